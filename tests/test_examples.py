import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gradflow

EXAMPLES = Path(__file__).parents[1] / "examples"


def run_example(name, out, steps):
    command = [sys.executable, EXAMPLES / name, "--steps", str(steps), "--out", out]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=out.parent, env=one_thread, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize(
    ("name", "branches", "projections"), [("attach_to_lightning.py", 8, 0), ("resnet_digits.py", 6, 2)]
)
def test_example_writes_the_report_it_names(tmp_path, name, branches, projections):
    done = run_example(name, tmp_path / "out", 3)
    assert done.returncode == 0, done.stderr
    report = Path(done.stdout.rpartition("report: ")[2].strip())
    assert report.resolve() == tmp_path / "out" / "report.html"
    assert "<svg" in report.read_text(encoding="utf-8")
    run = gradflow.load(tmp_path / "out")
    assert run.steps == [0, 1, 2]
    assert len(run.branches) == branches
    assert [branch.kind for branch in run.branches].count("projection") == projections


@pytest.mark.parametrize("name", ["attach_to_lightning.py", "resnet_digits.py"])
def test_the_module_of_an_example_knows_nothing_of_gradflow(name):
    tree = ast.parse((EXAMPLES / name).read_text(encoding="utf-8"))
    used = [node.id for c in tree.body if isinstance(c, ast.ClassDef) for node in ast.walk(c) if isinstance(node, ast.Name)]
    assert used
    assert not {"gradflow", "GradientFlowMonitor"} & set(used)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["attach_to_lightning.py", "resnet_digits.py"])
def test_example_as_it_stands_is_healthy(tmp_path, name):
    done = run_example(name, tmp_path / "out", 200)
    assert done.returncode == 0, done.stderr
    assert [f for f in gradflow.diagnose(gradflow.load(tmp_path / "out")) if f.severity != "info"] == []
