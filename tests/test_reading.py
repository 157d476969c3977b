"""Large tables are not held in memory: columns are read when they are asked for, and stay those of the run as loaded."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import huge
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gradflow.errors import GradflowError, UsageError
from gradflow.schema import TABLES
from gradflow.store import Run, load, parts, reading
from gradflow.store.writer import RunWriter


@pytest.fixture
def large(monkeypatch, tmp_path):
    """A run of two ranks whose tables count as large, and the same run read whole."""
    with contextlib.ExitStack() as stack:
        for rank in (0, 1):
            writer = stack.enter_context(RunWriter(tmp_path, rank=rank))
            if rank == 0:
                writer.write_meta({"world_size": 2, "branches": [{"name": name} for name in ("a", "b")]})
            for step in range(6):
                sums = {c.name: [step + 1.0 + rank, step + 3.0] for c in TABLES["branches"] if c.type == "float64"}
                writer.append("branches", {"step": [step] * 2, "branch": ["b", "a"], "n": [4, 4], **sums})
                writer.flush()
    whole = load(tmp_path)
    monkeypatch.setattr(reading, "WHOLE", 0)
    monkeypatch.setattr("gradflow.store.run.WHOLE", 0)
    return load(tmp_path), whole


@pytest.mark.parametrize("per_rank", [False, True])
def test_columns_of_a_large_table_are_those_of_the_table(large, per_rank):
    run, whole = large
    table = whole.table("branches", per_rank=per_rank)
    for names in (["branch", "gain"], ["cosine"], ["step", "rank", "branch", "out_max", "grad_fork_sq"]):
        got = run.columns("branches", names, per_rank=per_rank)
        assert got.to_pydict() == table.select(names).to_pydict()
    late = run.columns("branches", ["step", "branch", "gain"], per_rank=per_rank, since=4)
    assert late.to_pylist() == [row for row in table.select(["step", "branch", "gain"]).to_pylist() if row["step"] >= 4]
    assert run.table("branches", per_rank=per_rank).to_pydict() == table.to_pydict()
    assert run.steps == whole.steps == list(range(6))
    assert run.problems == []


def test_a_large_table_that_is_merged_and_goes_on_growing_reads_as_it_was_loaded(large):
    run, whole = large
    before = whole.table("branches").select(["step", "branch", "gain"]).to_pylist()
    folder = Path(run.path) / "branches"
    for rank in (0, 1):
        old = sorted(folder.glob(f"rank-{rank}-*.parquet"), key=lambda path: int(path.stem.split("-")[2]))
        rows = pa.concat_tables([pq.read_table(path, partitioning=None) for path in old])
        later = rows.slice(0, 2).set_column(rows.column_names.index("step"), "step", [[90, 90]])
        pq.write_table(pa.concat_tables([rows, later]), folder / f"rank-{rank}-77.parquet")
        for path in old:
            path.unlink()
    assert run.columns("branches", ["step", "branch", "gain"]).to_pylist() == before
    assert run.steps == list(range(6))


def test_a_large_table_whose_rows_are_replaced_says_so(large):
    run, _ = large
    parts = list((Path(run.path) / "branches").glob("*.parquet"))
    rows = pq.read_table(parts[0], partitioning=None).slice(0, 1)
    for path in parts:
        path.unlink()
    pq.write_table(rows, parts[0].with_name("rank-0-99.parquet"))
    with pytest.raises(GradflowError, match="load the run again"):
        run.columns("branches", ["gain"])


def test_a_part_of_a_large_table_that_breaks_later_is_null_there_and_named(large, monkeypatch):
    run, whole = large
    real = parts.read_part

    def broken(storage, table, part, *, only=None, **options):
        if part.rank == 1 and only is not None and "grad_fork_sq" in only:
            raise OSError("bad page")
        return real(storage, table, part, only=only, **options)

    monkeypatch.setattr(parts, "read_part", broken)
    got = run.columns("branches", ["step", "gain"], per_rank=True)
    expected = whole.table("branches", per_rank=True)
    assert [value is None for value in got["gain"].to_pylist()] == [rank == 1 for rank in expected["rank"].to_pylist()]
    assert all("left out: bad page" in problem for problem in run.problems)
    assert len(run.problems) == len(set(run.problems)) > 0


def test_columns_that_do_not_exist_are_refused_with_the_list():
    with pytest.raises(UsageError, match=r"expected columns of branches: .*gain.*; got 'gian'"):
        Run({}).columns("branches", ["gian"])


COST = """
import json, resource, sys, time
began = time.perf_counter()
sys.argv = ["gradflow", *sys.argv[1:]]
from gradflow.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
used = resource.getrusage(resource.RUSAGE_SELF)
unit = 1 if sys.platform == "darwin" else 1024
cost = {"wall_s": time.perf_counter() - began, "cpu_s": used.ru_utime + used.ru_stime, "peak_bytes": used.ru_maxrss * unit}
print(json.dumps(cost))
"""


def cost_of(*arguments):
    """Seconds and bytes that a command takes in a process of its own."""
    done = subprocess.run([sys.executable, "-c", COST, *map(str, arguments)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_thousand_branches_at_five_thousand_steps_are_reported_in_half_a_minute_and_two_gigabytes(tmp_path):
    run, page = tmp_path / "run", tmp_path / "report.html"
    # In a process of its own: a child's peak begins at what its parent holds.
    subprocess.run([sys.executable, huge.__file__, run], check=True)
    for command in (["report", run, "-o", page], ["check", run]):
        cost = cost_of(*command)
        print(command[0], cost)
        assert cost["peak_bytes"] < 2e9
        assert min(cost["wall_s"], cost["cpu_s"]) < 30  # on a machine that is busy, the time of our own
    assert page.stat().st_size < 5e6
