"""The NaN guard: steps between the sampled ones, of which nothing is kept unless a number in them is not finite.

A guarded step asks whether the loss, the outputs of layers and the gradients of parameters are finite, and no more. It
is judged one step later, when its figures have reached the host, so nothing waits for the device.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from gradflow.recorder.guard_taps import Known

if TYPE_CHECKING:
    from gradflow.recorder.buffer import Row
    from gradflow.recorder.recording import Finished

TABLES = frozenset({"layers", "parameters", "faults"})
"""What a guarded step records."""


class Guard:
    """Judges guarded steps one step late, and hands out those at which something broke."""

    def __init__(self) -> None:
        self._waiting: Finished | None = None
        self._broken = False
        self.hits = 0
        self.known = Known()

    def judged(self, finished: Finished | None) -> Finished | None:
        """Take a guarded step in (or None: no more for now), and give the one before it if it has to be kept.

        Kept is the step at which numbers stop being finite, not those that follow and are broken too.
        """
        before, self._waiting = self._waiting, finished
        if before is None:
            return None
        was_broken, self._broken = self._broken, is_broken(before.rows())
        if not self._broken or was_broken:
            return None
        self.hits += 1
        return before


def is_broken(rows: dict[str, list[Row]]) -> bool:
    """Whether the loss or a gradient of a step is NaN or infinite.

    Layers alone may hold infinities on purpose (masks). With a loss scale, gradients alone overflow on purpose: the
    scaler looks for that and skips the step.
    """
    head = rows["steps"][0]
    found = [head.get("loss")]
    if (head.get("loss_scale") or 1.0) == 1.0:
        found.append(head.get("grad_norm"))
    return any(value is not None and not math.isfinite(value) for value in found)
