"""Measures parameters over one optimizer step: weights before it, gradients before clipping, the update it makes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from gradflow import statistics
from gradflow.recorder.measurable import measurable
from gradflow.tracing.modules import names_by_identity

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Mapping

    from torch import Tensor

    from gradflow.recorder.buffer import Buffer
    from gradflow.statistics import Number


_COLUMNS = {"square": "grad_sq", "largest": "grad_max", "zeros": "grad_zeros", "nonfinite": "nonfinite"}


def parameter_names(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by name, the first name for a shared one, without the segments that wrappers add."""
    names = names_by_identity(model)
    return {names[id(parameter)][0]: parameter for parameter in model.parameters()}


class ParameterTaps:
    """The parameters of one sampled step. Weights are copied at its start (for `updates`): their memory once more.

    Copies in a CPU's memory stay in `rooms`, by name, for later steps: new memory costs as much time as filling it.
    With `norm_only` nothing but Σ g² is measured, which the global norm is made of.
    """

    def __init__(
        self, model: nn.Module, buffer: Buffer, *, updates: bool = True,
        owned: Callable[[nn.Parameter], bool] = lambda _: True, norm_only: bool = False,
        rooms: dict[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        self._buffer = buffer
        self._rooms = {} if rooms is None else rooms
        self._updates = updates
        self._norm_only = norm_only
        self._parameters = {n: p for n, p in parameter_names(model).items() if not nn.parameter.is_lazy(p) and owned(p)}
        self._before: dict[str, Tensor] = {}
        self._gradients: dict[str, dict[str, Number | None]] = {}
        self._weights: dict[str, Number] = {}
        self._by_id = {id(p): n for n, p in self._parameters.items()}

    def start(self) -> None:
        """Measure and keep the weights."""
        if self._norm_only:
            return
        on_device: dict[str, Tensor | None] = {}
        for name, parameter in self._parameters.items():
            weight = measurable(parameter.detach())
            if weight is None:
                continue
            copied = self._updates and parameter.requires_grad
            self._buffer.put("parameters", name, {"n": float(weight.numel())})
            if weight.device.type != "cpu":
                on_device[name] = weight
                if copied:
                    self._before[name] = weight.clone()
                continue
            if copied:
                self._before[name], square = statistics.copy(weight, self._rooms.get(name))
                self._rooms[name] = self._before[name]
            else:
                square = statistics.sum_squares(weight)
            self._buffer.put("parameters", name, {"weight_sq": square})
        for name, square in _squares(on_device).items():
            self._buffer.put("parameters", name, {"weight_sq": square})

    def weights(self) -> None:
        """Measure Σ w² as the weights stand; a later call replaces an earlier one."""
        visible = {name: measurable(parameter.detach()) for name, parameter in self._parameters.items()}
        self._weights.update(_squares(visible))

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
        visible: dict[str, Tensor | None] = {}
        for name in names:
            gradient = self._parameters[name].grad
            visible[name] = None if gradient is None or name in besides else _visible(gradient)
        if self._norm_only:
            self._gradients.update({name: {"grad_sq": square} for name, square in _squares(visible).items()})
        else:
            self._gradients.update(_measured(visible))
        return {name for name, gradient in visible.items() if gradient is not None}

    def finish(self) -> None:
        """Measure the updates, now that the optimizer has stepped."""
        for name, values in self._gradients.items():
            self._buffer.put("parameters", name, values)
        for name, square in self._weights.items():
            self._buffer.put("parameters", name, {"weight_sq": square})
        after = {name: measurable(self._parameters[name].detach()) for name in self._before}
        pairs = {
            name: (self._before[name], weight) for name, weight in after.items()
            if weight is not None and weight.shape == self._before[name].shape
        }  # fmt: skip
        moved = statistics.sum_squared_differences_each(*([pair[i] for pair in pairs.values()] for i in (0, 1)))
        for name, square in zip(pairs, moved, strict=True):
            self._buffer.put("parameters", name, {"update_sq": square})
        self._before.clear()


def _visible(gradient: Tensor) -> Tensor | None:
    """A gradient that can be measured: a dense one that hides nothing, or a sparse one with each row once."""
    return gradient.coalesce() if gradient.layout == torch.sparse_coo else measurable(gradient.detach())


def _squares(tensors: Mapping[str, Tensor | None]) -> dict[str, Number]:
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return dict(zip(present, statistics.sum_squares_each(list(present.values())), strict=True))


def _measured(gradients: Mapping[str, Tensor | None]) -> dict[str, dict[str, Number | None]]:
    present = {name: gradient for name, gradient in gradients.items() if gradient is not None}
    found = statistics.measure_each(list(present.values()), tuple(_COLUMNS))
    return {
        name: {_COLUMNS[figure]: value for figure, value in figures.items()}
        for name, figures in zip(present, found, strict=True)
    }
