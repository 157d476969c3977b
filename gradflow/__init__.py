"""See how signal and gradient flow through the residual branches of any PyTorch model, while it trains.

Example::

    trainer = Trainer(callbacks=[gradflow.callbacks.GradientFlowMonitor()])  # one line is all
    trainer.fit(model)
    run = gradflow.load("lightning_logs/version_0/gradflow")
    for finding in gradflow.diagnose(run):
        print(finding.severity, finding.claim)
    gradflow.report(run, "report.html")
"""
# ruff: noqa: TC004  (type checkers see the imports; at run time `_Package` makes them on first use)

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradflow import callbacks
    from gradflow.discovery import find_branches
    from gradflow.errors import GradflowError
    from gradflow.probing import probe
    from gradflow.recorder import Recorder
    from gradflow.records import Branch, Finding
    from gradflow.report import compare, report
    from gradflow.rules import diagnose
    from gradflow.store import Run, load

__version__ = "0.1.0"
__all__ = [
    "Branch", "Finding", "GradflowError", "Recorder", "Run",
    "callbacks", "compare", "diagnose", "find_branches", "load", "probe",
    "report",
]  # fmt: skip
_HOMES = {
    "Branch": "records", "Finding": "records", "GradflowError": "errors", "Recorder": "recorder", "Run": "store",
    "compare": "report", "diagnose": "rules", "find_branches": "discovery", "load": "store", "probe": "probing",
    "report": "report",
}  # fmt: skip


class _Package(ModuleType):
    """Imports a public name on first use, so that `import gradflow` is quick."""

    def __getattr__(self, name: str) -> Any:
        if name == "callbacks":
            return import_module("gradflow.callbacks")
        if name not in _HOMES:
            raise AttributeError(f"module 'gradflow' has no attribute {name!r}; public names: {', '.join(__all__)}")
        return getattr(import_module(f"gradflow.{_HOMES[name]}"), name)

    def __setattr__(self, name: str, value: object) -> None:
        # Importing the submodule `gradflow.report` would bind it over the public function of the same name.
        super().__setattr__(name, getattr(value, name) if name in _HOMES and isinstance(value, ModuleType) else value)

    def __dir__(self) -> list[str]:
        return sorted({*vars(self), *__all__})


sys.modules[__name__].__class__ = _Package
