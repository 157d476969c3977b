"""Ratios, gains and cosines from the sums that a run stores: columns in, columns out. No torch here.

Every derived column is defined once, in `DERIVED`: its formula as text beside its formula as code. One convention holds
throughout: a value is null where an input is null or a denominator is zero, so that no NaN or infinity is made up here;
a NaN or an infinity that was measured stays what it is. Ratios of sums of squares are taken as ratios of roots, which
neither overflow nor vanish where the sums themselves are near the ends of float64.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc

from gradflow.schema import TABLES

Values: TypeAlias = Any  # a pyarrow.ChunkedArray: pyarrow comes without types
Compute: TypeAlias = Callable[[pa.Table], Values]

_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Derived:
    """A derived column: `formula` names the raw columns, `doc` says how to read the value, `compute` does it."""

    name: str
    formula: str
    unit: str
    doc: str
    compute: Compute


def quotient(numerator: Values, denominator: Values) -> Values:
    """`numerator / denominator` as float64; null where either is null or the denominator is zero."""
    over = denominator.cast(pa.float64())
    nonzero = pc.if_else(pc.equal(over, 0.0), pa.scalar(None, pa.float64()), over)
    return pc.divide(numerator.cast(pa.float64()), nonzero)


def _mean(total: str, count: str) -> Compute:
    return lambda table: quotient(table[total], table[count])


def _rms(squares: str) -> Compute:
    return lambda table: pc.sqrt(quotient(table[squares], table["n"]))


def _root_ratio(over: str, under: str) -> Compute:
    return lambda table: quotient(pc.sqrt(table[over]), pc.sqrt(table[under]))


def _cosine(dot: str, left: str, right: str) -> Compute:
    return lambda table: quotient(quotient(table[dot], pc.sqrt(table[left])), pc.sqrt(table[right]))


DERIVED: dict[str, tuple[Derived, ...]] = {
    "steps": (),
    "branches": (
        Derived("skip_rms", "√(skip_sq/n)", "1", "size of the skip as it enters the sum", _rms("skip_sq")),
        Derived("branch_rms", "√(branch_sq/n)", "1", "size of the branch; 0: it adds nothing", _rms("branch_sq")),
        Derived("out_rms", "√(out_sq/n)", "1", "size of the join's output", _rms("out_sq")),
        Derived(
            "branch_ratio",
            "√(branch_sq/skip_sq)",
            "1",
            "branch over skip; below 1e-3 the branch is silent, above 1 it outweighs the stream",
            _root_ratio("branch_sq", "skip_sq"),
        ),
        Derived(
            "cosine",
            "dot/√(skip_sq·branch_sq)",
            "1",
            "angle of branch to skip: 0 writes something new, 1 amplifies the stream, -1 erases it",
            _cosine("dot", "skip_sq", "branch_sq"),
        ),
        Derived(
            "grad_out_rms", "√(grad_out_sq/n)", "1", "size of the gradient at the join's output", _rms("grad_out_sq")
        ),
        Derived(
            "grad_fork_rms",
            "√(grad_fork_sq/n)",
            "1",
            "size of the gradient at the fork, per element of the join's output",
            _rms("grad_fork_sq"),
        ),
        Derived(
            "gain",
            "√(grad_fork_sq/grad_out_sq)",
            "1",
            "factor by which the gradient grows on its way back through the join; 1 keeps it",
            _root_ratio("grad_fork_sq", "grad_out_sq"),
        ),
        Derived(
            "grad_branch_ratio",
            "√(grad_branch_sq/grad_out_sq)",
            "1",
            "part of the gradient that comes back through the branch; 0: nothing does",
            _root_ratio("grad_branch_sq", "grad_out_sq"),
        ),
    ),
    "layers": (
        Derived("out_mean", "out_sum/n", "1", "mean of the output", _mean("out_sum", "n")),
        Derived("out_rms", "√(out_sq/n)", "1", "size of the output", _rms("out_sq")),
        Derived("zero_fraction", "zeros/n", "1", "part of the output that is exactly zero", _mean("zeros", "n")),
        Derived(
            "saturated_fraction",
            "saturated/n",
            "1",
            "part of a bounded activation at its ends; null where the activation has none",
            _mean("saturated", "n"),
        ),
        Derived(
            "dead_fraction",
            "dead_units/units",
            "1",
            "part of the channels that are zero on every position of the step",
            _mean("dead_units", "units"),
        ),
        Derived("grad_out_rms", "√(grad_out_sq/n)", "1", "size of the gradient at the output", _rms("grad_out_sq")),
        Derived(
            "grad_zero_fraction",
            "grad_zeros/n",
            "1",
            "part of the output's gradient that is exactly zero",
            _mean("grad_zeros", "n"),
        ),
    ),
    "parameters": (
        Derived("weight_rms", "√(weight_sq/n)", "1", "size of the weights before the step", _rms("weight_sq")),
        Derived("grad_rms", "√(grad_sq/n)", "1", "size of the gradient before clipping", _rms("grad_sq")),
        Derived(
            "update_ratio",
            "√(update_sq/weight_sq)",
            "1",
            "length of the update over length of the weights; 0: the parameter stands still",
            _root_ratio("update_sq", "weight_sq"),
        ),
        Derived(
            "grad_zero_fraction",
            "grad_zeros/n",
            "1",
            "part of the gradient that is exactly zero",
            _mean("grad_zeros", "n"),
        ),
    ),
    "attention": (),
    "streams": (
        Derived("out_rms", "√(out_sq/n)", "1", "size of the signal at this point", _rms("out_sq")),
        Derived("grad_rms", "√(grad_sq/n)", "1", "size of the gradient at this point", _rms("grad_sq")),
    ),
    "faults": (),
}


def names(name: str) -> list[str]:
    """Return the columns of table `name`, raw ones first."""
    return [column.name for column in TABLES[name]] + [column.name for column in DERIVED[name]]


def inputs(name: str, wanted: Iterable[str]) -> list[str]:
    """Return the raw columns of table `name` that the columns `wanted`, raw or derived, are made of."""
    formulas = {column.name: column.formula for column in DERIVED[name]}
    needed = {word for column in wanted for word in _WORD.findall(formulas.get(column, column))}
    return [column.name for column in TABLES[name] if column.name in needed]


def derive(name: str, table: pa.Table, wanted: Iterable[str] | None = None) -> pa.Table:
    """Return `table` (raw columns of table `name`) with its derived columns appended, all or those `wanted`."""
    chosen = None if wanted is None else set(wanted)
    for column in DERIVED[name]:
        if chosen is None or column.name in chosen:
            table = table.append_column(column.name, column.compute(table))
    return table
