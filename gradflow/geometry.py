"""Geometry of a fixed sample of rows: how alike positions are, how many directions they use, how heavy the tails are.

A sample is a tensor of shape (sequence, position, width), at most `rows` positions in all, taken at fixed places, so
its cost does not grow with the batch. All functions are pure, batch over any leading axes and never synchronise.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradflow import compiled, device_sums, statistics, threads

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradflow.statistics import Number

_FEWEST_POSITIONS = 16
"""Positions taken from each sequence before more sequences are taken: cosines need several of one sequence."""


@lru_cache(maxsize=256)
def spread(length: int, count: int, device: torch.device) -> Tensor:
    """`count` indices spread evenly over `length`, first and last included."""
    return (torch.arange(count, device=device) * (length - 1) // max(count - 1, 1)).long()


def sample_rows(x: Tensor, channel_dim: int, rows: int) -> Tensor | None:
    """A copy of at most `rows` positions of a tensor, evenly spread: shape (sequence, position, width), float32 or 64.

    The first axis counts sequences (or images), `channel_dim` is the width, all other axes are positions; a tensor of
    one or two axes is one sequence of its rows. Everything is taken where it fits; else as many sequences as leave 16
    positions each. None for an empty tensor.
    """
    if x.numel() == 0 or x.dim() == 0:
        return None
    if compiled.SAMPLES and channel_dim % x.dim() == x.dim() - 1 and compiled.sums(x):
        width = x.shape[-1]
        sequences = x.shape[0] if x.dim() > 2 else 1
        places, shape = _places(sequences, x.numel() // (sequences * width), rows)
        room = torch.empty((*shape, width), dtype=x.dtype, device="cpu")
        return statistics.wide(compiled.SAMPLES.take(x, places, room))
    x = x.detach()
    if x.dim() <= 2:
        x = x.reshape(1, -1, x.shape[-1])
    else:
        if channel_dim % x.dim() != x.dim() - 1:
            x = x.movedim(channel_dim, -1)
        if x.dim() > 3:
            x = x.flatten(1, -2)
    most, take = _extent(x.shape[0], x.shape[1], rows)
    if (most, take) == x.shape[:2]:
        return statistics.wide(x.clone())
    return statistics.wide(x[:most].index_select(1, spread(x.shape[1], take, x.device)))


def _extent(sequences: int, positions: int, rows: int) -> tuple[int, int]:
    """Sequences in a sample of so many rows, and positions of each."""
    if sequences * positions <= rows:
        return sequences, positions
    take = min(positions, max(rows // sequences, min(_FEWEST_POSITIONS, rows)))
    return min(sequences, max(rows // take, 1)), take


@lru_cache(maxsize=256)
def _places(sequences: int, positions: int, rows: int) -> tuple[compiled.Counts, tuple[int, int]]:
    """Numbers of a sample's rows among all positions of all sequences, and how they stand."""
    most, take = _extent(sequences, positions, rows)
    each = spread(positions, take, torch.device("cpu")).tolist()
    return compiled.counts([i * positions + place for i in range(most) for place in each]), (most, take)


def has_tokens(shape: tuple[int, ...]) -> bool:
    """Whether a tensor of this shape has several positions a sequence, so that cosines between them mean something."""
    return len(shape) >= 3


def figures(samples: Sequence[Tensor], *, tokens: bool = True) -> dict[str, list[Number]]:
    """`kurtosis`, `max_over_median` and, of `tokens`, `token_cosine` of several samples of one shape and dtype."""
    functions = [kurtosis, max_over_median, token_cosine][: 3 if tokens else 2]
    names = [function.__name__ for function in functions]
    if compiled.SAMPLES and samples[0].dtype == torch.float32 and all(compiled.sums(sample) for sample in samples):
        rows = compiled.SAMPLES.figures(samples)
        return {name: [row[i] for row in rows] for i, name in enumerate(names)}
    together = torch.stack(list(samples))
    return {name: statistics.numbers(function(together)) for name, function in zip(names, functions, strict=True)}


