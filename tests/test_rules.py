"""Rules: silent on healthy runs, right about sick ones, never broken by broken numbers."""

import dataclasses
import functools
import json
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import runs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zoo.healthy import HEALTHY
from zoo.judging import alarms as alarms_of
from zoo.sick_training import ACTIVATIONS
from zoo.small import SMALL
from zoo.training import train

from gradflow import schema
from gradflow.records import Finding
from gradflow.rules import RULES, balance, diagnose, faults, grouping
from gradflow.rules.view import Grid, View, lasting, median, settled, spell, window
from gradflow.store import Run

QUICK_SICK = [
    "sigmoid-mlp", "default-mlp-12-wide", "large-init-mlp", "unnormalised", "two-zeros", "one-silent", "gate-not-trained",
    "log-of-negative", "log-from-step-40", "root-of-zero", "nan-in-batch", "loss-of-log", "detached-branch",
    "detached-mlp", "dead-bias", "saturated-tanh", "spike", "forgotten-parameters", "dominant", "half-precision",
]  # fmt: skip
slow = pytest.mark.slow


@functools.cache
def sick(name):
    return train(f"small/{name}", SMALL[name].setup)[0]


def alarms(run):
    return alarms_of(diagnose(run))


def split(names, quick):
    return [name if name in quick else pytest.param(name, marks=slow) for name in names]


# --- real trainings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", split(SMALL, QUICK_SICK))
def test_sick_training_is_found_at_the_right_place(name):
    found = alarms(sick(name))
    for code, word in SMALL[name].labels.items():
        places = [place for finding in found if finding.code == code for place in finding.where]
        assert any(word in place for place in places), (code, word, [(f.code, f.where) for f in found])


@pytest.mark.parametrize("name", split(SMALL, QUICK_SICK))
def test_sick_training_gets_no_finding_that_is_not_known_to_be_true(name):
    expected = set(SMALL[name].labels) | SMALL[name].also
    assert {finding.code for finding in alarms(sick(name))} <= expected


@pytest.mark.parametrize("name", ["two-zeros", "log-from-step-40", "spike", "dead-bias"])
def test_findings_are_complete_and_plain(name):
    for finding in diagnose(sick(name)):
        assert finding.where
        assert finding.steps[0] <= finding.steps[1]
        for text in (finding.claim, finding.why, finding.remedy, finding.remedy_2):
            assert text.endswith((".", "%")), text
            assert "nan" not in text.split()
        assert {"measured", "expected", "threshold", "threshold_from"} <= set(finding.evidence)
        json.dumps(finding.evidence, allow_nan=False)
        assert finding.severity in RULES[finding.code].severities


def test_nan_is_dated_to_the_step_and_the_layer_in_which_it_appeared():
    (finding,) = alarms(sick("log-from-step-40"))
    assert finding.code == "nonfinite"
    assert finding.steps[0] == 40
    assert finding.where[:2] == ("cells.2.log", "cells.3.norm")
    assert finding.evidence["last_finite_layer"] == "cells.2.inner.fc2"
    assert len(finding.evidence["consequences_layers"]) > 3


def test_nan_that_appears_backwards_is_traced_to_where_it_entered():
    (finding,) = alarms(sick("root-of-zero"))
    assert finding.evidence["direction"] == "backward"
    assert finding.where[:2] == ("cells.2.sqrt", "cells.2.inner.fc2")


def test_spike_is_dated():
    (finding,) = alarms(sick("spike"))
    assert finding.steps == (60, 60)


def test_silent_branches_hold_their_unmoved_parameters_as_one_finding():
    assert [finding.code for finding in alarms(sick("two-zeros"))] == ["silent-branch"]


# --- made-up runs -----------------------------------------------------------------------------------------------------


def with_column(run, name, column, change):
    """The run with one raw column changed by `change(values of shape (step, thing), steps)`."""
    table = run.table(name).select([c.name for c in schema.TABLES[name]])
    steps = np.unique(table["step"].to_numpy())
    values = table[column].cast(pa.float64()).to_numpy().copy()
    values = change(values.reshape(len(steps), -1), steps[:, None]).reshape(-1)
    index = table.column_names.index(column)
    kind = table.schema.field(column).type
    array = pa.array(values, pa.float64(), mask=np.isnan(values)) if kind != pa.float64() else pa.array(values)
    tables = {t: run.table(t).select([c.name for c in schema.TABLES[t]]) for t in schema.TABLES}
    return Run(run.meta, {**tables, name: table.set_column(index, column, array.cast(kind))})


