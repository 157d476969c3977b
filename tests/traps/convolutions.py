"""Traps: residual convolutions of all kinds."""

import torch
import torch.nn.functional as F
from torch import nn

from traps.base import D, Net, trap


def image(c=D, n=8):
    return (torch.randn(2, c, n, n),)


def conv(i=D, o=D, k=3, s=1, **kwargs):
    return nn.Conv2d(i, o, k, s, k // 2, **kwargs)


def cbr(i=D, o=D, s=1, k=3):
    return nn.Sequential(conv(i, o, k, s, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True))


def cb(i=D, o=D, s=1, k=3):
    return nn.Sequential(conv(i, o, k, s, bias=False), nn.BatchNorm2d(o))


def chain(function, *parts):
    """A stem and one block for each dictionary of parts."""
    return nn.Sequential(conv(), *[Net(function, **p) for p in parts])


@trap({"1": 1, "2": 1}, projections=1)
def basic_block():
    """ResNet: identity in place, then a projection with stride"""

    def forward(m, x):
        out = m.f(x)
        out += m.s(x)
        return F.relu(out)

    make = lambda i, o, s, shortcut: dict(f=nn.Sequential(cbr(i, o, s), cb(o, o)), s=shortcut)
    return chain(forward, make(D, D, 1, nn.Identity()), make(D, 16, 2, cb(D, 16, 2, 1))), image()


@trap({"1": 1, "2": 1}, projections=1)
def average_pooled_shortcut():
    """ResNet-D: pooling, then a 1x1 convolution on the skip; ResNet-A: pooling and zero channels"""
    body = lambda: nn.Sequential(cbr(D, 16, 2), cb(16, 16))
    a = Net(lambda m, x: F.relu(m.f(x) + m.s(F.avg_pool2d(x, 2))), f=body(), s=cb(D, 16, 1, 1))
    down = nn.Sequential(cbr(16, D), nn.Upsample(scale_factor=2))
    b = Net(lambda m, x: m.f(y := m.d(x)) + F.pad(F.avg_pool2d(y, 2), (0, 0, 0, 0, 4, 4)), f=body(), d=down)
    return nn.Sequential(conv(), a, b), image()


@trap({"1": 1, "2": 1})
def zero_channels_by_concatenation():
    """the skip is padded with torch.zeros by cat"""
    pad = lambda x: torch.cat([x, torch.zeros(x.shape[0], 4, *x.shape[2:])], 1)
    forward = lambda m, x: F.relu(m.f(x) + pad(x))
    body = lambda i: nn.Sequential(cbr(i, i + 4), cb(i + 4, i + 4))
    return chain(forward, dict(f=body(D)), dict(f=body(D + 4))), image()


@trap({"1": 1, "2": 1}, projections=1)
def pre_activation_with_blur():
    """pre-activation; the projection is applied to the activated input, behind a fixed blur"""

    def forward(m, x):
        y = F.relu(m.n(x))
        if not hasattr(m, "s"):
            return x + m.f(y)
        y = F.conv2d(y, m.blur, stride=2, padding=1, groups=y.shape[1])
        return m.s(y) + m.f(y)

    body = lambda o: nn.Sequential(conv(D, o), nn.BatchNorm2d(o), nn.ReLU(), conv(o, o))
    net = chain(forward, dict(n=nn.BatchNorm2d(D), f=body(D)), dict(n=nn.BatchNorm2d(D), f=body(16), s=conv(D, 16, 1)))
    net[2].register_buffer("blur", torch.full((D, 1, 3, 3), 1 / 9))
    return net, image()


@trap({"1": 1, "2": 1})
def frozen_batch_norm():
    """batch norm written out with buffers, on the branch and behind the sum"""

    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("weight", "bias", "mean", "var"):
                self.register_buffer(name, torch.rand(D))

        def forward(self, x):
            w, b, mean, var = (getattr(self, n).reshape(1, -1, 1, 1) for n in ("weight", "bias", "mean", "var"))
            scale = w * (var + 1e-5).rsqrt()
            return x * scale + (b - mean * scale)

    forward = lambda m, x: F.relu(m.n2(x + m.c2(F.relu(m.n(m.c(x))))))
    part = lambda: dict(c=conv(), n=Frozen(), c2=conv(), n2=Frozen())
    return chain(forward, part(), part()), image()


@trap({"1": 1, "2": 1})
def squeeze_and_excite():
    """the branch is scaled by a gate that it makes itself"""
    gate = lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(D, 4, 1), nn.ReLU(), conv(4, D, 1), nn.Sigmoid())
    forward = lambda m, x: F.relu(x + (y := m.f(x)) * m.g(y))
    return chain(forward, *[dict(f=nn.Sequential(cbr(), cb()), g=gate()) for _ in range(2)]), image()


