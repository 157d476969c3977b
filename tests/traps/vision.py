"""Traps: pyramids, encoders and decoders, and transformers of vision."""

import torch
import torch.nn.functional as F
from torch import nn

from traps.base import D, Net, mlp, trap
from traps.convolutions import cbr, chain, conv, image


@trap({"r0": 1, "r1": 1, "r2": 1}, projections=2)
def diffusion_unet():
    """residual blocks with a time embedding added inside, 1x1 shortcuts, skips by concatenation"""

    def block(m, x, t):
        h = m.c1(F.silu(m.n1(x))) + m.t(F.silu(t))[:, :, None, None]
        return m.s(x) + m.c2(F.silu(m.n2(h)))

    def make(i, o):
        shortcut = conv(i, o, 1) if i != o else nn.Identity()
        norms = dict(n1=nn.GroupNorm(2, i), n2=nn.GroupNorm(2, o))
        return Net(block, c1=conv(i, o), c2=conv(o, o), t=nn.Linear(4, o), s=shortcut, **norms)

    def forward(m, x, t):
        angle = t[:, None] * torch.tensor([1.0, 0.1])
        t = m.t(torch.cat([angle.sin(), angle.cos()], -1))
        a = m.r0(m.stem(x), t)
        b = m.r1(F.avg_pool2d(a, 2), t)
        return m.r2(torch.cat([F.interpolate(b, scale_factor=2), a], 1), t)

    parts = dict(stem=conv(), r0=make(D, D), r1=make(D, 16), r2=make(16 + D, D), t=mlp(4, 8))
    return Net(forward, **parts), (*image(), torch.rand(2))


@trap({"": 3})
def encoder_decoder_sums():
    """U-Net with additions instead of concatenations"""

    def forward(m, x):
        a = m.e0(x)
        b = m.e1(F.max_pool2d(a, 2))
        c = m.e2(F.max_pool2d(b, 2))
        c = c + m.mid(c)
        b = m.d1(F.interpolate(c, scale_factor=2)) + b
        return m.d0(F.interpolate(b, scale_factor=2)) + a

    return Net(forward, **{k: cbr() for k in ("e0", "e1", "e2", "mid", "d0", "d1")}), image()


@trap({"": 2, "g.0": 1, "g.1": 1, "g.2": 1, "g.0.0": 1, "g.0.1": 1, "g.1.0": 1, "g.1.1": 1, "g.2.0": 1, "g.2.1": 1})
def nested_long_skips():
    """residual in residual in residual (RCAN), and the image itself added at the end"""

    class Group(nn.Sequential):
        def forward(self, x):
            return x + super().forward(x)

    def forward(m, x):
        y = m.head(x)
        z = y
        for g in m.g:
            z = g(z)
        return x + m.tail(y + m.body(z))

    block = lambda: Net(lambda m, x: x + m.f(x), f=nn.Sequential(conv(), nn.ReLU(), conv()))
    groups = nn.ModuleList(Group(block(), block(), conv()) for _ in range(3))
    return Net(forward, head=conv(), g=groups, body=conv(), tail=conv()), image()


@trap({"": 1, "low": 1, "r.0": 1, "r.1": 1, "low.r.0": 1, "low.r.1": 1})
def hourglass():
    """a recursion: the block's skip branch and the path through lower resolution are summed"""

    def forward(m, x):
        x = m.r[0](x)
        y = F.max_pool2d(x, 2)
        y = m.low(y)
        return x + F.interpolate(m.r[1](y), scale_factor=2)

    block = lambda: Net(lambda m, x: x + m.f(x), f=nn.Sequential(nn.ReLU(), conv(), nn.ReLU(), conv()))
    make = lambda low: Net(forward, r=nn.ModuleList([block(), block()]), low=low)
    return make(make(nn.Conv2d(D, D, 1))), image()


@trap({"1": 1, "2": 1})
def temporal_convolution():
    """TCN: weight norm, causal padding and chomp, dropout, relu behind the sum"""

    def forward(m, x):
        y = F.dropout(F.relu(m.a(x)[..., :-2].contiguous()), 0.1)
        y = F.dropout(F.relu(m.b(y)[..., :-2].contiguous()), 0.1)
        return F.relu(y + x)

    make = lambda: nn.utils.parametrizations.weight_norm(nn.Conv1d(D, D, 3, padding=2))
    net = nn.Sequential(nn.Conv1d(D, D, 1), *[Net(forward, a=make(), b=make()) for _ in range(2)])
    return net, (torch.randn(2, D, 6),)


