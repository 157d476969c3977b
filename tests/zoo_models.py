"""Architectures of the labelled zoo, each with the switches that make it sick or sound."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import nn
from zoo_data import T, V

from gradflow.models import LanguageModel

D = 32
he = functools.partial(nn.init.kaiming_normal_, nonlinearity="relu")


def gaussian(std):
    return functools.partial(nn.init.normal_, std=std)


def initialise(model, init, kinds=(nn.Linear, nn.Conv2d)):
    """The model with every linear map and convolution drawn anew and zero biases."""
    for module in model.modules():
        if isinstance(module, kinds):
            init(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


class After(nn.Module):
    """A module with an operation behind its output."""

    def __init__(self, module, operation):
        super().__init__()
        self.inner, self.operation = module, operation

    def forward(self, *args, **kwargs):
        out = self.inner(*args, **kwargs)
        return (self.operation(out[0]), *out[1:]) if isinstance(out, tuple) else self.operation(out)


def after(model, path, operation):
    """The model with an operation behind one of its modules."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, After(model.get_submodule(path), operation))
    return model


def detached(x):
    return x.detach()


class HeadNorm(nn.Module):
    """Queries or keys of each head normalised to unit size: QK norm."""

    def forward(self, x):
        parts = x.unflatten(-1, (-1, D // 4))
        return F.layer_norm(parts, parts.shape[-1:]).flatten(-2)


def qk_norm(model, names):
    """The model with QK norm: the named projections are followed by a norm over each head."""
    for path in [p for p, _ in model.named_modules() if p.rpartition(".")[2] in names]:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, nn.Sequential(model.get_submodule(path), HeadNorm()))
    return model


def multiplied(model, words, factor):
    """The model with the matrices whose names hold one of the words multiplied."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(word in name for word in words) and parameter.dim() > 1:
                parameter.mul_(factor)
    return model


def shifted(model, name, value):
    """The model with one parameter moved by a constant."""
    with torch.no_grad():
        dict(model.named_parameters())[name].add_(value)
    return model


def transformer(depth=4, *, norm="pre", **options):
    return LanguageModel(V, D, depth, 4, max_tokens=T, norm=norm, dropout=options.pop("dropout", 0.0), **options)


def mlp(depth, act=nn.ReLU, *, width=48, inputs=64, classes=10, init=None, norm=None):
    """A plain stack of linear layers."""
    layers, fan = [], inputs
    for _ in range(depth):
        layers += [nn.Linear(fan, width), *([norm(width)] if norm else []), act()]
        fan = width
    model = nn.Sequential(*layers, nn.Linear(width, classes))
    return initialise(model, init) if init else model


class Plain(nn.Module):
    """A list of hidden layers called in a loop, optionally with residual connections and norms around them."""

    def __init__(
        self, depth, act=torch.relu, *, width=48, inputs=64, classes=10, init=None, residual=False, batchnorm=False
    ):
        super().__init__()
        self.entry = nn.Linear(inputs, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.norms = nn.ModuleList(
            nn.BatchNorm1d(width) if batchnorm else nn.LayerNorm(width) if residual else nn.Identity()
            for _ in range(depth)
        )
        self.exit, self.act, self.residual = nn.Linear(width, classes), act, residual
        if init:
            initialise(self, init)

    def forward(self, x):
        x = self.act(self.entry(x))
        for layer, norm in zip(self.hidden, self.norms, strict=True):
            x = x + layer(self.act(norm(x))) if self.residual else self.act(norm(layer(x)))
        return self.exit(x)


class Cell(nn.Module):
    """skip · x + gate · factor · f(norm(x)), f two linear maps with GELU between."""

    def __init__(
        self,
        width,
        *,
        norm=True,
        gate=None,
        zero=False,
        factor=1.0,
        cut=False,
        skip=1.0,
        drop=0.0,
        act=F.gelu,
        post=False,
        init=None,
    ):
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        if init:
            initialise(self, init)
        if zero:
            nn.init.zeros_(self.fc2.weight)
            nn.init.zeros_(self.fc2.bias)
        self.gate = None if gate is None else nn.Parameter(torch.full((width,), float(gate)))
        self.factor, self.cut, self.skip, self.drop, self.act, self.post = factor, cut, skip, drop, act, post

    def forward(self, x):
        if self.training and self.drop and torch.rand(()) < self.drop:
            return x
        f = self.fc2(self.act(self.fc1(x if self.post else self.norm(x)))) * self.factor
        f = f if self.gate is None else f * self.gate
        f = f.detach() if self.cut else f
        y = (x if self.skip == 1.0 else self.skip * x) + f
        return self.norm(y) if self.post else y


class ResidualNet(nn.Module):
    """Vectors in, classes out, through residual cells; `special` gives some of them other options."""

    def __init__(self, depth=6, *, width=D, inputs=64, classes=10, special=None, final=True, **options):
        super().__init__()
        self.inlet = nn.Linear(inputs, width)
        self.cells = nn.ModuleList(Cell(width, **{**options, **(special or {}).get(i, {})}) for i in range(depth))
        self.last = nn.LayerNorm(width) if final else nn.Identity()
        self.outlet = nn.Linear(width, classes)

    def forward(self, x):
        x = self.inlet(x)
        for cell in self.cells:
            x = cell(x)
        return self.outlet(self.last(x))


class ConvCell(nn.Module):
    """A basic ResNet block, batch norm after each convolution unless `norm` is False; `cut` detaches its branch."""

    def __init__(self, inputs, outputs, stride=1, *, norm=True, cut=False, init=None):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=not norm)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=not norm)
        self.bn1, self.bn2 = (nn.BatchNorm2d(outputs) if norm else nn.Identity() for _ in range(2))
        self.down = nn.Identity() if inputs == outputs and stride == 1 else nn.Conv2d(inputs, outputs, 1, stride)
        self.cut = cut
        if init:
            initialise(self, init)

    def forward(self, x):
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


class MixerNet(nn.Module):
    """MLP-Mixer over the rows of a digit."""

    def __init__(self, depth=4, width=24):
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.tokens = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(depth))
        self.channels = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 48), nn.GELU(), nn.Linear(48, width)) for _ in range(depth)
        )
        self.n1, self.n2 = (nn.ModuleList(nn.LayerNorm(width) for _ in range(depth)) for _ in range(2))
        self.fc = nn.Linear(width, 10)

    def forward(self, x):
        x = self.embed(x)
        for token, channel, n1, n2 in zip(self.tokens, self.channels, self.n1, self.n2, strict=True):
            x = x + token(n1(x).transpose(1, 2)).transpose(1, 2)
            x = x + channel(n2(x))
        return self.fc(x.mean(1))


class RowEncoder(nn.Module):
    """torch's TransformerEncoder over the rows of a digit; `plain` leaves its residual additions out."""

    def __init__(self, depth=4, *, norm_first=False, dropout=0.0, plain=False, cut=None):
        super().__init__()
        kind = _PlainLayer if plain else nn.TransformerEncoderLayer
        layer = kind(D, 4, 64, dropout, batch_first=True, norm_first=norm_first)
        self.embed, self.pos = nn.Linear(8, D), nn.Parameter(0.02 * torch.randn(8, D))
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        for parameter in self.encoder.parameters():  # the layers are copies: draw each anew
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        if cut is not None:
            self.encoder.layers[cut] = After(self.encoder.layers[cut], detached)
        self.fc = nn.Linear(D, 10)

    def forward(self, x):
        return self.fc(self.encoder(self.embed(x) + self.pos).mean(1))


class _PlainLayer(nn.TransformerEncoderLayer):
    def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
        x = self.norm1(self._sa_block(src, src_mask, src_key_padding_mask))
        return self.norm2(self._ff_block(x))


class Recurrent(nn.Module):
    """Embedding, a recurrent layer, a head at every token."""

    def __init__(self, kind=nn.GRU, depth=1):
        super().__init__()
        self.embed, self.rnn, self.fc = nn.Embedding(V, D), kind(D, D, depth, batch_first=True), nn.Linear(D, V)

    def forward(self, tokens):
        return self.fc(self.rnn(self.embed(tokens))[0])


class Unrolled(nn.Module):
    """A recurrent cell called once a token, by hand; the class is told at the end."""

    def __init__(self, cell, width=D):
        super().__init__()
        self.embed, self.cell, self.fc = nn.Embedding(8, width), cell(width, width), nn.Linear(width, 8)

    def forward(self, tokens):
        x, state = self.embed(tokens), torch.zeros(len(tokens), self.fc.in_features)
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.fc(state)
