"""Residual networks of vectors and of pictures, each with the switches that make it sick or sound."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from zoo.data import D
from zoo.surgery import initialise


class Cell(nn.Module):
    """skip · x + gate · factor · f(norm(x)), f two linear maps with GELU between."""

    def __init__(
        self,
        width,
        *,
        norm=True,
        gate=None,
        zero=False,
        factor=1.0,
        cut=False,
        skip=1.0,
        drop=0.0,
        act=F.gelu,
        post=False,
        init=None,
    ):
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        if init:
            initialise(self, init)
        if zero:
            nn.init.zeros_(self.fc2.weight)
            nn.init.zeros_(self.fc2.bias)
        self.gate = None if gate is None else nn.Parameter(torch.full((width,), float(gate)))
        self.factor, self.cut, self.skip, self.drop, self.act, self.post = factor, cut, skip, drop, act, post

    def forward(self, x):
        if self.training and self.drop and torch.rand(()) < self.drop:
            return x
        f = self.fc2(self.act(self.fc1(x if self.post else self.norm(x)))) * self.factor
        f = f if self.gate is None else f * self.gate
        f = f.detach() if self.cut else f
        y = (x if self.skip == 1.0 else self.skip * x) + f
        return self.norm(y) if self.post else y


class ResidualNet(nn.Module):
    """Vectors in, classes out, through residual cells; `special` gives some of them other options."""

    def __init__(self, depth=6, *, width=D, inputs=64, classes=10, special=None, final=True, **options):
        super().__init__()
        self.inlet = nn.Linear(inputs, width)
        self.cells = nn.ModuleList(Cell(width, **{**options, **(special or {}).get(i, {})}) for i in range(depth))
        self.last = nn.LayerNorm(width) if final else nn.Identity()
        self.outlet = nn.Linear(width, classes)

    def forward(self, x):
        x = self.inlet(x)
        for cell in self.cells:
            x = cell(x)
        return self.outlet(self.last(x))


class MixerNet(nn.Module):
    """MLP-Mixer over the rows of a digit."""

    def __init__(self, depth=4, width=24):
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.tokens = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(depth))
        self.channels = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 48), nn.GELU(), nn.Linear(48, width)) for _ in range(depth)
        )
        self.n1, self.n2 = (nn.ModuleList(nn.LayerNorm(width) for _ in range(depth)) for _ in range(2))
        self.fc = nn.Linear(width, 10)

    def forward(self, x):
        x = self.embed(x)
        for token, channel, n1, n2 in zip(self.tokens, self.channels, self.n1, self.n2, strict=True):
            x = x + token(n1(x).transpose(1, 2)).transpose(1, 2)
            x = x + channel(n2(x))
        return self.fc(x.mean(1))


class Checkpointed(ResidualNet):
    """Residual cells whose activations are recomputed."""

    def forward(self, x):
        x = self.inlet(x)
        for cell in self.cells:
            x = checkpoint(cell, x, use_reentrant=False)
        return self.outlet(self.last(x))


class GraphNet(nn.Module):
    """Residual graph convolutions over a fixed graph of 64 nodes."""

    def __init__(self, depth=4):
        super().__init__()
        edges = (torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) < 0.1).float()
        edges = ((edges + edges.T) > 0).float() + torch.eye(64)
        scale = edges.sum(1) ** -0.5
        self.register_buffer("edges", scale[:, None] * edges * scale)
        self.stem, self.head = nn.Linear(16, D), nn.Linear(D, 4)
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(depth))

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = x + torch.relu(layer(self.edges @ x))
        return self.head(x)
