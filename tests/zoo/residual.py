"""Residual networks of vectors and of pictures, each with the switches that make it sick or sound."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

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


class ConvCell(nn.Module):
    """A basic ResNet block, batch norm after each convolution unless `norm` is False; `cut` detaches its branch."""

    def __init__(self, inputs, outputs, stride=1, *, norm=True, cut=False, init=None):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=not norm)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=not norm)
        self.bn1, self.bn2 = (nn.BatchNorm2d(outputs) if norm else nn.Identity() for _ in range(2))
        self.down = nn.Identity() if inputs == outputs and stride == 1 else nn.Conv2d(inputs, outputs, 1, stride)
        self.cut = cut
        if init:
            initialise(self, init)

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(self.down(x) + (y.detach() if self.cut else y))


class ResNet(nn.Module):
    def __init__(self, *, blocks=2, widths=(12, 24), classes=10, special=None, **options):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, widths[0], 3, 1, 1), nn.BatchNorm2d(widths[0]), nn.ReLU())
        cells, fan = [], widths[0]
        for s, width in enumerate(widths):
            for b in range(blocks):
                own = {**options, **(special or {}).get(len(cells), {})}
                cells.append(ConvCell(fan, width, 2 if s and not b else 1, **own))
                fan = width
        self.layers, self.fc = nn.ModuleList(cells), nn.Linear(fan, classes)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.fc(x.mean((2, 3)))


class Depthwise(nn.Module):
    """ConvNeXt block with LayerScale; `normed=False` leaves its norm out."""

    def __init__(self, c, *, scale=1e-6, zero=False, normed=True, operation=None, init=None):
        super().__init__()
        self.dw, self.ln = nn.Conv2d(c, c, 3, 1, 1, groups=c), nn.LayerNorm(c) if normed else nn.Identity()
        self.pw1, self.pw2 = nn.Linear(c, 4 * c), nn.Linear(4 * c, c)
        self.scale = nn.Parameter(torch.full((c,), float(scale)))
        if init:
            initialise(self, init)
        if zero:
            nn.init.zeros_(self.pw2.weight)
            nn.init.zeros_(self.pw2.bias)
        self.operation = operation

    def forward(self, x):
        y = self.ln(self.dw(x).permute(0, 2, 3, 1))
        y = y if self.operation is None else self.operation(y)
        return x + (self.pw2(F.gelu(self.pw1(y))) * self.scale).permute(0, 3, 1, 2)


class ConvNet(nn.Module):
    """A patch convolution, blocks, mean pooling, a head."""

    def __init__(self, *blocks, c=16, classes=10):
        super().__init__()
        self.patch, self.blocks, self.fc = nn.Conv2d(1, c, 2, 2), nn.ModuleList(blocks), nn.Linear(c, classes)

    def forward(self, x):
        x = self.patch(x)
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((2, 3)))


def conv_net(**options):
    """A builder of six ConvNeXt blocks."""
    return lambda: ConvNet(*[Depthwise(16, **options) for _ in range(6)])


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
