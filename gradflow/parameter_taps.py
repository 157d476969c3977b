"""Measures parameters over one optimizer step: weights before it, gradients before clipping, the update it makes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from gradflow import statistics

if TYPE_CHECKING:
    from collections.abc import Container, Iterable

    from torch import Tensor

    from gradflow.buffer import Buffer

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def parameter_names(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by name, the first name for a shared one, without the segments that wrappers add."""
    named = {}
    for name, parameter in model.named_parameters():
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")  # noqa: PLW2901 (the name is being cleaned)
        named[name] = parameter
    return named


def _local(x: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, the tensor itself otherwise."""
    to_local: Any = getattr(x, "to_local", None)
    part: Tensor = x.detach() if to_local is None else to_local().detach()
    return part


class ParameterTaps:
    """The parameters of one sampled step. Weights are copied at its start (for `updates`): their memory once more."""

    def __init__(self, model: nn.Module, buffer: Buffer, *, updates: bool = True) -> None:
        self._buffer = buffer
        self._updates = updates
        self._parameters = {n: p for n, p in parameter_names(model).items() if not nn.parameter.is_lazy(p)}
        self._before: dict[str, Tensor] = {}
        self._gradients: dict[str, dict[str, Tensor | float | None]] = {}
        self._by_id = {id(p): n for n, p in self._parameters.items()}

    def start(self) -> None:
        """Measure and keep the weights."""
        for name, parameter in self._parameters.items():
            weight = _local(parameter)
            self._buffer.put(
                "parameters", name, {"n": float(weight.numel()), "weight_sq": statistics.sum_squares(weight)}
            )
            if self._updates and parameter.requires_grad:
                self._before[name] = weight.clone()

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

    def cleared(self) -> bool:
        """Whether no parameter holds a gradient: a backward pass starts from nothing."""
        return all(parameter.grad is None for parameter in self._parameters.values())

    def gradients(self, of: Iterable[Tensor] | None = None, *, besides: Container[str] = ()) -> set[str]:
        """Measure the gradients as they stand, of all parameters or of some; later calls replace earlier ones.

        The names of those measured.
        """
        names = self._parameters if of is None else self.names(of)
        measured = set()
        for name in names:
            gradient = self._parameters[name].grad
            if gradient is not None and name not in besides:
                self._gradients[name] = _measured(_local(gradient))
                measured.add(name)
        return measured

    def finish(self) -> None:
        """Measure the updates, now that the optimizer has stepped."""
        for name, values in self._gradients.items():
            self._buffer.put("parameters", name, values)
        for name, before in self._before.items():
            weight = _local(self._parameters[name])
            if weight.shape == before.shape:
                update = before.sub_(weight)  # our own copy: overwriting it saves one more
                self._buffer.put("parameters", name, {"update_sq": statistics.sum_squares(update)})
        self._before.clear()


def _measured(gradient: Tensor) -> dict[str, Tensor | float | None]:
    largest = statistics.max_abs(gradient)
    return {
        "grad_sq": statistics.sum_squares(gradient), "grad_max": largest,
        "grad_zeros": statistics.count_zeros(gradient), "nonfinite": statistics.count_nonfinite(gradient, largest),
    }  # fmt: skip
