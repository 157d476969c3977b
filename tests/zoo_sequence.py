"""Traps from sequence models: attention, recurrence, state spaces, graphs, sets (see `zoo`)."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from zoo import D, Net, blocks, mlp, tokens, trap, vectors


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


@trap(both())
def swiglu_and_gated_units():
    """silu(a) * b and tanh(a) * sigmoid(b) in the branch"""
    forward = lambda m, x: x + m.o(F.silu(m.a(x)) * m.b(x) + torch.tanh(m.c(x)) * torch.sigmoid(m.d(x)))
    return stack(lambda: Net(forward, **{k: nn.Linear(D, D) for k in "abcdo"}), *tokens())


@trap(both())
def retention():
    """RetNet: a decaying state over time, group norm and gate"""

    def forward(m, x):
        q, k, v = m.qkv(m.n(x)).chunk(3, -1)
        state, out = torch.zeros(x.shape[0], D, D), []
        for t in range(x.shape[1]):
            state = 0.9 * state + k[:, t, :, None] * v[:, t, None]
            out.append((q[:, t, None] @ state).squeeze(1))
        y = F.layer_norm(torch.stack(out, 1), (D,))
        return x + m.o(F.silu(m.g(x)) * y)

    make = lambda: Net(forward, n=norm(), qkv=nn.Linear(D, 3 * D), o=nn.Linear(D, D), g=nn.Linear(D, D))
    return stack(make, *tokens())


@trap(both())
def diagonal_state_space():
    """a learned diagonal recurrence with a gate"""

    def forward(m, x):
        u = m.i(m.n(x))
        a, h, out = torch.sigmoid(m.a), torch.zeros(x.shape[0], D), []
        for t in range(x.shape[1]):
            h = a * h + (1 - a) * u[:, t]
            out.append(h)
        return x + m.o(torch.stack(out, 1) * F.silu(m.g(x)))

    parts = lambda: dict(n=norm(), a=nn.Parameter(torch.zeros(D)), **{k: nn.Linear(D, D) for k in "iog"})
    return stack(lambda: Net(forward, **parts()), *tokens())


@trap(both())
def long_convolution():
    """Hyena: a filter made from positions by a network, applied by Fourier transform"""

    def forward(m, x):
        n = x.shape[1]
        u, g = m.i(m.n(x)).chunk(2, -1)
        k = m.k(torch.arange(n)[:, None] / n)
        y = torch.fft.irfft(torch.fft.rfft(u, 2 * n, dim=1) * torch.fft.rfft(k, 2 * n, dim=0), 2 * n, dim=1)[:, :n]
        return x + m.o(g * y)

    make = lambda: Net(forward, n=norm(), i=nn.Linear(D, 2 * D), k=mlp(1, 8, D), o=nn.Linear(D, D))
    return stack(make, *tokens())


@trap(both())
def linear_attention():
    """Performer: feature maps and a normaliser"""

    def forward(m, x):
        q, k, v = m.qkv(x).chunk(3, -1)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        z = 1 / (q * k.sum(1, keepdim=True)).sum(-1, keepdim=True)
        return x + m.o((q @ (k.transpose(1, 2) @ v)) * z)

    return stack(lambda: Net(forward, qkv=nn.Linear(D, 3 * D), o=nn.Linear(D, D)), *tokens())


@trap({"b.0": 4, "b.1": 4})
def set_transformer():
    """induced set attention: inducing points attend to the set, the set attends to them"""
    att = lambda: nn.MultiheadAttention(D, 2, batch_first=True)

    def forward(m, x):
        h = m.i.expand(x.shape[0], -1, -1)
        h = h + m.a(h, x, x, need_weights=False)[0]
        h = h + m.f(h)
        x = x + m.c(x, h, h, need_weights=False)[0]
        return x + m.g(x)

    return stack(lambda: Net(forward, a=att(), c=att(), f=mlp(), g=mlp(), i=nn.Parameter(torch.randn(2, D))), *tokens())


@trap(both())
def token_shift():
    """RWKV: x and its shifted self mixed per channel, sigmoid times value"""

    def forward(m, x):
        shifted = F.pad(x, (0, 0, 1, -1))
        k, r = x * m.mk + shifted * (1 - m.mk), x + (shifted - x) * m.mr
        return x + torch.sigmoid(m.r(r)) * m.v(torch.relu(m.k(k)) ** 2)

    parts = lambda: dict(mk=nn.Parameter(torch.rand(D)), mr=nn.Parameter(torch.rand(D)))
    return stack(lambda: Net(forward, **parts(), **{k: nn.Linear(D, D) for k in "krv"}), *tokens())


@trap(both())
def graph_convolution():
    """adjacency times features times weight, with a skip"""
    forward = lambda m, x, a: x + torch.relu(a @ m.w(x))
    return stack(lambda: Net(forward, w=nn.Linear(D, D)), *vectors(5), torch.rand(5, 5))


@trap()
def graph_sum_of_two_linear_maps():
    """GraphSAGE: w(x) + v(mean of neighbours)"""
    forward = lambda m, x, a: torch.relu(m.w(x) + m.v(a @ x / a.sum(1, keepdim=True)))
    return stack(lambda: Net(forward, w=nn.Linear(D, D), v=nn.Linear(D, D)), *vectors(5), torch.rand(5, 5))


@trap({"": 2})
def message_passing_by_index():
    """edges by index, messages summed with index_add, node update with a skip"""

    def forward(m, x, edges):
        x = m.stem(x)
        for f, u in ((m.f0, m.u0), (m.f1, m.u1)):
            message = f(torch.cat([x[edges[0]], x[edges[1]]], -1))
            x = x + u(torch.zeros_like(x).index_add(0, edges[1], message))
        return x

    parts = dict(stem=nn.Linear(D, D), f0=mlp(2 * D, 8, D), f1=mlp(2 * D, 8, D), u0=nn.Linear(D, D))
    return Net(forward, **parts, u1=nn.Linear(D, D)), (*vectors(4), torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]]))


@trap({"": 2})
def residual_lstm():
    """x + lstm(x)"""

    def forward(m, x):
        for l in m.l:
            x = x + l(x)[0]
        return x

    return Net(forward, l=nn.ModuleList(nn.LSTM(D, D, batch_first=True) for _ in range(2))), tokens()


@trap()
def additive_attention():
    """Bahdanau: v · tanh(W q + U k), step by step, with the context fed back"""

    def forward(m, x):
        h = torch.zeros(x.shape[0], D)
        for _ in range(3):
            a = m.v(torch.tanh(m.w(h)[:, None] + m.u(x))).softmax(1)
            h = m.cell((a * x).sum(1), h)
        return h

    return Net(forward, w=nn.Linear(D, D), u=nn.Linear(D, D), v=nn.Linear(D, 1), cell=nn.GRUCell(D, D)), tokens()


@trap({"1": 1, "2": 1})
def wavenet():
    """gated dilated convolutions: the residual sum is a join, the sum of the skip outputs is none"""

    class WaveNet(nn.Sequential):
        def forward(self, x):
            x, total = self[0](x), 0
            for layer in list(self)[1:]:
                x, skip = layer(x)
                total = total + skip
            return torch.relu(total)

    def layer(m, x):
        z = torch.tanh(m.f(x)) * torch.sigmoid(m.g(x))
        return x + m.r(z), m.s(z)

    conv = lambda k: nn.Conv1d(D, D, k, padding=k // 2)
    layers = [Net(layer, f=conv(3), g=conv(3), r=conv(1), s=conv(1)) for _ in range(2)]
    return WaveNet(conv(1), *layers), (torch.randn(2, D, 6),)


@trap({"1": 1, "2": 1})
def token_choice_of_depth():
    """mixture of depths: only the chosen tokens pass the block, and are put back by index"""

    def forward(m, x):
        weight, index = m.router(x).squeeze(-1).topk(2, dim=1)
        index = index[..., None].expand(-1, -1, D)
        chosen = x.gather(1, index)
        chosen = chosen + m.f(chosen) * weight.sigmoid()[..., None]
        return x.scatter(1, index, chosen)

    return blocks(forward, f=mlp, router=lambda: nn.Linear(D, 1)), tokens()


@trap()
def recurrence_with_a_constant_input():
    """an Elman network that takes in the same input at every step: W x + U h is no projection"""

    def forward(m, x):
        h = torch.zeros_like(x)
        for _ in range(4):
            h = torch.tanh(m.w(x) + m.u(h))
        return h

    return Net(forward, w=nn.Linear(D, D), u=nn.Linear(D, D)), vectors()
