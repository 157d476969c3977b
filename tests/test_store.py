import json
import os
import socket
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import gradflow
from gradflow.errors import GradflowError, RunError, SchemaVersionError, UsageError
from gradflow.metrics import DERIVED
from gradflow.schema import SCHEMA_VERSION, TABLES
from gradflow.store import Run, load, parts, storage
from gradflow.store.writer import RunWriter

META = {
    "run_id": "r1",
    "model": "Tiny",
    "world_size": 1,
    "branches": [
        {"name": "h.0", "join": "h.0/add", "module": "h.0", "kind": "identity", "occurrence": 0, "depth": 1,
         "placement": "pre-norm", "stream": "h"},
        {"name": "h.1", "join": "h.1/add", "module": "h.1", "kind": "projection", "occurrence": 0, "depth": 2,
         "placement": "post-norm", "stream": "h"},
    ],
    "streams": [{"name": "h", "kind": "stream", "points": ["input", "h.0", "h.1"], "nodes": [0, 3, 6], "exact": True}],
    "layers": [{"name": "fc", "module": "fc", "kind": "Linear", "occurrence": 0, "depth": 0}],
    "parameters": [
        {"name": "w", "shape": [2, 3], "dtype": "torch.float32", "requires_grad": True, "group": "0.1"},
        {"name": "frozen", "shape": [], "dtype": "torch.float32", "requires_grad": False, "group": None},
    ],
}  # fmt: skip


def write(path, *, flushes=2, meta=META):
    with RunWriter(path) as writer:
        writer.write_meta(meta)
        for step in range(flushes):
            writer.append("steps", {"step": [step], "loss": [1.0 / (step + 1)]})
            writer.append("branches", {"step": [step, step], "branch": ["h.1", "h.0"], "n": [4, 4],
                                       "skip_sq": [1.0, 4.0], "branch_sq": [1.0, 1.0]})  # fmt: skip
            writer.flush()
    return path


@pytest.fixture
def run_dir(tmp_path):
    return write(tmp_path / "run")


