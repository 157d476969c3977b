"""The tables of a run: every raw column once, with its type, unit, meaning, and how rows merge over ranks.

`TABLES` is what the recorder writes, what the store checks, and what `gradflow schema` prints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SCHEMA_VERSION = 1
OUTSIDE = "training step"
"""`faults.module` of an operation that ran in no module's forward: a loss function."""
Merge = Literal["key", "sum", "grad_sum", "norm", "max", "min", "mean", "first"]


@dataclass(frozen=True, slots=True)
class Column:
    """A raw column.

    `merge` says what happens to it when the rows of several ranks (with equal keys) become one: `"sum"` adds,
    `"grad_sum"` adds and divides by the square of the world size (activation gradients are those of each rank's own
    loss; merged they are those of the mean loss), `"norm"` takes the root of the sum of squares (each rank has the norm
    of its shards; what is replicated stands on one rank alone), `"max"`, `"min"`, `"mean"` (over the ranks that have
    it), `"first"` takes the lowest rank's. Null is left out of every merge; all null stays null.
    """

    name: str
    type: Literal["float64", "int64", "string"]
    merge: Merge
    unit: str
    doc: str


def _key(name: str, kind: Literal["int64", "string"], doc: str) -> Column:
    return Column(name, kind, "key", "", doc)


def _sum(name: str, doc: str, *, gradient: bool = False, unit: str = "1") -> Column:
    return Column(name, "float64", "grad_sum" if gradient else "sum", unit, doc)


def _count(name: str, doc: str) -> Column:
    return Column(name, "int64", "sum", "elements", doc)


def _other(name: str, merge: Merge, doc: str, unit: str = "1") -> Column:
    return Column(name, "float64", merge, unit, doc)


STEP = _key("step", "int64", "optimizer step: `trainer.global_step` before the step's first micro-batch")
RANK = Column("rank", "int64", "first", "", "process that measured the row; 0 in merged tables")
_SHARES = (
    _other(
        "signal_share", "mean",
        "⟨f, x_L⟩/⟨x_L, x_L⟩ on the row sample: part of the stream's end that came from here. Over each piece of a "
        "stream (`Stream.segments`) the shares of its branches and of its start add up to 1; the start's stands in "
        "`streams` at the point that the piece begins at",
    ),
    _other(
        "gradient_share", "mean",
        "⟨Δ, g_0⟩/⟨g_0, g_0⟩ on the row sample: part of the gradient at the piece's start that came back through here. "
        "With the share of the skip path (in `streams`, at the piece's last point) they add up to 1. Branches of one "
        "sum that leave the fork by one operation cannot be told apart: the first holds what came through all",
    ),
)  # fmt: skip

