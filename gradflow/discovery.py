"""Find a model's residual branches: one forward pass traced, analysed, and the model left as found."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gradflow.errors import UsageError
from gradflow.residuals import analyse
from gradflow.tracing import Tracer

if TYPE_CHECKING:
    from gradflow.records import Branch, Graph, Structure


def find_branches(model: nn.Module, /, *args: Any, **kwargs: Any) -> list[Branch]:
    """Residual branches that one forward pass `model(*args, **kwargs)` executes, in order of execution."""
    return discover(model, *args, **kwargs)[1].branches


def discover(model: nn.Module, /, *args: Any, **kwargs: Any) -> tuple[Graph, Structure]:
    """The traced graph of one forward pass, and the joins, streams and problems found in it."""
    if not isinstance(model, nn.Module):
        kind = "the class itself" if inspect.isclass(model) else f"a {type(model).__name__}"
        raise UsageError(
            f"expected a torch.nn.Module and what its forward takes, as in find_branches(model, batch); got {kind}"
        )
    tracer = Tracer(model)
    with tracer:
        model(*args, **kwargs)
    graph = tracer.take()
    return graph, analyse(graph)
