"""The sick runs of the zoo whose trouble lies in depth or in a branch.

`remedy` must be found in the finding's first remedy, so that `cure` is that remedy and nothing else. `also` names what is
true as well, a consequence that may be reported beside the label.
"""

from __future__ import annotations

import functools

import torch
from torch import nn

from zoo import proofs as proof
from zoo.case import Case
from zoo.convolutions import ConvNet, Depthwise, ResNet, conv_net, stack_of_convolutions
from zoo.data import digits, hidden, pictures, rows, text
from zoo.dense import Plain, mlp
from zoo.library import library
from zoo.residual import ResidualNet
from zoo.sequence import RowEncoder, transformer
from zoo.surgery import After, after, detached, gaussian, he, multiplied
from zoo.training import Setup

SGD, AdamW = torch.optim.SGD, torch.optim.AdamW


def _explosive(normed, depth=12):
    return lambda: ConvNet(*[Depthwise(16, scale=1.0, normed=normed, init=he) for _ in range(depth)])


def _loud_wpe(model, value=300.0):
    with torch.no_grad():
        model.transformer.wpe.weight[:, 3] += value
    return model


def _faint(model, factor=0.004):
    """Every sublayer's output multiplied by a small constant."""
    for block in model.encoder.blocks:
        block.attention = After(block.attention, lambda y: factor * y)
        block.feed_forward = After(block.feed_forward, lambda y: factor * y)
    return model


def _embed_spike(model, value=400.0):
    with torch.no_grad():
        model.inlet.bias[5] += value
    return model


_digits, _text = Setup(lambda: mlp(3), digits), Setup(transformer, text)
_T = functools.partial
_vit = Setup(_T(library, "vit"), pictures, lr=3e-3, steps=160)
_gpt = Setup(_T(library, "gpt2"), text)
_bert = Setup(_T(library, "bert"), hidden, steps=80)
_res = Setup(ResidualNet, digits)
_resnet = Setup(ResNet, pictures, optimizer=SGD, lr=0.05, options={"momentum": 0.9})