@trap({"1": 1, "2": 1}, projections=1)
def squeeze_and_excite_projection():
    """a projection whose branch passes a gate"""
    gate = lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(D, D, 1), nn.Sigmoid())
    forward = lambda m, x: F.relu(m.s(x) + (y := m.f(x)) * m.g(y))
    body = lambda: nn.Sequential(cbr(), cb())
    return chain(forward, dict(f=body(), g=gate(), s=cb(k=1)), dict(f=body(), g=gate(), s=nn.Identity())), image()


@trap({"1": 1, "2": 1})
def inverted_residual():
    """MBConv: expand, depthwise, swish gate, linear projection, drop connect"""

    def forward(m, x):
        y = m.d(F.silu(m.e(x)))
        y = m.p(y * torch.sigmoid(m.g(y.mean((2, 3), keepdim=True))))
        return y / 0.8 * torch.floor(torch.rand(y.shape[0], 1, 1, 1) + 0.8) + x

    parts = lambda: dict(e=cb(D, 16, 1, 1), d=conv(16, 16, groups=16), g=conv(16, 16, 1), p=cb(16, D, 1, 1))
    return chain(forward, parts(), parts()), image()


@trap({"1": 1, "2": 1}, branches=6)
def aggregated_paths():
    """ResNeXt written as a sum over paths: one join, three branches"""
    forward = lambda m, x: F.relu(x + sum(p(x) for p in m.paths))
    paths = lambda: nn.ModuleList(nn.Sequential(cbr(D, 4), cb(4, D)) for _ in range(3))
    return chain(forward, dict(paths=paths()), dict(paths=paths())), image()


@trap({"1": 1, "2": 1})
def split_attention():
    """ResNeSt: radix splits weighted by a softmax over them"""

    def forward(m, x):
        u = torch.stack(F.relu(m.f(x)).chunk(2, 1))
        a = m.g(u.sum(0).mean((2, 3), keepdim=True)).unflatten(1, (2, D)).softmax(1).transpose(0, 1)
        return x + m.o((u * a).sum(0))

    parts = lambda: dict(f=conv(D, 16), g=conv(D, 16, 1), o=conv(D, D, 1))
    return chain(forward, parts(), parts()), image()


@trap({"1": 1, "2": 1})
def inception_residual():
    """branches concatenated, projected, scaled by a constant and added"""
    forward = lambda m, x: F.relu(x + 0.17 * m.o(torch.cat([m.a(x), m.b(x)], 1)))
    parts = lambda: dict(a=cbr(D, 4, 1, 1), b=nn.Sequential(cbr(D, 4, 1, 1), cbr(4, 4)), o=conv(D, D, 1))
    return chain(forward, parts(), parts()), image()


@trap({"2": 1})
def separable_convolutions():
    """Xception's middle flow, no skip in the entry flow"""
    body = nn.Sequential(*[n for _ in range(3) for n in (nn.ReLU(), conv(groups=D), conv(k=1), nn.BatchNorm2d(D))])
    return nn.Sequential(conv(), cbr(), Net(lambda m, x: m.f(x) + x, f=body)), image()


@trap()
def channel_shuffle():
    """ShuffleNet v2: half of the channels pass, the other half is transformed, all by concatenation"""

    def forward(m, x):
        a, b = x.chunk(2, 1)
        y = torch.cat([a, m.f(b)], 1)
        return y.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)

    body = lambda: nn.Sequential(cbr(4, 4, 1, 1), cbr(4, 4))
    return chain(forward, dict(f=body()), dict(f=body())), image()


@trap()
def dense_block():
    """DenseNet"""
    forward = lambda m, x: torch.cat([x, m.f(x)], 1)
    return chain(forward, dict(f=cbr(D, 4)), dict(f=cbr(D + 4, 4))), image()
