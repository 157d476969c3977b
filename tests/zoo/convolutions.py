"""Plain and residual stacks of convolutions over pictures."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from zoo.surgery import he, initialise


class Around(nn.Module):
    """x + conv(act(norm(x))): a residual connection around a convolution."""

    def __init__(self, c, act):
        super().__init__()
        self.norm, self.act, self.conv = nn.GroupNorm(4, c), act(), nn.Conv2d(c, c, 3, 1, 1)

    def forward(self, x):
        return x + self.conv(self.act(self.norm(x)))


def stack_of_convolutions(depth, *, c=16, act=nn.ReLU, init=None, norm=False, residual=False):
    """A plain VGG-like stack, or one with residual connections."""
    if residual:
        around = [Around(c, act) for _ in range(depth - 1)]
        return nn.Sequential(nn.Conv2d(1, c, 3, 1, 1), *around, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 10))
    layers, fan = [], 1
    for _ in range(depth):
        layers += [nn.Conv2d(fan, c, 3, 1, 1), *([nn.BatchNorm2d(c)] if norm else []), act()]
        fan = c
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 10))
    return initialise(model, init) if init else model


class ConvCell(nn.Module):
    """A basic ResNet block, batch norm after each convolution unless `norm` is False; or before it (`pre`); `cut` detaches its branch."""

    def __init__(self, inputs, outputs, stride=1, *, norm=True, pre=False, cut=False, init=None):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=not norm)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=not norm)
        self.bn1, self.bn2 = (nn.BatchNorm2d(c) if norm else nn.Identity() for c in (inputs if pre else outputs, outputs))
        self.down = nn.Identity() if inputs == outputs and stride == 1 else nn.Conv2d(inputs, outputs, 1, stride)
        self.cut, self.pre = cut, pre
        if init:
            initialise(self, init)

    def forward(self, x):
        if self.pre:
            return self.down(x) + self.conv2(torch.relu(self.bn2(self.conv1(torch.relu(self.bn1(x))))))
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(self.down(x) + (y.detach() if self.cut else y))


class ResNet(nn.Module):
    def __init__(self, *, blocks=2, widths=(12, 24), classes=10, special=None, **options):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, widths[0], 3, 1, 1), nn.BatchNorm2d(widths[0]), nn.ReLU())
        cells, fan = [], widths[0]
        for s, width in enumerate(widths):
            for b in range(blocks):
                own = {**options, **(special or {}).get(len(cells), {})}
                cells.append(ConvCell(fan, width, 2 if s and not b else 1, **own))
                fan = width
        self.layers, self.fc = nn.ModuleList(cells), nn.Linear(fan, classes)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.fc(x.mean((2, 3)))


class Depthwise(nn.Module):
    """ConvNeXt block with LayerScale; `normed=False` leaves its norm out."""

    def __init__(self, c, *, scale=1e-6, zero=False, normed=True, operation=None, init=None):
        super().__init__()
        self.dw, self.ln = nn.Conv2d(c, c, 3, 1, 1, groups=c), nn.LayerNorm(c) if normed else nn.Identity()
        self.pw1, self.pw2 = nn.Linear(c, 4 * c), nn.Linear(4 * c, c)
        self.scale = nn.Parameter(torch.full((c,), float(scale)))
        if init:
            initialise(self, init)
        if zero:
            nn.init.zeros_(self.pw2.weight)
            nn.init.zeros_(self.pw2.bias)
        self.operation = operation

    def forward(self, x):
        y = self.ln(self.dw(x).permute(0, 2, 3, 1))
        y = y if self.operation is None else self.operation(y)
        return x + (self.pw2(F.gelu(self.pw1(y))) * self.scale).permute(0, 3, 1, 2)


class ConvNet(nn.Module):
    """A patch convolution, blocks, mean pooling, a head."""

    def __init__(self, *blocks, c=16, classes=10):
        super().__init__()
        self.patch, self.blocks, self.fc = nn.Conv2d(1, c, 2, 2), nn.ModuleList(blocks), nn.Linear(c, classes)

    def forward(self, x):
        x = self.patch(x)
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((2, 3)))


def conv_net(**options):
    """A builder of six ConvNeXt blocks."""
    return lambda: ConvNet(*[Depthwise(16, **options) for _ in range(6)])


class Squeeze(nn.Module):
    """Residual block with squeeze and excitation."""

    def __init__(self, c=16):
        super().__init__()
        self.conv, self.norm, self.down, self.up = (
            nn.Conv2d(c, c, 3, 1, 1),
            nn.BatchNorm2d(c),
            nn.Linear(c, 4),
            nn.Linear(4, c),
        )

    def forward(self, x):
        y = torch.relu(self.norm(self.conv(x)))
        gate = torch.sigmoid(self.up(torch.relu(self.down(y.mean((2, 3))))))
        return x + y * gate[:, :, None, None]


class Unnormalised(nn.Module):
    """x + relu(conv(x)) with He weights and no norm."""

    def __init__(self, c=16):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, 1, 1)
        he(self.conv.weight)

    def forward(self, x):
        return x + torch.relu(self.conv(x))


class UNet(nn.Module):
    """Down, up and across by concatenation: no residual addition anywhere."""

    def __init__(self):
        super().__init__()
        conv = lambda i, o: nn.Sequential(nn.Conv2d(i, o, 3, 1, 1), nn.GroupNorm(4, o), nn.SiLU())
        self.a, self.b, self.middle, self.up, self.out = (
            conv(1, 16),
            conv(16, 32),
            conv(32, 32),
            conv(64, 16),
            conv(32, 16),
        )
        self.head = nn.Conv2d(16, 1, 1)

    def forward(self, x):
        a = self.a(x)
        b = self.b(F.avg_pool2d(a, 2))
        up = self.up(torch.cat([F.interpolate(self.middle(F.avg_pool2d(b, 2)), scale_factor=2), b], 1))
        return self.head(self.out(torch.cat([F.interpolate(up, scale_factor=2), a], 1)))
