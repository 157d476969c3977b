"""Random residual networks with a truth that is known from how they were drawn."""

from collections import Counter
from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gradflow.discovery import discover, find_branches
from gradflow.residuals import analyse
from gradflow.tracing import Tracer

D = 4
SUMS = (
    "x + f", "f + x", "x - f", "inplace", "alpha", "sum", "scaled", "stack", "addcmul", "addcmul_", "addcdiv", "addmm",
    "lerp", "lerp, learned",
)  # fmt: skip
SCALING = ("scaled", "addmm", "lerp", "lerp, learned")
QUICK = settings(max_examples=60, deadline=None)


@dataclass(frozen=True)
class Plan:
    """One block: where its norm stands, how its sum is written, its branches, what is nested in it, whose it is."""

    placement: str
    sum: str
    branches: int
    nested: bool
    shared: bool


plans = st.builds(
    Plan, st.sampled_from(["pre-norm", "post-norm", "none"]), st.sampled_from(SUMS), st.integers(1, 3), st.booleans(),
    st.booleans(),
)  # fmt: skip


class Inner(nn.Module):
    """A branch, with a skip inside if it is nested."""

    def __init__(self, nested):
        super().__init__()
        self.a, self.b, self.nested = nn.Linear(D, D), nn.Linear(D, D), nested

    def forward(self, x):
        h = self.a(x)
        return h + self.b(torch.tanh(h)) if self.nested else self.b(torch.tanh(h))


class Block(nn.Module):
    def __init__(self, plan):
        super().__init__()
        self.plan, self.norm = plan, nn.LayerNorm(D)
        self.gain, self.map, self.share = (nn.Parameter(torch.rand(shape)) for shape in ((D,), (D, D), ()))
        self.f = nn.ModuleList(Inner(plan.nested) for _ in range(plan.branches))

    def forward(self, x):
        n = self.norm(x) if self.plan.placement == "pre-norm" else x
        y = self.add(x, [f(n) for f in self.f])
        return self.norm(y) if self.plan.placement == "post-norm" else y

    def add(self, x, branches):
        how = self.plan.sum
        if how == "sum":
            return sum([*branches[:1], x, *branches[1:]])
        if how == "stack":
            return torch.stack([*branches[:1], x, *branches[1:]], dim=1).sum(1)
        if how == "scaled":
            x = 0.5 * x
        if how == "addcmul_":
            x = x.clone()
        for place, f in enumerate(branches):
            if how in ("x + f", "scaled") or (how in SCALING and place):  # a sum of scaled sums is no longer one
                x = x + f
            elif how == "f + x":
                x = f + x
            elif how == "x - f":
                x = x - f
            elif how == "inplace":
                f += x
                x = f
            elif how == "alpha":
                x = torch.add(x, f, alpha=0.5)
            else:
                x = self.fused(how, x, f)
        return x

    def fused(self, how, x, f):
        if how == "addcmul":
            return torch.addcmul(x, self.gain, f, value=-0.5)
        if how == "addcmul_":
            return x.addcmul_(f, self.gain)
        if how == "addcdiv":
            return x.addcdiv(f, 1 + self.gain)
        if how == "addmm":
            return torch.baddbmm(x, f, self.map.expand(len(x), D, D), beta=0.5)
        return torch.lerp(x, f, 0.25 if how == "lerp" else self.share)


class Stack(nn.Module):
    def __init__(self, drawn):
        super().__init__()
        self.stem, self.blocks = nn.Linear(D, D), nn.ModuleList(Block(plan) for plan in drawn if not plan.shared)
        self.order = []
        count = 0
        for plan in drawn:
            count += not plan.shared
            self.order.append(max(count - 1, 0))

    def forward(self, x):
        x = self.stem(x)
        for place in self.order if len(self.blocks) else ():
            x = self.blocks[place](x)
        return x

    def called(self):
        """Block numbers in order of execution."""
        return self.order if len(self.blocks) else []


