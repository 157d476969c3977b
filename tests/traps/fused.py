"""Traps: sums inside other operations, and what looks like one."""

import torch
from torch import nn

from traps.base import D, Net, blocks, mlp, tokens, trap, vectors


def vector():
    return nn.Parameter(torch.rand(D) + 0.5)


def scalar():
    return nn.Parameter(torch.tensor(0.3))


def matrix(*shape):
    return lambda: nn.Parameter(torch.randn(*(shape or (D, D))) / 3)


@trap({"1": 1, "2": 1})
def summed_stack():
    """torch.stack([x, f(x)]).sum(0)"""
    return blocks(lambda m, x: torch.stack([x, m.f(x)]).sum(0), f=mlp), vectors()


@trap({"1": 1, "2": 1}, branches=4)
def summed_stack_of_three():
    """two branches beside the skip, stacked along the last axis"""
    return blocks(lambda m, x: torch.stack((m.f(x), x, m.g(x)), dim=-1).sum(dim=-1), f=mlp, g=mlp), tokens()


@trap({"1": 1, "2": 1}, branches=4)
def summed_stack_inside_a_sum():
    """x + stack([f(x), g(x)]).sum(0) chains into one sum"""
    return blocks(lambda m, x: x + torch.stack([m.f(x), m.g(x)]).sum((0,)), f=mlp, g=mlp), vectors()


@trap({"1": 1, "2": 1})
def stack_that_is_read_again():
    """the stack is summed, and something else of it is read too"""

    def forward(m, x):
        both = torch.stack([x, m.f(x)])
        return both.sum(0) * both.norm().detach().reciprocal()

    return blocks(forward, f=mlp), vectors()


@trap()
def stack_summed_over_features():
    """a sum over another axis adds up no tensors"""
    forward = lambda m, x: torch.stack([x, m.f(x)]).sum(-1).softmax(0)[0].unsqueeze(-1) * m.g(x)
    return blocks(forward, f=mlp, g=mlp), vectors()


@trap({"1": 1, "2": 1})
def fused_layer_scale():
    """torch.addcmul(x, gain, f(x), value=), operands by keyword"""
    forward = lambda m, x: torch.addcmul(x, value=0.5, tensor2=m.f(x), tensor1=m.gain)
    return blocks(forward, f=mlp, gain=vector), vectors()


@trap({"1": 1, "2": 1})
def fused_product_in_place():
    """x.addcmul_ overwrites the skip"""
    return blocks(lambda m, x: x.clone().addcmul_(m.f(x), m.gain), f=mlp, gain=vector), vectors()


@trap({"1": 1, "2": 1})
def fused_gated_unit():
    """the branch is a product of two maps of the fork, and only the addition shows it"""
    return blocks(lambda m, x: torch.addcmul(x, m.f(x), torch.sigmoid(m.g(x))), f=mlp, g=mlp), vectors()


@trap({"1": 1, "2": 1})
def fused_quotient():
    """torch.addcdiv: the branch is a quotient"""
    forward = lambda m, x: torch.addcdiv(x, m.f(x), 1 + m.g(x).exp(), value=-2)
    return blocks(forward, f=mlp, g=mlp), vectors()


@trap({"1": 1, "2": 1})
def fused_last_map():
    """torch.addmm(x, h, w): the last map of the branch and the addition are one operation"""
    forward = lambda m, x: torch.addmm(x, torch.relu(m.f(x)), m.w, beta=0.5, alpha=2)
    return blocks(forward, f=mlp, w=matrix()), vectors()


@trap({"1": 1, "2": 1})
def fused_attention():
    """torch.baddbmm(x, scores, values): attention's weighted sum and the addition are one operation"""
    forward = lambda m, x: torch.baddbmm(x, (m.q(x) @ m.k(x).mT).softmax(-1), m.v(x))
    return blocks(forward, **dict.fromkeys("qkv", lambda: nn.Linear(D, D))), tokens()


