"""A residual sum inside another operation is found and measured as the same sum written out with `+` and `*`."""

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from trainings import same

import gradflow
from gradflow.discovery import discover

D = 8


class Block(nn.Module):
    """A block whose forward is one of two spellings of the same arithmetic."""

    def __init__(self, spelling, shape):
        super().__init__()
        make = lambda: nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 12), nn.Tanh(), nn.Linear(12, D))
        self.f, self.g, self.norm, self.spelling = make(), make(), nn.LayerNorm(D), spelling
        self.gain, self.share = nn.Parameter(torch.rand(D) + 0.5), nn.Parameter(torch.tensor(0.3))
        self.w = nn.Parameter(torch.randn(*shape) / 3)

    def forward(self, x):
        return self.spelling(self, x)


class Model(nn.Module):
    def __init__(self, spelling, *, weight=(D, D), batch=(6,)):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(D, D), nn.Linear(D, 2)
        self.blocks = nn.ModuleList(Block(spelling, weight) for _ in range(2))
        self.batches = torch.randn(3, *batch, D)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = self.call(block, x)
        return self.head(x)

    def call(self, block, x):
        return block(x)


def overwritten(m, x):
    x = x.clone()
    x += 0.5 * (m.gain * m.f(x.clone()))
    return x


def fused_overwriting(m, x):
    x = x.clone()
    return x.addcmul_(m.gain, m.f(x.clone()), value=0.5)


def overwritten_view(m, x):
    x = x.clone()
    flat = x.view(-1)
    flat += m.f(x.clone()).view(-1) * m.gain.repeat(6)
    return x


def fused_view(m, x):
    x = x.clone()
    x.view(-1).addcmul_(m.f(x.clone()).view(-1), m.gain.repeat(6))
    return x


def gru(m, x):
    z = torch.sigmoid(m.g(x))
    return (1 - z) * torch.tanh(m.f(x)) + z * x


