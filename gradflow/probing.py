"""One forward and one backward pass of a model, with every table in memory and the model left as found."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pyarrow as pa
import torch
from torch import Tensor, nn

from gradflow.discovery import eager, preserved
from gradflow.errors import UsageError
from gradflow.recorder.description import Description
from gradflow.recorder.plans import Plans
from gradflow.recorder.recording import StepInProgress
from gradflow.records import Problem
from gradflow.schema import TABLES
from gradflow.store import Run
from gradflow.store.parts import arrow_schema
from gradflow.tracing.modules import tensors_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from gradflow.recorder.recording import Finished

_ROWS = 256
_NO_GRADIENT = Problem("loss", "", "it does not depend on anything that requires a gradient: no backward pass was run")


def probe(model: nn.Module, /, *args: Any, loss: Callable[[Any], Tensor] | None = None, **kwargs: Any) -> Run:
    """What signal and gradient do in one forward and one backward pass of `model(*args, **kwargs)`.

    ```python
    run = gradflow.probe(model, batch)
    print(run.table("branches"))
    ```

    The model runs in its current mode (train or eval) and is left as found: parameters, gradients, buffers, random
    state, hooks, `requires_grad`. Nothing is written to a disk. What the model raises comes through unchanged.

    Args:
        model: The module.
        *args: What its forward takes.
        **kwargs: What its forward takes.
        loss: Makes a scalar of the output. By default a scalar output itself, or its `loss`, or else the mean square
            of its floating-point tensors.

    Returns:
        A run with the single step 0. A loss that depends on no parameter or input that requires a gradient leaves the
        gradient columns null and stands in `run.meta["problems"]`.

    Raises:
        UsageError: `model` is no module, or the loss is no scalar.
    """
    if not isinstance(model, nn.Module):
        kind = f"the class {model.__name__} itself" if inspect.isclass(model) else f"a {type(model).__name__}"
        raise UsageError(
            f"expected a torch.nn.Module and what its forward takes, as in probe(model, batch); got {kind}"
        )
    if loss is not None and not callable(loss):
        raise UsageError(
            f"expected loss to be a function of the model's output, got a {type(loss).__name__}; "
            "pass the inputs by position, and the loss as loss=lambda output: ..."
        )
    finished, followed = _passed(model, args, kwargs, loss or _default_loss)
    config = {"every_n_steps": 1, "rows": _ROWS, "tables": sorted(TABLES), "probe": True}
    description = Description(uuid4().hex, config, {})
    description.add(finished.structures, finished.layers)
    if not followed:
        description.note([_NO_GRADIENT])
    rows = finished.rows()
    description.note(finished.problems(rows))
    tables = {table: pa.Table.from_pylist(found, schema=arrow_schema(table)) for table, found in rows.items()}
    return Run(description.meta(model, (), stopped=None), tables)


def _passed(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Callable[[Any], Tensor]
) -> tuple[Finished, bool]:
    """The measured pass, and whether there was a gradient to follow."""
    faults: list[Exception] = []
    own = _own_gradients(model, tensors_in((args, kwargs)))
    with preserved(model), eager(), own, torch.inference_mode(False), torch.enable_grad():
        step = StepInProgress(
            model, 0, Plans(), rows=_ROWS, tables=frozenset(TABLES), on_error=faults.append, scale=lambda: None,
            trains=False,
        )  # fmt: skip
        try:
            step.start(None)
            value = loss(model(*args, **kwargs))
            step.rest()
            _check(value)
            step.backward(value, None)
            followed = value.requires_grad
            if followed:
                value.backward()  # type: ignore[no-untyped-call]
                step.gradients(None, scaled=False)
            finished = step.finish()
            step.leeway.close()
        except BaseException:
            step.abandon()
            raise
    if faults:
        raise faults[0]
    return finished, followed


def _check(value: Any) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        got = f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}" if isinstance(value, Tensor) else value
        kind = got if isinstance(got, str) else f"a {type(got).__name__}"
        raise UsageError(f"expected the loss to be a scalar tensor, got {kind}; reduce it, for example with .mean()")


def _default_loss(output: Any) -> Tensor:
    """A scalar output, its loss, or the mean square of its floating-point tensors."""
    if isinstance(output, Tensor) and output.numel() == 1 and output.is_floating_point():
        return output
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(own, Tensor) and own.numel() == 1:
        return own
    tensors = [tensor for tensor in tensors_in(output) if tensor.is_floating_point() and tensor.numel()]
    if not tensors:
        raise UsageError(
            f"expected an output with floating-point tensors to make a loss of, got a {type(output).__name__} without; "
            "pass loss=lambda output: ..."
        )
    squares = [tensor.square().sum() for tensor in tensors]
    total = squares[0]
    for square in squares[1:]:
        total = total + square
    return total / sum(tensor.numel() for tensor in tensors)


@contextlib.contextmanager
def _own_gradients(model: nn.Module, inputs: Iterable[Tensor]) -> Iterator[None]:
    """Gradients start from nothing, and no optimizer that hangs on them takes a step meanwhile.

    Those of the inputs are put back; `preserved` does so for the parameters.
    """
    given = [(tensor, tensor.grad) for tensor in inputs if tensor.is_leaf and tensor.requires_grad]
    for tensor, _ in given:
        tensor.grad = None
    hooked = [p._post_accumulate_grad_hooks for p in model.parameters() if p._post_accumulate_grad_hooks]  # noqa: SLF001
    kept = [dict(hooks) for hooks in hooked]
    for parameter in model.parameters():
        parameter.grad = None
    for hooks in hooked:
        hooks.clear()
    try:
        yield
    finally:
        for tensor, gradient in given:
            tensor.grad = gradient
        for hooks, before in zip(hooked, kept, strict=True):
            hooks.update(before)
