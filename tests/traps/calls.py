"""Traps: how modules and blocks are called: shared, nested, repeated, with and without gradient."""

import torch
import torch.nn.functional as F
from torch import nn

from traps.base import D, Net, blocks, mlp, tokens, trap, vectors


@trap({"f": 3})
def shared_block():
    """one block called three times"""

    def forward(m, x):
        x = m.stem(x)
        for _ in range(3):
            x = m.f(x)
        return x

    return Net(forward, stem=nn.Linear(D, D), f=Net(lambda m, x: x + m.g(x), g=mlp())), vectors()


@trap({"tower.b": 2})
def siamese():
    """one tower, two inputs"""
    tower = Net(lambda m, x: m.b(m.stem(x)), stem=nn.Linear(D, D), b=Net(lambda m, x: x + m.f(x), f=mlp()))
    return Net(lambda m, x, y: (m.tower(x) * m.tower(y)).sum(-1), tower=tower), (*vectors(), *vectors())


@trap({"b": 1, "teacher": 1})
def teacher_without_gradient():
    """a teacher of the same shape runs without gradient; a difference of outputs is no join"""

    def forward(m, x):
        with torch.no_grad():
            target = m.teacher(x)
        return m.b(x) - target

    block = lambda: Net(lambda m, x: x + m.f(x), f=mlp())
    return Net(forward, b=block(), teacher=block()), vectors()


@trap({"b": 2})
def same_module_with_and_without_gradient():
    """the teacher is the same module"""

    def forward(m, x):
        with torch.no_grad():
            target = m.b(x)
        return m.b(x) * target

    return Net(forward, b=Net(lambda m, x: x + m.f(x), f=mlp())), vectors()


@trap({"1": 1, "1.a": 1, "2": 1, "2.a": 1})
def nested_adapter():
    """x + adapter(f(x)) with a skip inside the adapter"""
    adapter = lambda: Net(lambda m, h: h + m.u(torch.relu(m.d(h))), d=nn.Linear(D, 2), u=nn.Linear(2, D))
    return blocks(lambda m, x: x + m.a(m.f(x)), f=mlp, a=adapter), vectors()


@trap({"0": 2, "1": 2})
def reversible():
    """two streams that feed each other, from one tensor"""

    class Pair(nn.ModuleList):
        def forward(self, x):
            a = b = x
            for block in self:
                a, b = block(a, b)
            return a, b

    def forward(m, a, b):
        a = a + m.f(b)
        return a, b + m.g(a)

    return Pair(Net(forward, f=mlp(), g=mlp()) for _ in range(2)), vectors()


@trap({"": 4})
def ode_steps():
    """Euler steps with a shared field, and a leak of the state itself"""

    def forward(m, h):
        h = m.stem(h)
        for _ in range(4):
            h = h + 0.1 * (torch.tanh(m.f(h)) - h)
        return h

    return Net(forward, stem=nn.Linear(D, D), f=nn.Linear(D, D)), vectors()


@trap({"": 2})
def sums_over_slices():
    """part of a tensor is updated by a sum over an equal slice, twice"""

    def forward(m, x):
        x = m.stem(x)
        for f in (m.f, m.g):
            x = torch.cat([x[:, :1], x[:, 1:] + f(x[:, 1:])], 1)
        return x

    return Net(forward, stem=nn.Linear(D, D), f=mlp(), g=mlp()), tokens()


@trap({"1": 1, "2": 1})
def gated_branch():
    """x + sigmoid(z(x)) * f(x): the gate scales the branch, the skip stays whole"""
    return blocks(lambda m, x: x + torch.sigmoid(m.z(x)) * m.f(x), f=mlp, z=lambda: nn.Linear(D, D)), vectors()


@trap({"": 2})
def step_embedding_in_every_round():
    """a universal transformer adds positions and a step embedding to the stream before each call of one block"""

    def forward(m, x):
        x = m.stem(x)
        for step in range(2):
            x = x + m.pos.weight + m.step(torch.tensor(step))
            x = m.norm(x + m.f(x))
        return x

    parts = dict(pos=nn.Embedding(5, D), step=nn.Embedding(2, D), norm=nn.LayerNorm(D))
    return Net(forward, stem=nn.Linear(D, D), f=mlp(), **parts), tokens()


@trap({"": 1}, projections=1)
def linear_shortcut():
    """a projection between vectors of different width"""
    return Net(lambda m, x: m.s(x) + m.f(x), s=nn.Linear(D, 3), f=mlp(D, 16, 3)), vectors()


@trap({"a": 1, "b": 1})
def two_towers_and_a_sum():
    """two towers of different inputs, added at the end: late fusion is no join"""
    block = lambda: Net(lambda m, x: x + m.f(x), f=mlp())
    return Net(lambda m, x, y: m.a(m.s(x)) + m.b(m.t(y)), a=block(), b=block(), s=mlp(), t=mlp()), (
        *vectors(),
        *vectors(),
    )


@trap({"1": 1, "2": 1})
def written_back_in_place():
    """the sum is copied into a buffer, and the buffer is what goes on"""

    def forward(m, x):
        y = torch.zeros_like(x)
        y[:] = x + m.f(x)
        return y

    return blocks(forward, f=mlp), vectors()


@trap({"1": 1, "2": 1}, branches=4)
def mixed_operations():
    """architecture search: identity, two learned operations and a scaled copy, each with a learned weight, summed"""

    def forward(m, x):
        w = m.w.softmax(-1)
        return sum(w[i] * y for i, y in enumerate([x, m.f(x), m.g(x), 0.5 * x]))

    return blocks(forward, f=mlp, g=mlp, w=lambda: nn.Parameter(torch.randn(4))), vectors()


@trap({"": 8})
def runge_kutta():
    """each stage is a sum onto the state, and so is the step; the sum of the slopes is none"""

    def forward(m, h):
        h = m.stem(h)
        for _ in range(2):
            a = m.f(h)
            b = m.f(h + 0.5 * a)
            c = m.f(h + 0.5 * b)
            h = h + (a + 2 * b + 2 * c + m.f(h + c)) / 6
        return h

    return Net(forward, stem=nn.Linear(D, D), f=mlp()), vectors()


@trap()
def variational_autoencoder():
    """mean plus noise times deviation, and the terms of the loss"""

    def forward(m, x):
        h = torch.relu(m.e(x))
        mean, log_var = m.mean(h), m.var(h)
        z = mean + torch.randn_like(mean) * torch.exp(0.5 * log_var)
        divergence = -0.5 * (1 + log_var - mean.pow(2) - log_var.exp()).mean()
        return F.mse_loss(m.d(z), x) + divergence

    parts = dict(e=nn.Linear(D, 16), mean=nn.Linear(16, 4), var=nn.Linear(16, 4), d=mlp(4, 16, D))
    return Net(forward, **parts), vectors()


@trap({"1": 1, "2": 1})
def scalar_biases():
    """Fixup: scalar biases before every layer, a scalar gain and bias behind the branch, added in place"""

    def forward(m, x):
        y = torch.relu(m.f(x + m.b0) + m.b1)
        y = m.g(y + m.b2) * m.gain + m.b3
        y += x
        return torch.relu(y)

    scalar = lambda: nn.Parameter(torch.zeros(1))
    linear = lambda: nn.Linear(D, D)
    return blocks(forward, f=linear, g=linear, gain=scalar, b0=scalar, b1=scalar, b2=scalar, b3=scalar), vectors()
