"""Hooks on the autograd graph of a running step, placed where a tensor was made, after the fact, and all removable.

A hook on the autograd node that made a tensor sees the tensor's gradient summed over all paths, keeps no activation
alive, and adds nothing to the graph: the training's own arithmetic stays bit for bit what it was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from gradflow import statistics
from gradflow.recorder.measurable import measurable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch.utils.hooks import RemovableHandle

    from gradflow.statistics import Number

Edge = tuple[Any, int]
"""An autograd node and the number of its output."""
Use: TypeAlias = "Callable[[Tensor], None]"
"""What is done with a gradient."""
_WALK_LIMIT = 2048
_MOST_VIEWS = 4
_RESHAPES = frozenset({
    "ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "SqueezeBackward0", "SqueezeBackward1",
    "UnsqueezeBackward0", "AliasBackward0",
})  # fmt: skip
_MOVES = frozenset({"TransposeBackward0", "PermuteBackward0", "TBackward0"})


class undisturbed:  # noqa: N801 (a context manager)
    """Our own arithmetic: no gradient recorded, no mode of anybody sees it, no autocast changes its precision."""

    __slots__ = ("_autocast", "_functions", "_grad")

    def __enter__(self) -> None:
        self._functions = torch._C.DisableTorchFunction()  # noqa: SLF001
        self._functions.__enter__()
        self._grad = torch.is_grad_enabled()
        if self._grad:
            torch._C._set_grad_enabled(False)  # noqa: SLF001
        self._autocast: tuple[str, ...] = ()
        if torch._C._is_any_autocast_enabled():  # noqa: SLF001
            self._autocast = tuple(kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind))
        for kind in self._autocast:
            torch.set_autocast_enabled(kind, False)

    def __exit__(self, *_: object) -> None:
        for kind in self._autocast:
            torch.set_autocast_enabled(kind, True)
        if self._grad:
            torch._C._set_grad_enabled(True)  # noqa: SLF001
        self._functions.__exit__(None, None, None)


class Hooks:
    """Autograd hooks of one step. A hook that raises reports to `on_error` and never to the backward pass."""

    def __init__(self, on_error: Callable[[Exception], None]) -> None:
        self._handles: list[RemovableHandle] = []
        self._on_error = on_error
        self.live = True  # False while gradients run that are not those of the loss (a gradient penalty's inner ones)
        self._last: tuple[Tensor, dict[str, Number]] | None = None

    def gradient(self, edge: Edge, use: Use) -> None:
        """Call `use` with the gradient of the tensor at `edge`, summed over all paths, whenever a backward has it."""
        node, number = edge

        def hook(gradients: tuple[Tensor | None, ...]) -> None:
            self._run(use, gradients[number])

        self._handles.append(node.register_prehook(hook))

    def returned(self, node: Any, position: int, use: Use) -> None:
        """Call `use` with what the autograd node `node` sends back to its input number `position`."""

        def hook(sent: tuple[Tensor | None, ...], _received: tuple[Tensor | None, ...]) -> None:
            self._run(use, sent[position])

        self._handles.append(node.register_hook(hook))

    def measure(self, gradient: Tensor, *wanted: str) -> dict[str, Number]:
        """`statistics.measure`, done once where several hooks in a row ask about the same gradient."""
        if self._last is None or self._last[0] is not gradient:
            self._last = (gradient, {})
        known = self._last[1]
        missing = [name for name in wanted if name not in known]
        if missing:
            known.update(statistics.measure(gradient, missing))
        return known

    def square(self, gradient: Tensor) -> Number:
        """Σ g²."""
        return self.measure(gradient, "square")["square"]

    def _run(self, use: Use, gradient: Tensor | None) -> None:
        if gradient is None or not self.live:
            return
        try:
            with undisturbed():
                visible = measurable(gradient)
                if visible is not None:
                    use(visible)
        except Exception as error:  # noqa: BLE001 (whatever it is, training goes on)
            self._on_error(error)

    def remove(self) -> None:
        """Take every hook off again."""
        self._last = None
        while self._handles:
            self._handles.pop().remove()


def inputs_reaching(node: Any, positions: Sequence[int], target: Edge, *, of: int = 2) -> list[Edge] | None:
    """Where the paths that leave autograd node `node` at the inputs `positions` arrive at `target`.

    Each result is a node and the number of its input that is `target`; the gradients sent there add up to what comes
    back along the paths. Empty if no gradient goes from one to the other; None if the graph cannot tell, as where the
    node has more inputs than the operation (`of`).
    """
    node = _overwriter(node)
    if max(positions) >= len(node.next_functions) or len(node.next_functions) > of:
        return None
    found: list[Edge] = []
    seen: set[Any] = set()
    queue: list[Edge] = [(node, position) for position in positions]
    # Nodes are numbered as they are made: older ones cannot lead to the target (a leaf has the largest number of all).
    oldest = 0 if hasattr(target[0], "variable") else target[0]._sequence_nr()  # noqa: SLF001
    while queue:
        holder, number = queue.pop()
        function, output = holder.next_functions[number]
        if function is None:
            continue
        if (function, output) == target:
            found.append((holder, number))
        elif function not in seen and function._sequence_nr() >= oldest:  # noqa: SLF001
            seen.add(function)
            if len(seen) > _WALK_LIMIT:
                return None
            queue.extend((function, i) for i in range(len(function.next_functions)))
    return found


def _overwriter(node: Any) -> Any:
    """The node that reads the operands of an operation: an in-place one on a view stands behind the view's node."""
    if len(node.next_functions) == 1:
        behind = node.next_functions[0][0]
        if behind is not None and "CopySlices" in behind.name():
            return behind
    return node


def behind_views(edge: Edge) -> Iterator[tuple[Edge, bool]]:
    """The tensors that a tensor is a view of, and whether their elements stand in the same order.

    Autograd leads past the views of a tensor that is overwritten in place: its gradient is complete only behind them.
    """
    ordered = True
    for _ in range(_MOST_VIEWS):
        name = edge[0].name()
        if name not in _RESHAPES and name not in _MOVES:
            return
        ordered = ordered and name in _RESHAPES
        before = edge[0].next_functions[0]
        if before[0] is None:
            return
        edge = before
        yield edge, ordered