def until(run, step):
    """The run as it was after a step."""
    tables = {t: run.table(t).select([c.name for c in schema.TABLES[t]]) for t in schema.TABLES}
    return Run(run.meta, {t: table.filter(pc.less_equal(table["step"], step)) for t, table in tables.items()})


def codes(run):
    return [finding.code for finding in alarms(run)]


@pytest.mark.parametrize("make", [runs.prenorm, runs.postnorm, runs.many, runs.hostile])
def test_made_up_healthy_runs_are_silent(make):
    assert codes(make()) == []


def test_empty_run_and_run_without_tables_have_no_findings():
    assert diagnose(runs.empty()) == []
    assert diagnose(Run({})) == []


def test_unnormalised_doubling_is_named_by_its_signature():
    (finding,) = alarms(runs.exploding())
    assert finding.code == "signal-explosion"
    assert "doubling" in finding.claim
    assert finding.evidence["measured"] == pytest.approx(np.log(2), abs=0.1)


def test_prenorm_gradient_growth_of_theory_is_no_explosion_and_ten_thousandfold_is():
    def blow(values, steps):
        return values * np.geomspace(1e10, 1, values.shape[1])

    assert codes(runs.prenorm()) == []
    assert codes(with_column(runs.prenorm(), "streams", "grad_sq", blow)) == ["exploding-gradient"]


def test_vanishing_gradient_needs_to_last():
    def early(values, steps):
        return np.where(steps < 200, values * np.geomspace(1e-12, 1, values.shape[1]), values)

    def always(values, steps):
        return values * np.geomspace(1e-12, 1, values.shape[1])

    assert codes(with_column(runs.prenorm(), "streams", "grad_sq", early)) == []
    (finding,) = alarms(with_column(runs.prenorm(), "streams", "grad_sq", always))
    assert finding.code == "vanishing-gradient"
    assert finding.severity == "error"


def test_a_single_join_that_loses_the_gradient_is_the_place():
    def cut(values, steps):
        values = values.copy()
        values[:, :10] *= 1e-9
        return values

    (finding,) = alarms(with_column(runs.prenorm(), "streams", "grad_sq", cut))
    assert finding.where == ("blocks.4.mlp",)  # the join behind point 9 is the tenth: block 4's second


def test_postnorm_attention_over_aligned_tokens_may_lose_what_theory_says():
    def theirs(values, steps):  # 24 joins at token cosine 1: half of them attention, each keeps 1/√2
        return values * np.geomspace(2.0**-12, 1, values.shape[1])

    run = with_column(runs.postnorm(), "streams", "token_cosine", lambda v, s: np.full_like(v, 0.98))
    assert codes(with_column(run, "streams", "grad_sq", theirs)) == []
    plain = with_column(runs.postnorm(), "streams", "token_cosine", lambda v, s: np.full_like(v, 0.0))
    assert codes(with_column(plain, "streams", "grad_sq", lambda v, s: theirs(v, s) ** 1.0 * np.geomspace(1e-3, 1, v.shape[1]))) == [
        "vanishing-gradient"
    ]


def test_tokens_that_come_in_alike_are_no_collapse():
    same = with_column(runs.postnorm(), "streams", "token_cosine", lambda v, s: np.full_like(v, 0.9995))
    assert codes(same) == []


def test_collapse_in_training_must_last_five_hundred_steps_with_gradient_and_loss_stuck():
    def collapsed(values, steps):
        return np.where((steps > 100) & (np.arange(values.shape[1]) > 8), 0.9999, 0.3)

    def stuck(run):
        run = with_column(run, "streams", "grad_sq", lambda v, s: np.where(s > 100, v * np.geomspace(1e-3, 1, v.shape[1]), v))
        return with_column(run, "steps", "loss", lambda v, s: np.where(s > 100, 3.0, 4.0))

    long = with_column(runs.postnorm(last=1000), "streams", "token_cosine", collapsed)
    assert "rank-collapse" in codes(stuck(long))
    short = with_column(runs.postnorm(last=400), "streams", "token_cosine", collapsed)
    assert "rank-collapse" not in codes(stuck(short))
    falling = with_column(stuck(long), "steps", "loss", lambda v, s: 4.0 - s / 400)
    assert "rank-collapse" not in codes(falling)


