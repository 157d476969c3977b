"""Tiny models, one structural trap each, with the joins that are there written by hand.

`TRAPS[name]` builds (model, arguments); its docstring names the trap; `joins` counts the joins by the module in whose
forward they are evaluated, `branches` and `projections` are totals. Vision and sequence models have files of their own.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

D = 8


@dataclass
class Trap:
    build: Callable
    joins: dict
    branches: int
    projections: int = 0
    kwargs: dict = field(default_factory=dict)


TRAPS: dict[str, Trap] = {}


def trap(joins=None, branches=None, projections=0):
    """Register a builder with its truth."""
    joins = joins or {}

    def register(build):
        assert build.__doc__, build.__name__
        assert build.__name__ not in TRAPS, build.__name__
        total = sum(joins.values())
        TRAPS[build.__name__] = Trap(build, joins, total if branches is None else branches, projections)
        return build

    return register


class Net(nn.Module):
    """A module from a forward function and its parts."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def mlp(i=D, h=16, o=None):
    return nn.Sequential(nn.Linear(i, h), nn.GELU(), nn.Linear(h, o or i))


def blocks(function, n=2, **parts):
    """A stem and n blocks with the same forward and parts of their own."""
    return nn.Sequential(
        nn.Linear(D, D), *[Net(function, **{k: make() for k, make in parts.items()}) for _ in range(n)]
    )


def vectors(n=4, d=D):
    return (torch.randn(n, d),)


def tokens(t=5, d=D):
    return (torch.randn(2, t, d),)


def per(prefix, indices, n=1):
    return {f"{prefix}{i}" if prefix else str(i): n for i in indices}


# ------------------------------------------------------------------------------------------- how a sum is written


@trap({"1": 1, "2": 1})
def plain():
    """x + f(x)"""
    return blocks(lambda m, x: x + m.f(x), f=mlp), vectors()


@trap({"1": 1, "2": 1})
def subtraction():
    """x - f(x)"""
    return blocks(lambda m, x: x - m.f(x), f=mlp), vectors()


@trap({"1": 1, "2": 1})
def reversed_subtraction():
    """f(x) - x is a join too: the skip has a minus sign"""
    return blocks(lambda m, x: m.f(x) - x, f=mlp), vectors()


@trap({"1": 1, "2": 1})
def alpha():
    """torch.add with alpha=, operands by keyword"""
    return blocks(lambda m, x: torch.add(input=x, other=m.f(x), alpha=0.5), f=mlp), vectors()


@trap({"1": 1, "2": 1})
def sub_alpha():
    """torch.sub with alpha="""
    return blocks(lambda m, x: torch.sub(x, m.f(x), alpha=2), f=mlp), vectors()


@trap({"1": 1, "2": 1})
def out_argument():
    """torch.add(out=) without gradient"""

    def forward(m, x):
        with torch.no_grad():
            y = torch.empty_like(x)
            torch.add(x, m.f(x), out=y)
            return y

    return blocks(forward, f=mlp), vectors()


@trap({"1": 1, "2": 1})
def inplace_method():
    """y.add_(x) on the branch"""
    return blocks(lambda m, x: m.f(x).add_(x), f=mlp), vectors()


@trap({"1": 1, "2": 1})
def inplace_skip():
    """x += f(x) on the skip, as early residual code has it"""

    def forward(m, x):
        y = m.f(x.clone())
        x += y
        return x

    return blocks(forward, f=mlp), vectors()


@trap({"1": 1, "2": 1})
def inplace_through_a_view():
    """the sum is written into a view of the skip, and the skip is read afterwards"""

    def forward(m, x):
        x = x.clone()
        flat = x.view(-1)
        flat += m.f(x.clone()).reshape(-1)
        return x

    return blocks(forward, f=mlp), vectors()


@trap({"1": 1, "2": 1}, branches=6)
def python_sum():
    """sum([...]) starts from the number 0 and adds three branches"""
    return blocks(lambda m, x: sum([x, m.f(x), m.g(x), m.h(x)]), f=mlp, g=mlp, h=mlp), vectors()


@trap({"1": 1, "2": 1}, branches=4)
def dropout_between_partial_sums():
    """x + dropout(f(x) + g(x)): the dropout does not part the sum"""
    return blocks(lambda m, x: x + F.dropout(m.f(x) + m.g(x), 0.1), f=mlp, g=mlp), vectors()


@trap({"1": 2, "2": 2})
def partial_sum_used_elsewhere():
    """h = x + f(x); y = h + g(h): two joins, since the first sum is read by g as well"""

    def forward(m, x):
        h = x + m.f(x)
        return h + m.g(h)

    return blocks(forward, f=mlp, g=mlp), vectors()


@trap({"a": 1, "b": 1})
def condition_added_within_the_sum():
    """(x + c) + f(x) with a condition c that is neither skip nor branch"""

    class Conditioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.c = nn.Linear(D, D), nn.Linear(3, D)
            self.a, self.b = (Net(lambda m, x, c: (x + c) + m.f(x), f=mlp()) for _ in range(2))

        def forward(self, x, z):
            c = self.c(z)
            return self.b(self.a(self.stem(x), c), c)

    return Conditioned(), (torch.randn(4, D), torch.randn(4, 3))


