"""What the commands have in common: a run is loaded, a file must be free, a model is run, findings are judged."""

from __future__ import annotations

import os
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import typer

import gradflow
from gradflow.cli import console, factories
from gradflow.errors import GradflowError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from gradflow.records import Finding
    from gradflow.store import Run


class Severity(StrEnum):
    """Severities, gravest first."""

    error = "error"
    warning = "warning"
    info = "info"


def load(path: str) -> Run:
    """Load a run and say on stderr what was left out of it."""
    run = gradflow.load(path)
    for problem in run.problems:
        console.say(f"note: {problem}", error=True)
    if run.meta["stopped"] is not None:
        console.say(f"note: recording stopped early: {run.meta['stopped']}", error=True)
    return run


def free(path: Path, *, force: bool) -> Path:
    """Return the path if it may be written; nothing is replaced unless the user said so."""
    if os.path.lexists(path) and not force:
        raise UsageError(f"expected a new file, got {path}, which is there already; pass --force or another --out")
    return path


def run_model(factory: str, action: Any, subject: factories.Subject) -> Any:
    """Run the user's model; what it raises becomes one line that says where."""
    try:
        return action(subject.model, *subject.args, **subject.kwargs)
    except GradflowError:
        raise
    except Exception as error:
        raise UsageError(
            f"expected the model of {factory} to run on its inputs, got {factories.reason(error)}; "
            "check the inputs that the factory or --input gives"
        ) from error


def judge(run: Run, *, fail_on: Severity, ignore: Sequence[str], as_json: bool) -> None:
    """Print the findings and exit with status 1 where one is grave enough."""
    from gradflow.cli.settings import settings
    from gradflow.rules import RULES

    unknown = [code for code in ignore if code not in RULES]
    if unknown:
        raise UsageError(
            f"expected codes of findings after --ignore, got {', '.join(unknown)}; known: {', '.join(RULES)}"
        )
    chosen = settings()
    left_out = {*ignore, *chosen.ignore}
    findings: list[Finding] = [
        finding for finding in gradflow.diagnose(run, thresholds=chosen.thresholds) if finding.code not in left_out
    ]
    order = list(Severity)
    failed = any(order.index(Severity(finding.severity)) <= order.index(fail_on) for finding in findings)
    if as_json:
        console.print_json(
            {"run": run.path, "steps": run.steps, "failed": failed, "findings": findings, "problems": run.problems}
        )
    else:
        if chosen.path is not None:
            console.say(f"note: settings of {chosen.path} apply", error=True)
        console.print_findings(findings)
        console.say(console.verdict(run, findings))
    if failed:
        raise typer.Exit(1)