def part(path, table="branches", **columns):
    """Write a part file of any content beside the real ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def test_what_was_written_is_what_is_read(run_dir):
    run = gradflow.load(run_dir)
    assert run.problems == []
    assert run.path == str(run_dir)
    assert run.steps == [0, 1]
    assert run.meta["run_id"] == "r1"
    rows = run.table("branches").select(["step", "rank", "branch", "branch_ratio"]).to_pylist()
    assert rows == [
        {"step": 0, "rank": 0, "branch": "h.0", "branch_ratio": 0.5},
        {"step": 0, "rank": 0, "branch": "h.1", "branch_ratio": 1.0},
        {"step": 1, "rank": 0, "branch": "h.0", "branch_ratio": 0.5},
        {"step": 1, "rank": 0, "branch": "h.1", "branch_ratio": 1.0},
    ]


def test_records_come_back_as_they_were(run_dir):
    run = load(run_dir)
    assert [b.name for b in run.branches] == ["h.0", "h.1"]
    assert (run.branches[1].kind, run.branches[1].placement, run.branches[1].depth) == ("projection", "post-norm", 2)
    assert run.streams[0].points == ("input", "h.0", "h.1")
    assert run.streams[0].exact
    assert run.layers[0].kind == "Linear"
    assert run.parameters[0].shape == (2, 3)
    assert [p.group for p in run.parameters] == ["0.1", None]


def test_points_of_a_stream_are_in_the_order_of_the_stream():
    points = pa.table({"step": [0, 0, 0], "stream": ["h"] * 3, "point": ["h.1", "input", "h.0"], "out_sq": [3.0, 1, 2]})
    run = Run(META, {"streams": points})
    assert run.table("streams")["point"].to_pylist() == ["input", "h.0", "h.1"]
    assert run.table("streams")["out_sq"].to_pylist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("name", TABLES)
def test_a_table_without_rows_has_all_columns_in_plain_types(name):
    table = Run({}).table(name)
    assert table.num_rows == 0
    assert table.column_names == [c.name for c in (*TABLES[name], *DERIVED[name])]
    assert {str(t) for t in table.schema.types} <= {"int64", "double", "string"}


def test_tables_are_kept_and_the_run_does_not_change_with_them(run_dir):
    run = load(run_dir)
    assert run.table("branches") is run.table("branches")
    assert run.table("branches") is not run.table("branches", per_rank=True)


def test_an_unknown_table_is_named_together_with_the_known_ones():
    with pytest.raises(UsageError, match="expected one of the tables steps, branches.*got 'nope'"):
        Run({}).table("nope")


def test_a_run_in_memory_refuses_columns_that_are_not_of_its_table():
    with pytest.raises(UsageError, match="got also 'typo'"):
        Run({}, {"steps": pa.table({"step": [0], "typo": [1.0]})})


def test_missing_meta_has_sensible_values():
    run = Run({})
    assert (run.branches, run.layers, run.streams, run.parameters, run.steps, run.problems) == ([], [], [], [], [], [])
    assert run.meta["world_size"] == 1
    assert run.meta["stopped"] is None
    assert run.meta["config"] == {}


def test_odd_meta_is_named_and_the_rest_still_read():
    meta = {"world_size": 0, "config": [], "layers": "none",
            "branches": [{"name": "good"}, {"name": 3}, "text", {"name": "bad", "depth": "deep"}],
            "streams": [{"name": "s", "points": "abc"}], "parameters": [{"name": "p", "shape": [1.5]}]}  # fmt: skip
    run = Run(meta)
    assert [b.name for b in run.branches] == ["good"]
    assert run.meta["world_size"] == 1
    said = "\n".join(run.problems)
    for expected in ("world_size", "config", "layers should be a list", "branches[1]", "branches[2]", "branches[3]",
                     "streams[0]", "parameters[0]"):  # fmt: skip
        assert expected in said


def test_a_run_whose_training_has_recorded_nothing_yet_has_no_steps(tmp_path):
    RunWriter(tmp_path).write_meta(META)
    run = load(tmp_path)
    assert run.steps == []
    assert run.problems == []
    assert run.table("steps").num_rows == 0


def test_a_directory_without_a_run_says_what_was_expected(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(RunError, match=r"expected a run directory with a run.json, got no such file at .*; pass"):
            load(path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="expected a run directory"):
        load(tmp_path / "file")


@pytest.mark.parametrize(
    "text", ["", "{", "[1, 2]", '"text"', '{"schema_version": "new"}', '{"schema_version": true}', "[" * 100_000]
)
def test_a_broken_run_json_is_named(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(RunError, match=r"run\.json"):
        load(tmp_path)


def test_run_json_that_is_not_text_is_named(tmp_path):
    (tmp_path / "run.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RunError, match=r"run\.json"):
        load(tmp_path)


def test_a_newer_schema_is_refused_and_both_versions_named(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"schema_version": SCHEMA_VERSION + 6, "gradflow": "9.9"}))
    with pytest.raises(SchemaVersionError, match=rf"version {SCHEMA_VERSION} .*version {SCHEMA_VERSION + 6}.*9\.9"):
        load(tmp_path)
    assert issubclass(SchemaVersionError, GradflowError)


def test_a_truncated_part_is_left_out_and_named(run_dir):
    broken = run_dir / "branches" / "rank-0-1.parquet"
    broken.write_bytes(broken.read_bytes()[:-20])
    run = load(run_dir)
    assert run.table("branches")["step"].to_pylist() == [0, 0]
    assert len(run.problems) == 1
    assert "branches/rank-0-1.parquet left out" in run.problems[0]
    assert run.steps == [0, 1]  # the other table still has the step


@pytest.mark.parametrize(
    "damage", [b"", b"PAR1", b"not parquet at all", os.urandom(500)], ids=["empty", "magic", "text", "noise"]
)
def test_a_part_that_is_no_parquet_is_left_out_and_named(run_dir, damage):
    (run_dir / "steps" / "rank-0-7.parquet").write_bytes(damage)
    run = load(run_dir)
    assert run.table("steps")["step"].to_pylist() == [0, 1]
    assert "steps/rank-0-7.parquet" in run.problems[0]


def test_bytes_flipped_anywhere_in_a_part_never_raise(run_dir):
    path = run_dir / "branches" / "rank-0-1.parquet"
    whole = path.read_bytes()
    for position in range(0, len(whole), max(1, len(whole) // 150)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x5A]) + whole[position + 1 :])
        assert load(run_dir).table("branches").num_rows >= 2


FOREIGN = {
    "foreign column": ({"step": [0], "loss": [1.0], "secret": ["x"]}, "'secret'"),
    "no step": ({"loss": [1.0]}, "'step'"),
    "null step": ({"step": pa.array([None], pa.int64())}, "got null"),
    "text for a number": ({"step": [0], "loss": ["1.0"]}, "expected float64 in column 'loss', got string"),
    "float for a step": ({"step": [0.5]}, "expected int64"),
    "nested": ({"step": [0], "loss": [[1.0]]}, "expected float64"),
    "too big": ({"step": pa.array([2**63], pa.uint64())}, "rank-0-9.parquet"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_foreign_part_is_left_out_and_its_reason_named(run_dir, case):
    columns, said = FOREIGN[case]
    part(run_dir / "steps" / "rank-0-9.parquet", **columns)
    run = load(run_dir)
    assert run.table("steps")["step"].to_pylist() == [0, 1]
    assert len(run.problems) == 1
    assert "steps/rank-0-9.parquet left out" in run.problems[0]
    assert said in run.problems[0]


def test_narrower_numbers_of_another_writer_are_read(run_dir):
    part(run_dir / "steps" / "rank-1-0.parquet", step=pa.array([5], pa.int32()), loss=pa.array([0.5], pa.float32()))
    run = load(run_dir)
    assert run.steps == [0, 1, 5]
    assert run.table("steps", per_rank=True)["rank"].to_pylist() == [0, 0, 1]
    assert run.table("steps")["loss"].to_pylist()[-1] == 0.5


def test_a_column_that_an_older_writer_lacked_is_null_and_named_once(run_dir):
    for number in (5, 6):
        part(run_dir / "branches" / f"rank-0-{number}.parquet", step=[number], branch=["h.0"])
    run = load(run_dir)
    assert run.table("branches")["n"].to_pylist() == [4, 4, 4, 4, None, None]
    notes = [p for p in run.problems if "column n " in p]
    assert notes == ["branches: column n is missing in 2 of 4 parts, read as null"]


def test_other_files_in_a_table_are_named_and_temporary_ones_passed_over(run_dir):
    (run_dir / "steps" / "notes.txt").write_text("hello")
    (run_dir / "steps" / "rank-0-01.parquet").write_text("leading zero")
    (run_dir / "steps" / ".rank-0-3.parquet.abc.tmp").write_text("half a part")
    problems = load(run_dir).problems
    assert problems == [
        "steps/'notes.txt' left out: not the name of a part",
        "steps/'rank-0-01.parquet' left out: not the name of a part",
    ]


def test_links_are_not_followed(run_dir, tmp_path):
    outside = write(tmp_path / "outside", flushes=5)
    (run_dir / "steps" / "rank-0-8.parquet").symlink_to(outside / "steps" / "rank-0-4.parquet")
    (run_dir / "layers").symlink_to(outside / "steps")
    run = load(run_dir)
    assert run.steps == [0, 1]
    assert any("steps/rank-0-8.parquet left out" in p for p in run.problems)
    assert any(p.startswith("layers: left out") for p in run.problems)


def test_a_linked_run_json_is_refused(run_dir, tmp_path):
    (tmp_path / "elsewhere.json").write_text("{}")
    (run_dir / "run.json").unlink()
    (run_dir / "run.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(RunError, match="expected a regular, readable file at .*run.json"):
        load(run_dir)


def test_fifos_sockets_and_folders_in_place_of_parts_do_not_hang_the_reader(run_dir, monkeypatch):
    os.mkfifo(run_dir / "steps" / "rank-0-5.parquet")
    (run_dir / "steps" / "rank-0-6.parquet").mkdir()
    with socket.socket(socket.AF_UNIX) as sock:
        monkeypatch.chdir(run_dir / "steps")  # the path of a socket must be short
        sock.bind("rank-0-7.parquet")
        run = load(run_dir)
    assert run.steps == [0, 1]
    assert len(run.problems) == 3


def test_a_fifo_in_place_of_run_json_does_not_hang_the_reader(tmp_path):
    os.mkfifo(tmp_path / "run.json")
    with pytest.raises(RunError, match="regular"):
        load(tmp_path)


def test_a_file_in_place_of_a_table_is_named(run_dir):
    (run_dir / "layers").write_text("no folder")
    assert any(p.startswith("layers: left out") for p in load(run_dir).problems)


def test_a_part_that_promises_too_many_rows_is_refused_before_it_is_decoded(run_dir, monkeypatch):
    monkeypatch.setattr(parts, "MAX_ROWS", 3)
    part(run_dir / "steps" / "rank-0-5.parquet", step=list(range(10)))
    run = load(run_dir)
    assert run.steps == [0, 1]
    assert any("rank-0-5.parquet left out: expected at most 3 rows" in p for p in run.problems)


def test_names_that_are_no_unicode_do_not_reach_a_table(run_dir):
    bad = pa.array([b"\xff\xfe"], pa.binary()).view(pa.string())
    part(run_dir / "branches" / "rank-0-9.parquet", step=[9], branch=bad)
    run = load(run_dir)
    assert run.steps == [0, 1]
    assert any("rank-0-9.parquet left out" in p for p in run.problems)


def test_a_later_part_wins_where_a_step_was_recorded_twice(run_dir):
    part(run_dir / "steps" / "rank-0-9.parquet", step=[1, 2], loss=[7.0, 8.0])
    part(run_dir / "steps" / "rank-0-10.parquet", step=[2], loss=[9.0])
    run = load(run_dir)
    assert run.table("steps")["step"].to_pylist() == [0, 1, 2]
    assert run.table("steps")["loss"].to_pylist() == [1.0, 7.0, 9.0]


def test_a_step_recorded_again_keeps_nothing_of_the_first_record(run_dir):
    part(run_dir / "branches" / "rank-0-9.parquet", step=[1], branch=["h.0"], n=[99])
    rows = load(run_dir).table("branches").select(["step", "branch", "n"]).to_pylist()
    assert rows[2:] == [{"step": 1, "branch": "h.0", "n": 99}]


def test_ranks_do_not_replace_each_other(tmp_path):
    for rank in (1, 0):
        with RunWriter(tmp_path, rank=rank) as writer:
            writer.write_meta({**META, "world_size": 2})
            writer.append("branches", {"step": [3], "branch": ["h.0"], "skip_sq": [1.0 + rank], "grad_out_sq": [4.0]})
    run = load(tmp_path)
    assert run.table("branches")["skip_sq"].to_pylist() == [3.0]
    assert run.table("branches")["grad_out_sq"].to_pylist() == [2.0]
    assert run.table("branches", per_rank=True)["skip_sq"].to_pylist() == [1.0, 2.0]


def test_a_listing_overtaken_by_a_merge_is_tried_again(run_dir, monkeypatch):
    original = storage.LocalStorage.open
    overtaken = []

    def opened(self, name):
        if name == "branches/rank-0-0.parquet" and not overtaken:
            overtaken.append(name)
            both = pq.read_table(run_dir / "branches" / "rank-0-0.parquet", partitioning=None)
            both = pa.concat_tables([both, pq.read_table(run_dir / "branches" / "rank-0-1.parquet", partitioning=None)])
            pq.write_table(both, run_dir / "branches" / "rank-0-1.parquet")
            (run_dir / "branches" / "rank-0-0.parquet").unlink()
        return original(self, name)

    monkeypatch.setattr(storage.LocalStorage, "open", opened)
    run = load(run_dir)
    assert overtaken
    assert run.problems == []
    assert run.table("branches")["step"].to_pylist() == [0, 0, 1, 1]


def test_a_part_that_vanishes_for_good_is_named_in_the_end(run_dir, monkeypatch):
    original = storage.LocalStorage.open

    def opened(self, name):
        if name == "steps/rank-0-1.parquet":
            raise FileNotFoundError(name)
        return original(self, name)

    monkeypatch.setattr(storage.LocalStorage, "open", opened)
    run = load(run_dir)
    assert run.table("steps")["step"].to_pylist() == [0]
    assert any("rank-0-1.parquet" in p for p in run.problems)


@pytest.mark.parametrize("scheme", ["file://", "local://"])
def test_a_file_url_is_the_local_folder(run_dir, scheme):
    assert load(f"{scheme}{run_dir}").steps == [0, 1]


def test_the_notebook_view_is_escaped():
    run = Run({"model": "<script>alert(1)</script>", "stopped": {"step": 3, "error": "<b>"}})
    html = run._repr_html_()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "&lt;b&gt;" in html
    assert repr(run).startswith("Run(model=")


def test_the_repr_says_how_much_there_is(run_dir):
    assert "steps='2 (0 to 1)'" in repr(load(run_dir))
    assert "branches='2'" in repr(load(run_dir))


def test_a_table_is_a_frame_of_pandas_or_polars_in_one_call(run_dir):
    polars, pandas = map(pytest.importorskip, ("polars", "pandas"))
    run = load(run_dir)
    frames = run.pandas("branches"), run.polars("branches")
    assert (type(frames[0]), type(frames[1])) == (pandas.DataFrame, polars.DataFrame)
    for frame in frames:
        assert list(frame.columns) == run.table("branches").column_names
        assert list(frame["branch_ratio"]) == run.table("branches")["branch_ratio"].to_pylist()
    assert list(run.pandas("branches", per_rank=True)["rank"]) == run.table("branches", per_rank=True)["rank"].to_pylist()


@pytest.mark.parametrize("package", ["pandas", "polars"])
def test_a_library_that_is_missing_is_named_with_the_way_to_get_it(run_dir, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(GradflowError, match=f"expected {package} to be installed.* run: pip install {package}"):
        getattr(load(run_dir), package)("branches")


def test_a_run_plots_itself(run_dir):
    figure = load(run_dir).plot()
    assert any(ax.get_ylabel() == "branch RMS / skip RMS" for ax in figure.axes)


def test_other_readers_take_the_folder_as_it_is(run_dir):
    duckdb, polars, pandas = map(pytest.importorskip, ("duckdb", "polars", "pandas"))
    (run_dir / ".branches.rank-0-3.parquet.abc.tmp").write_text("what a kill left behind")
    folder = str(run_dir / "branches")
    query = (
        f"SELECT branch, count(*), sum(skip_sq) FROM read_parquet('{folder}/*.parquet') GROUP BY branch ORDER BY branch"
    )
    assert duckdb.sql(query).fetchall() == [("h.0", 2, 8.0), ("h.1", 2, 2.0)]
    frame = polars.read_parquet(f"{folder}/*.parquet")
    assert frame["branch"].to_list() == ["h.1", "h.0", "h.1", "h.0"]
    assert polars.read_parquet(folder).height == 4
    assert pandas.read_parquet(folder)["skip_sq"].tolist() == [1.0, 4.0, 1.0, 4.0]
    assert pq.read_table(folder).num_rows == 4


@pytest.mark.slow
def test_five_million_rows_are_written_read_and_derived_in_seconds(tmp_path):
    branches, names = 1000, [f"transformer.h.{i}.attn" for i in range(1000)]
    values = np.random.default_rng(0).random(branches)
    floats = {c.name: values for c in TABLES["branches"] if c.type == "float64"}
    with RunWriter(tmp_path) as writer:
        writer.write_meta({"branches": [{"name": name} for name in names]})
        for step in range(5000):
            writer.append("branches", {"step": [step] * branches, "branch": names, **floats})
            if step % 20 == 19:
                writer.flush()
    start = time.monotonic()
    table = load(tmp_path).table("branches")
    assert time.monotonic() - start < 15
    assert table.num_rows == 5_000_000
    assert table["branch"][:2].to_pylist() == names[:2]
    assert len(list((tmp_path / "branches").iterdir())) <= 64
