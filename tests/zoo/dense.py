"""Plain stacks of linear maps and of convolutions."""

from __future__ import annotations

import torch
from torch import nn

from zoo.surgery import initialise


def mlp(depth, act=nn.ReLU, *, width=48, inputs=64, classes=10, init=None, norm=None):
    """A plain stack of linear layers."""
    layers, fan = [], inputs
    for _ in range(depth):
        layers += [nn.Linear(fan, width), *([norm(width)] if norm else []), act()]
        fan = width
    model = nn.Sequential(*layers, nn.Linear(width, classes))
    return initialise(model, init) if init else model


class Plain(nn.Module):
    """A list of hidden layers called in a loop, optionally with residual connections and norms around them."""

    def __init__(
        self, depth, act=torch.relu, *, width=48, inputs=64, classes=10, init=None, residual=False, batchnorm=False
    ):
        super().__init__()
        self.entry = nn.Linear(inputs, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.norms = nn.ModuleList(
            nn.BatchNorm1d(width) if batchnorm else nn.LayerNorm(width) if residual else nn.Identity()
            for _ in range(depth)
        )
        self.exit, self.act, self.residual = nn.Linear(width, classes), act, residual
        if init:
            initialise(self, init)

    def forward(self, x):
        x = self.act(self.entry(x))
        for layer, norm in zip(self.hidden, self.norms, strict=True):
            x = x + layer(self.act(norm(x))) if self.residual else self.act(norm(layer(x)))
        return self.exit(x)


class Sine(nn.Module):
    def forward(self, x):
        return torch.sin(x)


class Cut(nn.Sequential):
    """Layers behind the third of which the graph is cut."""

    def forward(self, x):
        for i, layer in enumerate(self):
            x = layer(x)
            x = x.detach() if i == 5 else x
        return x
