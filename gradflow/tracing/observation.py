"""What a traced pass tells while it runs, to whoever records it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

    Args = tuple[Any, ...]
    Kwargs = dict[str, Any]


class Observer(Protocol):
    """What watches a traced pass from inside: the recorder.

    `watches` holds the canonical names of the operations for which `before` and `after` are called.
    """

    watches: frozenset[str]

    def before(self, op: str, func: Any, args: Args, kwargs: Kwargs, operands: tuple[int | None, ...]) -> Any:
        """Run before a watched operation (in-place ones overwrite); the result is handed to `after`.

        `args` stand in the operation's own order (`b - a` by `__rsub__` comes as `(b, a)`), operands given by keyword
        included; `operands` are their nodes, None where an argument is no tensor.
        """

    def after(self, node: int, op: str, func: Any, args: Args, kwargs: Kwargs, out: Tensor, token: Any) -> None:
        """Run after a watched operation made `node`."""

    def entered(self, call: int, path: str, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """Run when a module's forward begins."""

    def exited(self, call: int, path: str, module: nn.Module, output: Any) -> None:
        """Run when a module's forward has ended (`output` is None if it raised)."""

    def backward(self, name: str, args: Args) -> None:
        """Run before a backward pass (`name`: `"backward"` or `"grad"`) that starts while the mode is on."""

    def backward_done(self, name: str) -> None:
        """Run when that backward pass is over, unless it raised."""

    def fault(self, error: Exception) -> None:
        """Run when the trace itself failed: the model's own operations go on, nothing more is traced."""
