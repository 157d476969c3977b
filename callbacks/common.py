"""What the adapters have in common: options, the directory of a run, and faults outside the recorder."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from gradflow.errors import UsageError
from gradflow.live import LiveReport
from gradflow.store import Run
from gradflow.store.directories import new_directory, resume

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from gradflow.recorder import Recorder
    from gradflow.records import Finding
    from gradflow.watch import Watch

log = logging.getLogger("gradflow")


class Recorded:
    """What a user reads from an adapter, whatever the trainer."""

    _recorder: Recorder | None
    _watch: Watch

    @property
    def run(self) -> Run:
        """What has been recorded so far; an empty run before training."""
        return self._recorder.run if self._recorder is not None else Run({}, {})

    @property
    def findings(self) -> list[Finding]:
        """What is wrong, by what has been recorded so far."""
        return self._watch.judge(self.run)


def checked(owner: str, **values: int) -> None:
    """Refuse options that must be integers of at least 1 and are not."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UsageError(f"{owner} expected {name} to be an integer of at least 1, got {value!r}")


def chosen_directory(path: str, run_id: str | None) -> tuple[str, str]:
    """Where to record, and the id of the run: the one of that id if it is found there, else a new one."""
    found = resume(path, run_id) if run_id else None
    return (found, str(run_id)) if found is not None else (new_directory(path), uuid4().hex)


def shielded(make: Callable[[], Any], *, strict: bool, recorder: Recorder | None) -> Any:
    """A fault outside the recorder does not stop training either, and is told once in a training."""
    try:
        return make()
    except Exception:
        if strict:
            raise
        told = recorder is not None and recorder.stopped is not None
        log.log(logging.DEBUG if told else logging.WARNING, "gradflow failed; training goes on", exc_info=True)
        return None


def live_report(recorder: Recorder | None, *, report: bool, loggers: Iterable[Any] = ()) -> LiveReport | None:
    """What rewrites the report in the run's directory and gives pictures to loggers; None where neither is wanted."""
    if recorder is None or not (report or loggers):
        return None
    return LiveReport(recorder.dirpath.rstrip("/") + "/report.html" if report else None, loggers)
