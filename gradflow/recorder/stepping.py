"""Hooks on optimizers during one sampled step: what they compute is no pass, what their closures run is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch.optim import Optimizer
    from torch.utils.hooks import RemovableHandle

    Arguments = tuple[Any, ...]
    Keywords = dict[str, Any]


class OptimizerHooks:
    """Calls `before(optimizer, has_closure)` and `after(optimizer)` around the steps of optimizers, until `remove`.

    A closure that an optimizer is given (LBFGS calls it several times) runs between `watch()` and `rest()`.
    """

    def __init__(
        self, optimizers: Iterable[Optimizer], *, before: Callable[[Optimizer, bool], None],
        after: Callable[[Optimizer], None], watch: Callable[[], None], rest: Callable[[], None],
    ) -> None:  # fmt: skip
        self._before, self._after, self._watch, self._rest = before, after, watch, rest
        self._handles: list[RemovableHandle] = []
        for optimizer in optimizers:
            if not hasattr(optimizer, "register_step_pre_hook"):  # an engine's own, which is no torch optimizer
                continue
            self._handles.append(optimizer.register_step_pre_hook(self._pre))
            self._handles.append(optimizer.register_step_post_hook(self._post))

    def _pre(self, optimizer: Optimizer, args: Arguments, kwargs: Keywords) -> tuple[Arguments, Keywords] | None:
        position = next((i for i, value in enumerate(args) if i and callable(value)), None)  # 0 is the optimizer
        self._before(optimizer, position is not None or callable(kwargs.get("closure")))
        if position is not None:
            return (*args[:position], self._watched(args[position]), *args[position + 1 :]), kwargs
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": self._watched(kwargs["closure"])}
        return None

    def _watched(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def watched() -> Any:
            self._watch()
            try:
                return closure()
            finally:
                self._rest()

        return watched

    def _post(self, optimizer: Optimizer, _args: Arguments, _kwargs: Keywords) -> None:
        self._after(optimizer)

    def remove(self) -> None:
        """Take every hook off again."""
        while self._handles:
            self._handles.pop().remove()