def test_a_branch_that_falls_silent_is_found_with_the_step_since_when():
    def fade(values, steps):
        values = values.copy()
        values[:, 7] = np.where(steps[:, 0] >= 300, 1e-9 * values[:, 7], values[:, 7])
        return values

    (finding,) = alarms(with_column(runs.prenorm(), "branches", "branch_sq", fade))
    assert finding.code == "silent-branch"
    assert finding.where == ("blocks.3.mlp",)
    assert finding.steps == (300, 1000)


@pytest.mark.parametrize(("last", "at_the_end", "found"), [(600, 9e-4, False), (1000, 9e-4, True), (600, 9e-5, True)])
def test_a_branch_that_grows_has_a_thousand_steps_if_that_is_enough_at_its_pace(last, at_the_end, found):
    made = runs.prenorm(last=last)
    skip = View(made).grid("branches")["skip_sq"]
    run = with_column(made, "branches", "branch_sq", lambda v, s: skip * (1e-5 + at_the_end * s / last) ** 2)
    assert ("silent-branch" in codes(run)) is found


@pytest.mark.parametrize(("times", "left", "found"), [(20, 0.95, True), (20, 0.7, False), (200, 0.7, True)])
def test_a_dominant_branch_is_excused_if_it_shrinks_in_time(times, left, found):
    def loud(values, steps):
        values = values.copy()
        values[:, 9] *= times**2 * np.where(steps[:, 0] > 650, left ** (2 * (steps[:, 0] - 650) / 350), 1.0)
        return values

    assert ("dominant-branch" in codes(with_column(runs.prenorm(), "branches", "branch_sq", loud))) is found


def test_the_first_block_is_one_join_where_names_count_joins_and_two_where_they_count_blocks():
    depth = np.array([1, 2, 3, 4])
    for names, first in (
        (["blocks.0", "blocks.1", "blocks.2", "blocks.3"], [True, False, False, False]),
        (["h.0.attn", "h.0.mlp", "h.1.attn", "h.1.mlp"], [True, True, False, False]),
        (["attend", "feed", "attend@1", "feed@1"], [True, True, False, False]),
    ):
        assert balance._first_block(names, depth).tolist() == first


@pytest.mark.parametrize(("gradient", "found"), [(1e-3, True), (1e-12, False)])
def test_weights_whose_update_must_round_away_are_not_frozen(gradient, found):
    def column(value):
        def change(values, steps):
            values = values.copy()
            values[:, 5] = value
            return values

        return change

    still = with_column(runs.prenorm(), "parameters", "update_sq", column(0.0))
    small = with_column(with_column(still, "parameters", "grad_sq", column(gradient**2)), "parameters", "grad_max", column(gradient))
    assert ("frozen-parameter" in codes(small)) is found


@pytest.mark.parametrize(("last", "rising", "found"), [(60, False, True), (60, True, False), (120, True, True)])
def test_updates_are_too_small_from_step_50_on_or_twice_that_while_the_rate_rises(last, rising, found):
    run = with_column(runs.prenorm(last=last, every=10), "parameters", "update_sq", lambda v, s: 1e-10 * v)
    run = with_column(run, "steps", "learning_rate", lambda v, s: 1e-9 * (1 + s) if rising else np.full_like(v, 1e-9))
    jitter = np.random.default_rng(0).normal(0, 0.1, len(run.steps))[:, None]
    assert ("update-too-small" in codes(with_column(run, "steps", "loss", lambda v, s: 2.0 + jitter))) is found
    assert "update-too-small" not in codes(with_column(run, "steps", "loss", lambda v, s: 2.0 - s / last + 0.01 * jitter))