def halves(x):
    return x.view(6, 2, D // 2).transpose(0, 1)


CUBE, HALVES = {"weight": (2, D, D), "batch": (2, 5)}, {"weight": (2, D // 2, D)}
PAIRS = {
    "stack": (lambda m, x: x + m.f(x), lambda m, x: torch.stack([x, m.f(x)]).sum(0)),
    "stack, branch first": (lambda m, x: m.f(x) + x, lambda m, x: torch.sum(torch.stack((m.f(x), x), -1), dim=-1)),
    "stack of three": (lambda m, x: x + m.f(x) + m.g(x), lambda m, x: torch.stack([x, m.f(x), m.g(x)], 1).sum((1,))),
    "stack of four": (
        lambda m, x: m.f(x) + x + m.g(x) + m.f(2 * x), lambda m, x: torch.stack([m.f(x), x, m.g(x), m.f(2 * x)]).sum(0)
    ),
    "stack of branches": (lambda m, x: x + (m.f(x) + m.g(x)), lambda m, x: x + torch.stack([m.f(x), m.g(x)]).sum(0)),
    "stack of a sum": (lambda m, x: (x + m.f(x)) + m.g(x), lambda m, x: torch.stack([x + m.f(x), m.g(x)]).sum(0)),
    "stack with a condition": (
        lambda m, x: (x + m.f(torch.ones_like(x))) + m.g(x),
        lambda m, x: torch.stack([x, m.f(torch.ones_like(x)), m.g(x)]).sum(0),
    ),
    "stack with an end that is no branch": (
        lambda m, x: (x + m.f(x)) + torch.ones_like(x), lambda m, x: torch.stack([x, m.f(x), torch.ones_like(x)]).sum(0)
    ),
    "stack before a norm": (
        lambda m, x: m.norm(x + m.f(x)), lambda m, x: m.norm(torch.stack([x, m.f(x)]).sum(0))
    ),
    "addcmul": (lambda m, x: x + m.gain * m.f(x), lambda m, x: torch.addcmul(x, m.gain, m.f(x))),
    "addcmul, value": (
        lambda m, x: torch.add(x, m.f(x) * m.gain, alpha=-0.5), lambda m, x: x.addcmul(m.f(x), m.gain, value=-0.5)
    ),
    "addcmul_": (overwritten, fused_overwriting),
    "addcmul_ on a view": (overwritten_view, fused_view),
    "addcmul, gated": (
        lambda m, x: x + torch.sigmoid(m.g(x)) * m.f(x), lambda m, x: torch.addcmul(x, torch.sigmoid(m.g(x)), m.f(x))
    ),
    "addcmul of itself": (lambda m, x: x + x * m.f(x), lambda m, x: torch.addcmul(x, x, m.f(x))),
    "addcmul, no skip": (lambda m, x: m.g(x) + m.gain * m.f(x), lambda m, x: torch.addcmul(m.g(x), m.gain, m.f(x))),
    "addcmul, partial sum": (
        lambda m, x: (x + m.gain * m.f(x)) + m.g(x), lambda m, x: torch.addcmul(x, m.gain, m.f(x)) + m.g(x)
    ),
    "addcmul of a partial sum": (
        lambda m, x: (x + m.g(x)) + m.gain * m.f(x), lambda m, x: torch.addcmul(x + m.g(x), m.gain, m.f(x))
    ),
    "addcmul, detached skip": (
        lambda m, x: x.detach() + m.gain * m.f(x), lambda m, x: torch.addcmul(x.detach(), m.gain, m.f(x))
    ),
    "addcdiv": (lambda m, x: x + m.f(x) / m.gain, lambda m, x: torch.addcdiv(x, m.f(x), m.gain)),
    "addcdiv, value": (
        lambda m, x: torch.sub(x, m.f(x) / m.gain, alpha=2), lambda m, x: torch.addcdiv(x, m.f(x), m.gain, value=-2)
    ),
    "addmm": (lambda m, x: x + m.f(x) @ m.w, lambda m, x: torch.addmm(x, m.f(x), m.w)),
    "addmm, scaled": (
        lambda m, x: torch.add(0.5 * x, torch.mm(m.f(x), m.w), alpha=2),
        lambda m, x: torch.addmm(x, mat2=m.w, mat1=m.f(x), alpha=2, beta=0.5),
    ),
    "addmm, bias": (lambda m, x: m.f(x @ m.w + m.gain), lambda m, x: m.f(torch.addmm(m.gain, x, m.w))),
    "addmm, update": (
        lambda m, x: m.g(x) + m.f(x) @ m.w, lambda m, x: torch.addmm(m.g(x), m.f(x), m.w)
    ),
    "baddbmm": (
        lambda m, x: x + torch.bmm(m.f(x), m.w), lambda m, x: x.baddbmm(m.f(x), m.w), CUBE
    ),
    "addbmm": (
        lambda m, x: x + torch.bmm(halves(m.f(x)), m.w).sum(0), lambda m, x: torch.addbmm(x, halves(m.f(x)), m.w), HALVES
    ),
    "addmv": (lambda m, x: x + torch.mv(m.w, m.f(x)), lambda m, x: torch.addmv(x, m.w, m.f(x)), {"batch": ()}),
    "addr": (
        lambda m, x: x + torch.outer(m.f(x)[:, 0], m.gain), lambda m, x: torch.addr(x, m.f(x)[:, 0], m.gain)
    ),
    "lerp": (lambda m, x: 0.75 * x + 0.25 * m.f(x), lambda m, x: torch.lerp(x, m.f(x), 0.25)),
    "lerp to the skip": (lambda m, x: 0.75 * m.f(x) + 0.25 * x, lambda m, x: m.f(x).lerp(x, 0.25)),
    "lerp, learned": (lambda m, x: (1 - m.share) * x + m.share * m.f(x), lambda m, x: x.lerp(m.f(x), m.share)),
    "lerp, gated": (gru, lambda m, x: torch.lerp(torch.tanh(m.f(x)), x, torch.sigmoid(m.g(x)))),
    "lerp of a lerp": (
        lambda m, x: 0.75 * (0.5 * x + 0.5 * m.f(x)) + 0.25 * m.g(x),
        lambda m, x: torch.lerp(torch.lerp(x, m.f(x), 0.5), m.g(x), 0.25),
    ),
    "lerp of a learned lerp": (
        lambda m, x: (1 - m.share) * ((1 - m.share) * x + m.share * m.f(x)) + m.share * m.g(x),
        lambda m, x: torch.lerp(torch.lerp(x, m.f(x), m.share), m.g(x), m.share),
    ),
    "lerp of partial sums": (
        lambda m, x: 0.75 * (x + torch.ones_like(x)) + 0.25 * (m.f(x) + m.g(x)),
        lambda m, x: torch.lerp(x + torch.ones_like(x), m.f(x) + m.g(x), 0.25),
    ),
    "lerp as a partial sum": (
        lambda m, x: m.g(x) + (0.75 * x + 0.25 * m.f(x)), lambda m, x: m.g(x) + torch.lerp(x, m.f(x), 0.25)
    ),
    "lerp_": (
        lambda m, x: 0.5 * x + 0.5 * m.f(x), lambda m, x: x.clone().lerp_(end=m.f(x.clone()), weight=0.5)
    ),
}  # fmt: skip


def trained(spelling, directory, sizes, dtype=torch.float64, record=True):
    """A model after three recorded steps, and the run."""
    model = Model(spelling, **sizes).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    recorder = gradflow.Recorder(model, optimizer, directory, every_n_steps=1 if record else 10**6)
    with recorder:
        for x in model.batches.to(dtype):
            with recorder.step():
                (model(x) - 1).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
    return model, recorder.run


@pytest.mark.parametrize("name", PAIRS)
def test_a_fused_sum_has_the_names_and_the_figures_of_the_written_one(name, tmp_path):
    written, fused, *sizes = PAIRS[name]
    sizes = sizes[0] if sizes else {}
    models = [Model(spelling, **sizes) for spelling in (written, fused)]
    torch.testing.assert_close(models[0](models[0].batches[0]), models[1](models[1].batches[0]))
    plain, other = (discover(model, model.batches[0])[1] for model in models)
    assert other.branches == plain.branches
    assert [(s.name, s.kind, s.points, s.exact, s.segments) for s in other.streams] == [
        (s.name, s.kind, s.points, s.exact, s.segments) for s in plain.streams
    ]
    assert not other.problems
    runs = [trained(spelling, tmp_path / str(i), sizes)[1] for i, spelling in enumerate((written, fused))]
    for table in ("branches", "streams", "layers"):
        expected, got = (sorted_rows(run, table) for run in runs)
        assert [key for key, _ in got] == [key for key, _ in expected]
        for (key, row), (_, wanted) in zip(got, expected, strict=True):
            for column, value in wanted.items():
                assert alike(row[column], value), (key, column, row[column], value)
    assert bool(plain.joins) == (runs[1].table("branches").num_rows > 0)


def sorted_rows(run, table):
    keys = ("step", {"branches": "branch", "streams": "stream", "layers": "layer"}[table], *(["point"] * (table == "streams")))
    rows = [(tuple(row[key] for key in keys), row) for row in run.table(table).to_pylist()]
    return sorted(rows, key=lambda row: row[0])


def alike(got, expected):
    if isinstance(expected, float) and isinstance(got, float):
        return math.isclose(got, expected, rel_tol=1e-10, abs_tol=1e-12) or (math.isnan(got) and math.isnan(expected))
    return got == expected


def test_joins_are_among_the_pairs():
    """The comparison above would pass if neither spelling were seen."""
    joins = {name: len(discover(model := Model(fused, **(sizes[0] if sizes else {})), model.batches[0])[1].joins)
             for name, (_, fused, *sizes) in PAIRS.items()}  # fmt: skip
    none = {"addcmul, no skip", "addmm, bias", "addmm, update", "lerp, gated", "lerp of partial sums"}
    assert {name for name, count in joins.items() if count == 0} == none


@pytest.mark.parametrize("name", ["stack of three", "addcmul, value", "addcmul_ on a view", "addmm, scaled", "lerp, learned"])
def test_training_with_fused_sums_ends_in_the_same_bits(name, tmp_path):
    _, fused, *sizes = PAIRS[name]
    states = [
        trained(fused, tmp_path / str(record), sizes[0] if sizes else {}, torch.float32, record=record)[0].state_dict()
        for record in (True, False)
    ]
    assert same(*states)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["stack of three", "addcmul, value", "addmm, scaled", "lerp, learned"])
def test_a_fused_sum_inside_a_checkpoint_is_measured_as_outside(name, reentrant, tmp_path, monkeypatch):
    _, plain = trained(PAIRS[name][1], tmp_path / "plain", {})
    monkeypatch.setattr(Model, "call", lambda _, block, x: checkpoint(block, x, use_reentrant=reentrant))
    _, run = trained(PAIRS[name][1], tmp_path / "checkpoint", {})
    columns = ("skip_sq", "branch_sq", "dot", "out_sq", "grad_out_sq", "grad_fork_sq", "grad_branch_sq")
    expected, got = (sorted_rows(r, "branches") for r in (plain, run))
    assert [key for key, _ in got] == [key for key, _ in expected]
    for (key, row), (_, wanted) in zip(got, expected, strict=True):
        for column in columns:
            assert row[column] is not None
            assert alike(row[column], wanted[column]), (key, column)


@pytest.mark.parametrize("name", ["stack of three", "addcmul, gated", "addmm, scaled", "lerp"])
def test_a_fused_sum_under_autocast_is_measured(name, tmp_path):
    """The product that is computed once more takes operands of two precisions."""
    model = Model(PAIRS[name][1])
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with gradflow.Recorder(model, optimizer, tmp_path, every_n_steps=1, strict=True) as recorder:
        for x in model.batches:
            with recorder.step():
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model(x).float().square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    exact = dict(sorted_rows(trained(PAIRS[name][1], tmp_path / "exact", {})[1], "branches"))
    rows = [row for row in sorted_rows(recorder.run, "branches") if row[0][0] == 0]
    assert rows
    for key, row in rows:
        assert row["branch_sq"] == pytest.approx(exact[key]["branch_sq"], rel=0.05)
        assert row["grad_branch_sq"] > 0
