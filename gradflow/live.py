"""The report while training goes on: rewritten now and then, for at most a hundredth of the time.

The overview goes to the experiment loggers that take images: TensorBoard, Weights & Biases, MLflow. A logger is known
by what it can do: none of these packages is imported here.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import numpy as np
    from numpy.typing import NDArray

    from gradflow.store import Run

log = logging.getLogger("gradflow")

SHARE = 0.01
"""Part of the training time that rewriting may take."""

FIRST = 5.0
"""Seconds that the first rewrite is taken to cost: of a small model it costs 3, of a thousand branches 30."""

GROWTH = 1.25
"""A run grows between two rewrites, and the cost of the next one with it."""

TAG = "gradflow/overview"


class LiveReport:
    """Decides when the report of a growing run is rewritten, and does it.

    A rewrite waits until what all rewrites have cost so far, and what it will cost itself by the last one, is a
    hundredth of the time since training began.

    Args:
        path: The report; None writes none.
        loggers: Loggers that the overview goes to, where they take images.
        clock: Seconds since any moment.
    """

    def __init__(
        self, path: str | None, loggers: Iterable[Any] = (), *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.path = path
        self._takers = [taker for taker in map(_image_taker, loggers) if taker is not None]
        self._clock = clock
        self._began = clock()
        self._spent = 0.0
        self._expected = FIRST

    @property
    def due(self) -> bool:
        """Whether there is time for a rewrite. Runs after every step: it reads the clock and no more."""
        return SHARE * (self._clock() - self._began) >= self._spent + self._expected

    def rewrite(self, run: Callable[[], Run], step: int) -> None:
        """Write the report of the run as it is and send the overview to the loggers; what it costs is remembered."""
        began = self._clock()
        try:
            if self.path is not None or self._takers:
                self._write(run(), step)
        finally:
            cost = self._clock() - began
            self._spent += cost
            self._expected = GROWTH * cost

    def _write(self, run: Run, step: int) -> None:
        from gradflow.plotting import gallery  # matplotlib is loaded when there is something to draw
        from gradflow.report import report
        from gradflow.rules import diagnose

        findings = diagnose(run)
        if self.path is not None:
            report(run, self.path, findings=findings)
        if self._takers:
            picture = gallery.pixels(gallery.overview(run, findings=findings))
            for take in self._takers:
                try:
                    take(picture, step)
                except Exception:
                    log.warning("a logger did not take gradflow's picture", exc_info=True)


def _image_taker(logger: Any) -> Callable[[NDArray[np.uint8], int], object] | None:
    """Return how an image (height, width, RGB) is given to a logger of Lightning; None where it takes none."""
    if hasattr(logger, "log_image"):  # Weights & Biases
        return lambda picture, step: logger.log_image(TAG, [picture], step=step)
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_image"):  # TensorBoard
        return lambda picture, step: experiment.add_image(TAG, picture, step, dataformats="HWC")
    if hasattr(experiment, "log_image") and hasattr(logger, "run_id"):  # MLflow
        return lambda picture, step: experiment.log_image(logger.run_id, picture, key=TAG, step=step)
    return None
