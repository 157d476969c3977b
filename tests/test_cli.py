import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gradflow
from gradflow import cli
from gradflow.metrics import DERIVED
from gradflow.records import Finding
from gradflow.rules import RULES
from gradflow.schema import TABLES
from gradflow.store.writer import RunWriter

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
MODELS = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

    def forward(self, x):
        return x + self.mlp(self.norm(x))


def make():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block()), torch.randn(4, 8)


def wrong_shape():
    return make()[0], torch.randn(4, 7)
"""


@pytest.fixture
def gf(monkeypatch, capsys):
    """Run the command line in this process: status, stdout, stderr."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["gradflow", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture
def models(tmp_path, monkeypatch):
    (tmp_path / "models_for_cli.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield "models_for_cli"
    sys.modules.pop("models_for_cli", None)


def write_run(path, *, nonfinite=0, name="h.0"):
    with RunWriter(path) as writer:
        writer.write_meta({"model": "Tiny", "branches": [{"name": name, "depth": 1}]})
        for step in range(3):
            writer.append("steps", {"step": [step], "loss": [float("nan") if nonfinite else 1.0], "grad_norm": [1.0]})
            writer.append("branches", {"step": [step], "branch": [name], "n": [64], "skip_sq": [64.0], "branch_sq": [16.0],
                                       "out_sq": [80.0], "nonfinite": [nonfinite], "grad_out_sq": [1.0], "grad_fork_sq": [1.1]})  # fmt: skip
    return path


@pytest.fixture
def healthy(tmp_path):
    return write_run(tmp_path / "healthy")


@pytest.fixture
def sick(tmp_path):
    return write_run(tmp_path / "sick", nonfinite=3)


def finding(severity, code="nonfinite", **changes):
    fields = {"code": code, "severity": severity, "where": ("h.0",), "steps": (0, 2), "claim": "it broke", "evidence": {"x": 1.0},
              "why": "because", "remedy": "mend it"}  # fmt: skip
    return Finding(**{**fields, **changes})


# ---------------------------------------------------------------- help, version, misuse


def test_without_arguments_the_help_is_printed(gf):
    status, out, err = gf()
    assert (status, err) == (0, "")
    for command in ("demo", "branches", "probe", "report", "compare", "check", "schema", "rules"):
        assert f"  {command} " in out
    assert "..." not in out.split("Commands:")[1]
    assert "--install-completion" not in out


@pytest.mark.parametrize("command", ["demo", "branches", "probe", "report", "compare", "check", "schema", "rules"])
def test_every_command_explains_itself(gf, command):
    status, out, _ = gf(command, "--help")
    assert status == 0
    assert out.startswith(f"Usage: gradflow {command}")


def test_the_version_is_printed(gf):
    assert gf("--version") == (0, f"gradflow {gradflow.__version__}\n", "")


@pytest.mark.parametrize("args", [["chek"], ["check"], ["check", "run", "--fail-on", "never"], ["schema", "--nope"]])
def test_misuse_ends_with_status_2(gf, args):
    status, out, err = gf(*args)
    assert (status, out) == (2, "")
    assert err


# ---------------------------------------------------------------- schema and rules


def test_schema_prints_every_column_of_every_table(gf):
    status, out, _ = gf("schema")
    assert status == 0
    for table, columns in TABLES.items():
        block = out.split(f"{table}\n  column", 1)[1].split("\n\n")[0]
        for column in (*columns, *DERIVED[table]):
            assert f"\n  {column.name} " in block
            assert column.doc in block


def test_schema_as_json_holds_units_merges_and_formulas(gf):
    status, out, _ = gf("schema", "--json")
    assert status == 0
    tables = json.loads(out)
    assert list(tables) == list(TABLES)
    columns = {column["name"]: column for column in tables["branches"]}
    assert columns["grad_out_sq"]["merge"] == "grad_sum"
    assert columns["cosine"]["formula"] == "dot/√(skip_sq·branch_sq)"
    assert columns["step"]["type"] == "int64"


def test_rules_print_every_code_with_its_thresholds(gf):
    status, out, _ = gf("rules")
    assert status == 0
    assert all(f"{code} (" in out for code in RULES)
    as_json = json.loads(gf("rules", "--json")[1])
    assert [rule["code"] for rule in as_json] == list(RULES)
    assert all(threshold["origin"] for rule in as_json for threshold in rule["thresholds"])


# ---------------------------------------------------------------- check


def test_a_healthy_run_passes_the_check(gf, healthy):
    status, out, err = gf("check", healthy)
    assert (status, err) == (0, "")
    assert out == "no findings in 3 sampled steps (0 to 2), 1 branch, 0 layers\n"


def test_a_sick_run_fails_the_check_and_says_why(gf, sick):
    status, out, _ = gf("check", sick)
    assert status == 1
    assert out.startswith("error: nonfinite\n  ")
    for word in ("where     h.0", "steps     0 to 2", "evidence", "why", "try"):
        assert word in out


def test_an_ignored_code_does_not_fail_the_check(gf, sick):
    status, out, _ = gf("check", sick, "--ignore", "nonfinite")
    assert status == 0
    assert "nonfinite" not in out


def test_a_mistyped_code_to_ignore_is_an_error(gf, sick):
    status, out, err = gf("check", sick, "--ignore", "nonfinit")
    assert (status, out) == (2, "")
    assert "got nonfinit; known: nonfinite" in err


@pytest.mark.parametrize(
    ("severity", "fail_on", "status"),
    [
        ("error", "error", 1), ("warning", "error", 0), ("info", "error", 0),
        ("error", "warning", 1), ("warning", "warning", 1), ("info", "warning", 0),
        ("error", "info", 1), ("info", "info", 1),
    ],
)  # fmt: skip
def test_the_status_depends_on_the_gravest_finding(gf, healthy, monkeypatch, severity, fail_on, status):
    monkeypatch.setattr(gradflow, "diagnose", lambda run, **_: [finding(severity)])
    assert gf("check", healthy, "--fail-on", fail_on)[0] == status


def test_check_as_json_is_strict_json(gf, healthy, monkeypatch):
    odd = finding("warning", evidence={"nan": float("nan"), "many": (1, 2.5), "text": "√"}, where=("a\x1b[31m", "b"))
    monkeypatch.setattr(gradflow, "diagnose", lambda run, **_: [odd])
    status, out, _ = gf("check", healthy, "--json")
    assert status == 1
    result = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert result["failed"] is True
    assert result["steps"] == [0, 1, 2]
    assert result["findings"][0]["evidence"] == {"nan": None, "many": [1, 2.5], "text": "√"}
    assert result["findings"][0]["where"] == ["a\x1b[31m", "b"]


def test_names_cannot_steer_the_terminal(gf, healthy, monkeypatch):
    odd = finding("warning", where=("\x1b[2J\x1b[31mred", "a\nb", "[bold]x[/bold]", "d", "e"), claim="\x07bell")
    monkeypatch.setattr(gradflow, "diagnose", lambda run, **_: [odd])
    _, out, _ = gf("check", healthy)
    assert "\x1b" not in out
    assert "\x07" not in out
    assert "\\x1b[2J\\x1b[31mred, a\\nb, [bold]x[/bold] and 2 more" in out


def test_what_was_left_out_of_a_run_is_said_on_stderr(gf, healthy):
    (healthy / "steps" / "rank-0-9.parquet").write_bytes(b"no parquet")
    status, out, err = gf("check", healthy)
    assert status == 0
    assert "note: steps/rank-0-9.parquet left out" in err
    assert "note" not in out


def test_a_run_without_steps_does_not_pass_as_healthy(gf, tmp_path):
    RunWriter(tmp_path).write_meta({})
    status, _, err = gf("check", tmp_path)
    assert status == 2
    assert "expected a run with recorded steps, got none" in err


@pytest.mark.parametrize("command", [["check"], ["report"], ["compare", "missing"]])
def test_a_run_that_is_not_there_is_one_clear_line(gf, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    status, out, err = gf(*command, tmp_path / "missing")
    assert (status, out) == (2, "")
    assert err.startswith("error: expected a run directory with a run.json, got no such file")
    assert err.count("\n") == 1
    assert "Traceback" not in err


# ---------------------------------------------------------------- report and compare


def test_report_is_written_into_the_run_and_never_over_another(gf, healthy):
    target = healthy / "report.html"
    assert gf("report", healthy) == (0, f"wrote {target}\n", "")
    assert target.read_text().lstrip().lower().startswith("<!doctype html>")
    target.write_text("mine")
    status, _, err = gf("report", healthy)
    assert status == 2
    assert "which is there already; pass --force" in err
    assert target.read_text() == "mine"
    assert gf("report", healthy, "--force")[0] == 0
    assert target.read_text() != "mine"


def test_report_goes_where_it_is_told(gf, healthy, tmp_path):
    assert gf("report", healthy, "-o", tmp_path / "sub" / "page.html")[0] == 0
    assert (tmp_path / "sub" / "page.html").stat().st_size > 1000
    assert not (healthy / "report.html").exists()


@pytest.mark.parametrize(("form", "start"), [("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_report_writes_every_picture_as_a_file_for_a_paper(gf, healthy, tmp_path, form, start):
    folder = tmp_path / "paper"
    status, out, err = gf("report", healthy, "--format", form, "-o", folder)
    files = sorted(folder.iterdir())
    assert (status, out, err) == (0, f"wrote {len(files)} pictures into {folder}\n", "")
    assert {path.suffix for path in files} == {f".{form}"}
    assert files
    assert all(path.read_bytes().startswith(start) for path in files)
    assert gf("report", healthy, "--format", form, "-o", folder)[0] == 2


def test_report_of_a_run_behind_a_url_needs_a_file_to_write(gf, tmp_path):
    url = f"memory://cli/{tmp_path.name}"
    write_run(url)
    status, _, err = gf("report", url)
    assert status == 2
    assert "expected --out FILE" in err
    assert gf("report", url, "-o", tmp_path / "page.html")[0] == 0
    assert (tmp_path / "page.html").exists()


def test_compare_sets_runs_side_by_side_in_a_new_file(gf, healthy, sick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert gf("compare", healthy, sick) == (0, "wrote gradflow-compare.html\n", "")
    assert gf("compare", healthy, sick)[0] == 2
    assert gf("compare", healthy, sick, "--force")[0] == 0


def test_compare_needs_two_runs(gf, healthy):
    status, _, err = gf("compare", healthy)
    assert status == 2
    assert "expected two runs or more to compare, got 1" in err


# ---------------------------------------------------------------- models


def test_branches_of_a_model_are_shown_as_a_tree(gf, models):
    status, out, err = gf("branches", f"{models}:make")
    assert (status, err) == (0, "")
    assert "mlp" in out


def test_branches_as_json_are_the_records(gf, models):
    status, out, _ = gf("branches", f"{models}:make", "--json")
    assert status == 0
    result = json.loads(out)
    assert [branch["depth"] for branch in result["branches"]] == [1, 2]
    assert {branch["placement"] for branch in result["branches"]} == {"pre-norm"}
    assert result["streams"][0]["points"]


@pytest.mark.parametrize("command", ["branches", "probe"])
def test_a_model_that_does_not_run_is_one_clear_line(gf, models, command):
    status, out, err = gf(command, f"{models}:wrong_shape")
    assert (status, out) == (2, "")
    assert err.startswith(
        "error: expected the model of models_for_cli:wrong_shape to run on its inputs, got RuntimeError"
    )
    assert err.count("\n") == 1


@pytest.mark.parametrize("target", ["nonsense", "no_such_module:make", "models_for_cli:nothing"])
def test_a_factory_that_does_not_import_is_one_clear_line(gf, models, target):
    status, out, err = gf("branches", target)
    assert (status, out) == (2, "")
    assert err.startswith("error: expected ")
    assert err.count("\n") == 1


def test_probe_diagnoses_an_untrained_model(gf, models, tmp_path):
    status, out, _ = gf("probe", f"{models}:make", "--json", "-o", tmp_path / "probe.html")
    result = json.loads(out)
    assert result["steps"] == [0]
    assert status == int(result["failed"])
    assert (tmp_path / "probe.html").stat().st_size > 1000


# ---------------------------------------------------------------- as a program


def shell(*args, **options):
    command = [sys.executable, "-m", "gradflow", *map(str, args)]
    return subprocess.run(command, capture_output=True, check=False, env={**ENVIRONMENT, **options})


def test_piped_output_is_plain_and_not_cut():
    done = shell("schema", COLUMNS="40", FORCE_COLOR="", TERM="xterm-256color")
    out = done.stdout.decode()
    assert (done.returncode, done.stderr) == (0, b"")
    assert "\x1b" not in out
    assert "…" not in out
    assert max(map(len, out.splitlines())) > 120
    assert out.splitlines() == [line.rstrip() for line in out.splitlines()]


def test_an_ascii_terminal_does_not_break_the_output():
    done = shell("schema", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 0
    assert rb"\u221a(skip_sq/n)" in done.stdout


def test_a_reader_that_leaves_early_is_no_error():
    command = f"{sys.executable} -m gradflow schema | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, check=False, env=ENVIRONMENT, cwd=ROOT)
    assert done.stdout == b"steps\n"
    assert done.stderr == b""


def test_an_error_leaves_no_traceback(tmp_path):
    done = shell("check", tmp_path / "missing")
    assert done.returncode == 2
    assert done.stdout == b""
    assert done.stderr.startswith(b"error: expected a run directory")
    assert b"Traceback" not in done.stderr


def test_the_demo_is_handed_its_options(gf, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr("gradflow.demo.run", lambda out, **options: calls.append((out, options)))
    assert gf("demo", "--out", tmp_path / "d", "--steps", "20", "--depth", "3", "--force")[0] == 0
    assert gf("demo")[0] == 0
    assert calls == [
        (tmp_path / "d", {"steps": 20, "depth": 3, "force": True}),
        (Path("gradflow-demo"), {"steps": None, "depth": None, "force": False}),
    ]
    assert gf("demo", "--steps", "0")[0] == 2