@trap({"1": 1, "2": 1})
def bias_beside_the_branch():
    """x + (f(x) + b): the bias belongs to the branch"""
    make = lambda: nn.Parameter(torch.randn(D))
    return blocks(lambda m, x: x + (m.f(x) + m.b), f=mlp, b=make), vectors()


@trap({"": 3})
def functional():
    """parameters used directly, weights transposed on the way"""
    make = lambda *s: nn.ParameterList(nn.Parameter(torch.randn(*s) / 3) for _ in range(3))

    def forward(m, x):
        for a, b in zip(m.a, m.b, strict=True):
            x = x + torch.relu(x @ a.t()) @ b.mT
        return x

    return Net(forward, a=make(16, D), b=make(D, 16)), vectors()


@trap({"": 2})
def einsum_weights():
    """attention written with einsum over three-dimensional weights"""

    def forward(m, x):
        for w, o in ((m.w0, m.o0), (m.w1, m.o1)):
            q, k, v = torch.einsum("btd,dnhe->nbhte", x, w)
            s = torch.einsum("bhte,bhse->bhts", q, k).softmax(-1)
            x = x + torch.einsum("bhts,bhse,hed->btd", s, v, o)
        return x

    w = lambda: nn.Parameter(torch.randn(D, 3, 2, 4) / 3)
    o = lambda: nn.Parameter(torch.randn(2, 4, D) / 3)
    return Net(forward, w0=w(), w1=w(), o0=o(), o1=o()), tokens()


# ------------------------------------------------------------------------------------------- skips


@trap({"1": 1, "2": 1})
def scaled_skip():
    """DeepNorm: norm(alpha * x + f(x))"""
    return blocks(lambda m, x: m.norm(2.2 * x + m.f(x)), f=mlp, norm=lambda: nn.LayerNorm(D)), vectors()


@trap({"1": 1, "2": 1})
def learned_gains():
    """per-channel gains on both operands, ReZero's scalar on the branch"""
    gain = lambda: nn.Parameter(torch.ones(D))
    scalar = lambda: nn.Parameter(torch.tensor(0.1))
    return blocks(lambda m, x: m.a * x + m.s * (m.b * m.f(x)), f=mlp, a=gain, b=gain, s=scalar), vectors()


@trap({"1": 1, "2": 1})
def hand_written_affine_skip():
    """NoNorm on the skip: x * w + b is no learned operation of its own"""
    vector = lambda: nn.Parameter(torch.ones(D))
    return blocks(lambda m, x: (x * m.w + m.b) + m.f(x), f=mlp, w=vector, b=vector), vectors()


@trap({"1": 1, "2": 1})
def drop_path_by_hand():
    """a random mask times one over the keep probability on the branch, dropout on the skip"""

    def forward(m, x):
        keep = x.new_empty((x.shape[0], 1)).bernoulli_(0.8).div_(0.8)
        return m.d(x) + m.f(x) * keep

    return blocks(forward, f=mlp, d=lambda: nn.Dropout(0.1)), vectors()


@trap({"1": 1, "2": 1})
def floor_drop_path():
    """drop path in the style x.div(keep) * (keep + rand).floor_()"""

    def forward(m, x):
        r = (0.8 + torch.rand((x.shape[0], 1), dtype=x.dtype)).floor_()
        return x + m.f(x).div(0.8) * r

    return blocks(forward, f=mlp), vectors()


@trap({"": 2})
def masked_stream():
    """a padding mask multiplies stream and branch, as in speech models"""

    def forward(m, x, lengths):
        mask = (torch.arange(x.shape[1])[None] < lengths[:, None]).unsqueeze(-1).to(x.dtype)
        x = m.stem(x) * mask
        for f in (m.f, m.g):
            x = (x + f(x * mask)) * mask
        return x

    return Net(forward, stem=nn.Linear(D, D), f=mlp(), g=mlp()), (*tokens(), torch.tensor([3, 5]))


@trap({"": 1})
def fork_at_the_input():
    """the fork is the model input itself, inside a dictionary"""
    return Net(lambda m, batch: batch["x"] + m.f(batch["x"]), f=mlp()), ({"x": torch.randn(4, D)},)


@trap({"1": 1, "2": 1})
def detached_skip():
    """the skip carries the values and not the gradient"""
    return blocks(lambda m, x: x.detach() + m.f(x), f=mlp), vectors()


@trap({"": 2})
def permuted_skip():
    """the skip is transposed, reshaped and cast before the sum"""

    def forward(m, x):
        x = m.stem(x)
        y = m.f(x).double() + x.double()
        y = y.float().transpose(0, 1)
        return m.g(y.transpose(0, 1)).transpose(0, 1) + y

    return Net(forward, stem=nn.Linear(D, D), f=mlp(), g=mlp()), tokens()


# ------------------------------------------------------------------------------------------- not joins


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


# ------------------------------------------------------------------------------------------- calls


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
