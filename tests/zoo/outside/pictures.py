"""Networks of pictures: U-Net, autoencoders, Wide ResNet, DenseNet, MobileNet, ConvMixer, pictures as functions, a GAN."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from zoo.surgery import initialise


def conv(inputs, outputs, stride=1, *, norm=True, act=nn.SiLU):
    """A convolution, a group norm and an activation."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), *([nn.GroupNorm(4, outputs)] if norm else []), act())


class ResUNet(nn.Module):
    """A denoising U-Net of residual blocks that predicts the noise; `frozen` runs its lowest level without a graph."""

    def __init__(self, c=16, *, frozen=False):
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, c, 3, 1, 1), nn.Conv2d(c, 2 * c, 3, 2, 1)
        self.encode, self.middle, self.decode = (nn.Sequential(conv(w, w), nn.Conv2d(w, w, 3, 1, 1)) for w in (c, 2 * c, c))
        self.up, self.out, self.frozen = nn.Conv2d(3 * c, c, 1), nn.Conv2d(c, 3, 3, 1, 1), frozen

    def forward(self, x):
        a = self.stem(x)
        a = a + self.encode(a)
        low = self.down(a)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            mixed = self.middle(low)
        up = self.up(torch.cat([F.interpolate(low + mixed, scale_factor=2), a], 1))
        return x - self.out(up + self.decode(up))


class ConvAutoencoder(nn.Module):
    """Down to a code of 16 numbers and up again; with `noise` a variational one."""

    def __init__(self, *, noise=False, act=nn.ReLU):
        super().__init__()
        self.encoder = nn.Sequential(conv(3, 16, 2, norm=False, act=act), conv(16, 32, 2, norm=False, act=act), nn.Flatten(), nn.Linear(512, 32 if noise else 16))
        self.decoder = nn.Sequential(
            nn.Linear(16, 512), nn.Unflatten(1, (32, 4, 4)), act(), nn.ConvTranspose2d(32, 16, 2, 2), act(), nn.ConvTranspose2d(16, 3, 2, 2), nn.Tanh()
        )
        self.noise = noise

    def forward(self, x):
        code = self.encoder(x)
        if not self.noise:
            return self.decoder(code)
        mean, log = code.chunk(2, 1)
        return self.decoder(mean + (log / 2).exp() * torch.randn_like(mean)), mean, log


class WideBlock(nn.Module):
    """Pre-activation block of a Wide ResNet, with dropout; `norm=False` leaves its batch norms out."""

    def __init__(self, inputs, outputs, stride, *, norm=True, drop=0.0):
        super().__init__()
        bn = nn.BatchNorm2d if norm else nn.Identity
        self.bn1, self.conv1 = bn(inputs), nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.bn2, self.conv2 = bn(outputs), nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.drop = nn.Dropout(drop)
        self.shortcut = nn.Identity() if inputs == outputs and stride == 1 else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x):
        return self.shortcut(x) + self.conv2(self.drop(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x)))))))


class WideResNet(nn.Module):
    def __init__(self, *, blocks=2, widths=(16, 32), norm=True, init=None, **options):
        super().__init__()
        sizes = [16, *(w for w in widths for _ in range(blocks))]
        strides = [2 if not i and s else 1 for s in range(len(widths)) for i in range(blocks)]
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.blocks = nn.Sequential(*[WideBlock(i, o, s, norm=norm, **options) for i, o, s in zip(sizes, sizes[1:], strides, strict=False)])
        self.bn, self.fc = nn.BatchNorm2d(widths[-1]) if norm else nn.Identity(), nn.Linear(widths[-1], 10)
        if init:
            initialise(self, init)

    def forward(self, x):
        return self.fc(F.relu(self.bn(self.blocks(self.stem(x)))).mean((2, 3)))


class DenseNet(nn.Module):
    """Layers that each see the concatenation of all before."""

    def __init__(self, depth=5, growth=8):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(16 + i * growth), nn.ReLU(), nn.Conv2d(16 + i * growth, growth, 3, 1, 1)) for i in range(depth)
        )
        self.fc = nn.Linear(16 + depth * growth, 10)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return self.fc(x.mean((2, 3)))


class Inverted(nn.Module):
    """MobileNet's inverted residual: widen, depthwise, narrow."""

    def __init__(self, c, expand=3):
        super().__init__()
        wide = c * expand
        self.widen = nn.Sequential(nn.Conv2d(c, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6())
        self.depthwise = nn.Sequential(nn.Conv2d(wide, wide, 3, 1, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6())
        self.narrow = nn.Sequential(nn.Conv2d(wide, c, 1, bias=False), nn.BatchNorm2d(c))

    def forward(self, x):
        return x + self.narrow(self.depthwise(self.widen(x)))


def mobile(depth=4, c=16):
    return nn.Sequential(
        nn.Conv2d(3, c, 3, 2, 1), nn.BatchNorm2d(c), nn.ReLU6(), *[Inverted(c) for _ in range(depth)], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 10)
    )


class ConvMixer(nn.Module):
    """Residual depthwise convolutions and pointwise ones between; `scales` multiplies what each block adds."""

    def __init__(self, depth=4, c=24, *, scales=None, classes=10):
        super().__init__()
        unit = lambda layer: nn.Sequential(layer, nn.GELU(), nn.BatchNorm2d(c))
        self.patch = unit(nn.Conv2d(3, c, 4, 4))
        self.spatial = nn.ModuleList(unit(nn.Conv2d(c, c, 3, 1, 1, groups=c)) for _ in range(depth))
        self.channel = nn.ModuleList(unit(nn.Conv2d(c, c, 1)) for _ in range(depth))
        self.scales, self.fc = scales or [1.0] * depth, nn.Linear(c, classes)

    def forward(self, x):
        x = self.patch(x)
        for spatial, channel, scale in zip(self.spatial, self.channel, self.scales, strict=True):
            x = channel(x + scale * spatial(x))
        return self.fc(x.mean((2, 3)))


class Wave(nn.Module):
    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        return torch.sin(self.rate * x)


def siren(depth=4, width=64, *, rate=10.0, proper=True):
    """A picture as a function of place: sines, drawn as in Sitzmann et al. 2020 or (`proper=False`) as torch does."""
    layers, fan = [], 2
    for i in range(depth):
        linear = nn.Linear(fan, width)
        if proper:
            nn.init.uniform_(linear.weight, -1 / fan if not i else -math.sqrt(6 / fan) / rate, 1 / fan if not i else math.sqrt(6 / fan) / rate)
        layers += [linear, Wave(rate)]
        fan = width
    return nn.Sequential(*layers, nn.Linear(width, 3))


def vgg(depth, c=16, *, norm=True, act=nn.ReLU, init=None, residual=False):
    """A VGG of one width, with batch norm, or the same with a residual connection around every convolution."""
    around = lambda: Skip(nn.Sequential(nn.BatchNorm2d(c), act(), nn.Conv2d(c, c, 3, 1, 1)))
    plain = lambda: nn.Sequential(nn.Conv2d(c, c, 3, 1, 1), *([nn.BatchNorm2d(c)] if norm else []), act())
    body = [around() if residual else plain() for _ in range(depth)]
    model = nn.Sequential(nn.Conv2d(3, c, 3, 2, 1), nn.Sequential(*body), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 10))
    return initialise(model, init) if init else model


class Skip(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)
