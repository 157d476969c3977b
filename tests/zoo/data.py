"""Data of the labelled zoo: English text, handwritten digits, and small synthetic tasks. Every batch is (inputs, targets)."""

from __future__ import annotations

import functools
import pydoc_data.topics

import torch
import torch.nn.functional as F

V, T = 48, 24
"""Characters of the text task, and tokens of a sequence."""
D = 32
"""Width of the models."""
MASK = V
"""Token that hides a character from a masked-language model."""


@functools.cache
def _corpus():
    source = " ".join(pydoc_data.topics.topics.values())[:200_000].lower()
    letters = sorted(set(source), key=lambda c: (-source.count(c), c))[: V - 1]
    index = {c: i for i, c in enumerate(letters)}
    return torch.tensor([index.get(c, V - 1) for c in source])


def text(generator, *, batch=8, tokens=T):
    """Characters of the Python manual's prose, (batch, token), and the next ones."""
    start = torch.randint(len(_corpus()) - tokens - 1, (batch,), generator=generator)
    rows = torch.stack([_corpus()[s : s + tokens + 1] for s in start])
    return rows[:, :-1], rows[:, 1:]


def hidden(generator, *, batch=8):
    """Text with 15 % of its characters hidden, and the characters where they are (-100 elsewhere)."""
    x, _ = text(generator, batch=batch)
    mask = torch.rand(x.shape, generator=generator) < 0.15
    mask[:, 0] = True
    return torch.where(mask, MASK, x), torch.where(mask, x, -100)


@functools.cache
def _digits():
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y)


def digits(generator, *, batch=48, raw=False):
    """Handwritten digits as 64 pixels, centred and of about unit size, or `raw` from 0 to 255."""
    x, y = _digits()
    rows = torch.randint(len(x), (batch,), generator=generator)
    return (x[rows] * 255 / 16 if raw else (x[rows] - 4.9) / 6.0), y[rows]


def pictures(generator, *, batch=24, size=8):
    """The same as images (batch, 1, 8, 8), or enlarged."""
    x, y = digits(generator, batch=batch)
    x = x.view(-1, 1, 8, 8)
    return (F.interpolate(x, size=(size, size)) if size != 8 else x), y


def rows(generator, *, batch=24):
    """The same as sequences of eight rows, (batch, 8, 8)."""
    x, y = digits(generator, batch=batch)
    return x.view(-1, 8, 8), y


def rings(generator, *, batch=96):
    """Points of the plane, to be sorted by the ring they lie on: four classes."""
    y = torch.randint(4, (batch,), generator=generator)
    angle = 2 * torch.pi * torch.rand(batch, generator=generator)
    radius = 0.5 + y + 0.1 * torch.randn(batch, generator=generator)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1), y


def waves(generator, *, batch=64):
    """A smooth function of eight inputs, to be regressed."""
    x = torch.randn(batch, 8, generator=generator)
    return x, (x[:, :4].sin().sum(1) + x[:, 4] * x[:, 5])[:, None]


def vectors(generator, *, batch=64, scale=1.0):
    """Noisy prototypes of four classes, 16 numbers each."""
    prototypes = torch.randn(4, 16, generator=torch.Generator().manual_seed(9))
    y = torch.randint(4, (batch,), generator=generator)
    return scale * (prototypes[y] + torch.randn(batch, 16, generator=generator)), y


def recall(generator, *, batch=32, tokens=20):
    """Ten random tokens a sequence, padded with noise: the class is its very first token."""
    x = torch.randint(8, (batch, tokens), generator=generator)
    return x, x[:, 0].clone()