def test_loss_scale_that_is_too_small_is_to_be_raised_to_what_the_largest_gradient_allows():
    run = with_column(runs.prenorm(), "parameters", "grad_zeros", lambda v, s: np.full_like(v, 1e6))
    half = Run({**run.meta, "precision": "16-mixed"}, {t: run.table(t).select([c.name for c in schema.TABLES[t]]) for t in schema.TABLES})
    for scale, says in ((1.0, "GradScaler(init_scale=2.0**34)"), (2.0**4, "to 2.0**34, from 16")):
        scaled = with_column(half, "steps", "loss_scale", lambda v, s, scale=scale: np.full_like(v, scale))
        lost = with_column(scaled, "parameters", "grad_max", lambda v, s: np.full_like(v, 1e-8))
        (finding,) = [f for f in diagnose(lost) if f.code == "gradient-underflow"]
        assert says in finding.remedy
    enough = with_column(half, "steps", "loss_scale", lambda v, s: np.full_like(v, 2.0**30))
    assert "gradient-underflow" not in codes(with_column(enough, "parameters", "grad_max", lambda v, s: np.full_like(v, 1e-8)))


def test_scaler_overflows_that_are_skipped_are_no_fault():
    def overflow(values, steps):
        return np.where(steps <= 1, np.inf, values)

    run = with_column(runs.prenorm(), "steps", "loss_scale", lambda v, s: np.full_like(v, 65536.0))
    assert codes(with_column(run, "parameters", "grad_sq", overflow)) == []
    unscaled = with_column(runs.prenorm(), "parameters", "grad_sq", overflow)
    assert codes(unscaled) == ["nonfinite"]


@pytest.mark.parametrize(("broken", "found"), [(1, False), (4, False), (5, True)])
def test_scaler_overflows_up_to_the_end_are_a_fault_once_they_persist(broken, found):
    run = with_column(runs.prenorm(), "steps", "loss_scale", lambda v, s: np.full_like(v, 65536.0))
    last = run.steps[-broken]
    sick = with_column(run, "parameters", "grad_sq", lambda v, s: np.where(s >= last, np.inf, v))
    assert ("nonfinite" in codes(sick)) is found


def test_masks_of_infinities_that_do_no_harm_are_a_note():
    def mask(values, steps):
        values = values.copy()
        values[:, 3] = 100
        return values

    found = diagnose(with_column(runs.prenorm(), "layers", "nonfinite", mask))
    assert [(finding.code, finding.severity) for finding in found] == [("nonfinite", "info")]


def test_what_comes_after_the_first_nan_is_not_judged():
    def broken(values, steps):
        return np.where(steps >= 500, np.nan, values)

    def wild(values, steps):
        return np.where(steps >= 550, values * 1e-12, values)

    run = with_column(runs.prenorm(), "branches", "branch_sq", wild)
    assert codes(run) == ["silent-branch"]
    assert codes(with_column(run, "steps", "loss", broken)) == ["nonfinite"]


def test_global_norm_that_outgrows_its_past_while_the_loss_rises_is_an_explosion():
    grown = with_column(runs.prenorm(), "steps", "grad_norm", lambda v, s: np.where(s >= 800, 1e4 * v, v))
    rising = with_column(grown, "steps", "loss", lambda v, s: np.where(s >= 800, 9.0, v))
    assert codes(grown) == []
    (finding,) = alarms(rising)
    assert (finding.code, finding.steps) == ("exploding-gradient", (800, 1000))


def attention(entropy, logit, layers=4, last=300):
    steps = runs.cadence(last)
    rows = len(steps) * layers
    shape = (len(steps), layers)
    table = runs.table(
        "attention", rows, step=np.repeat(steps, layers), layer=[f"layers.{i}.attn" for i in range(layers)] * len(steps),
        entropy=np.broadcast_to(entropy, shape).reshape(-1), logit_max=np.broadcast_to(logit, shape).reshape(-1),
        keys=np.full(rows, 64.0),
    )  # fmt: skip
    return Run({}, {"attention": table})


def test_attention_rules_find_one_hot_heads_and_runaway_logits():
    assert codes(attention(2.0, 5.0)) == []
    assert codes(attention([[2.0, 2.0, 0.1, 2.0]], 5.0)) == []  # one layer, small logits: a previous-token head
    (finding,) = alarms(attention([[2.0, 2.0, 0.1, 2.0]], [[5.0, 5.0, 40.0, 5.0]]))
    assert (finding.code, finding.where) == ("attention-entropy-collapse", ("layers.2.attn",))
    steps = runs.cadence(300)[:, None]
    growing = attention(2.0, 5.0 + steps * np.array([[0.0, 1.0, 0.0, 0.0]]))
    assert [(f.code, f.where) for f in alarms(growing)] == [("attention-logit-growth", ("layers.1.attn",))]
    absurd = alarms(attention(2.0, 2e4))
    assert [(f.code, f.severity) for f in absurd] == [("attention-logit-growth", "error")]


