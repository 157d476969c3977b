"""Measures parameters over one optimizer step: weights before it, gradients before clipping, the update it makes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from gradflow import statistics
from gradflow.recorder.measurable import measurable

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Mapping

    from torch import Tensor

    from gradflow.recorder.buffer import Buffer
    from gradflow.statistics import Number


_COLUMNS = {"square": "grad_sq", "largest": "grad_max", "zeros": "grad_zeros", "nonfinite": "nonfinite"}


class ParameterTaps:
    """The parameters of one sampled step. Weights are copied at its start (for `updates`): their memory once more.

    Copies in a CPU's memory stay in `rooms`, by name, for later steps: new memory costs as much time as filling it.
    With `norm_only` nothing but Σ g² is measured, which the global norm is made of.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], buffer: Buffer, *, updates: bool = True,
        owned: Callable[[nn.Parameter], bool] = lambda _: True, norm_only: bool = False,
        rooms: dict[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        self._buffer = buffer
        self._rooms = {} if rooms is None else rooms
        self._updates = updates
        self._norm_only = norm_only
        self._parameters = {n: p for n, p in parameters.items() if not nn.parameter.is_lazy(p) and owned(p)}
        self._before: dict[str, Tensor] = {}
        self._gradients: dict[str, dict[str, Number | None]] = {}
        self._weights: dict[str, Number] = {}
        self._by_id = {id(p): n for n, p in self._parameters.items()}

    def start(self) -> None:
        """Measure and keep the weights."""
        if self._norm_only:
            return
        weights = _visible_of(self._parameters)
        moving = [name for name in weights if self._updates and self._parameters[name].requires_grad]
        held = [name for name in moving if weights[name].device.type == "cpu"]
        copies = statistics.copy_each([weights[name] for name in held], [self._rooms.get(name) for name in held])
        squares: dict[str, Number] = {}
        for name, (copy, square) in zip(held, copies, strict=True):
            self._before[name] = self._rooms[name] = copy
            squares[name] = square
        self._before |= {name: weights[name].clone() for name in moving if name not in squares}
        squares |= _squares({name: weight for name, weight in weights.items() if name not in squares})
        for name, weight in weights.items():
            self._buffer.put("parameters", name, {"n": float(weight.numel()), "weight_sq": squares[name]})

    def weights(self) -> None:
        """Measure Σ w² as the weights stand; a later call replaces an earlier one."""
        self._weights.update(_squares(_visible_of(self._parameters)))

    def names(self, of: Iterable[Tensor]) -> set[str]:
        """Names of those among some tensors that are parameters measured here."""
        return {self._by_id[id(p)] for p in of if id(p) in self._by_id}

    def of(self, names: Iterable[str]) -> list[nn.Parameter]:
        """The parameters of these names."""
        return [self._parameters[name] for name in names]

    @property
    def measured(self) -> frozenset[str]:
        """Names of the parameters whose gradient has been measured."""
        return frozenset(self._gradients)

    @property
    def on_host(self) -> bool:
        """Whether all parameters are in the host's memory."""
        return all(parameter.device.type == "cpu" for parameter in self._parameters.values())

    @property
    def broken(self) -> bool:
        """Whether a measured gradient is known not to be finite (on a device none is known to be)."""
        sums = (values.get("grad_sq") for values in self._gradients.values())
        return any(isinstance(value, float) and not math.isfinite(value) for value in sums)

    def cleared(self) -> bool:
        """Whether no parameter holds a gradient: a backward pass starts from nothing."""
        return all(parameter.grad is None for parameter in self._parameters.values())

    def gradients(self, of: Iterable[Tensor] | None = None, *, besides: Container[str] = ()) -> set[str]:
        """Measure the gradients as they stand, of all parameters or of some; later calls replace earlier ones.

        The names of those measured.
        """
        names = self._parameters if of is None else self.names(of)
        visible: dict[str, Tensor] = {}
        for name in names:
            gradient = self._parameters[name].grad
            seen = None if gradient is None or name in besides else _visible(gradient)
            if seen is not None:
                visible[name] = seen
        if self._norm_only:
            self._gradients.update({name: {"grad_sq": square} for name, square in _squares(visible).items()})
        else:
            found = statistics.measure_each(list(visible.values()), tuple(_COLUMNS))
            for name, values in zip(visible, found, strict=True):
                self._gradients[name] = {column: values[figure] for figure, column in _COLUMNS.items()}
        return set(visible)

    def finish(self) -> None:
        """Measure the updates, now that the optimizer has stepped."""
        for name, values in self._gradients.items():
            self._buffer.put("parameters", name, values)
        for name, square in self._weights.items():
            self._buffer.put("parameters", name, {"weight_sq": square})
        now = _visible_of({name: self._parameters[name] for name in self._before})
        stayed = [name for name, weight in now.items() if weight.shape == self._before[name].shape]
        before, after = [self._before[name] for name in stayed], [now[name] for name in stayed]
        moved = statistics.sum_squared_differences_each(before, after)
        for name, square in zip(stayed, moved, strict=True):
            self._buffer.put("parameters", name, {"update_sq": square})
        self._before.clear()


def _visible_of(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Their values, of those that can be measured."""
    seen = {name: measurable(parameter) for name, parameter in parameters.items()}
    return {name: weight for name, weight in seen.items() if weight is not None}


def _visible(gradient: Tensor) -> Tensor | None:
    """A gradient that can be measured: a dense one that hides nothing, or a sparse one with each row once."""
    return gradient.coalesce() if gradient.layout == torch.sparse_coo else measurable(gradient)


def _squares(tensors: Mapping[str, Tensor]) -> dict[str, Number]:
    return dict(zip(tensors, statistics.sum_squares_each(list(tensors.values())), strict=True))
