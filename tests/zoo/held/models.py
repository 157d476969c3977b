"""Models of the last set: U-shaped forecaster, gMLP, graph attention, neural ODE, hypernetwork, mixture density, pair of towers, Perceiver."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


class GMLP(nn.Module):
    """Blocks of gated MLPs (Liu et al. 2021): half of the channels gate the other half across places."""

    def __init__(self, vocabulary, depth=4, width=40, length=24, *, skip=True, norm=True, gain=1.0):
        super().__init__()
        self.embed, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary)
        self.widen, self.narrow = (nn.ModuleList(nn.Linear(*s) for _ in range(depth)) for s in ((width, 2 * width), (width, width)))
        self.mix = nn.ModuleList(nn.Linear(length, length) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(width) if norm else nn.Identity() for _ in range(depth))
        self.skip, self.last = skip, nn.LayerNorm(width)
        for layer in self.mix:
            nn.init.normal_(layer.weight, std=1e-3)
            nn.init.ones_(layer.bias)
        with torch.no_grad():
            for layer in (*self.widen, *self.narrow):
                layer.weight.mul_(gain)

    def forward(self, tokens):
        x = self.embed(tokens)
        below = torch.ones(tokens.shape[1], tokens.shape[1]).tril()
        for norm, widen, mix, narrow in zip(self.norms, self.widen, self.mix, self.narrow, strict=True):
            a, b = F.gelu(widen(norm(x))).chunk(2, -1)
            gate = (F.linear(b.mT, mix.weight * below, mix.bias)).mT
            x = x + narrow(a * gate) if self.skip else narrow(a * gate)
        return self.head(self.last(x))


class GraphAttention(nn.Module):
    """Points that attend to their neighbours in space, a head over their mean; `hard` multiplies the scores."""

    def __init__(self, depth=3, width=32, *, hard=1.0, cut=None):
        super().__init__()
        self.inlet, self.outlet = nn.Linear(3, width), nn.Linear(width, 4)
        self.query, self.key, self.value, self.out = (nn.ModuleList(nn.Linear(width, width) for _ in range(depth)) for _ in range(4))
        self.norms, self.hard, self.cut = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth)), hard, cut

    def forward(self, x):
        near = torch.cdist(x, x) < 1.2
        x = self.inlet(x)
        for i, (norm, query, key, value, out) in enumerate(zip(self.norms, self.query, self.key, self.value, self.out, strict=True)):
            h = norm(x)
            mixed = F.scaled_dot_product_attention(self.hard * query(h), key(h), value(h), attn_mask=near)
            f = out(mixed)
            x = x + (f.detach() if i == self.cut else f)
        return self.outlet(x.mean(1))


class Flowing(nn.Module):
    """A neural ODE by Euler's steps, one network for all of them, told the time."""

    def __init__(self, inputs=2, width=32, steps=8, *, dt=None, classes=2):
        super().__init__()
        self.inlet, self.outlet = nn.Linear(inputs, width), nn.Linear(width, classes)
        self.field, self.steps, self.dt = nn.Sequential(nn.Linear(width + 1, 64), nn.Tanh(), nn.Linear(64, width)), steps, dt or 1 / steps

    def forward(self, x):
        x = self.inlet(x)
        for t in range(self.steps):
            x = x + self.dt * self.field(torch.cat([x, torch.full_like(x[:, :1], t * self.dt)], 1))
        return self.outlet(x)


class MixtureDensity(nn.Module):
    """Weights, means and spreads of five normal densities; the negative log-likelihood by hand or in logarithms."""

    def __init__(self, inputs=10, width=48, *, naive=False, act=nn.ReLU):
        super().__init__()
        self.body, self.head, self.naive = nn.Sequential(nn.Linear(inputs, width), act(), nn.Linear(width, width), act()), nn.Linear(width, 15), naive

    def forward(self, x, y):
        weight, mean, spread = self.head(self.body(x)).chunk(3, -1)
        far = (y - mean) / spread.exp()
        if self.naive:
            density = (weight.softmax(-1) * (-far.pow(2) / 2).exp() / spread.exp()).sum(-1)
            return -density.log().mean()
        return -torch.logsumexp(weight.log_softmax(-1) - far.pow(2) / 2 - spread, -1).mean()


