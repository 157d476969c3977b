"""The labelled zoo: sick trainings are found and placed, healthy ones are silent, first remedies cure."""

import functools

import pytest
from zoo import judging, score, table
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
    "outside/wine-raw",
    "outside/side-head",
    "outside/spread-of-alike",
    "outside/points-through-numpy",
    "held/graph-detached",
    "stranger/rounded-code",
    "stranger/detector-bias-everywhere",
    "stranger/lstm-lr-1",
]
QUICK_HEALTHY = [
    "mlp-relu",
    "mlp-he-momentum",
    "mlp-tanh",
    "mlp-overfit",
    "residual-rezero",
    "residual-batch-of-two",
    "lora-residual",
    "experts",
    "gpt2-four-steps",
    "ten-steps",
    "text-encoder-pre",
    "outside/gan",
    "outside/hinge",
    "outside/simclr",
    "outside/highway",
    "stranger/q-learning",
    "stranger/sgd-lr-half",
]


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


def test_parts_of_the_zoo_are_the_whole_of_it():
    parts = [name for k in (1, 2, 3) for name in score.chosen([], f"{k}/3")]
    assert sorted(parts) == sorted(score.chosen([], "1/1"))
    assert len(parts) == len(SICK) + len(HEALTHY)


def test_a_fresh_draw_trains_the_same_setup_with_another_seed_and_cadence(monkeypatch):
    asked = []
    monkeypatch.setattr(judging, "train", lambda name, setup, proof: asked.append((name, setup.seed, setup.every)))
    judging.Draw(5, 7).train("healthy/mlp-relu", HEALTHY["mlp-relu"])
    judging.LABELLED.train("healthy/mlp-relu", HEALTHY["mlp-relu"])
    assert asked == [("seed-5/every-7/healthy/mlp-relu", 5, 7), ("healthy/mlp-relu", 0, 20)]


def test_scores_of_fresh_runs_are_kept_once_each_and_told_on_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "FRESH", tmp_path / "fresh.json")
    for found in (False, True):
        table.keep_fresh("seed 5", [judging.Judged("one", "dead-units", found=found, placed=found)], [])
    (row,) = table.fresh_rows()
    assert row.startswith("| seed 5 |")
    assert "1/1" in row
