"""`find_branches` sees exactly the joins that are there, and leaves the model as it found it."""

import gc
import random
import time
from collections import Counter

import numpy as np
import pytest
import torch
import traps
from torch import nn
from traps.attention import attention, pre_norm

from gradflow.discovery import discover, find_branches
from gradflow.errors import UsageError


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", traps.TRAPS)
def test_the_joins_of_every_trap_are_those_written_by_hand(name):
    trap = traps.TRAPS[name]
    model, args = trap.build()
    branches = find_branches(model, *args)
    joins = {b.join: b for b in branches}
    assert Counter(b.module for b in joins.values()) == Counter(trap.joins)
    assert len(branches) == trap.branches
    assert sum(b.kind == "projection" for b in joins.values()) == trap.projections
    assert len({b.name for b in branches}) == len(branches)


# ------------------------------------------------------------------------------------------- the model is left as found


class Everything(nn.Module):
    """Batch norm, dropout, Python's random numbers, a counter buffer, a frozen layer, and its own mode switch."""

    def __init__(self):
        super().__init__()
        self.bn, self.drop, self.lin, self.frozen = nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4), nn.Linear(4, 4)
        self.frozen.requires_grad_(requires_grad=False)
        self.frozen.eval()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", None)

    def forward(self, x):
        random.random(), np.random.rand()
        self.calls += 1
        self.last = x.detach()
        self.lin.eval()
        return x + self.frozen(self.lin(self.drop(self.bn(x))))


