"""Fixed-threshold rules of other tools, computed from the same tables, for the comparison of the labelled zoo.

Sources: SageMaker Debugger's built-in rules, AUTOTRAINER's `reproduce.py`, torchmortem 0.1.1's detectors; each at its
published default. A tool's rule that needs what the tables do not hold (accuracy, raw pre-activations) is left out; where
a mean absolute value is asked for, the root mean square stands in, which is larger: fewer alarms, not more.
"""

from __future__ import annotations

import numpy as np

from gradflow.rules.view import View

ALL_SICK = {"nonfinite": ("nonfinite",)}


def _columns(view, table, *names):
    grid = view.grid(table)
    return [grid[name] for name in names] if grid.keys and len(grid.steps) else [np.zeros((0, 0))] * len(names)


def _any(mask):
    return bool(np.asarray(mask).any())


def _nonfinite(view):
    found = False
    for table, column in (("layers", "out_sq"), ("parameters", "grad_sq"), ("steps", "loss")):
        values, known = view.grid(table).raw(column)
        found |= _any(known & ~np.isfinite(values))
    return found


def _ends(view):
    """Gradient norms of the first and the last weight matrix in order of registration, each step."""
    grid = view.grid("parameters")
    shapes = {p.name: p.shape for p in view.run.parameters}
    columns = [i for i, name in enumerate(grid.names) if len(shapes.get(name, ())) > 1]
    if not columns or not len(grid.steps):
        return np.zeros(0), np.zeros(0)
    norms = np.sqrt(grid["grad_sq"][:, columns])
    return norms[:, 0], norms[:, -1]


def sagemaker(run):
    view = View(run)
    grad_rms, weight_rms, update = _columns(view, "parameters", "grad_rms", "weight_rms", "update_ratio")
    dead, units, saturated, n = _columns(view, "layers", "dead_units", "units", "saturated", "n")
    found = set()
    if _any(grad_rms < 1e-7):
        found |= {"vanishing-gradient", "below-epsilon", "gradient-underflow"}
    if _nonfinite(view):
        found |= {"nonfinite", "exploding-gradient"}
    if _any(dead / np.where(units > 0, units, np.nan) > 0.5):
        found.add("dead-units")
    if _any(saturated / np.where(n > 0, n, np.nan) > 0.5):
        found.add("saturated-activation")
    if _any(update > 10):
        found.add("update-too-large")
    if _any(update < 1e-8):
        found |= {"update-too-small", "frozen-parameter"}
    rms = weight_rms[0] if len(weight_rms) else np.zeros(0)
    rms = rms[rms > 0]
    if len(rms) and (rms.max() / rms.min()) ** 2 > 10:
        found |= {"signal-collapse", "signal-explosion", "silent-branch", "dominant-branch"}
    return found


def autotrainer(run):
    view = View(run)
    first, last = _ends(view)
    found = set()
    if _any((first / np.where(last > 0, last, np.nan) < 1e-3) & (first < 1e-4)):
        found |= {"vanishing-gradient", "signal-collapse"}
    if _any(first / np.where(last > 0, last, np.nan) > 70):
        found |= {"exploding-gradient", "signal-explosion"}
    zeros, n = _columns(view, "parameters", "grad_zeros", "n")
    if _any(zeros / np.where(n > 0, n, np.nan) >= 0.7):
        found |= {"dead-units", "gradient-underflow"}
    if _nonfinite(view) or _any(view.series("loss") >= 1e3):
        found |= {"nonfinite", "exploding-gradient"}
    return found


def torchmortem(run):
    view = View(run)
    half = lambda values: values[len(values) // 2 :]
    first, last = _ends(view)
    grad, n = _columns(view, "layers", "grad_out_sq", "n")
    norms = np.sqrt(grad)
    dead, units, saturated = _columns(view, "layers", "dead_units", "units", "saturated")
    (update,) = _columns(view, "parameters", "update_ratio")
    (rank,) = _columns(view, "streams", "effective_rank")
    found = set()
    fall = half(last / np.where(first > 0, first, np.nan))
    if np.isfinite(fall).any() and _any(np.nanmedian(fall) >= 100):
        found |= {"vanishing-gradient", "signal-collapse"}
    if _any(norms > 1000):
        found |= {"exploding-gradient", "signal-explosion"}
    if norms.size and _any((norms < 1e-8).mean(axis=0) >= 0.3):
        found |= {"below-epsilon", "gradient-underflow", "blocked-gradient"}
    share = half(dead / np.where(units > 0, units, np.nan))
    if share.size and _any((share > 0.5).mean(axis=0) >= 0.5):
        found.add("dead-units")
    if _any(update > 1e-1):
        found.add("update-too-large")
    if _any(update < 1e-5):
        found |= {"update-too-small", "frozen-parameter", "silent-branch"}
    third = len(rank) // 3
    if third and np.isfinite(rank[-third:]).any() and np.isfinite(rank[:third]).any() and _any(np.nanmean(rank[-third:]) <= 0.5 * np.nanmean(rank[:third])):
        found.add("rank-collapse")
    ends = half(saturated / np.where(n > 0, n, np.nan))
    if ends.size and _any((ends > 0.5).mean(axis=0) >= 0.5):
        found.add("saturated-activation")
    if _nonfinite(view):
        found.add("nonfinite")
    return found


PEERS = {"SageMaker Debugger": sagemaker, "AUTOTRAINER": autotrainer, "torchmortem": torchmortem}
"""Each gives the codes of ours that its alarms could stand for: whatever sickness they may be about counts as found."""