@trap({"1": 2, "2": 2})
def parallel_vit_and_layer_scale():
    """layer scale and drop path as modules around each sublayer"""

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.gamma = nn.Parameter(torch.full((D,), 1e-5))

        def forward(self, x):
            return x * self.gamma

    class DropPath(nn.Module):
        def forward(self, x):
            return x * x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(0.9).div_(0.9)

    def forward(m, x):
        n = m.n1(x)
        x = x + m.drop(m.s1(m.a(n, n, n, need_weights=False)[0]))
        return x + m.drop(m.s2(m.f(m.n2(x))))

    parts = lambda: dict(n1=nn.LayerNorm(D), n2=nn.LayerNorm(D), s1=Scale(), s2=Scale(), drop=DropPath(), f=mlp())
    make = lambda: Net(forward, a=nn.MultiheadAttention(D, 2, batch_first=True), **parts())
    return nn.Sequential(nn.Linear(D, D), make(), make()), (torch.randn(2, 5, D),)


@trap({"1": 2, "2": 2})
def shifted_windows():
    """windows by view and permute, cyclic shift by roll, norm behind the branch (Swin v2), a learned bias"""

    def window(m, x):
        b, n, _, c = x.shape
        w = torch.roll(x, (-1, -1), (1, 2)).view(b, n // 2, 2, n // 2, 2, c).transpose(2, 3).reshape(-1, 4, c)
        q, k, v = m.qkv(w).chunk(3, -1)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        w = m.o((q @ k.mT * m.tau.clamp(max=4).exp() + m.bias[m.index].view(4, 4)).softmax(-1) @ v)
        w = w.view(b, n // 2, n // 2, 2, 2, c).transpose(2, 3).reshape(b, n, n, c)
        return torch.roll(w, (1, 1), (1, 2))

    def forward(m, x):
        x = x + m.n1(m.a(x))
        return x + m.n2(m.f(x))

    def make():
        parts = dict(qkv=nn.Linear(D, 3 * D), o=nn.Linear(D, D), tau=nn.Parameter(torch.zeros(1, 1, 1)))
        a = Net(window, bias=nn.Parameter(torch.randn(9)), **parts)
        a.register_buffer("index", torch.arange(16) % 9)
        return Net(forward, a=a, f=mlp(), n1=nn.LayerNorm(D), n2=nn.LayerNorm(D))

    return nn.Sequential(nn.Linear(D, D), make(), make()), (torch.randn(2, 4, 4, D),)


@trap({"1": 1, "2": 1})
def additive_coupling():
    """a flow of additive couplings over halves of the channels: by the letter a fork needs to be an ancestor"""

    class Flow(nn.ModuleList):
        def forward(self, x):
            a, b = x.chunk(2, 1)
            for block in self:
                a, b = block(a, b)
            return torch.cat([a, b], 1)

    # The first sum adds to one half what depends on the other half alone.
    return Flow(Net(lambda m, a, b: (b, a + m.f(b)), f=mlp(4)) for _ in range(3)), (torch.randn(3, D),)


@trap({"": 1})
def global_context():
    """GCNet: one pooled context vector, transformed and broadcast over the image"""

    def forward(m, x):
        x = m.stem(x)
        a = m.k(x).flatten(2).softmax(-1)
        context = (x.flatten(2) @ a.transpose(1, 2)).unsqueeze(-1)
        return x + m.f(context)

    return Net(forward, stem=conv(), k=conv(D, 1, 1), f=nn.Sequential(conv(D, 4, 1), nn.ReLU(), conv(4, D, 1))), image()


@trap({"1": 1}, projections=1)
def attention_beside_a_projection():
    """CoAtNet's first attention of a stage: pooled convolution on the skip, attention with a learned bias in the branch"""

    def forward(m, x):
        q, k, v = m.qkv(F.avg_pool2d(m.n(x), 2)).flatten(2).unflatten(1, (3, D)).transpose(2, 3).unbind(1)
        y = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], attn_mask=m.bias)[:, 0]
        return m.s(F.avg_pool2d(x, 2)) + m.o(y.transpose(1, 2).unflatten(2, (4, 4)))

    bias = nn.Parameter(torch.randn(1, 16, 16))
    parts = dict(n=nn.BatchNorm2d(D), qkv=conv(D, 3 * D, 1), s=conv(D, 16, 1), o=conv(D, 16, 1), bias=bias)
    return chain(forward, parts), image()


@trap({"1": 1, "2": 1})
def class_token_apart():
    """MViT: the class token is split off, the others are pooled, and both are put together again on the skip"""

    def forward(m, x):
        token, patches = torch.tensor_split(x, (1,), dim=1)
        pooled = F.max_pool1d(patches.transpose(1, 2), 3, 1, 1).transpose(1, 2)
        return torch.cat([token, pooled], 1) + m.f(m.n(x))

    parts = lambda: dict(f=mlp(), n=nn.LayerNorm(D))
    net = nn.Sequential(nn.Linear(D, D), *[Net(forward, **parts()) for _ in range(2)])
    return net, (torch.randn(2, 3, D),)