@trap({"": 2})
def fused_other_products():
    """addbmm adds a sum of products, addmv and addr to a vector and a matrix"""

    def forward(m, x):
        x = m.stem(x)
        h = torch.relu(m.f(x))
        x = torch.addbmm(x, h.view(2, 4, -1), m.w)
        return torch.addmv(x[0], m.g, torch.tanh(m.f(x[0])))

    return Net(forward, stem=nn.Linear(D, D), f=nn.Linear(D, D), w=matrix(2, 4, D)(), g=matrix()()), vectors(4)


@trap({"1": 1, "2": 1})
def interpolation():
    """torch.lerp(x, f(x), 0.3) is 0.7 x + 0.3 f(x)"""
    return blocks(lambda m, x: torch.lerp(x, m.f(x), 0.3), f=mlp), vectors()


@trap({"1": 1, "2": 1})
def interpolation_learned():
    """f(x).lerp(x, w) with a learned scalar: the skip stands on the right"""
    return blocks(lambda m, x: m.f(x).lerp(x, weight=m.w), f=mlp, w=scalar), vectors()


@trap()
def fused_bias():
    """Conv1D of GPT-2: addmm adds a bias to a plain stack"""
    return blocks(lambda m, x: torch.relu(torch.addmm(m.b, x, m.w)), b=vector, w=matrix()), vectors()


@trap()
def fused_affine_norm():
    """a norm's gain and offset by addcmul, and statistics that follow by lerp"""

    def forward(m, x):
        with torch.no_grad():
            m.mean.lerp_(x.mean(0), 0.1)
        return torch.relu(torch.addcmul(m.b, m.f(x - m.mean), m.g))

    def block():
        net = Net(forward, f=nn.Linear(D, D), g=vector(), b=vector())
        net.register_buffer("mean", torch.zeros(D))
        return net

    return nn.Sequential(nn.Linear(D, D), block(), block()), vectors()


@trap()
def fused_film():
    """addcmul(beta(c), gamma(c), x): the first operand is the condition, not the stream"""
    forward = lambda m, x, c: torch.relu(torch.addcmul(m.b(c), m.g(c), m.f(x)))
    return Net(forward, f=mlp(), g=nn.Linear(3, D), b=nn.Linear(3, D)), (torch.randn(4, D), torch.randn(4, 3))


@trap()
def fused_position_bias():
    """baddbmm adds a bias to attention scores, without a skip anywhere"""

    def forward(m, x):
        bias = m.rel.weight.view(1, 5, 5)
        for qkv in m.layers:
            q, k, v = qkv(x).chunk(3, -1)
            x = bias.baddbmm(batch1=q, batch2=k.mT, beta=0.5, alpha=0.3).softmax(-1) @ v
        return x

    return Net(forward, rel=nn.Embedding(25, 1), layers=nn.ModuleList(nn.Linear(D, 3 * D) for _ in range(2))), tokens()


@trap()
def fused_low_rank_update():
    """LoRA by addmm: a linear map and its update"""
    forward = lambda m, x: torch.relu(torch.addmm(m.w(x), m.a(x), m.b, alpha=2))
    return blocks(forward, w=lambda: nn.Linear(D, D), a=lambda: nn.Linear(D, 2), b=matrix(2, D)), vectors()


@trap()
def fused_gru():
    """the gate of a GRU by lerp, its candidate by addcmul"""

    def forward(m, x):
        h = torch.zeros(x.shape[0], D)
        for t in range(x.shape[1]):
            r, z = torch.sigmoid(m.x(x[:, t]) + m.h(h)).chunk(2, -1)
            h = torch.lerp(torch.tanh(torch.addcmul(m.n(x[:, t]), r, m.u(h))), h, z)
        return h

    return Net(forward, x=nn.Linear(D, 2 * D), h=nn.Linear(D, 2 * D), n=nn.Linear(D, D), u=nn.Linear(D, D)), tokens()


@trap()
def moving_average_of_weights():
    """lerp between two parameters makes the weight of a map"""
    forward = lambda m, x: torch.relu(x @ torch.lerp(m.w, m.v, 0.1))
    return blocks(forward, w=matrix(), v=matrix()), vectors()