def truth(net):
    joins, branches = Counter(), 0
    for place in net.called():
        plan = net.blocks[place].plan
        joins[f"blocks.{place}"] += 1
        branches += plan.branches
        if plan.nested:
            joins.update(f"blocks.{place}.f.{i}" for i in range(plan.branches))
            branches += plan.branches
    return joins, branches


def by_module(branches):
    return Counter(b.module for b in {b.join: b for b in branches}.values())


networks = st.lists(plans, min_size=1, max_size=5).map(Stack)


@QUICK
@given(networks)
def test_the_joins_are_those_that_were_drawn(net):
    branches = find_branches(net, torch.randn(2, 3, D))
    joins, count = truth(net)
    assert by_module(branches) == joins
    assert len(branches) == count
    assert len({b.name for b in branches}) == count


@QUICK
@given(networks)
def test_placement_depth_and_occurrence_follow_the_drawing(net):
    outer = [b for b in find_branches(net, torch.randn(2, 3, D)) if b.module.count(".") == 1]
    seen = Counter()
    at = 0
    for place in net.called():
        plan = net.blocks[place].plan
        for branch in outer[at : at + plan.branches]:
            assert branch.placement == plan.placement
            assert branch.occurrence == seen[place]
        seen[place] += 1
        at += plan.branches
    depths = [b.depth for b in outer]
    assert depths == sorted(depths)


@QUICK
@given(networks, st.booleans())
def test_gradient_mode_training_mode_and_a_second_pass_change_no_name(net, grad):
    names = [b.name for b in find_branches(net, torch.randn(2, 3, D))]
    with torch.set_grad_enabled(grad):
        assert [b.name for b in find_branches(net.eval(), torch.randn(4, 2, D))] == names


@QUICK
@given(networks)
def test_the_outer_joins_make_one_stream(net):
    _, structure = discover(net, torch.randn(2, 3, D))
    called = net.called()
    if not called:
        assert not structure.joins
        return
    outer = [join.node for join in structure.joins if join.branches[0].module.count(".") == 1]
    streams = [s for s in structure.streams if set(outer) & set(s.nodes)]
    assert len(streams) == 1
    assert list(streams[0].nodes[1:]) == outer
    between = [net.blocks[place].plan.placement for place in called[:-1]]
    scaled = any(net.blocks[place].plan.sum in SCALING for place in called)
    assert streams[0].exact == ("post-norm" not in between and not scaled)


@QUICK
@given(networks)
def test_the_addends_sum_to_the_joins_output(net):
    """Every operand of a join is traced to where it enters, so that y = a + Σ f can be checked with values."""
    values = {}

    class Watch:
        watches = frozenset({"add", "sub", "sum", "addcmul", "addcdiv", "baddbmm", "lerp"})

        def before(self, op, func, args, kwargs, operands):
            return [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]

        def after(self, node, op, func, args, kwargs, out, token):
            if op == "sum":  # nodes of its partial sums come right before it
                parts = token[0].unbind(token[1])
                for place in range(1, len(parts)):
                    before = sum(parts[:place])
                    values[node - len(parts) + 1 + place] = (before, parts[place], before + parts[place])
                return
            if op == "lerp":
                x, y, w = token
                operands = (x * (1 - w), y * w) if isinstance(w, torch.Tensor) else (x, y)
            else:
                combine = {"addcmul": torch.mul, "addcdiv": torch.div, "baddbmm": torch.matmul}.get(op)
                operands = (token[0], combine(*token[1:3])) if combine else token[:2]
            values[node] = (*operands, out.detach().clone())

        def entered(self, *_): ...
        def exited(self, *_): ...
        def backward(self, *_): ...
        def backward_done(self, *_): ...
        def fault(self, error):
            raise error

    tracer = Tracer(net, Watch())
    with tracer:
        net(torch.randn(2, 3, D))
    structure = analyse(tracer.take())
    assert len(structure.joins) == sum(truth(net)[0].values())
    for join in structure.joins:
        total = sum(a.scale * values[a.addition][a.position] for a in (join.skip, *join.addends))
        torch.testing.assert_close(total, values[join.node][2])
