import threading
from pathlib import Path

import pytest

from gradflow.errors import RunError
from gradflow.store import load
from gradflow.store.directories import new_directory, resume
from gradflow.store.writer import RunWriter


def record(path, run_id="one", steps=(0,)):
    with RunWriter(path) as writer:
        writer.write_meta({"run_id": run_id})
        for step in steps:
            writer.append("steps", {"step": [step]})
            writer.flush()


def test_a_free_path_is_taken_as_it_is(tmp_path):
    assert new_directory(tmp_path / "gradflow") == str(tmp_path / "gradflow")
    assert new_directory(tmp_path) == str(tmp_path)  # it exists, and no run is in it


def test_other_files_in_the_way_do_not_make_a_directory_taken(tmp_path):
    (tmp_path / "hparams.yaml").write_text("a: 1")
    assert new_directory(tmp_path) == str(tmp_path)
    assert (tmp_path / "hparams.yaml").read_text() == "a: 1"


def test_a_run_is_never_touched_and_the_next_number_taken(tmp_path):
    for expected in ("gradflow", "gradflow-1", "gradflow-2"):
        path = new_directory(tmp_path / "gradflow")
        assert path == str(tmp_path / expected)
        record(path)


def test_a_run_that_has_only_begun_counts_as_there(tmp_path):
    RunWriter(tmp_path / "run").write_meta({})
    assert new_directory(tmp_path / "run") == str(tmp_path / "run-1")


def test_a_file_or_a_dangling_link_in_the_way_counts_as_taken(tmp_path):
    (tmp_path / "run").write_text("mine")
    (tmp_path / "run-1").symlink_to(tmp_path / "nowhere")
    assert new_directory(f"{tmp_path}/run/") == str(tmp_path / "run-2")
    assert (tmp_path / "run").read_text() == "mine"


def test_trainings_that_start_at_once_each_get_their_own(tmp_path):
    start, taken = threading.Barrier(8), []

    def claim():
        start.wait()
        taken.append(new_directory(tmp_path / "run"))

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(taken)) == 8


def test_force_removes_the_run_and_nothing_else(tmp_path):
    record(tmp_path, steps=range(3))
    (tmp_path / "report.html").write_text("old")
    (tmp_path / "steps" / "mine.txt").write_text("kept")
    (tmp_path / "weights.ckpt").write_text("kept")
    assert new_directory(tmp_path, force=True) == str(tmp_path)
    left = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert left == ["steps/mine.txt", "weights.ckpt"]
    record(tmp_path, steps=[9])
    assert load(tmp_path).steps == [9]


def test_a_place_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="expected a directory that can be written at .*file/run.*pass another path"):
        new_directory(tmp_path / "file" / "run")


def test_a_run_is_found_again_by_its_id_and_goes_on(tmp_path):
    base = tmp_path / "gradflow"
    for run_id in ("one", "two", "three"):
        record(new_directory(base), run_id)
    assert resume(base, "two") == f"{base}-1"
    record(resume(base, "two"), "two", steps=[0, 1])
    run = load(f"{base}-1")
    assert run.steps == [0, 1]
    assert sorted(p.name for p in Path(f"{base}-1/steps").iterdir()) == [f"rank-0-{n}.parquet" for n in range(3)]


def test_a_run_that_is_not_there_is_not_resumed(tmp_path):
    record(tmp_path / "run", "one")
    record(tmp_path / "nameless", "")
    assert resume(tmp_path / "run", "other") is None
    assert resume(tmp_path / "nameless", "") is None
    assert resume(tmp_path / "missing", "one") is None
    assert not (tmp_path / "missing").exists()


def test_a_broken_run_beside_does_not_hide_the_one_that_is_looked_for(tmp_path):
    base = tmp_path / "run"
    new_directory(base)  # claimed by a training that died before its first write
    record(new_directory(base), "two")
    (Path(f"{base}-1") / "run.json").write_text("{")
    record(new_directory(base), "three")
    assert resume(base, "three") == f"{base}-2"


def test_runs_behind_a_url_are_numbered_and_found_too(tmp_path):
    base = f"memory://{tmp_path.name}/run"
    for run_id in ("one", "two"):
        record(new_directory(base), run_id)
    assert resume(base, "two") == f"{base}-1"
    assert new_directory(base, force=True) == base
    assert resume(base, "one") is None
