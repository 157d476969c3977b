"""Every recorded figure equals what an independent float64 computation of the same formula gives (`oracle.py`)."""

import math

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradflow

D = 12


class Sublayer(nn.Module):
    def __init__(self, width=D, hidden=20):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """`layers` sublayers behind an input map; a subclass says how they join, once for the net and once by hand."""

    count, shape = 3, (2, 7, D)

    def __init__(self):
        super().__init__()
        self.inp = nn.Linear(D, D)
        self.sub = nn.ModuleList(Sublayer() for _ in range(self.count))
        self.out = nn.Linear(D, 3)

    def forward(self, x):
        return self.out(self.joined(self.inp(x)))

    def by_hand(self, x, tape):
        return self.out(self.listed(self.inp(x), tape))

    def joined(self, x):
        for f in self.sub:
            x = x + f(x)
        return x

    def listed(self, x, tape):
        for f in self.sub:
            x = tape.join(x, f)
        return x


class PreNorm(Net):
    """The plain case."""


class Swapped(Net):
    """The branch stands on the left of the sum."""

    def joined(self, x):
        for f in self.sub:
            x = f(x) + x
        return x


class ScaledSkip(Net):
    """The skip is measured after its scaling."""

    def joined(self, x):
        for f in self.sub:
            x = 0.5 * x + f(x)
        return x

    def listed(self, x, tape):
        for f in self.sub:
            x = tape.join(x, f, skip=lambda s: 0.5 * s)
        return x


class LearnedGain(Net):
    """The skip passes a learned per-channel gain, and the branch a scalar one."""

    def __init__(self):
        super().__init__()
        self.gain, self.scale = nn.Parameter(torch.rand(D) + 0.5), nn.Parameter(torch.tensor(0.3))

    def joined(self, x):
        for f in self.sub:
            x = self.gain * x + self.scale * f(x)
        return x

    def listed(self, x, tape):
        for f in self.sub:
            x = tape.join(x, lambda t, f=f: self.scale * f(t), skip=lambda s: self.gain * s)
        return x


class Subtracted(Net):
    """A subtracted branch carries its sign."""

    def joined(self, x):
        for f in self.sub:
            x = x - f(x)
        return x

    def listed(self, x, tape):
        for f in self.sub:
            x = tape.join(x, f, scales=[-1.0])
        return x


class Alpha(Net):
    """The factor of `alpha=` belongs to the operand; in-place and out of place."""

    def joined(self, x):
        x = torch.add(x, self.sub[0](x), alpha=0.25)
        x = torch.sub(x, self.sub[1](x), alpha=2.0)
        return x.clone().add_(self.sub[2](x), alpha=-1.5)

    def listed(self, x, tape):
        for f, scale in zip(self.sub, (0.25, -2.0, -1.5)):
            x = tape.join(x, f, scales=[scale])
        return x


class InPlace(Net):
    """The sum overwrites an operand: the skip twice, the branch once."""

    def joined(self, x):
        h = self.sub[0](x)
        x = x.clone()
        x += h
        h = self.sub[1](x)
        x = x.clone().add_(h)
        h = self.sub[2](x)
        h += x
        return h


class OverwrittenView(Net):
    """The skip that is overwritten is a view (as a linear map of three axes gives): autograd leads past its own node."""

    def __init__(self):
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(D, D) for _ in self.sub)

    def joined(self, x):
        for f in self.maps:
            x = F.linear(x, f.weight, f.bias)
            h = torch.tanh(f(x * 2))
            x += h
        return x

    def listed(self, x, tape):
        for f in self.maps:
            x = tape.join(F.linear(x, f.weight, f.bias), lambda t, f=f: torch.tanh(f(t * 2)))
        return x


class Parallel(Net):
    """Several branches in one sum, in four orders of association."""

    count = 8

    def joined(self, x):
        a = self.sub
        x = x + a[0](x) + a[1](x)
        x = a[2](x) + (x + a[3](x))
        x = x + (a[4](x) + a[5](x))
        y = a[6](x) + a[7](x)
        y += x
        return y

    def listed(self, x, tape):
        a = self.sub
        for first, second in ((0, 1), (2, 3), (4, 5), (6, 7)):
            x = tape.join(x, a[first], a[second])
        return x


