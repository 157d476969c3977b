"""Keeps a step's own records from setting off the garbage collector, which would find nothing among them.

They are objects by the thousand that live until the step is over and refer to each other in no cycle. Each few hundred
of them would start a collection, and now and then one of everything that the training holds.
"""

from __future__ import annotations

import gc
import threading
from weakref import WeakKeyDictionary

PER_MODULE = 200
"""Objects that a step may keep for a module: twice as many as measured on a transformer."""
LEAST = 10_000
"""Objects that it may keep in any case: a module can run any number of operations."""

_lock = threading.Lock()
_open: WeakKeyDictionary[Leeway, int] = WeakKeyDictionary()  # a step that was dropped holds nothing open
_found = _raised = (0, 0, 0)


class Leeway:
    """While it is open, the collector's first threshold is higher by the number of objects that a step may keep.

    Several may be open at once. The threshold is left alone where it is 0, which switches the collector off, and where
    somebody else changes it meanwhile. What the training itself leaves behind in cycles is collected as in any step.
    """

    def open(self, modules: int) -> None:
        """Raise the threshold for a model of so many modules."""
        global _found, _raised  # noqa: PLW0603 (there is one collector)
        with _lock:
            if not _open and gc.get_threshold() != _raised:
                _found = _raised = gc.get_threshold()
            _open[self] = max(modules * PER_MODULE, LEAST)
            _adjust()

    def close(self) -> None:
        """Lower it again."""
        with _lock:
            if _open.pop(self, None) is not None:
                _adjust()


def _adjust() -> None:
    global _raised  # noqa: PLW0603
    if gc.get_threshold() == _raised and _found[0]:
        _raised = (_found[0] + sum(_open.values()), *_found[1:])
        gc.set_threshold(*_raised)
