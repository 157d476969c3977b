"""Traps: additions that are not joins."""

import torch
import torch.nn.functional as F
from torch import nn

from traps.base import D, Net, blocks, mlp, tokens, trap, vectors


@trap()
def embedding_sum():
    """token plus position plus type embeddings"""

    def forward(m, ids):
        return m.head(m.tok(ids) + m.pos(torch.arange(ids.shape[1])) + m.typ(torch.zeros_like(ids)))

    parts = dict(tok=nn.Embedding(9, D), pos=nn.Embedding(9, D), typ=nn.Embedding(2, D), head=nn.Linear(D, 2))
    return Net(forward, **parts), (torch.randint(0, 9, (2, 5)),)


@trap()
def gru_by_hand():
    """gates: (1 - z) * n + z * h, with the reset gate inside the candidate"""

    def forward(m, x):
        h = torch.zeros(x.shape[0], D)
        for t in range(x.shape[1]):
            r, z = torch.sigmoid(m.x(x[:, t]) + m.h(h)).chunk(2, -1)
            n = torch.tanh(m.n(x[:, t]) + m.u(r * h))
            h = (1 - z) * n + z * h
        return h

    return Net(forward, x=nn.Linear(D, 2 * D), h=nn.Linear(D, 2 * D), n=nn.Linear(D, D), u=nn.Linear(D, D)), tokens()


@trap()
def gru_as_a_difference():
    """the same gate written h + z * (n - h)"""

    def forward(m, x):
        h = m.stem(x)
        for n, z in ((m.n0, m.z0), (m.n1, m.z1)):
            h = h + torch.sigmoid(z(h)) * (torch.tanh(n(h)) - h)
        return h

    return Net(forward, stem=nn.Linear(D, D), **{k: nn.Linear(D, D) for k in ("n0", "z0", "n1", "z1")}), vectors()


@trap()
def lerp_gate():
    """torch.lerp with a gate from the data"""
    f = lambda m, x: torch.lerp(x, m.f(x), torch.sigmoid(m.z(x)))
    return blocks(f, f=mlp, z=lambda: nn.Linear(D, D)), vectors()


@trap()
def lstm_by_hand():
    """cell state f * c + i * g"""

    def forward(m, x):
        h = c = torch.zeros(x.shape[0], D)
        for t in range(x.shape[1]):
            i, f, g, o = (m.x(x[:, t]) + m.h(h)).chunk(4, -1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return h

    return Net(forward, x=nn.Linear(D, 4 * D), h=nn.Linear(D, 4 * D)), tokens()


@trap()
def straight_through():
    """x + (quantised - x).detach()"""

    def forward(m, x):
        x = m.stem(x)
        q = m.book(torch.cdist(x, m.book.weight).argmin(-1))
        return m.head(x + (q - x).detach())

    return Net(forward, stem=nn.Linear(D, D), book=nn.Embedding(6, D), head=nn.Linear(D, 2)), vectors()


@trap()
def low_rank_update():
    """LoRA: a linear map and its update, no nonlinearity between its two maps"""
    f = lambda m, x: torch.relu(m.w(x) + 2 * m.b(F.dropout(m.a(x), 0.1)))
    return blocks(f, w=lambda: nn.Linear(D, D), a=lambda: nn.Linear(D, 2), b=lambda: nn.Linear(2, D)), vectors()


@trap()
def mixture_of_experts():
    """experts merged by routing weights, accumulated in place"""

    def forward(m, x):
        x = m.stem(x)
        weight = m.router(x).softmax(-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(m.experts):
            out = out + weight[:, i : i + 1] * expert(x)
        return out + torch.sigmoid(m.gate(x)) * m.shared(x)

    parts = dict(stem=nn.Linear(D, D), router=nn.Linear(D, 3), experts=nn.ModuleList(mlp() for _ in range(3)))
    return Net(forward, **parts, gate=nn.Linear(D, 1), shared=mlp()), vectors()


@trap()
def ensemble_and_losses():
    """two heads averaged, a loss of several terms, a reconstruction error"""

    def forward(m, x):
        h = torch.relu(m.stem(x))
        a, b = m.a(h), m.b(h)
        error = (m.decode(h) - x).pow(2).mean()
        return (a + b) / 2, error + 0.1 * a.pow(2).mean() + 0.01 * b.abs().mean()

    return Net(forward, stem=nn.Linear(D, D), a=nn.Linear(D, 3), b=nn.Linear(D, 3), decode=mlp()), vectors()


@trap()
def film():
    """feature-wise modulation: gamma(c) * x + beta(c)"""
    f = lambda m, x, c: torch.relu(m.f(x) * (1 + m.g(c)) + m.b(c))
    return Net(f, f=mlp(), g=nn.Linear(3, D), b=nn.Linear(3, D)), (torch.randn(4, D), torch.randn(4, 3))


@trap()
def shared_bias_without_skips():
    """attention layers without skips that all add the same learned bias to their scores"""

    def forward(m, x):
        bias = m.rel.weight.view(5, 5)
        for qkv in m.layers:
            q, k, v = qkv(x).chunk(3, -1)
            x = (q @ k.transpose(-1, -2) + bias).softmax(-1) @ v
        return x

    return Net(forward, rel=nn.Embedding(25, 1), layers=nn.ModuleList(nn.Linear(D, 3 * D) for _ in range(3))), tokens()