DEPTH = {
    "sigmoid-mlp-8": Case(
        "vanishing-gradient", r".", _digits.but(model=lambda: mlp(8, nn.Sigmoid)),
        proof.gradient("0", "14", below=1e-3), "sigmoid.*ReLU", {"model": lambda: mlp(8, init=he)},
    ),
    "sigmoid-loop": Case(
        "vanishing-gradient", r".", Setup(lambda: Plain(9, torch.sigmoid), digits, optimizer=AdamW),
        proof.gradient("entry", "hidden.8", below=1e-3), "sigmoid.*ReLU", {"model": lambda: Plain(9, init=he)},
    ),
    "deep-cnn-default": Case(
        "vanishing-gradient", r".", Setup(lambda: stack_of_convolutions(14), pictures, optimizer=SGD, lr=0.02, steps=80),
        proof.gradient("0", "26", below=2e-3), "residual", {"model": lambda: stack_of_convolutions(14, residual=True)}, ("signal-collapse",),
    ),
    "leaking-skip": Case(
        "vanishing-gradient", r"cells|inlet", Setup(lambda: ResidualNet(14, norm=False, skip=0.4, factor=0.2), digits, optimizer=SGD, lr=0.05),
        proof.gradient("inlet", "cells.13", below=1e-3), "skip pass unchanged", {"model": lambda: ResidualNet(14, norm=False, factor=0.2)},
    ),
    "small-tanh-loop": Case(
        "vanishing-gradient", r".", Setup(lambda: Plain(10, torch.tanh, init=gaussian(0.05)), digits, optimizer=SGD, lr=0.05),
        proof.gradient("entry", "hidden.9", below=1e-3), "residual connection|unit gain|xavier|5/3",
        {"model": lambda: Plain(10, torch.tanh, init=gaussian(0.05), residual=True)}, ("signal-collapse",),
    ),
    "batchnorm-stack-50": Case(
        "exploding-gradient", r".", Setup(lambda: Plain(50, batchnorm=True), digits, steps=60, every=12, lr=3e-4),
        proof.gradient("entry", "hidden.49", above=100, initial=True), "residual", {"model": lambda: Plain(50, batchnorm=True, residual=True)},
    ),
    "large-init-cnn": Case(
        "exploding-gradient", r".", Setup(lambda: stack_of_convolutions(12, init=gaussian(0.35)), pictures, lr=1e-5, steps=60),
        proof.gradient("0", "22", above=100), "kaiming", {"model": lambda: stack_of_convolutions(12, init=he)}, ("signal-explosion", "update-too-small"),
    ),
    "large-init-tanh-less": Case(
        "signal-explosion", r".", Setup(lambda: mlp(10, width=64, init=gaussian(0.45)), digits, lr=1e-5, steps=60),
        proof.signal("0", "18", above=1e3), "kaiming", {"model": lambda: mlp(10, width=64, init=he)}, ("exploding-gradient", "update-too-small"),
    ),
    "convnext-unnormalised": Case(
        "signal-explosion", r"blocks", Setup(_explosive(False), pictures, lr=1e-5, steps=60),
        proof.signal("blocks.0", "blocks.11", above=1e2), "[Nn]ormalise", {"model": _explosive(True)}, ("exploding-gradient",),
    ),
    "transformer-without-norms": Case(
        "signal-explosion", r"blocks", _text.but(model=lambda: transformer(10, norm="none"), lr=1e-5, steps=60),
        proof.signal("encoder.blocks.0", "encoder.blocks.9", above=1e2), "[Nn]ormalise", {"model": lambda: transformer(10, norm="pre")}, ("exploding-gradient",),
    ),
    "residual-without-norms": Case(
        "signal-explosion", r"cells", _res.but(model=lambda: ResidualNet(14, norm=False, init=he, act=torch.relu, final=False), lr=1e-5, steps=60),
        proof.signal("cells.0", "cells.13", above=1e2), "[Nn]ormalise", {"model": lambda: ResidualNet(14, init=he, act=torch.relu, final=False)}, ("exploding-gradient",),
    ),
    "small-init-mlp": Case(
        "signal-collapse", r".", Setup(lambda: mlp(9, init=gaussian(0.05)), digits, optimizer=SGD, lr=0.02),
        proof.signal("0", "16", below=1e-2), "kaiming", {"model": lambda: mlp(9, init=he)}, ("vanishing-gradient",),
    ),
    "small-init-cnn": Case(
        "signal-collapse", r".", Setup(lambda: stack_of_convolutions(10, init=gaussian(0.03)), pictures, optimizer=SGD, lr=0.05, steps=80),
        proof.signal("0", "18", below=1e-2), "kaiming", {"model": lambda: stack_of_convolutions(10, init=he)}, ("vanishing-gradient",),
    ),
    "transformer-no-skips": Case(
        "rank-collapse", r"blocks", _text.but(model=lambda: transformer(10, norm="post", residual=False), lr=3e-4),
        proof.alike("encoder.blocks.9", above=0.99), "residual", {"model": lambda: transformer(10, norm="pre")}, ("vanishing-gradient",),
    ),
    "encoder-no-skips": Case(
        "rank-collapse", r"layers", Setup(lambda: RowEncoder(10, plain=True), rows, steps=80),
        proof.alike("encoder.layers.9", above=0.99), "residual", {"model": lambda: RowEncoder(10, norm_first=True)}, ("vanishing-gradient",),
    ),
}  # fmt: skip

