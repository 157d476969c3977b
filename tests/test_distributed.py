"""Several ranks as real processes on this machine: what they record together is what one process records alone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import gradflow

HERE = Path(__file__).parent
TOGETHER = ["ddp", "unused", "accumulated", "plain_ddp", "plain_fsdp", "fully_shard", "model_parallel", "tensor_parallel"]


def launch(cases: list[str], root: Path, world: int) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, str(HERE / "ranks.py"), ",".join(cases), str(root), str(rank), str(world), str(port)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip


def finish(processes: list[subprocess.Popen], seconds: float = 150) -> list[SimpleNamespace]:
    done = []
    try:
        for process in processes:
            try:
                text = process.communicate(timeout=seconds)[0]
            except subprocess.TimeoutExpired:
                process.kill()
                text = process.communicate()[0]
            done.append(SimpleNamespace(code=process.returncode, text=text))
    finally:
        for process in processes:
            process.kill()
    return done


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """All comparable cases, trained by one process and by two."""
    root = tmp_path_factory.mktemp("ranks")
    started = [launch(TOGETHER, root / "one", 1), launch(TOGETHER, root / "two", 2)]
    for processes in started:
        done = finish(processes)
        report = "\n\n".join(process.text[-2500:] for process in done)
        assert [process.code for process in done] == [0] * len(done), report
        assert all(process.text.count("done") == len(TOGETHER) for process in done), report
    return root


SUMS = {
    "branches": ["n", "skip_sq", "branch_sq", "dot", "out_sq", "out_max", "nonfinite", "grad_out_sq", "grad_fork_sq", "grad_branch_sq", "grad_dot"],
    "layers": ["n", "out_sum", "out_sq", "out_max", "grad_out_sq"],
    "parameters": ["n", "weight_sq", "grad_sq", "grad_max", "nonfinite", "update_sq"],
    "streams": ["n", "out_sq", "grad_sq"],
    "steps": ["microbatches", "loss", "grad_norm", "learning_rate"],
}  # fmt: skip
KEYS = {"branches": ("branch",), "layers": ("layer",), "parameters": ("parameter",), "streams": ("stream", "point"), "steps": ()}


@pytest.mark.parametrize("case", [case for case in TOGETHER if case != "tensor_parallel"])
def test_two_ranks_record_what_one_process_records(case, root):
    one, two = (gradflow.load(root / world / case / "gradflow") for world in ("one", "two"))
    assert two.meta["world_size"] == 2
    assert [b.name for b in two.branches] == [b.name for b in one.branches]
    assert two.problems == one.problems == []
    for table, columns in SUMS.items():
        if table == "layers" and "fsdp" in case:
            continue  # the wrapped module's output is a view of another shape
        names = lambda run: [tuple(row[key] for key in ("step", *KEYS[table])) for row in run.table(table).to_pylist() if row.get("depth") != 0]
        assert names(two) == names(one), table  # wrappers hand the stream's start on, and with it the name of that point
        for column in columns:
            expected, found = (run.table(table)[column].to_pylist() for run in (one, two))
            assert found == [None if x is None else pytest.approx(x, rel=2e-3, abs=1e-4 if column == "out_sum" else 1e-9) for x in expected], (table, column)


def test_every_rank_writes_its_own_parts(root):
    run = gradflow.load(root / "two" / "ddp" / "gradflow")
    assert set(run.table("branches", per_rank=True)["rank"].to_pylist()) == {0, 1}
    assert set(run.table("parameters", per_rank=True)["rank"].to_pylist()) == {0}
    sharded = gradflow.load(root / "two" / "fully_shard" / "gradflow")
    assert set(sharded.table("parameters", per_rank=True)["rank"].to_pylist()) == {0, 1}
    assert {part.name.split("-")[1] for part in (root / "two" / "ddp" / "gradflow" / "layers").iterdir()} == {"0", "1"}


def test_global_norm_of_shards_is_the_root_of_their_squares(root):
    run = gradflow.load(root / "two" / "plain_fsdp" / "gradflow")
    for step, norm in zip(run.steps, run.table("steps")["grad_norm"].to_pylist(), strict=True):
        squares = [row["grad_sq"] for row in run.table("parameters").to_pylist() if row["step"] == step]
        assert norm == pytest.approx(sum(squares) ** 0.5)
    parts = run.table("steps", per_rank=True).to_pylist()
    assert len({row["grad_norm"] for row in parts}) > len(run.steps)


def test_tensor_parallel_parameters_are_counted_once(root):
    one, two = (gradflow.load(root / world / "tensor_parallel" / "gradflow") for world in ("one", "two"))
    for column in ("n", "weight_sq", "grad_sq", "update_sq"):
        found, expected = (run.table("parameters")[column].to_pylist() for run in (two, one))
        assert found == pytest.approx(expected, rel=1e-4), column
    assert two.table("steps")["grad_norm"].to_pylist() == pytest.approx(one.table("steps")["grad_norm"].to_pylist(), rel=1e-4)
    assert two.table("branches")["branch_ratio"].to_pylist() == pytest.approx(one.table("branches")["branch_ratio"].to_pylist(), rel=1e-4)


def test_ranks_that_disagree_train_on(tmp_path):
    for process in finish(launch(["disagree"], tmp_path, 2)):
        assert process.code == 0, process.text[-3000:]
        assert "done" in process.text
    run = gradflow.load(tmp_path / "disagree" / "gradflow")
    assert run.steps == [0, 1, 2, 3]
    assert run.meta["stopped"] is None
    assert {row["step"] for row in run.table("branches", per_rank=True).to_pylist() if row["rank"] == 1} <= {0, 1}


@pytest.mark.slow
def test_all_ranks_stop_together_at_an_error(tmp_path):
    done = finish(launch(["stop"], tmp_path, 2))
    assert [process.code for process in done] == [0, 0], done[0].text[-3000:]
    steps = {process.text.split("done")[1].split()[1] for process in done}
    assert len(steps) == 1
    assert 8 <= int(steps.pop()) < 200


@pytest.mark.slow
def test_each_rank_names_the_operation_that_broke_in_it_and_the_run_says_it_once(tmp_path):
    for process in finish(launch(["guarded"], tmp_path, 2)):
        assert process.code == 0, process.text[-2500:]
    run = gradflow.load(tmp_path / "guarded" / "gradflow")
    told = run.table("faults", per_rank=True).select(["step", "rank", "direction", "operation"]).to_pylist()
    assert [tuple(row.values()) for row in told] == [(3, 0, "forward", "div"), (3, 1, "forward", "log")]
    (finding,) = [finding for finding in gradflow.diagnose(run) if finding.code == "nonfinite"]
    assert (finding.steps[0], finding.evidence["operation"]) == (3, "div")


def test_data_of_a_rank_that_died_is_readable(tmp_path):
    processes = launch(["dead"], tmp_path, 2)
    processes[1].wait(120)
    finish(processes, 120)
    run = gradflow.load(tmp_path / "dead" / "gradflow")
    rows = run.table("branches", per_rank=True).to_pylist()
    assert {row["step"] for row in rows if row["rank"] == 1} == {0, 1, 2}
    assert run.problems == []
