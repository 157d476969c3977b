"""Ways to change a model: drawn anew, multiplied, shifted, cut, normed, given low-rank updates."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import nn

from zoo.data import D

he = functools.partial(nn.init.kaiming_normal_, nonlinearity="relu")


def gaussian(std):
    return functools.partial(nn.init.normal_, std=std)


def initialise(model, init, kinds=(nn.Linear, nn.Conv2d)):
    """The model with every linear map and convolution drawn anew and zero biases."""
    for module in model.modules():
        if isinstance(module, kinds):
            init(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


class After(nn.Module):
    """A module with an operation behind its output."""

    def __init__(self, module, operation):
        super().__init__()
        self.inner, self.operation = module, operation

    def forward(self, *args, **kwargs):
        out = self.inner(*args, **kwargs)
        return (self.operation(out[0]), *out[1:]) if isinstance(out, tuple) else self.operation(out)


def after(model, path, operation):
    """The model with an operation behind one of its modules."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, After(model.get_submodule(path), operation))
    return model


class Since:
    """An operation that begins with the call of that number, counted from 0."""

    def __init__(self, operation, call):
        self.operation, self.call, self.calls = operation, call, 0

    def __call__(self, x):
        self.calls += 1
        return self.operation(x) if self.calls > self.call else x


def detached(x):
    return x.detach()


class HeadNorm(nn.Module):
    """Queries or keys of each head normalised to unit size: QK norm."""

    def __init__(self, width):
        super().__init__()
        self.width = width

    def forward(self, x):
        parts = x.unflatten(-1, (-1, self.width))
        return F.layer_norm(parts, parts.shape[-1:]).flatten(-2)


def qk_norm(model, names, width=D // 4):
    """The model with QK norm: the named projections are followed by a norm over each head, `width` wide."""
    for path in [p for p, _ in model.named_modules() if p.rpartition(".")[2] in names]:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, nn.Sequential(model.get_submodule(path), HeadNorm(width)))
    return model


def multiplied(model, words, factor):
    """The model with the matrices whose names hold one of the words multiplied."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(word in name for word in words) and parameter.dim() > 1:
                parameter.mul_(factor)
    return model


def shifted(model, name, value):
    """The model with one parameter moved by a constant."""
    with torch.no_grad():
        dict(model.named_parameters())[name].add_(value)
    return model


class LowRank(nn.Module):
    """A frozen linear map and a trained low-rank update that starts at zero."""

    def __init__(self, base, rank=4):
        super().__init__()
        self.base, self.lora_a = base.requires_grad_(False), nn.Linear(base.in_features, rank, bias=False)
        self.lora_b = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_b.weight)

    def forward(self, x):
        return self.base(x) + self.lora_b(self.lora_a(x))


def low_rank(model, words):
    """The model frozen, the named linear maps with low-rank updates."""
    model.requires_grad_(False)
    for path in [p for p, m in model.named_modules() if isinstance(m, nn.Linear) and any(w in p for w in words)]:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, LowRank(model.get_submodule(path)))
    return model
