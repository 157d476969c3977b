"""Traps: attention, its masks and biases, and where norms stand around it."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from traps.base import D, Net, mlp, tokens, trap, vectors


def norm():
    return nn.LayerNorm(D)


def attention(function=None, **parts):
    """Scaled dot-product attention by hand; `function` changes the scores."""

    def forward(m, x, *rest):
        q, k, v = m.qkv(x).chunk(3, -1)
        s = q @ k.transpose(-1, -2) / math.sqrt(D)
        s = s if function is None else function(m, s, *rest)
        return m.o(s.softmax(-1) @ v)

    return Net(forward, qkv=nn.Linear(D, 3 * D), o=nn.Linear(D, D), **parts)


def stack(block, *args, n=2, **parts):
    """A stem and n blocks that take the same further arguments."""

    def forward(m, x, *rest):
        x = m.stem(x)
        for b in m.b:
            x = b(x, *rest)
        return x

    return Net(forward, stem=nn.Linear(D, D), b=nn.ModuleList(block() for _ in range(n)), **parts), args


def both(n=1):
    return {"b.0": n, "b.1": n}


def pre_norm():
    """A pre-norm block whose attention takes what the block takes besides x."""

    def forward(m, x, *rest):
        x = x + m.a(m.n1(x), *rest)
        return x + m.f(m.n2(x))

    return forward


@trap(both(2))
def causal_mask():
    """one additive mask, made outside and used in every layer"""
    block = lambda: Net(pre_norm(), a=attention(lambda m, s, mask: s + mask), n1=norm(), n2=norm(), f=mlp())
    return stack(block, *tokens(), torch.full((5, 5), float("-inf")).triu(1))


@trap(both(2))
def padding_mask_from_integers():
    """(1 - mask) * min, recomputed from an integer mask in every layer"""
    mask = lambda m, s, keep: s + (1.0 - keep[:, None].to(s.dtype)) * -1e4
    block = lambda: Net(pre_norm(), a=attention(mask), n1=norm(), n2=norm(), f=mlp())
    return stack(block, *tokens(), torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]))


@trap({"b.0": 2, "b.1": 2})
def shared_position_bias():
    """T5: the first layer computes a learned bias, and hands it to the others"""

    class Bias(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.rel = nn.Linear(D, D), nn.Embedding(25, 1)
            score = lambda m, s, bias: s + bias
            make = lambda: Net(pre_norm(), a=attention(score), n1=norm(), n2=norm(), f=mlp())
            self.b = nn.ModuleList(make() for _ in range(2))

        def forward(self, x):
            x = self.stem(x)
            bias = self.rel(torch.arange(25)).view(1, 5, 5)
            for b in self.b:
                x = b(x, bias)
            return x

    return Bias(), tokens()


@trap({"e.0": 2, "e.1": 2, "d.0": 3, "d.1": 3})
def object_queries():
    """DETR: positions are added to queries and keys in every layer; learned queries start from zeros"""

    def encoder(m, x, pos):
        q = x + pos
        x = m.n1(x + m.a(q, q, x, need_weights=False)[0])
        return m.n2(x + m.f(x))

    def decoder(m, x, memory, pos, query):
        q = x + query
        x = m.n1(x + m.a(q, q, x, need_weights=False)[0])
        x = m.n2(x + m.c(x + query, memory + pos, memory, need_weights=False)[0])
        return m.n3(x + m.f(x))

    att = lambda: nn.MultiheadAttention(D, 2, batch_first=True)

    class Detr(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.pos, self.query = nn.Linear(D, D), nn.Embedding(5, D), nn.Embedding(3, D)
            self.e = nn.ModuleList(Net(encoder, a=att(), f=mlp(), n1=norm(), n2=norm()) for _ in range(2))
            parts = lambda: dict(a=att(), c=att(), f=mlp(), n1=norm(), n2=norm(), n3=norm())
            self.d = nn.ModuleList(Net(decoder, **parts()) for _ in range(2))

        def forward(self, x):
            x, pos = self.stem(x), self.pos.weight[None].expand(x.shape[0], -1, -1)
            query = self.query.weight[None].expand(x.shape[0], -1, -1)
            for e in self.e:
                x = e(x, pos)
            y = torch.zeros_like(query)
            for d in self.d:
                y = d(y, x, pos, query)
            return y

    return Detr(), tokens()


@trap({"e": 2})
def position_scaled_by_the_stream():
    """DAB-DETR's encoder: a fixed position times a network of the stream, put onto queries and keys alone"""

    def forward(m, x, pos):
        q = x + pos * m.scale(x)
        x = m.n1(x + m.a(q, q, x, need_weights=False)[0])
        return m.n2(x + m.f(x))

    att = nn.MultiheadAttention(D, 2, batch_first=True)
    e = Net(forward, scale=mlp(), a=att, f=mlp(), n1=norm(), n2=norm())
    run = lambda m, x: m.e(m.stem(x), torch.sin(torch.arange(5 * D).view(1, 5, D) / 3))
    return Net(run, stem=nn.Linear(D, D), e=e), tokens()


