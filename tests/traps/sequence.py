"""Traps: gated units, recurrence, state spaces, graphs, sets."""


import torch
import torch.nn.functional as F
from torch import nn

from traps.attention import both, norm, stack
from traps.base import D, Net, blocks, mlp, tokens, trap, vectors


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
