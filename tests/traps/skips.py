"""Traps: what a skip may pass on its way."""

import torch
from torch import nn

from traps.base import D, Net, blocks, mlp, tokens, trap, vectors


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