BRANCHES = {
    "residual-faint": Case(
        "silent-branch", r"cells\.4", _res.but(model=lambda: ResidualNet(7, special={4: {"factor": 1e-6}})),
        proof.branch("cells.4", below=1e-3), "last layer|factor|gain", {"model": lambda: ResidualNet(7)},
    ),
    "convnext-double-zero": Case(
        "silent-branch", r"blocks", Setup(conv_net(scale=0.0, zero=True), pictures),
        proof.branch("blocks.2", below=1e-6), "one factor", {"model": conv_net(scale=0.0)},
    ),
    "llama-faint-mlp": Case(
        "silent-branch", r"layers\.2\.mlp", Setup(lambda: after(library("llama"), "model.layers.2.mlp", lambda y: 1e-5 * y), text),
        proof.branch("model.layers.2", part="model.layers.2.mlp", below=1e-3), "last layer|factor|gain", {"model": lambda: library("llama")},
    ),
    "decayed-gates": Case(
        "silent-branch", r"cells", _res.but(
            model=lambda: ResidualNet(5, gate=1.0), optimizer=SGD, lr=0.05, steps=200,
            parameters=lambda m: [{"params": [p for n, p in m.named_parameters() if "gate" in n], "weight_decay": 19.0}, {"params": [p for n, p in m.named_parameters() if "gate" not in n]}],
        ), proof.branch("cells.1", below=1e-3), "weight decay", {"parameters": None},
    ),
    "residual-dominant": Case(
        "dominant-branch", r"cells\.4", _res.but(model=lambda: multiplied(ResidualNet(8), ("cells.4.fc2",), 90.0)),
        proof.branch("cells.4", above=4), "scale|initialis", {"model": lambda: ResidualNet(8)},
    ),
    "vit-dominant": Case(
        "dominant-branch", r"layers\.2\.mlp", _vit.but(model=lambda: after(library("vit"), "vit.layers.2.mlp", lambda y: 400 * y)),
        proof.branch("vit.layers.2", part="vit.layers.2.mlp", above=4), "scale|initialis", {"model": lambda: library("vit")},
    ),
    "residual-inert": Case(
        "inert-depth", r"cells", _res.but(model=lambda: ResidualNet(10, factor=0.004), steps=420, every=60, lr=2e-4),
        proof.kept([f"cells.{i}" for i in range(10)], above=0.9995), "scale|larger", {"model": lambda: ResidualNet(10)},
    ),
    "transformer-inert": Case(
        "inert-depth", r"blocks", _text.but(model=lambda: _faint(transformer(5)), steps=420, every=60, lr=1e-4),
        proof.kept([f"encoder.blocks.{i}" for i in range(5)], above=0.9995), "scale|larger", {"model": lambda: transformer(5)},
    ),
    "residual-detached": Case(
        "blocked-gradient", r"cells\.3", _res.but(model=lambda: ResidualNet(6, special={3: {"cut": True}})),
        proof.no_gradient("cells.3.fc", "cells.3.fc2"), "detach", {"model": lambda: ResidualNet(6)},
    ),
    "convnext-detached": Case(
        "blocked-gradient", r"blocks\.[45]", Setup(lambda: after(conv_net(scale=1.0)(), "blocks.4", detached), pictures, lr=2e-3),
        proof.no_gradient("blocks.4.", "blocks.4"), "detach", {"model": conv_net(scale=1.0)},
    ),
    "resnet-detached": Case(
        "blocked-gradient", r"layers\.1", _resnet.but(model=lambda: ResNet(cut=True)),
        proof.no_gradient("layers.1.conv", "layers.1.conv2"), "detach", {"model": ResNet},
    ),
    "encoder-detached": Case(
        "blocked-gradient", r"layers\.[12]", Setup(lambda: RowEncoder(4, norm_first=True, cut=1), rows),
        proof.no_gradient("encoder.layers.1", "encoder.layers.1"), "detach", {"model": lambda: RowEncoder(4, norm_first=True)},
    ),
    "gpt2-massive": Case(
        "massive-activation", r".", _gpt.but(model=lambda: _loud_wpe(library("gpt2"))),
        proof.massive("transformer.h.1", above=1000), "[Nn]othing", twin="gpt2",
    ),
    "residual-massive": Case(
        "massive-activation", r".", _res.but(model=lambda: _embed_spike(ResidualNet(5), 20000.0)),
        proof.massive("cells.2", above=1000), "[Nn]othing",
    ),
}  # fmt: skip
