"""Data that the first zoo does not use: bytes and words of the standard library, a photograph, scikit-learn's tables."""

from __future__ import annotations

import argparse
import functools
import inspect
import random
import re

import torch
import torch.nn.functional as F

BYTES, WORDS, LENGTH = 128, 200, 32
"""Vocabulary of bytes and of words, tokens a sequence."""
HIDDEN = WORDS - 1
"""Token that hides a word."""


@functools.cache
def _source():
    return torch.tensor([min(b, BYTES - 1) for b in (inspect.getsource(argparse) + inspect.getsource(random)).encode()])


@functools.cache
def _prose():
    told = re.findall(r"\w+|[^\w\s]", inspect.getsource(random).lower() + inspect.getsource(argparse).lower())
    common = sorted(set(told), key=lambda w: (-told.count(w), w))[: WORDS - 2]
    index = {w: i for i, w in enumerate(common)}
    return torch.tensor([index.get(w, WORDS - 2) for w in told])


def _pieces(stream, generator, batch, length):
    start = torch.randint(len(stream) - length - 1, (batch,), generator=generator)
    pieces = torch.stack([stream[s : s + length + 1] for s in start])
    return pieces[:, :-1], pieces[:, 1:]


def source(generator, *, batch=8, length=LENGTH):
    """Bytes of two modules of the standard library, and the next ones."""
    return _pieces(_source(), generator, batch, length)


def words(generator, *, batch=8, length=24):
    """Words of the same, and the next ones."""
    return _pieces(_prose(), generator, batch, length)


def gaps(generator, *, batch=8, length=24):
    """Words of which a fifth is hidden, and the words there (-100 elsewhere)."""
    x, _ = words(generator, batch=batch, length=length)
    hidden = torch.rand(x.shape, generator=generator) < 0.2
    hidden[:, 1] = True
    return torch.where(hidden, HIDDEN, x), torch.where(hidden, x, -100)


def copies(generator, *, batch=16, length=8, symbols=16):
    """Symbols, a mark, silence: to be said again after the mark; -100 before it."""
    said = torch.randint(2, symbols, (batch, length), generator=generator)
    mark, silence = torch.ones(batch, 1).long(), torch.zeros(batch, length - 1).long()
    return torch.cat([said, mark, silence], 1), torch.cat([torch.full((batch, length), -100), said], 1)


@functools.cache
def _photograph():
    from sklearn.datasets import load_sample_image

    return torch.tensor(load_sample_image("flower.jpg")).permute(2, 0, 1).float() / 255


def patches(generator, *, batch=16, size=16):
    """Patches of a photograph, (batch, 3, size, size), from -1 to 1; which third of the picture they come from."""
    photo = F.avg_pool2d(_photograph(), 2)
    top = torch.randint(photo.shape[1] - size, (batch,), generator=generator)
    left = torch.randint(photo.shape[2] - size, (batch,), generator=generator)
    cut = torch.stack([photo[:, t : t + size, l : l + size] for t, l in zip(top, left, strict=True)])
    return 2 * cut - 1, left * 3 // (photo.shape[2] - size)


def noisy(generator, *, noise=0.3, **options):
    """Noisy patches, and the clean ones."""
    clean, _ = patches(generator, **options)
    return clean + noise * torch.randn(clean.shape, generator=generator), clean


def pixels(generator, *, batch=256):
    """Coordinates of pixels from -1 to 1, and their colours: a picture as a function."""
    photo = F.avg_pool2d(_photograph(), 8)
    y = torch.randint(photo.shape[1], (batch,), generator=generator)
    x = torch.randint(photo.shape[2], (batch,), generator=generator)
    where = torch.stack([y / photo.shape[1], x / photo.shape[2]], 1) * 2 - 1
    return where, photo[:, y, x].T


@functools.cache
def _digits():
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return F.interpolate(torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) / 16, scale_factor=2), torch.tensor(y)


def digits16(generator, *, batch=24):
    """Digits as colour images of 16 x 16 from 0 to 1."""
    x, y = _digits()
    rows = torch.randint(len(x), (batch,), generator=generator)
    return x[rows].expand(-1, 3, -1, -1), y[rows]


def twins(generator, *, batch=32):
    """Pairs of digits, and whether both are the same figure."""
    x, y = _digits()
    a, b = torch.randint(len(x), (2, batch), generator=generator)
    like = torch.stack([torch.nonzero(y == c)[0, 0] for c in y[a]])
    b = torch.where(torch.rand(batch, generator=generator) < 0.5, like, b)
    return torch.stack([x[a], x[b]], 1).flatten(2), (y[a] == y[b]).float()


@functools.cache
def _table(name):
    import sklearn.datasets

    x, y = getattr(sklearn.datasets, f"load_{name}")(return_X_y=True)
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y)


def table(generator, *, name="wine", batch=32, raw=False):
    """Rows of one of scikit-learn's tables, standardised or `raw`, and their classes (numbers of unit size for diabetes)."""
    x, y = _table(name)
    y = ((y - y.mean()) / y.std()).float()[:, None] if y.is_floating_point() else y
    rows = torch.randint(len(x), (batch,), generator=generator)
    return (x if raw else (x - x.mean(0)) / x.std(0))[rows], y[rows]


def friedman(generator, *, batch=64):
    """Friedman's first function of ten numbers, of which five matter."""
    x = torch.rand(batch, 10, generator=generator)
    y = 10 * (torch.pi * x[:, 0] * x[:, 1]).sin() + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
    return x * 2 - 1, ((y - 14.4) / 5)[:, None]


def moons(generator, *, batch=128):
    """Points of two half moons, and which."""
    y = torch.randint(2, (batch,), generator=generator)
    angle = torch.pi * torch.rand(batch, generator=generator)
    x = torch.stack([angle.cos(), angle.sin()], 1)
    x = torch.where(y[:, None] == 1, torch.tensor([1.0, 0.5]) - x, x)
    return x + 0.08 * torch.randn(batch, 2, generator=generator), y


def clouds(generator, *, batch=24, points=32):
    """Clouds of points in space, on a sphere, in a cube, on a helix or on a plane: four classes."""
    y = torch.randint(4, (batch,), generator=generator)
    x = torch.randn(batch, points, 3, generator=generator)
    turn = 6 * torch.rand(batch, points, generator=generator)
    shapes = [F.normalize(x, dim=-1), x.clamp(-1, 1), torch.stack([turn.cos(), turn.sin(), turn / 3 - 1], -1), x * torch.tensor([1, 1, 0.05])]
    return torch.stack(shapes, 1)[torch.arange(batch), y], y


def walks(generator, *, batch=64, reward=1.0):
    """Steps of a walk on a line of eight rooms: state, action, reward, next state; the last room pays."""
    state = torch.randint(8, (batch,), generator=generator)
    action = torch.randint(2, (batch,), generator=generator)
    after = (state + 2 * action - 1).clamp(0, 7)
    paid = reward * (after == 7).float() + 0.1 * reward * torch.randn(batch, generator=generator)
    return (F.one_hot(state, 8).float(), F.one_hot(after, 8).float()), (action, paid)


def waves(generator, *, batch=16, length=40):
    """Sums of two sine waves with noise, (batch, 1, length), and the next value at each time."""
    t = torch.arange(length + 1) / 4
    rate, phase = torch.rand(2, batch, 2, 1, generator=generator)
    x = ((0.3 + 1.5 * rate) * t + 6.28 * phase).sin().sum(1) + 0.05 * torch.randn(batch, length + 1, generator=generator)
    return x[:, None, :-1], x[:, 1:]
