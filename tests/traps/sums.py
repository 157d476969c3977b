"""Traps: how a sum is written."""

import torch
import torch.nn.functional as F
from torch import nn

from traps.base import D, Net, blocks, mlp, tokens, trap, vectors


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
