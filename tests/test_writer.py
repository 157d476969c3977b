import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from gradflow.errors import RunError, UsageError
from gradflow.schema import SCHEMA_VERSION, TABLES
from gradflow.store import load, parts, storage
from gradflow.store.writer import FANIN, RunWriter, mergeable

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def flush(writer, step, *, names=("a", "b"), value=1.0):
    writer.append("branches", {"step": [step] * len(names), "branch": list(names), "skip_sq": [value] * len(names)})
    writer.flush()


def listing(path):
    return sorted(item.name for item in path.iterdir())


def numbers(path, table="branches"):
    return [part.number for part in parts.list_parts(storage.open_storage(path), table)[0]]


def test_nothing_is_created_before_the_first_write(tmp_path):
    with RunWriter(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()


def test_a_flush_writes_one_part_a_table_and_leaves_no_temporary_file(tmp_path):
    with RunWriter(tmp_path, rank=3) as writer:
        writer.append("steps", {"step": [0]})
        writer.append("branches", {"step": [0], "branch": ["a"]})
        writer.append("branches", {"step": [1], "branch": ["a"]})
        writer.flush()
        writer.flush()
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert files == ["branches/rank-3-0.parquet", "steps/rank-3-0.parquet"]
    assert pq.read_table(tmp_path / "branches" / "rank-3-0.parquet", partitioning=None)["rank"].to_pylist() == [3, 3]


def test_what_is_buffered_is_written_at_close(tmp_path):
    writer = RunWriter(tmp_path)
    writer.append("steps", {"step": [7]})
    writer.close()
    writer.close()
    assert numbers(tmp_path, "steps") == [0]


def test_run_json_is_replaced_as_a_whole_and_by_the_rank_that_writes_it_only(tmp_path):
    writer = RunWriter(tmp_path)
    writer.write_meta({"model": "first", "branches": ["x"] * 1000})
    writer.write_meta({"model": "second", "shape": (2, 3), "lr": float("inf"), "n": np.int64(4), "r": np.float32(0.5)})
    RunWriter(tmp_path, rank=1).write_meta({"model": "other rank"})
    assert json.loads((tmp_path / "run.json").read_text()) == {
        "schema_version": SCHEMA_VERSION, "model": "second", "shape": [2, 3], "lr": None, "n": 4, "r": 0.5,
    }  # fmt: skip
    assert listing(tmp_path) == ["run.json"]


def test_names_of_any_script_survive_and_broken_ones_do_not_stop_recording(tmp_path):
    names = ["层归一化·🙂", "line\nbreak", "lone\ud800surrogate"]
    with RunWriter(tmp_path) as writer:
        writer.write_meta({"branches": [{"name": name} for name in names]})
        flush(writer, 0, names=names[::-1])
    run = load(tmp_path)
    assert run.table("branches")["branch"].to_pylist() == [*names[:2], "lone?surrogate"]
    assert [b.name for b in run.branches] == [*names[:2], "lone?surrogate"]


@pytest.mark.parametrize(
    ("table", "columns"),
    [
        ("nope", {"step": [0]}),
        ("steps", {"step": [0], "nope": [1.0]}),
        ("steps", {"step": [0, 1], "loss": [1.0]}),
        ("steps", {"step": [0], "loss": ["high"]}),
        ("steps", {"loss": [1.0]}),
        ("steps", {"step": [None]}),
    ],
)
def test_rows_that_do_not_fit_are_refused_at_once_and_not_buffered(tmp_path, table, columns):
    with RunWriter(tmp_path / "run") as writer, pytest.raises(UsageError, match="expected"):
        writer.append(table, columns)
    assert not (tmp_path / "run").exists()


def test_arrays_lists_and_nulls_are_taken_alike(tmp_path):
    with RunWriter(tmp_path) as writer:
        writer.write_meta({})
        writer.append(
            "steps", {"step": np.array([0, 1]), "loss": [float("nan"), None], "microbatches": np.array([1.0, 2.0])}
        )
    rows = load(tmp_path).table("steps").to_pylist()
    assert np.isnan(rows[0]["loss"])
    assert rows[1]["loss"] is None
    assert [row["microbatches"] for row in rows] == [1, 2]


def test_a_writer_goes_on_with_the_numbers_of_the_one_before(tmp_path):
    for step in range(3):
        with RunWriter(tmp_path) as writer:
            flush(writer, step)
    with RunWriter(tmp_path, rank=1) as writer:
        flush(writer, 0)
    assert listing(tmp_path / "branches") == [
        "rank-0-0.parquet", "rank-0-1.parquet", "rank-0-2.parquet", "rank-1-0.parquet",
    ]  # fmt: skip


@pytest.mark.parametrize("flushes", [16, 17, 256, 300])
def test_many_flushes_leave_few_parts_and_every_row_once(tmp_path, flushes):
    most = 0
    with RunWriter(tmp_path) as writer:
        writer.write_meta({})
        for step in range(flushes):
            flush(writer, step, value=float(step))
            most = max(most, len(numbers(tmp_path)))
    assert most <= 64
    digits, rest = 0, flushes
    while rest:
        digits, rest = digits + rest % FANIN, rest // FANIN
    assert len(numbers(tmp_path)) == digits
    run = load(tmp_path)
    assert run.problems == []
    assert run.table("branches")["skip_sq"].to_pylist() == [float(step) for step in range(flushes) for _ in "ab"]
    whole = pq.read_table(tmp_path / "branches")  # other readers count nothing twice either
    assert whole.num_rows == 2 * flushes


def test_flushes_past_the_fourth_size_still_leave_at_most_64_parts():
    held, most = [], 0
    for number in range(FANIN**4 + 5000):
        held.append(number)
        while run := mergeable(held):
            first, last = run
            held[first:last] = held[last - 1 : last]
        most = max(most, len(held))
    assert 16 <= most <= 61


def test_parts_of_odd_sizes_are_merged_as_well_when_there_are_too_many():
    held = list(np.cumsum([1, 20, 300] * 25) - 1)
    first, last = mergeable(held)
    assert last - first == FANIN
    assert mergeable(held[:60]) is None


def test_merging_keeps_the_later_record_of_a_step(tmp_path):
    with RunWriter(tmp_path) as writer:
        writer.write_meta({})
        for flushed in range(FANIN):
            flush(writer, flushed % 4, value=float(flushed))
    assert numbers(tmp_path) == [FANIN - 1]
    assert pq.read_table(tmp_path / "branches").num_rows == 8
    assert load(tmp_path).table("branches")["skip_sq"].to_pylist() == [12.0] * 2 + [13.0] * 2 + [14.0] * 2 + [15.0] * 2


class Killed(BaseException):
    """Stands for a kill: nothing of ours handles it."""


@pytest.mark.parametrize("kills_at", ["before the rename", *range(FANIN - 1)])
def test_a_kill_at_any_moment_of_a_merge_loses_and_doubles_nothing(tmp_path, monkeypatch, kills_at):
    writer = RunWriter(tmp_path)
    writer.write_meta({})
    for step in range(FANIN - 1):
        flush(writer, step, value=float(step))
    removed = []

    def remove(self, name):
        if len(removed) == kills_at:
            raise Killed
        removed.append(name)
        (self.root / name).unlink()

    def write_rows(file, tables):
        tables = list(tables)
        if len(tables) > 1:
            raise Killed
        original(file, tables)

    original = parts.write_rows
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(storage.LocalStorage, "remove", remove)
        if kills_at == "before the rename":
            patch.setattr(parts, "write_rows", write_rows)
        flush(writer, FANIN - 1, value=float(FANIN - 1))
    expected = [float(step) for step in range(FANIN) for _ in "ab"]
    run = load(tmp_path)
    assert run.table("branches")["skip_sq"].to_pylist() == expected
    assert run.problems == []
    with RunWriter(tmp_path) as later:  # and the next training tidies up
        for step in range(FANIN, 2 * FANIN):
            flush(later, step, value=float(step))
    expected += [float(step) for step in range(FANIN, 2 * FANIN) for _ in "ab"]
    assert load(tmp_path).table("branches")["skip_sq"].to_pylist() == expected
    assert len(numbers(tmp_path)) <= FANIN


def test_a_broken_part_is_neither_merged_nor_removed(tmp_path):
    with RunWriter(tmp_path) as writer:
        writer.write_meta({})
        for step in range(5):
            flush(writer, step)
    broken = tmp_path / "branches" / "rank-0-3.parquet"
    broken.write_bytes(b"broken")
    with RunWriter(tmp_path) as writer:
        for step in range(5, 20):
            flush(writer, step)
    assert broken.read_bytes() == b"broken"
    run = load(tmp_path)
    assert run.table("branches")["step"].unique().to_pylist() == [0, 1, 2, *range(4, 20)]
    assert [p for p in run.problems if "rank-0-3.parquet" in p] == run.problems


def test_a_broken_last_part_is_not_written_over(tmp_path):
    with RunWriter(tmp_path) as writer:
        flush(writer, 0)
    broken = tmp_path / "branches" / "rank-0-9.parquet"
    broken.write_bytes(b"broken")
    with RunWriter(tmp_path) as writer:
        for step in range(20):
            flush(writer, step)
    assert broken.read_bytes() == b"broken"


@pytest.mark.parametrize("branches", [2, 12, 100])
def test_a_row_costs_at_most_250_bytes(tmp_path, branches):
    rng = np.random.default_rng(0)
    names = [f"transformer.encoder.layers.{i}.self_attention" for i in range(branches)]
    with RunWriter(tmp_path) as writer:
        for step in range(20):
            for table, key in (("branches", "branch"), ("parameters", "parameter"), ("layers", "layer")):
                floats = {c.name: rng.lognormal(size=branches) for c in TABLES[table] if c.type == "float64"}
                counts = {
                    c.name: rng.integers(0, 10**6, branches)
                    for c in TABLES[table]
                    if c.merge == "sum" and c.type == "int64"
                }
                writer.append(table, {"step": [step] * branches, key: names, **floats, **counts})
            writer.append(
                "steps", {"step": [step], **{c.name: rng.random(1) for c in TABLES["steps"] if c.type == "float64"}}
            )
    for table in ("branches", "parameters", "layers", "steps"):
        rows = 20 * (1 if table == "steps" else branches)
        assert (tmp_path / table / "rank-0-0.parquet").stat().st_size <= 250 * rows, table


def test_parts_are_zstd_with_names_as_a_dictionary_and_plain_types(tmp_path):
    with RunWriter(tmp_path) as writer:
        flush(writer, 0)
    file = pq.ParquetFile(tmp_path / "branches" / "rank-0-0.parquet")
    assert {str(t) for t in file.schema_arrow.types} == {"int64", "double", "string"}
    columns = {c.path_in_schema: c for c in map(file.metadata.row_group(0).column, range(file.metadata.num_columns))}
    assert {c.compression for c in columns.values()} == {"ZSTD"}
    assert columns["branch"].has_dictionary_page
    assert columns["step"].statistics.max == 0


def test_a_disk_that_is_full_is_a_run_error_and_what_was_buffered_stays(tmp_path, monkeypatch):
    writer = RunWriter(tmp_path)
    writer.write_meta({})
    writer.append("steps", {"step": [0]})

    def full(file, tables):
        file.write(b"half a part")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(parts, "write_rows", full)
        with pytest.raises(
            RunError, match=r"expected to write steps/rank-0-0.parquet .*No space left on device.*; make room"
        ):
            writer.flush()
    assert listing(tmp_path) == ["run.json", "steps"]
    writer.flush()
    assert load(tmp_path).steps == [0]


def test_a_place_that_cannot_be_written_is_a_run_error(tmp_path):
    (tmp_path / "file").write_text("")
    writer = RunWriter(tmp_path / "file" / "run")
    with pytest.raises(RunError, match="expected to write run.json in the run directory"):
        writer.write_meta({})
    writer.append("steps", {"step": [0]})
    with pytest.raises(RunError, match="expected to write steps"):
        writer.flush()


def test_a_run_can_live_behind_a_url(tmp_path):
    url = f"memory://runs/{tmp_path.name}"
    with RunWriter(url) as writer:
        writer.write_meta({"run_id": "x"})
        for step in range(20):
            flush(writer, step)
    run = load(url)
    assert run.path == url
    assert run.steps == list(range(20))
    assert run.table("branches").num_rows == 40
    assert numbers(url) == [15, 16, 17, 18, 19]
    with pytest.raises(RunError, match="expected a run directory"):
        load(url + "/missing")


def test_a_file_url_is_written_as_a_local_folder(tmp_path):
    with RunWriter(f"file://{tmp_path}/run") as writer:
        writer.write_meta({})
        flush(writer, 0)
    assert load(tmp_path / "run").steps == [0]


WRITE_FOR_EVER = """
import sys
from gradflow.store.writer import RunWriter
writer = RunWriter(sys.argv[1])
writer.write_meta({"run_id": "killed"})
names = [f"h.{i}" for i in range(200)]
step = 0
while True:
    writer.append("branches", {"step": [step] * 200, "branch": names, "skip_sq": [float(step)] * 200})
    writer.flush()
    print(step, flush=True)
    step += 1
"""


def test_what_was_flushed_survives_kill_9_and_a_reader_beside_the_writer(tmp_path):
    command = [sys.executable, "-c", WRITE_FOR_EVER, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=ENVIRONMENT)
    flushed = -1
    deadline = time.monotonic() + 60
    try:
        while flushed < 40 and time.monotonic() < deadline:
            flushed = int(process.stdout.readline())
            if flushed % 8 == 0:  # parts are merged while we read
                run = load(tmp_path)
                assert run.problems == []
                steps = run.table("branches")["step"].to_pylist()
                assert steps == [step for step in range(steps[-1] + 1) for _ in range(200)]
                assert steps[-1] >= flushed
    finally:
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split()
        process.wait()
        process.stdout.close()
    flushed = int(rest[-1]) if rest else flushed
    assert flushed >= 40
    run = load(tmp_path)
    assert run.problems == []
    steps = run.table("branches")["step"].to_pylist()
    assert steps[-1] >= flushed
    assert steps == [step for step in range(steps[-1] + 1) for _ in range(200)]
    assert run.table("branches")["skip_sq"].to_pylist() == [float(step) for step in steps]
    assert set(pq.read_table(tmp_path / "branches")["step"].to_pylist()) == set(steps)
    with RunWriter(tmp_path) as writer:  # going on sweeps up what the kill left
        (tmp_path / ".branches.rank-0-77.parquet.deadbeef.tmp").write_bytes(b"half")
        (tmp_path / ".branches.rank-01-7.parquet.deadbeef.tmp").write_bytes(b"of another rank")
        flush(writer, steps[-1] + 1, names=["h.0"])
    assert [name for name in listing(tmp_path) if name.endswith(".tmp")] == [".branches.rank-01-7.parquet.deadbeef.tmp"]


MERGE_AND_MEASURE = """
import sys
import pyarrow as pa
from gradflow.store.writer import RunWriter
with RunWriter(sys.argv[1]) as writer:
    writer.append("branches", {"step": [10**9], "branch": ["b"]})
print(pa.default_memory_pool().max_memory())
"""


def test_a_merge_does_not_hold_all_its_parts_in_memory(tmp_path):
    steps, names = 1000, [f"h.{i}" for i in range(100)]
    rows = steps * len(names)
    with RunWriter(tmp_path) as writer:
        for number in range(FANIN - 1):
            values = np.random.default_rng(number).random(rows)
            step = np.repeat(np.arange(steps) + number * steps, len(names))
            writer.append("branches", {"step": step, "branch": names * steps, "skip_sq": values, "dot": values})
            writer.flush()
    command = [sys.executable, "-c", MERGE_AND_MEASURE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=ENVIRONMENT)
    assert numbers(tmp_path) == [FANIN - 1]
    everything = FANIN * rows * len(TABLES["branches"]) * 8
    assert int(done.stdout) < everything / 2
