"""The analysis of graphs that are written by hand: no torch, no model."""

import pytest

from gradflow.records import Call, Graph, Lineage, Node
from gradflow.residuals import analyse
from gradflow.residuals.roles import Roles
from gradflow.residuals.sums import all_but_one

WIDE, WEIGHT, GAIN = (2, 4), (4, 4), (4,)


class Sketch:
    """A graph drawn operation by operation; each method gives the index of its node."""

    def __init__(self):
        self.nodes, self.parents, self.calls = [], [], []
        self.scope, self.call = "", -1

    def op(self, name, /, *parents, shape=WIDE, floating=True, **detail):
        self.parents.append(parents)
        index = len(self.nodes)
        lineage = Lineage(self.parents)
        self.nodes.append(
            Node(index, name, parents, self.scope, self.call, shape, floating, True, False, detail, lineage)
        )
        return index

    def within(self, path):
        """From here on operations run in a new call of a module of the root."""
        self.calls.append(Call(len(self.calls), path, -1, "Module", True))
        self.scope, self.call = path, len(self.calls) - 1

    def input(self, **kwargs):
        return self.op("input", **kwargs)

    def weight(self, name="w", shape=WEIGHT):
        return self.op("parameter", shape=shape, name=name, buffer=False)

    def linear(self, x, name="w"):
        return self.op("linear", x, self.weight(name))

    def mlp(self, x, name="f"):
        return self.linear(self.op("relu", self.linear(x, f"{name}.0.weight")), f"{name}.1.weight")

    def analyse(self):
        return analyse(Graph(tuple(self.nodes), tuple(self.calls)))


def joins(sketch):
    return [(j.node, j.fork, j.skip.node, [a.node for a in j.addends]) for j in sketch.analyse().joins]


def test_a_join_names_its_operands_as_they_enter():
    g = Sketch()
    x = g.input()
    f = g.mlp(x)
    y = g.op("sub", x, f, alpha=2)
    (join,) = g.analyse().joins
    assert (join.node, join.fork, join.skip.node, join.skip.scale) == (y, x, x, 1)
    assert [(a.node, a.scale, a.addition, a.position) for a in join.addends] == [(f, -2, y, 1)]


def test_signs_multiply_through_partial_sums():
    g = Sketch()
    x = g.input()
    f, h = g.mlp(x), g.mlp(x)
    part = g.op("sub", f, h)
    y = g.op("sub", x, part, alpha=3)
    (join,) = g.analyse().joins
    assert join.node == y
    assert [(a.node, a.scale, a.addition, a.position) for a in join.addends] == [(f, -3, part, 0), (h, 3, part, 1)]


@pytest.mark.parametrize(("shape", "found"), [(GAIN, 1), ((1,), 1), (WIDE, 0)], ids=["channel", "scalar", "full"])
def test_a_skip_may_be_scaled_per_channel_and_no_further(shape, found):
    g = Sketch()
    x = g.input()
    g.op("add", g.op("mul", x, g.weight(shape=shape)), g.mlp(x))
    assert len(joins(g)) == found


def test_a_skip_scaled_by_the_data_is_a_gate():
    g = Sketch()
    x = g.input()
    gate = g.op("sigmoid", g.linear(x))
    g.op("add", g.op("mul", x, gate), g.mlp(x))
    assert joins(g) == []


def test_a_dependence_through_integers_is_none():
    g = Sketch()
    x = g.input()
    index = g.op("argmax", g.linear(x), shape=(2,), floating=False)
    g.op("add", x, g.op("embedding", index, g.weight()))
    assert joins(g) == []


def test_a_branch_without_a_weight_is_none():
    g = Sketch()
    x = g.input()
    g.op("add", x, g.op("tanh", x))
    assert joins(g) == []


def test_what_is_inside_a_branch_is_no_projection_for_what_comes_after_the_join():
    g = Sketch()
    x = g.input()
    inside = g.op("tanh", g.linear(x, "a"))
    first = g.op("add", x, g.linear(inside, "b"))
    taps = g.op("add", g.linear(inside, "c"), g.linear(g.op("tanh", g.linear(first, "d")), "e"))
    assert [node for node, *_ in joins(g)] == [first]
    assert taps not in [node for node, *_ in joins(g)]


def test_a_shortcut_with_a_norm_is_a_projection():
    g = Sketch()
    x = g.input()
    short = g.op("batch_norm", g.op("conv", x, g.weight(shape=(4, 4, 1, 1))))
    g.op("add", g.mlp(x), short)
    (join,) = g.analyse().joins
    assert (join.fork, join.skip.node, join.branches[0].kind) == (x, short, "projection")


@pytest.mark.parametrize("between", ["relu", "add"])
def test_an_update_needs_a_nonlinearity_to_be_a_branch_beside_a_linear_map(between):
    g = Sketch()
    x = g.input()
    h = g.linear(x, "down")
    h = g.op("relu", h) if between == "relu" else g.op("add", h, g.weight("bias", GAIN))
    g.op("add", g.linear(x, "base"), g.linear(h, "up"))
    assert len(joins(g)) == (between == "relu")