class ForkOfTwo(Net):
    """One fork feeds two joins."""

    def joined(self, x):
        left, right = x + self.sub[0](x), x + self.sub[1](x)
        return self.sub[2](left) * right

    def listed(self, x, tape):
        left, right = tape.join(x, self.sub[0]), tape.join(x, self.sub[1])
        return self.sub[2](left) * right


class Nested(Net):
    """A join inside a branch (an adapter)."""

    def joined(self, x):
        h = self.sub[0](x)
        h = h + self.sub[1](h)
        return x + self.sub[2](h)

    def listed(self, x, tape):
        def branch(t):
            return self.sub[2](tape.join(self.sub[0](t), self.sub[1]))

        return tape.join(x, branch)


class Shared(Net):
    """One module called three times."""

    count = 1

    def joined(self, x):
        for _ in range(3):
            x = x + self.sub[0](x)
        return x

    def listed(self, x, tape):
        for _ in range(3):
            x = tape.join(x, self.sub[0])
        return x


class DetachedBranch(Net):
    """No gradient comes back through the second branch."""

    def joined(self, x):
        x = x + self.sub[0](x)
        x = x + self.sub[1](x).detach()
        return x + self.sub[2](x)

    def listed(self, x, tape):
        x = tape.join(x, self.sub[0])
        x = tape.join(x, lambda t: self.sub[1](t).detach())
        return tape.join(x, self.sub[2])


class DetachedSkip(Net):
    """No gradient comes back along the second skip."""

    def joined(self, x):
        x = x + self.sub[0](x)
        x = x.detach() + self.sub[1](x)
        return x + self.sub[2](x)

    def listed(self, x, tape):
        x = tape.join(x, self.sub[0])
        x = tape.join(x, self.sub[1], blocked=True)
        return tape.join(x, self.sub[2])


class PostNorm(Net):
    """The norm stands on the stream."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in self.sub)

    def joined(self, x):
        for f, norm in zip(self.sub, self.norms):
            x = norm(x + f(x))
        return x

    def listed(self, x, tape):
        for f, norm in zip(self.sub, self.norms):
            x = norm(tape.join(x, f))
        return x


class Broadcast(Net):
    """The branch is one row for the whole sequence."""

    def joined(self, x):
        for f in self.sub:
            x = x + f(x.mean(1, keepdim=True))
        return x

    def listed(self, x, tape):
        for f in self.sub:
            x = tape.join(x, lambda t, f=f: f(t.mean(1, keepdim=True)))
        return x


class FromInput(Net):
    """The fork is the model's input, which autograd does not follow."""

    def forward(self, x):
        return self.out(self.joined(x))

    def by_hand(self, x, tape):
        return self.out(self.listed(x, tape))


class SmallBranch(Net):
    """A branch that carries a thousandth of the gradient."""

    def joined(self, x):
        for f in self.sub:
            x = x + 1e-3 * f(x)
        return x

    def listed(self, x, tape):
        for f in self.sub:
            x = tape.join(x, lambda t, f=f: 1e-3 * f(t))
        return x


class Projection(Net):
    """The skip is mapped."""

    count = 0

    def __init__(self):
        super().__init__()
        self.short, self.up, self.down = nn.Linear(D, 5), nn.Linear(D, 9), nn.Linear(9, 5)
        self.out = nn.Linear(5, 3)

    def joined(self, x):
        return self.short(x) + self.down(torch.relu(self.up(x)))

    def listed(self, x, tape):
        return tape.join(x, lambda t: self.down(torch.relu(self.up(t))), skip=self.short)


NETS = [
    PreNorm, Swapped, OverwrittenView, ScaledSkip, LearnedGain, Subtracted, Alpha, InPlace, Parallel, ForkOfTwo, Nested, Shared,
    DetachedBranch, DetachedSkip, PostNorm, Broadcast, FromInput, SmallBranch, Projection,
]  # fmt: skip


class Conv(nn.Module):
    """Convolutions: features stand at axis 1."""

    def __init__(self):
        super().__init__()
        self.inp = nn.Conv2d(3, 8, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))

    def forward(self, x):
        x = self.inp(x)
        for conv, norm in zip(self.convs, self.norms):
            x = x + conv(F.relu(norm(x)))
        return x

    def by_hand(self, x, tape):
        x = self.inp(x)
        for conv, norm in zip(self.convs, self.norms):
            x = tape.join(x, lambda t, conv=conv, norm=norm: conv(F.relu(norm(t))))
        return x


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