def dying(share, loss, *, last, start=0.1):
    """A run on 48 positions a step that turned a share of one layer's units off, by its loss as a function of the step."""

    def off(values, steps):
        values = values.copy()
        values[:, 7] = np.round(1536 * np.where(steps[:, 0] < 8, start, share))
        return values

    run = with_column(runs.prenorm(last=last, every=10), "layers", "dead_units", off)
    few = with_column(run, "layers", "n", lambda v, s: np.full_like(v, 48 * 1536))
    return with_column(few, "steps", "loss", lambda v, s: loss(s))


@pytest.mark.parametrize(
    ("last", "loss", "severity"),
    [
        (40, lambda s: 1 - s / 100, "info"),
        (40, lambda s: np.full(s.shape, 0.9), "warning"),
        (40, lambda s: 1 - s / 100 + 0.3 * (-1.0) ** np.arange(len(s))[:, None], "warning"),
        (40, lambda s: 1 + 9 * (s == 1), "warning"),
        (400, lambda s: 1 - s / 2000, "warning"),
        (400, lambda s: 1 - s / 800, "info"),
        (1000, lambda s: 1 - s / 2500, "warning"),
        (1000, lambda s: 1 - s / 1500, "info"),
    ],
    ids=["falls", "stuck", "jitters", "back from a blow-up", "falls too slowly", "falls in time", "has not halved", "has halved"],
)
def test_units_that_training_turned_off_are_a_note_while_it_learns(last, loss, severity):
    (finding,) = [f for f in diagnose(dying(0.5, loss, last=last)) if f.code == "dead-units"]
    assert finding.severity == severity
    assert finding.confidence == "low"
    assert finding.remedy.startswith("Nothing, unless the loss stops falling: lower the") == (severity == "info")


@pytest.mark.parametrize(("share", "start", "severity"), [(0.9, 0.1, "error"), (0.75, 0.7, "warning")])
def test_nearly_all_units_off_or_off_from_the_start_are_an_alarm_though_the_loss_falls(share, start, severity):
    run = dying(share, lambda s: 1 - s / 100, last=40, start=start)
    assert [f.severity for f in diagnose(run) if f.code == "dead-units"] == [severity]