def test_a_side_input_is_not_a_fork():
    """A float mask, added to the scores of every layer, comes back to the later scores through the stream."""
    g = Sketch()
    x, mask = g.input(), g.input()
    for _ in range(2):
        scores = g.op("add", g.linear(x, "q"), mask)
        x = g.op("add", x, g.linear(g.op("softmax", scores), "o"))
    assert len(joins(g)) == 2
    assert mask not in [fork for _, fork, *_ in joins(g)]


def test_names_come_from_weights_where_no_module_makes_the_branch():
    g = Sketch()
    x = g.input()
    x = g.op("add", x, g.mlp(x, "first"))
    g.op("add", x, g.linear(x, "second.weight"))
    assert [b.name for b in g.analyse().branches] == ["first.0-first.1", "second"]


def test_a_stream_goes_on_through_views_and_breaks_exactness_at_a_norm():
    g = Sketch()
    x = g.input()
    a = g.op("add", x, g.mlp(x))
    b = g.op("view", a)
    c = g.op("add", b, g.mlp(b))
    (stream,) = g.analyse().streams
    assert stream.nodes == (x, a, c)
    assert stream.exact
    d = g.op("layer_norm", c)
    e = g.op("add", d, g.mlp(d))
    (stream,) = g.analyse().streams
    assert stream.nodes == (x, a, c, e)
    assert not stream.exact


def test_the_outermost_of_several_joins_from_one_fork_goes_on_with_the_stream():
    g = Sketch()
    x = g.input()
    a = g.op("add", x, g.mlp(x))
    inner = g.op("add", a, g.mlp(a))
    outer = g.op("add", a, g.linear(inner, "up"))
    streams = {s.nodes for s in g.analyse().streams}
    assert streams == {(x, a, outer), (a, inner)}


def test_a_shared_module_is_told_by_its_occurrence():
    g = Sketch()
    x = g.input()
    for _ in range(3):
        g.within("block")
        x = g.op("add", x, g.mlp(x, "f"))
    branches = g.analyse().branches
    assert [b.occurrence for b in branches] == [0, 1, 2]
    assert [b.depth for b in branches] == [1, 2, 3]
    assert len({b.name for b in branches} | {b.join for b in branches}) == 6


def test_a_long_sum_is_one_join_and_does_not_recurse():
    g = Sketch()
    x = total = g.input()
    for _ in range(300):
        total = g.op("add", total, g.linear(g.op("relu", g.linear(x)), "v"))
    (join,) = g.analyse().joins
    assert join.node == total
    assert len(join.addends) == 300


def test_ways_that_are_too_many_to_follow_are_reported(monkeypatch):
    monkeypatch.setattr("gradflow.residuals.roles._VISITS", 3)
    g = Sketch()
    x = g.input()
    for _ in range(4):
        x = g.op("add", g.linear(x, "s"), g.mlp(x))
    assert [p.what for p in g.analyse().problems] == ["long ways"]


def test_between_are_the_nodes_on_the_ways_alone():
    g = Sketch()
    x = g.input()
    a = g.op("relu", x)
    aside = g.op("tanh", x)
    b = g.op("mul", a, aside)
    other = g.op("sin", g.input())
    c = g.op("add", b, other)
    roles = Roles(g.nodes)
    assert roles.between(a, c) == [b, c]
    assert roles.between(x, b) == [a, aside, b]
    assert roles.between(a, other) == []


@pytest.mark.parametrize("masks", [[0b11, 0b01], [0b111, 0b110, 0b011], [1, 2, 4, 7]])
def test_all_but_one_is_the_intersection_of_the_others(masks):
    for place, mask in enumerate(all_but_one(masks)):
        expected = -1
        for other, value in enumerate(masks):
            expected &= value if other != place else -1
        assert mask == expected


def test_ancestors_are_the_same_however_they_are_worked_out(monkeypatch):
    parents = [(), (0,), (0, 1), (), (2, 3), (4, 1)]
    known = [Lineage(parents).ancestors(i) for i in range(6)]
    monkeypatch.setattr(Lineage, "_KEPT", 0)
    assert [Lineage(parents).ancestors(i) for i in range(6)] == known == [0, 1, 0b11, 0, 0b1111, 0b11111]


def _layer(g, x, path, parent):
    """A call of a module below `parent` with one learned operation."""
    g.calls.append(Call(len(g.calls), path, parent, "Linear", True, inputs=(x,)))
    g.scope, g.call = path, len(g.calls) - 1
    y = g.op("relu", g.linear(x, f"{path}.weight"))
    g.calls[-1] = Call(g.call, path, parent, "Linear", True, outputs=(y,), inputs=(x,))
    g.scope, g.call = "", -1
    return y


def test_a_plain_part_of_a_model_has_a_trunk_beside_the_streams():
    g = Sketch()
    x = g.input()
    for i in range(5):
        x = _layer(g, x, f"stem.{i}", -1)
    first = x
    for i in range(2):
        x = g.op("add", x, _layer(g, x, f"blocks.{i}", -1))
    streams = g.analyse().streams
    assert [(s.name, s.kind, len(s.points)) for s in streams] == [("stream", "stream", 3), ("stem", "trunk", 5)]
    assert streams[1].nodes[-1] == first


def test_two_layers_before_a_stream_are_no_trunk():
    g = Sketch()
    x = g.input()
    for i in range(2):
        x = _layer(g, x, f"stem.{i}", -1)
    g.op("add", x, g.mlp(x))
    assert [s.kind for s in g.analyse().streams] == ["stream"]