class Towers(nn.Module):
    """Users and things, a vector each, and small networks over both; their product is the liking."""

    def __init__(self, users=60, things=40, width=24):
        super().__init__()
        self.user, self.thing = nn.Embedding(users, width), nn.Embedding(things, width)
        self.left, self.right = (nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, 16)) for _ in range(2))

    def forward(self, pairs):
        return (self.left(self.user(pairs[:, 0])) * self.right(self.thing(pairs[:, 1]))).sum(-1)


def likings(generator, *, batch=128):
    """Pairs of users and things, and how much the one likes the other: products of hidden vectors."""
    hidden = torch.Generator().manual_seed(4)
    users, things = torch.randn(60, 4, generator=hidden), torch.randn(40, 4, generator=hidden)
    pairs = torch.stack([torch.randint(60, (batch,), generator=generator), torch.randint(40, (batch,), generator=generator)], 1)
    return pairs, (users[pairs[:, 0]] * things[pairs[:, 1]]).sum(1) / 2


class Perceiver(nn.Module):
    """A few learned vectors that look at all patches of a picture, then at themselves."""

    def __init__(self, depth=4, width=32, latents=6):
        super().__init__()
        self.patch, self.place = nn.Conv2d(3, width, 4, 4), nn.Parameter(0.5 * torch.randn(16, width))
        self.latents, self.fc = nn.Parameter(torch.randn(latents, width)), nn.Linear(width, 3)
        self.look = nn.MultiheadAttention(width, 4, batch_first=True)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(width, 4, 64, 0.0, batch_first=True, norm_first=True) for _ in range(depth))

    def forward(self, x):
        x = self.patch(x).flatten(2).mT + self.place
        z = self.latents.expand(len(x), -1, -1)
        z = z + self.look(z, x, x, need_weights=False)[0]
        for layer in self.layers:
            z = layer(z)
        return self.fc(z.mean(1))


class Forecaster(nn.Module):
    """N-BEATS: stacks of blocks that each explain a part of the series and hand on what they could not."""

    def __init__(self, length=32, ahead=8, depth=5, width=48, *, init=None):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(length, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, length + ahead)) for _ in range(depth)
        )
        self.length = length
        for layer in self.modules():
            if init and isinstance(layer, nn.Linear):
                init(layer.weight)

    def forward(self, x):
        told = 0.0
        for block in self.blocks:
            back, ahead = block(x).split([self.length, 8], -1)
            x, told = x - back, told + ahead
        return told


def ahead(generator, *, batch=32):
    """Forty values of a sum of two waves: 32 to see, eight to tell."""
    t = torch.arange(40) / 4
    rate, phase = torch.rand(2, batch, 2, 1, generator=generator)
    x = ((0.3 + 1.5 * rate) * t + 2 * math.pi * phase).sin().sum(1)
    return x[:, :32], x[:, 32:]


class Plain(nn.Module):
    """Convolutions over a series of sensor values, one after another, a global mean and a head."""

    def __init__(self, depth=9, c=24, *, act=nn.Hardtanh, init=None, skip=False):
        super().__init__()
        self.inlet, self.outlet, self.skip = nn.Conv1d(1, c, 5, 1, 2), nn.Linear(c, 8), skip
        self.layers, self.acts = nn.ModuleList(nn.Conv1d(c, c, 3, 1, 1) for _ in range(depth)), nn.ModuleList(act() for _ in range(depth))
        for layer in self.layers:
            if init:
                init(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, x):
        x = self.inlet(x[:, None])
        for layer, act in zip(self.layers, self.acts, strict=True):
            x = x + act(layer(x)) if self.skip else act(layer(x))
        return self.outlet(x.mean(2))