# --- broken numbers ---------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 10**6), share=st.floats(0, 1), maker=st.sampled_from(["prenorm", "postnorm", "trunk"]))
def test_no_null_nan_infinity_or_missing_table_breaks_a_rule(seed, share, maker):
    random = np.random.default_rng(seed)
    run = getattr(runs, maker)(blocks=3, last=int(random.choice([0, 1, 4, 200])))
    tables = {}
    for name, columns in schema.TABLES.items():
        table = run.table(name).select([column.name for column in columns])
        if random.random() < 0.15:
            continue
        for i, column in enumerate(columns):
            if column.type != "string" and column.merge != "key" and column.name != "rank" and random.random() < 0.7:
                values = table[column.name].cast(pa.float64()).to_numpy().copy()
                hit = random.random(len(values)) < share
                values[hit] = random.choice([np.nan, np.inf, -np.inf, 0.0, 1e300, -1.0], hit.sum())
                mask = random.random(len(values)) < share * random.random()
                if column.type == "int64":
                    values = np.nan_to_num(np.clip(values, -(2**53), 2**53))
                table = table.set_column(i, column.name, pa.array(values, pa.float64(), mask=mask).cast(table.schema.field(i).type))
        rows = np.flatnonzero(random.random(len(table)) < (1.0 if random.random() < 0.5 else 0.6))
        tables[name] = table.take(pa.array(rows, pa.int64()))
    meta = run.meta if random.random() < 0.7 else {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = diagnose(Run(meta, tables))
        for rule in RULES.values():
            rule(Run(meta, tables))
    for finding in found:
        json.dumps(dataclasses.asdict(finding), allow_nan=False)


# --- pieces -----------------------------------------------------------------------------------------------------------


def test_every_rule_says_what_it_checks_and_where_its_numbers_come_from():
    assert len(RULES) == 21
    for code, rule in RULES.items():
        assert rule.code == code
        assert rule.says
        assert rule.criterion.endswith(".")
        assert rule.source
        assert rule.severities
        assert rule.thresholds
        for threshold in rule.thresholds:
            assert threshold.origin


def test_findings_come_worst_first_then_earliest():
    found = diagnose(sick("unnormalised"))
    order = {"error": 0, "warning": 1, "info": 2}
    keys = [(order[f.severity], f.steps[0]) for f in found]
    assert keys == sorted(keys)


def test_grid_places_every_row_of_a_table():
    run = runs.prenorm(blocks=2, last=100)
    table = run.table("streams")
    grid = Grid(run, "streams", None)
    for row in table.to_pylist():
        s = grid.steps.tolist().index(row["step"])
        k = grid.keys.index((row["stream"], row["point"]))
        assert grid.present[s, k]
        assert grid["out_sq"][s, k] == pytest.approx(row["out_sq"])
    assert grid.present.sum() == len(table)
    assert View(Run({})).grid("attention")["entropy"].shape == (0, 0)


def test_grid_stops_at_the_step_of_a_fault():
    run = runs.broken()
    view = faults.view_of(run)
    assert view.fault is not None
    assert view.steps[-1] == view.fault.step == view.grid("steps").steps[-1]


def test_windows_medians_and_spells():
    assert window(30) == slice(20, 30)
    assert window(2) == slice(0, 2)
    values = np.array([[1.0, np.nan], [3.0, np.nan], [5.0, np.nan]])
    assert median(values)[0] == 3.0
    assert np.isnan(settled(values)[1])
    mask = np.array([True, False, True, True, True])
    known = np.array([True, True, True, False, True])
    steps = np.array([0, 1, 2, 4, 8])
    assert spell(mask, known, steps) == (2, 8)
    assert lasting(mask[:, None], known[:, None])[0]
    assert not lasting(~mask[:, None], known[:, None])[0]
    assert not lasting(mask[:, None], np.zeros((5, 1), dtype=bool))[0]


def test_consequences_move_into_their_root():
    def make(code, **evidence):
        return Finding(code, "warning", ("x",), (0, 1), f"{code}.", evidence, "", "")

    root, dead = make("rank-collapse"), make("dead-units", measured=0.5)
    (kept,) = grouping.grouped([dead, root])
    assert kept.code == "rank-collapse"
    assert kept.evidence["consequences"] == ["dead-units: dead-units."]
    worse = make("dead-units", measured=0.95)
    assert len(grouping.grouped([worse, root])) == 2
    assert grouping.grouped([dead]) == [dead]


def finding_of(code, first, **evidence):
    return Finding(code, "warning", ("x",), (first, 100), f"{code} from {first}.", {"depth": 0, **evidence}, "", "")


def walk(place, causes):
    """Every finding that a chain of causes passes."""
    passed = [place]
    while (place := causes.get(place)) is not None and place not in passed:
        passed.append(place)
    return passed


@given(data=st.data(), count=st.integers(1, 12))
def test_every_finding_has_one_root_whatever_causes_whatever(data, count):
    places = st.integers(0, count - 1)
    findings = [finding_of(f"code-{i}", data.draw(st.integers(0, 3))) for i in range(count)]
    causes = data.draw(st.dictionaries(places, places))
    roots = grouping.rooted(findings, causes)
    assert len(roots) == count
    for place, root in enumerate(roots):
        assert roots[root] == root
        assert place == root or place in causes
        assert root in walk(place, causes)


CODES = sorted({*grouping.ROOTS, *(code for roots in grouping.ROOTS.values() for code in roots)})


@given(st.lists(st.sampled_from(CODES), unique=True, min_size=1), st.data())
def test_grouping_ends_and_loses_no_finding(codes, data):
    findings = [
        finding_of(
            code, data.draw(st.integers(0, 2)), measured=data.draw(st.sampled_from([0.1, 0.9])),
            depth=data.draw(st.integers(0, 2)), cause=data.draw(st.sampled_from(["update", "optimizer"])),
        )
        for code in codes
    ]  # fmt: skip
    kept = grouping.grouped(findings)
    told = [claim.partition(":")[0] for finding in kept for claim in finding.evidence.get("consequences", ())]
    assert sorted([*(finding.code for finding in kept), *told]) == sorted(codes)


@pytest.mark.parametrize(("dead", "vanishing", "root"), [(0, 10, "dead-units"), (10, 0, "vanishing-gradient"), (0, 0, "dead-units")])
def test_of_dead_units_and_a_vanishing_gradient_the_older_is_the_root(dead, vanishing, root):
    findings = [finding_of("vanishing-gradient", vanishing, measured=0.0), finding_of("dead-units", dead, measured=0.9)]
    (kept,) = grouping.grouped(findings)
    assert kept.code == root


def test_a_thousand_branches_over_five_hundred_steps_are_judged_in_seconds():
    run = runs.prenorm(blocks=500, steps=np.arange(500) * 50)
    for name in ("branches", "streams", "layers", "parameters"):
        run.table(name)
    import time

    start = time.perf_counter()
    diagnose(run)
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize("name", split(HEALTHY, ["mlp-he-momentum", "residual-rezero", "text-encoder-pre", "autoencoder-relu"]))
def test_healthy_training_raises_no_alarm_at_any_step_of_the_way(name):
    run, _ = train(f"healthy/{name}", HEALTHY[name])
    for step in run.steps:
        assert alarms(until(run, step)) == [], step


def test_units_that_the_first_steps_kill_are_an_alarm_from_the_fourth_sampled_step_on():
    case = ACTIVATIONS["dying-by-rate"]
    run, _ = train("sick/dying-by-rate", case.setup, case.proof)
    for step in run.steps[3:]:
        assert "dead-units" in codes(until(run, step)), step


def test_branches_that_drown_after_a_dominant_one_are_its_consequence_and_those_before_are_not():
    def make(code, depth):
        return Finding(code, "warning", ("x",), (0, 1), f"{code}.", {"depth": depth, "measured": 0.0}, "", "")

    dominant = make("dominant-branch", 4)
    assert [f.code for f in grouping.grouped([dominant, make("silent-branch", 6)])] == ["dominant-branch"]
    assert len(grouping.grouped([dominant, make("silent-branch", 2)])) == 2


def found(code, first=0, severity="warning", where=("x",), **evidence):
    return Finding(code, severity, where, (first, 100), f"{code}.", {"measured": 0.9, **evidence}, "", "")


@pytest.mark.parametrize(
    ("follows", "root", "does"),
    [
        (found("dominant-branch"), found("signal-explosion"), True),
        (found("gradient-spike", 20), found("update-too-large"), True),
        (found("gradient-spike"), found("update-too-large"), False),
        (found("rank-collapse"), found("dead-units", measured=1.0), True),
        (found("rank-collapse"), found("dead-units", measured=0.95), False),
        (found("gradient-spike", 20), found("exploding-gradient"), True),
        (found("gradient-spike", 20), found("exploding-gradient", 60), False),
        (found("signal-explosion", 30), found("update-too-large"), True),
        (found("signal-explosion"), found("update-too-large"), False),
        (found("signal-explosion", over="time"), found("update-too-large", 50), True),
        (found("blocked-gradient", where=("4",)), found("dead-units", where=("4.act",)), True),
        (found("blocked-gradient", where=("4",)), found("dead-units", where=("40.act",)), False),
        (found("below-epsilon"), found("silent-branch", severity="error"), True),
        (found("below-epsilon"), found("silent-branch"), False),
    ],
)
def test_what_follows_from_what(follows, root, does):
    assert [f.code for f in grouping.grouped([follows, root])] == ([root.code] if does else [follows.code, root.code])


def test_what_began_before_an_explosion_does_not_follow_from_it():
    def make(code, first):
        return Finding(code, "warning", ("x",), (first, 100), f"{code}.", {"measured": 0.0}, "", "")

    explosion = make("signal-explosion", 16)
    assert len(grouping.grouped([explosion, make("attention-entropy-collapse", 0)])) == 2
    assert [f.code for f in grouping.grouped([explosion, make("attention-entropy-collapse", 32)])] == ["signal-explosion"]
