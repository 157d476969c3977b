"""Every recorded figure equals what an independent float64 computation of the same formula gives (`oracle.py`)."""

import math

import oracle
import pytest
import torch
from hand_nets import (
    NETS,
    Broadcast,
    Conv,
    DetachedBranch,
    DetachedSkip,
    InPlace,
    LearnedGain,
    Parallel,
    PostNorm,
    PreNorm,
    ScaledSkip,
    Subtracted,
    Swapped,
)

import gradflow
from gradflow.store.conservation import balances, conservation, unbalanced


def both(net, x, dtype=torch.float64):
    """The run of one step through gradflow, and the tape of the same step by hand in float64."""
    net, x = net.to(dtype), x.to(dtype)
    run = gradflow.probe(net, x, loss=loss_of)
    tape = oracle.Tape()
    reference = type(net)().double()
    reference.load_state_dict(net.state_dict())
    loss_of(reference.by_hand(x.double(), tape)).backward()
    return run, tape, reference


def loss_of(out):
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).sin().view(out.shape)
    return (out * weights).sum() + out.square().mean()


def close(got, expected, *, rel, scale=0.0):
    if expected is None or got is None:
        return got is None and expected is None
    return math.isclose(got, expected, rel_tol=rel, abs_tol=rel * scale)


def check_branches(run, tape, rel):
    rows = run.table("branches").to_pylist()
    wanted = [(join, i) for join in tape.joins for i in range(len(join.branches))]
    assert len(rows) == len(wanted)
    taken = set()
    for join, number in wanted:
        expected = oracle.branch_columns(join, number)
        # a join's branches are listed in the order of execution of the sum, which the net chooses: match by size
        row = min(
            (row for row in rows if id(row) not in taken),
            key=lambda row: abs(row["branch_sq"] - expected["branch_sq"]) + abs(row["out_sq"] - expected["out_sq"]),
        )
        taken.add(id(row))
        scales = {
            "dot": math.sqrt(expected["skip_sq"] * expected["branch_sq"]),
            "grad_dot": expected["grad_fork_sq"] or 0.0,
        }
        for column, value in expected.items():
            assert close(row[column], value, rel=rel, scale=scales.get(column, 0.0)), (row["branch"], column, row, expected)


@pytest.mark.parametrize("kind", NETS, ids=lambda kind: kind.__name__)
def test_branches_are_those_of_the_oracle_in_float64(kind):
    torch.manual_seed(0)
    run, tape, _ = both(kind(), torch.randn(kind.shape))
    check_branches(run, tape, 1e-10)


@pytest.mark.parametrize("kind", NETS, ids=lambda kind: kind.__name__)
def test_branches_are_those_of_the_oracle_in_float32(kind):
    torch.manual_seed(1)
    run, tape, _ = both(kind(), torch.randn(kind.shape), torch.float32)
    check_branches(run, tape, 1e-5)


def test_convolutions_are_those_of_the_oracle():
    torch.manual_seed(0)
    run, tape, _ = both(Conv(), torch.randn(2, 3, 4, 4))
    check_branches(run, tape, 1e-10)
    points = run.table("streams").to_pylist()
    tensors = [tape.joins[0].fork, *(join.out for join in tape.joins)]
    check_points(points, tensors, 1e-10, channel=1)


def check_points(points, tensors, rel, channel=-1, sequences=True):
    assert len(points) == len(tensors)
    for depth, (point, tensor) in enumerate(zip(points, tensors)):
        assert point["depth"] == depth
        for column, value in oracle.stream_columns(tensor, channel, sequences).items():
            assert close(point[column], value, rel=rel), (depth, column, point[column], value)


@pytest.mark.parametrize("kind", [PreNorm, Swapped, Subtracted, InPlace, PostNorm, ScaledSkip, DetachedBranch])
def test_points_of_a_stream_are_those_of_the_oracle(kind):
    torch.manual_seed(0)
    run, tape, _ = both(kind(), torch.randn(kind.shape))
    rows = run.table("streams").to_pylist()
    tensors = [tape.joins[0].fork, *(join.out for join in tape.joins)]
    check_points(rows, tensors, 1e-10)


@pytest.mark.parametrize("kind", [PreNorm, Swapped, Subtracted, InPlace, Broadcast, DetachedBranch])
def test_the_ledger_of_an_exact_stream_is_that_of_the_oracle_and_adds_up(kind):
    torch.manual_seed(0)
    run, tape, _ = both(kind(), torch.randn(kind.shape))
    points, rows = run.table("streams").to_pylist(), run.table("branches").to_pylist()
    signal = [points[0]["signal_share"], *(row["signal_share"] for row in rows)]
    gradient = [points[-1]["gradient_share"], *(row["gradient_share"] for row in rows)]
    assert signal == pytest.approx(oracle.signal_shares(tape.joins), rel=1e-10, abs=1e-12)
    assert gradient == pytest.approx(oracle.gradient_shares(tape.joins), rel=1e-10, abs=1e-12)
    assert sum(signal) == pytest.approx(1, abs=1e-12)
    assert sum(gradient) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("kind", [PostNorm, ScaledSkip, LearnedGain, DetachedSkip])
def test_a_stream_that_is_cut_has_a_ledger_a_piece(kind):
    torch.manual_seed(0)
    run, tape, _ = both(kind(), torch.randn(kind.shape))
    points, rows = run.table("streams").to_pylist(), run.table("branches").to_pylist()
    segments = run.streams[0].segments
    assert len(set(segments)) > 1
    for number in sorted(set(segments)):
        places = [i for i, segment in enumerate(segments) if segment == number]
        joins = [tape.joins[i] for i in places]
        signal = [points[places[0]]["signal_share"], *(rows[i]["signal_share"] for i in places)]
        assert signal == pytest.approx(oracle.signal_shares(joins), rel=1e-10)
        assert sum(signal) == pytest.approx(1)
        if joins[0].along.requires_grad:
            gradient = [points[places[-1] + 1]["gradient_share"], *(rows[i]["gradient_share"] for i in places)]
            assert gradient == pytest.approx(oracle.gradient_shares(joins), rel=1e-10)
            assert sum(gradient) == pytest.approx(1)


def test_branches_of_one_sum_have_their_own_gradient_shares():
    torch.manual_seed(0)
    run, tape, _ = both(Parallel(), torch.randn(Parallel.shape))
    rows = run.table("branches").to_pylist()
    shares = sorted(row["gradient_share"] for row in rows)
    assert shares == pytest.approx(sorted(oracle.gradient_shares(tape.joins)[1:]), rel=1e-9)


@pytest.mark.parametrize("kind", [PreNorm, PostNorm, Parallel, DetachedBranch, ScaledSkip])
def test_conservation_is_checked_and_what_does_not_add_up_is_a_problem(kind):
    torch.manual_seed(0)
    run, _, _ = both(kind(), torch.randn(kind.shape), torch.float32)
    found = conservation(run)
    assert found
    assert all(balance.sound and balance.signal == pytest.approx(1, abs=1e-5) for balance in found)
    assert any(balance.gradient == pytest.approx(1, abs=1e-5) for balance in found)
    assert unbalanced(found) == []
    points, rows = run.table("streams").to_pylist(), run.table("branches").to_pylist()
    rows[0]["signal_share"] += 0.5
    problems = unbalanced(balances(run.streams, run.branches, points, rows))
    assert [problem.what for problem in problems] == ["ledger"]