TABLES: dict[str, tuple[Column, ...]] = {
    "steps": (
        STEP,
        RANK,
        Column("microbatches", "int64", "first", "1", "forward-and-backward passes summed into the step"),
        _other("loss", "mean", "loss backpropagated, unscaled: summed over micro-batches, mean of closures"),
        _other("learning_rate", "first", "learning rate of the first parameter group during the step"),
        _other("grad_norm", "norm", "√(Σ over all parameter gradients of g²), before clipping"),
        _other("loss_scale", "first", "AMP loss scale that was divided out; 1 without AMP"),
        _other("seconds", "max", "wall time of the step, our own work included", "s"),
    ),
    "branches": (
        STEP,
        RANK,
        _key("branch", "string", "name of the branch"),
        _count("n", "elements of the join's output"),
        _sum("skip_sq", "Σ a², a the skip as it enters the sum"),
        _sum("branch_sq", "Σ f², f the branch as it enters the sum (with the sign of a subtraction and alpha)"),
        _sum("dot", "Σ a·f"),
        _sum("out_sq", "Σ y²"),
        _other("out_max", "max", "max |y|"),
        _count("nonfinite", "NaN and infinite elements of y; they are left out of no sum"),
        _sum("grad_out_sq", "Σ (∂L/∂y)²", gradient=True),
        _sum("grad_fork_sq", "Σ (∂L/∂F)², over all paths", gradient=True),
        _sum("grad_branch_sq", "Σ (∂L/∂F − what came back along the skip)²", gradient=True),
        _sum("grad_dot", "Σ (what came back along the skip)·(∂L/∂F − what came back along the skip)", gradient=True),
        *_SHARES,
    ),
    "layers": (
        STEP,
        RANK,
        _key("layer", "string", "name of the layer (an occurrence of a leaf module, or of an activation function)"),
        Column("kind", "string", "first", "", "class of the module, or name of the function"),
        _count("n", "elements of the output"),
        _sum("out_sum", "Σ y"),
        _sum("out_sq", "Σ y²"),
        _other("out_max", "max", "max |y|"),
        _count("zeros", "elements that are exactly zero"),
        _count("saturated", "elements at the ends of a bounded activation; null for unbounded ones"),
        _count("dead_units", "channels that are zero on every position of the step; null if this is no activation"),
        _count("units", "channels; null where the layer is no activation"),
        _count("nonfinite", "NaN and infinite elements; they are left out of no sum"),
        _sum("grad_out_sq", "Σ (∂L/∂y)²", gradient=True),
        _count("grad_zeros", "elements of ∂L/∂y that are exactly zero"),
    ),
    "parameters": (
        STEP,
        RANK,
        _key("parameter", "string", "name of the parameter"),
        _count("n", "elements (of this rank's shard, where sharded)"),
        _sum("weight_sq", "Σ w², before the optimizer step"),
        _sum("grad_sq", "Σ g², before clipping, loss scale divided out"),
        _other("grad_max", "max", "max |g|"),
        _count("grad_zeros", "elements of g that are exactly zero"),
        _count("nonfinite", "NaN and infinite elements of g; they are left out of no sum"),
        _sum("update_sq", "Σ (w_after − w_before)²; null where nothing trains it, and in a probe"),
    ),
    "attention": (
        STEP,
        RANK,
        _key("layer", "string", "name of the attention call"),
        _other("entropy", "mean", "mean over sampled heads and queries of −Σ p ln p; ln(keys): all alike", "nat"),
        _other("entropy_min", "min", "smallest mean entropy of one head", "nat"),
        _other("logit_max", "max", "largest logit on the sample, as it enters the softmax, masked keys left out"),
        _other("keys", "mean", "keys that a query can attend to, mean over the sample"),
    ),
    "streams": (
        STEP,
        RANK,
        _key("stream", "string", "name of the stream or trunk"),
        _key("point", "string", "point of the stream: where it starts, then each join; or a member of the trunk"),
        Column("depth", "int64", "first", "1", "position along the stream, from 0"),
        _count("n", "elements"),
        _sum("out_sq", "Σ x²"),
        _sum("grad_sq", "Σ (∂L/∂x)²", gradient=True),
        _other("token_cosine", "mean", "mean off-diagonal cosine between positions of one sequence, on the row sample"),
        _other(
            "effective_rank", "mean",
            "exp of the entropy of the normalised singular values of the row sample; of 128 of its rows if rows and "
            "width are more",
        ),
        _other("kurtosis", "mean", "E x⁴/(E x²)² on the row sample; 3 for a normal distribution"),
        _other("max_over_median", "max", "largest over median |x| on the row sample"),
        *_SHARES,
    ),
    "faults": (
        STEP,
        RANK,
        _key("direction", "string", "`forward` or `backward`: the pass in which numbers stopped being finite"),
        _key("operation", "string", "the operation that gave the first ones, from finite operands; empty if untold"),
        _key("module", "string", f"module in whose forward it ran; `{OUTSIDE}` outside of every module"),
        Column("reason", "string", "first", "", "what could not be told, and why; empty if all is told"),
        _count("n", "elements of its result (backwards: of a gradient that it sent)"),
        _count("nonfinite", "NaN and infinite ones among them"),
    ),
}