@trap({"b.0": 3, "b.1": 3})
def cross_attention_decoder():
    """self-attention, cross-attention to one memory, feed-forward"""

    def forward(m, x, memory):
        x = x + m.a(m.n1(x))
        x = x + m.c(m.n2(x), memory, memory, need_weights=False)[0]
        return x + m.f(m.n3(x))

    att = lambda: nn.MultiheadAttention(D, 2, batch_first=True)
    block = lambda: Net(forward, a=attention(), c=att(), f=mlp(), n1=norm(), n2=norm(), n3=norm())
    return stack(block, *tokens(), *tokens(7))


@trap({"": 4})
def perceiver():
    """learned latents read the input; the latents are the stream"""

    def forward(m, x):
        z = m.latents.expand(x.shape[0], -1, -1)
        for c, f in ((m.c0, m.f0), (m.c1, m.f1)):
            z = z + c(z, x, x, need_weights=False)[0]
            z = z + f(z)
        return z

    att = lambda: nn.MultiheadAttention(D, 2, batch_first=True)
    latents = nn.Parameter(torch.randn(3, D))
    return Net(forward, latents=latents, c0=att(), c1=att(), f0=mlp(), f1=mlp()), tokens()


@trap(both(2))
def rotary_alibi_softcap():
    """rotary embedding, slopes by distance, tanh cap: sums inside attention"""

    def forward(m, x):
        q, k, v = m.qkv(x).chunk(3, -1)
        angle = torch.arange(x.shape[1])[:, None] * 10.0 ** -torch.arange(0, D, 2).repeat(2)
        turn = lambda u: u * angle.cos() + torch.cat([-u[..., D // 2 :], u[..., : D // 2]], -1) * angle.sin()
        s = 30 * torch.tanh(turn(q) @ turn(k).transpose(-1, -2) / 30)
        i = torch.arange(x.shape[1])
        s = s - 0.5 * (i[:, None] - i[None]).abs()
        return m.o(s.softmax(-1) @ v)

    make = lambda: Net(forward, qkv=nn.Linear(D, 3 * D), o=nn.Linear(D, D))
    return stack(lambda: Net(pre_norm(), a=make(), n1=norm(), n2=norm(), f=mlp()), *tokens())


@trap(both(1), branches=4)
def parallel_attention_and_feed_forward():
    """x + attention(n) + mlp(n): one join, two branches"""

    def forward(m, x):
        n = m.n(x)
        return x + m.a(n) + m.f(n)

    return stack(lambda: Net(forward, a=attention(), f=mlp(), n=norm()), *tokens())


@trap(both(2))
def sandwich_norm():
    """a norm before and after each sublayer"""

    def forward(m, x):
        x = x + m.n2(m.a(m.n1(x)))
        return x + m.n4(m.f(m.n3(x)))

    return stack(lambda: Net(forward, a=attention(), f=mlp(), n1=norm(), n2=norm(), n3=norm(), n4=norm()), *tokens())


@trap(both(2))
def norm_former():
    """head scale, norm after attention, norm inside the feed-forward"""
    inner = lambda: nn.Sequential(nn.Linear(D, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, D))
    forward = lambda m, x: (y := x + m.n2(m.a(m.n1(x)) * m.s)) + m.f(m.n3(y))
    make = lambda: Net(
        forward, a=attention(), f=inner(), s=nn.Parameter(torch.ones(D)), n1=norm(), n2=norm(), n3=norm()
    )
    return stack(make, *tokens())


@trap(both(2))
def rms_norm_by_hand():
    """x * rsqrt(mean(x²)) * w in half precision and back"""

    class Rms(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(D))

        def forward(self, x):
            y = x.double()
            return self.w * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    return stack(lambda: Net(pre_norm(), a=attention(), f=mlp(), n1=Rms(), n2=Rms()), *tokens())


@trap(both(2))
def adaptive_norm():
    """scales, shifts and gates are slices of one linear map of a condition"""

    def forward(m, x, c):
        s1, b1, g1, s2, b2, g2 = m.c(F.silu(c))[:, None].chunk(6, -1)
        x = x + g1 * m.a(F.layer_norm(x, (D,)) * (1 + s1) + b1)
        return x + g2 * m.f(F.layer_norm(x, (D,)) * (1 + s2) + b2)

    return stack(lambda: Net(forward, a=attention(), f=mlp(), c=nn.Linear(D, 6 * D)), *tokens(), *vectors(2))
