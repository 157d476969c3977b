"""`[tool.gradflow]` in pyproject.toml: what it sets, and what it says of keys that it does not know."""

import numpy as np
import pytest
import runs

from gradflow.cli.settings import Settings, settings, threshold_keys
from gradflow.errors import UsageError
from gradflow.rules import RULES, diagnose
from gradflow.rules.registry import chosen


@pytest.fixture
def project(tmp_path):
    def write(text):
        (tmp_path / "pyproject.toml").write_text(text)
        return tmp_path

    return write


def test_thresholds_and_ignores_are_read_from_the_nearest_project_file(project):
    folder = project(
        '[tool.gradflow]\nignore = ["dead-units"]\n[tool.gradflow.thresholds]\n"silent-branch.ratio" = 1e-4\n'
    )
    inner = folder / "runs" / "one"
    inner.mkdir(parents=True)
    assert settings(inner) == Settings(("dead-units",), {"silent-branch.ratio": 1e-4}, folder / "pyproject.toml")


def test_keys_without_quotes_mean_the_same(project):
    folder = project("[tool.gradflow.thresholds]\ndead-units.share = 0.6\nsilent-branch.patience = 2000\n")
    assert settings(folder).thresholds == {"dead-units.share": 0.6, "silent-branch.patience": 2000.0}


@pytest.mark.parametrize("text", ["", "[tool.other]\nx = 1\n", "[tool.gradflow]\n"])
def test_no_table_sets_nothing(project, text):
    assert settings(project(text)) == Settings()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[tool.gradflow]\nignores = []\n", ["'ignores'", "did you mean ignore?", "pyproject.toml"]),
        ('[tool.gradflow]\nignore = ["dead-unit"]\n', ["'dead-unit'", "did you mean dead-units?"]),
        ('[tool.gradflow]\nignore = "dead-units"\n', ["list of codes"]),
        (
            '[tool.gradflow.thresholds]\n"dead-units.shares" = 1\n',
            ["'dead-units.shares'", "did you mean dead-units.share?"],
        ),
        ('[tool.gradflow.thresholds]\n"dead-units.share" = "much"\n', ["expected a number", "'much'"]),
        ('[tool.gradflow.thresholds]\n"dead-units.share" = nan\n', ["expected a number", "nan"]),
        ('[tool.gradflow.thresholds]\n"dead-units.share" = true\n', ["expected a number", "True"]),
        ("[tool]\ngradflow = 3\n", ["expected a table", "3"]),
        ("[tool.gradflow\n", ["TOML file"]),
    ],
)
def test_what_does_not_fit_is_named(project, text, words):
    with pytest.raises(UsageError) as error:
        settings(project(text))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_every_threshold_has_a_key_of_its_own_under_its_rule():
    keys = threshold_keys()
    assert len(set(keys)) == len(keys)
    for code, rule in RULES.items():
        assert all(threshold.key.startswith(f"{code}.") for threshold in rule.thresholds)


def test_a_threshold_that_is_set_holds_for_that_call_alone():
    run = runs.exploding()
    assert "signal-explosion" in {finding.code for finding in diagnose(run)}
    lax = diagnose(run, thresholds={"signal-explosion.total": np.inf, "signal-explosion.time": np.inf})
    assert "signal-explosion" not in {finding.code for finding in lax}
    assert "signal-explosion" in {finding.code for finding in diagnose(run)}


def test_thresholds_are_put_back_after_an_error():
    threshold = RULES["dead-units"].thresholds[0]
    with pytest.raises(RuntimeError), chosen({threshold.key: 9.0}):
        assert threshold.value == 9.0
        raise RuntimeError
    assert threshold.value == threshold.default


def test_check_applies_the_settings_of_the_project_and_says_so(project, monkeypatch, capsys):
    import gradflow
    from gradflow.cli import commands
    from gradflow.records import Finding

    seen = {}

    def diagnose(run, *, thresholds):
        seen.update(thresholds)
        return [Finding("dead-units", "error", ("x",), (0, 1), "Dead.", {}, "Why.", "Do.")]

    monkeypatch.setattr(gradflow, "diagnose", diagnose)
    monkeypatch.chdir(project('[tool.gradflow]\nignore = ["dead-units"]\nthresholds = { "silent-branch.ratio" = 0.01 }\n'))
    commands.judge(runs.exploding(), fail_on=commands.Severity.warning, ignore=[], as_json=False)
    out, err = capsys.readouterr()
    assert seen == {"silent-branch.ratio": 0.01}
    assert out.startswith("no findings")
    assert "pyproject.toml apply" in err