def token_cosine(rows: Tensor) -> Tensor:
    """Mean cosine between different positions of one sequence, averaged over sequences.

    cos = (|Σ_i u_i|² − Σ_i |u_i|²) / (m(m−1)) with u_i = x_i/|x_i| over the m positions that are not zero.
    rows: (..., sequence, position, width) → (...). 1 means that all tokens are the same (rank collapse, Dong 2021,
    arXiv:2103.03404); about 0 that they are unrelated. NaN where no sequence has two positions that are not zero.
    """
    norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    inverse = torch.where(norms == 0, torch.zeros_like(norms), 1 / norms)
    count = (norms != 0).sum((-2, -1)).to(rows.dtype)
    pairs = count * (count - 1)
    # no product of matrices: the training may let those run in TF32 or bfloat16. Σ |u|² is the number of vectors
    together = (inverse * rows).sum(-2)
    cosines = (together.square().sum(-1) - count) / pairs
    valid = pairs > 0
    mean: Tensor = torch.where(valid, cosines, torch.zeros_like(cosines)).sum(-1) / valid.sum(-1)
    return mean


def gram(rows: Tensor) -> Tensor:
    """Inner products of the rows of a sample, scaled so that the trace is 1: (..., s, p, d) → (..., n, n), n ≤ s·p, d.

    Whichever of X Xᵀ and XᵀX is smaller; both have the same eigenvalues besides zeros.
    """
    flat = rows.flatten(-3, -2)
    product = flat @ flat.mT if flat.shape[-2] <= flat.shape[-1] else flat.mT @ flat
    scaled: Tensor = product / product.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    return scaled


def effective_rank(gram_matrix: Tensor) -> Tensor:
    """Effective rank exp(−Σ p ln p), p = σ/Σσ the normalised singular values of the row sample (Roy & Vetterli 2007).

    gram_matrix: (..., n, n), on the CPU (the decomposition would wait for any other device) → (...). Between 1 (all
    rows on one line) and n. NaN where the sample is zero or not finite.
    """
    finite = torch.isfinite(gram_matrix).all(-1).all(-1)
    safe = torch.where(finite[..., None, None], gram_matrix, torch.zeros_like(gram_matrix))
    with threads.alone():  # LAPACK asks for help with pieces that are done before it comes
        values = torch.linalg.eigvalsh(safe)
    # eigenvalues of a product are right to n·eps of the largest one; below that they are rounding, not directions
    floor = values.shape[-1] * torch.finfo(values.dtype).eps * values[..., -1:].clamp_min(0)
    sigma = torch.where(values > floor, values, torch.zeros_like(values)).sqrt()
    p = sigma / sigma.sum(-1, keepdim=True)
    rank = torch.exp(torch.special.entr(p).sum(-1))
    return torch.where(finite, rank, torch.full_like(rank, float("nan")))


def kurtosis(rows: Tensor) -> Tensor:
    """E x⁴/(E x²)² over the sample: 3 for a normal distribution, large where few features are huge. NaN if all zero."""
    squares = rows.flatten(-3).square()
    fourth = torch.linalg.vector_norm(squares, dim=-1).square() / squares.shape[-1]
    ratio: Tensor = fourth / squares.mean(-1).square()
    return ratio


def max_over_median(rows: Tensor) -> Tensor:
    """Largest over median |x| of the sample (lower median); over 1,000 is massive (Sun 2024, arXiv:2402.17762)."""
    sizes = rows.flatten(-3).abs()
    middle = (sizes.shape[-1] - 1) // 2
    if sizes.device.type != "cpu":  # by sorting: a device's `median` is not deterministic where that is asked for
        return sizes.amax(-1) / sizes.sort(-1).values[..., middle]
    # numpy selects ten times faster, here in memory of our own; a NaN it sorts last, and `amax` keeps it
    sizes.numpy().partition(middle, axis=-1)
    return sizes[..., middle:].amax(-1) / sizes[..., middle]


def shares(parts: Sequence[Tensor], whole: Tensor) -> Sequence[Number]:
    """Share of each part in a sum: ⟨part, whole⟩/⟨whole, whole⟩.

    They add up to 1 exactly where the parts add up to the whole. NaN where the whole is zero.
    """
    if whole.device.type == "cpu":
        size = float(statistics.sum_squares(whole))
        return [float(statistics.dot(part, whole)) / size if size else math.nan for part in parts]
    wide = device_sums.wide(whole)
    together = whole.flatten().to(wide)
    products = (torch.stack([part.to(wide) for part in parts]).flatten(1) * together).sum(1)
    return (products / together.square().sum()).unbind()
