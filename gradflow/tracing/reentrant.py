"""Whether a backward pass is running, or a reentrant checkpoint, whose first forward is followed without gradient."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import CodeType

_MOST_FRAMES = 400
_MOST_NODES = 100_000
_NAME = "CheckpointFunctionBackward"
current_backward = torch._C._current_graph_task_id  # noqa: SLF001  -1 outside a backward pass


def follows_gradients() -> bool:
    """Whether autograd follows what runs here, now or when a reentrant checkpoint computes it again."""
    return torch.is_grad_enabled() or in_checkpoint()


def in_checkpoint() -> bool:
    """Whether the first forward of a reentrant checkpoint is running."""
    module = sys.modules.get("torch.utils.checkpoint")
    if module is None or torch.is_grad_enabled():
        return False
    code: CodeType = module.CheckpointFunction.forward.__code__
    frame = sys._getframe(1)  # noqa: SLF001
    for _ in range(_MOST_FRAMES):
        if frame.f_code is code:
            return True
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False


def checkpoints(root: Any) -> Iterator[Any]:
    """The autograd nodes of reentrant checkpoints that a backward pass from `root` will compute again."""
    seen, queue = {root}, [root]
    while queue and len(seen) < _MOST_NODES:
        node = queue.pop()
        if node.name() == _NAME:
            yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                queue.append(following)
