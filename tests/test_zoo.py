"""The labelled zoo: sick trainings are found and placed, healthy ones are silent, first remedies cure."""

import functools

import pytest
from zoo import judging
from zoo.judging import HEALTHY, SICK
from zoo.table import page, record, summary

from gradflow.rules import RULES

QUICK_SICK = [
    "sigmoid-mlp-8",
    "dead-mlp",
    "residual-detached",
    "large-init-tanh-less",
    "group-without-rate",
    "division-by-spread",
]
QUICK_HEALTHY = ["mlp-relu", "mlp-he-momentum", "residual-rezero", "residual-batch-of-two", "ten-steps"]


@pytest.fixture(scope="module", autouse=True)
def _runs(tmp_path_factory):
    """Runs are trained afresh unless `ZOO_RUNS` names where they are."""
    import os

    before = os.environ.get("ZOO_RUNS")
    if before is None:
        os.environ["ZOO_RUNS"] = str(tmp_path_factory.mktemp("zoo"))
    yield
    if before is None:
        del os.environ["ZOO_RUNS"]


def split(names, quick):
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@functools.cache
def sick(name):
    return judging.judge_sick(name)


@functools.cache
def healthy(name):
    return judging.judge_healthy(name)


@pytest.mark.parametrize("name", split(SICK, QUICK_SICK))
def test_plain_pytorch_proves_the_label(name):
    assert sick(name).proved, sick(name).figure


@pytest.mark.parametrize("name", split(SICK, QUICK_SICK))
def test_sick_training_is_found_at_its_place_and_nothing_false_beside_it(name):
    judged = sick(name)
    told = [(f.code, f.severity, f.where, f.steps) for f in judged.findings]
    assert judged.found, told
    assert judged.placed, told
    assert judged.false == [], told


@pytest.mark.parametrize("name", split([n for n, case in SICK.items() if case.cure is not None], QUICK_SICK))
def test_first_remedy_takes_the_finding_away_and_lowers_the_loss(name):
    judged = sick(name)
    assert judged.remedied, [f.remedy for f in judged.findings if f.code == judged.code]
    assert judged.cured, (judged.losses, [f.code for f in judged.cure_findings])


@pytest.mark.parametrize("name", split(HEALTHY, QUICK_HEALTHY))
def test_healthy_training_is_silent(name):
    assert healthy(name).false == [], [(f.code, f.claim) for f in healthy(name).findings]


def test_every_code_has_two_sick_runs_or_more_and_there_are_enough_of_both_kinds():
    counts = {code: sum(case.code == code for case in SICK.values()) for code in RULES}
    assert min(counts.values()) >= 2, counts
    assert len(SICK) >= 40
    assert len(HEALTHY) >= 30


def test_score_counts_what_was_judged():
    hit, miss = sick("dead-mlp"), judging.Judged("missed", "dead-units", false=["frozen-parameter"], losses=(1.0,))
    text = summary([hit, miss], [healthy("mlp-relu")])
    assert "recall (warning or error)   1/2" in text
    assert record([hit, miss], [])["rules"]["dead-units"]["found"] == 1
    assert record([hit, miss], [])["rules"]["frozen-parameter"]["false"] == 1
    assert "| missed | dead-units |" in page([hit, miss], [healthy("mlp-relu")])