def _state(model):
    return {
        "buffers": {n: None if b is None else b.clone() for m in model.modules() for n, b in m._buffers.items()},
        "identities": [id(b) for m in model.modules() for b in m._buffers.values()],
        "flags": [m.training for m in model.modules()],
        "grads": [(p.requires_grad, p.grad) for p in model.parameters()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "random": (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()),
        "grad mode": torch.is_grad_enabled(),
        "collection": gc.isenabled(),
    }


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_and_the_random_state_are_left_as_found(fails):
    model = Everything()
    model.lin.weight.grad = torch.ones(4, 4)
    before = _state(model)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    if fails:
        with pytest.raises(RuntimeError, match="shape"):
            find_branches(model, torch.randn(8, 4, 3, generator=torch.Generator().manual_seed(1)))
    else:
        find_branches(model, x)
    torch.testing.assert_close(before, _state(model), rtol=0, atol=0)


def test_wrong_arguments_raise_what_python_raises():
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        find_branches(Everything())


@pytest.mark.parametrize(
    ("thing", "said"), [(nn.Linear, "the class Linear itself"), ("gpt2", "a str"), (None, "a NoneType")]
)
def test_what_is_no_model_is_refused_with_what_to_pass(thing, said):
    with pytest.raises(UsageError, match=f"expected a torch.nn.Module .* got {said}"):
        find_branches(thing)


# ------------------------------------------------------------------------------------------- names


def _names(model, *args):
    return [b.name for b in find_branches(model, *args)]


X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


def test_branches_are_named_by_the_module_that_makes_them():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    assert _names(model, X) == [
        "layers.0.self_attn", "layers.0.linear1-linear2", "layers.1.self_attn", "layers.1.linear1-linear2",
    ]  # fmt: skip
    assert {b.placement for b in find_branches(model, X)} == {"pre-norm"}


def test_names_stay_when_other_blocks_are_dropped():
    block = lambda: traps.Net(lambda m, x: x + m.f(x), f=traps.mlp())
    forward = lambda m, x: torch.nn.Sequential(*[b for b, keep in zip(m.b, m.keep, strict=True) if keep])(m.stem(x))
    model = traps.Net(forward, stem=nn.Linear(8, 8), b=nn.ModuleList(block() for _ in range(3)))
    model.keep = [True, True, True]
    everything = _names(model, X)
    model.keep = [False, True, True]
    assert _names(model, X) == everything[1:]


def test_occurrences_of_a_shared_block_are_numbered_and_a_teacher_does_not_shift_them():
    student = traps.Net(
        lambda m, x: m.b(m.b(m.stem(x))), stem=nn.Linear(8, 8), b=traps.Net(lambda m, x: x + m.f(x), f=traps.mlp())
    )

    def with_teacher(m, x):
        with torch.no_grad():
            target = m.s(x)
        return m.s(x) * target

    assert _names(student, X) == ["b.f", "b.f@1"]
    assert _names(traps.Net(with_teacher, s=student), X) == ["s.b.f@nograd", "s.b.f@nograd@1", "s.b.f", "s.b.f@1"]


def test_depth_counts_joins_from_the_input():
    assert [b.depth for b in find_branches(*_built("nested_adapter"))] == [1, 2, 3, 4]


def _built(name):
    model, args = traps.TRAPS[name].build()
    return model, *args


@pytest.mark.parametrize(
    ("name", "placement"),
    [
        ("causal_mask", "pre-norm"), ("rms_norm_by_hand", "pre-norm"), ("adaptive_norm", "pre-norm"),
        ("scaled_skip", "post-norm"), ("plain", "none"), ("basic_block", "none"), ("shifted_windows", "none"),
        ("pre_activation_with_blur", "pre-norm"),
    ],
)  # fmt: skip
def test_the_placement_of_the_norm(name, placement):
    assert {b.placement for b in find_branches(*_built(name)) if b.kind == "identity"} == {placement}


# ------------------------------------------------------------------------------------------- streams and trunks


@pytest.mark.parametrize(
    ("name", "streams"),
    [
        ("plain", [("stream", 2, True)]), ("causal_mask", [("b", 4, True)]), ("scaled_skip", [("stream", 2, False)]),
        ("shared_block", [("f", 3, True)]), ("reversible", [("stream", 2, True), ("stream@1", 2, True)]),
        ("object_queries", [("e", 4, False), ("d", 6, False)]), ("basic_block", [("stream", 2, False)]),
    ],
)  # fmt: skip
def test_joins_chain_into_streams(name, streams):
    _, structure = discover(*_built(name))
    assert [(s.name, len(s.points) - 1, s.exact) for s in structure.streams] == streams
    assert all(len(s.points) == len(s.nodes) == len(set(s.points)) for s in structure.streams)
    assert {b.stream for b in structure.branches} == {s.name for s in structure.streams}


def test_a_plain_stack_has_a_trunk_in_the_streams_place():
    layers = [nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(4)]
    model = traps.Net(lambda m, x: m.head(m.body(x)), body=nn.Sequential(*layers), head=nn.Linear(8, 2))
    _, structure = discover(model, X)
    (trunk,) = structure.streams
    assert trunk.kind == "trunk"
    assert trunk.points == ("body.0", "body.1", "body.2", "body.3")


def test_what_hands_its_input_on_is_no_point_of_a_trunk():
    def forward(m, x):
        for layer, norm in zip(m.layers, m.norms, strict=True):
            x = norm(layer(x))
        return x

    layers, norms = (nn.ModuleList(make() for _ in range(4)) for make in (lambda: nn.Linear(8, 8), nn.Identity))
    _, structure = discover(traps.Net(forward, layers=layers, norms=norms), X)
    (trunk,) = structure.streams
    assert trunk.points == ("layers.0", "layers.1", "layers.2", "layers.3")


# ------------------------------------------------------------------------------------------- cost


def test_a_pass_of_48_blocks_is_traced_and_analysed_within_a_second():
    blocks = [
        traps.Net(
            pre_norm(), a=attention(), n1=nn.LayerNorm(8), n2=nn.LayerNorm(8), f=traps.mlp()
        )
        for _ in range(48)
    ]
    model = nn.Sequential(nn.Linear(8, 8), *blocks)
    start = time.process_time()
    assert len(find_branches(model, X)) == 96
    assert time.process_time() - start < 1
