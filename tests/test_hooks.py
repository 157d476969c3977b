"""Hooks on autograd nodes: several uses of one node, and what they keep alive."""

from __future__ import annotations

import weakref

import pytest
import torch

from gradflow.recorder.hooks import Hooks, undisturbed


def edge(tensor):
    return tensor.grad_fn, tensor.output_nr


@pytest.fixture
def faults():
    return []


@pytest.fixture
def hooks(faults):
    placed = Hooks(faults.append)
    yield placed
    placed.remove()


def test_each_use_of_an_autograd_node_gets_the_gradient_of_its_output_whatever_others_do(hooks, faults):
    first, second = torch.ones(4, requires_grad=True).split(2)
    seen = []
    hooks.gradient(edge(first), lambda g: seen.append(("first", g.tolist())))
    hooks.gradient(edge(second), lambda _: 1 / 0)
    hooks.gradient(edge(second), lambda g: seen.append(("second", g.tolist())))
    (first.sum() + 2 * second.sum()).backward()
    assert seen == [("first", [1, 1]), ("second", [2, 2])]
    assert [type(fault) for fault in faults] == [ZeroDivisionError]


def test_output_that_gets_no_gradient_is_passed_over(hooks, faults):
    first, second = torch.ones(4, requires_grad=True).unbind()[:2]
    seen = []
    hooks.gradient(edge(first), lambda g: seen.append(float(g)))
    hooks.gradient(edge(second), lambda g: seen.append(float(g)))
    second.backward()
    assert not faults
    assert seen in ([1.0], [0.0, 1.0])


def test_nodes_that_live_at_once_are_told_apart(hooks):
    """An autograd node may outlive the object that Python shows of it (PyTorch 2.11), whose address another may get."""
    x, seen = torch.ones(1, requires_grad=True), []
    results = [x * 2 for _ in range(50)]
    for number, y in enumerate(results):
        hooks.gradient(edge(y), lambda _, number=number: seen.append(number))
    for y in results:
        y.backward()
    assert seen == list(range(50))


def test_hooks_keep_no_activation_alive(hooks):
    y = torch.ones(3, requires_grad=True).exp()
    hooks.gradient(edge(y), lambda _: None)
    gone = weakref.ref(y)
    del y
    assert gone() is None


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_autocast_of_either_kind_is_off_for_our_own_arithmetic_alone(kind):
    was = torch.is_autocast_enabled(kind)
    torch.set_autocast_enabled(kind, True)
    try:
        with undisturbed():
            assert not torch.is_autocast_enabled(kind)
        assert torch.is_autocast_enabled(kind)
    finally:
        torch.set_autocast_enabled(kind, was)
