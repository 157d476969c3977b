"""Small sick runs, a few seconds each, with every code that has to be found and a word that its place has to hold."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import nn

from zoo.convolutions import ConvNet, Depthwise, Squeeze, Unnormalised, stack_of_convolutions
from zoo.data import pictures, rows, text, vectors
from zoo.dense import Cut, mlp
from zoo.disturbances import after_step, at_steps, without
from zoo.library import library
from zoo.losses import log_of_relu, sine
from zoo.residual import MixerNet, ResidualNet
from zoo.sequence import TextEncoder, WaveNet, transformer
from zoo.surgery import Since, after, detached, gaussian, he, multiplied, shifted
from zoo.training import Setup


@dataclass(frozen=True)
class Small:
    """A sick run, the codes that have to be found with a word of their place, and what else is true of it."""

    labels: dict[str, str]
    setup: Setup
    also: frozenset[str] = frozenset()


SGD = torch.optim.SGD
_T = functools.partial
_stack = _T(mlp, width=64, inputs=16, classes=4)
_cells = _T(ResidualNet, inputs=16, classes=4, act=torch.relu)
_qk, _half = ("query", "key"), {"autocast": torch.float16, "precision": "16-mixed"}
_vec, _text, _pic = (Setup(model, data, steps=120) for model, data in ((_T(_cells, 6), vectors), (transformer, text), (mlp, pictures)))


def _small(labels, setup, *also):
    return Small(dict.fromkeys(labels.split(), "") if isinstance(labels, str) else labels, setup, frozenset(also))


def _broken_after(operation, since=0):
    return lambda: after(_cells(6), "cells.2", Since(operation, since))


def _nan_inputs(generator):
    x, y = vectors(generator)
    return torch.full_like(x, torch.nan), y


def _with_unused():
    model = _cells(4)
    model.extra = nn.Linear(64, 64)
    return model


DEEP = {
    "no-residual": _small({"rank-collapse": "blocks", "vanishing-gradient": "blocks"}, _text.but(model=_T(transformer, 12, norm="post", residual=False), steps=200)),
    "no-residual-encoder": _small({"rank-collapse": "blocks"}, _text.but(model=_T(transformer, 8, norm="post", residual=False), lr=3e-4), "vanishing-gradient"),
    "plain-torch-encoder": _small({"rank-collapse": "encoder"}, _text.but(model=_T(TextEncoder, 8, plain=True)), "vanishing-gradient"),
    "plain-torch-encoder-16": _small({"rank-collapse": "encoder", "vanishing-gradient": "encoder"}, _text.but(model=_T(TextEncoder, 16, plain=True), steps=150)),
    "sigmoid-mlp": _small("vanishing-gradient", _vec.but(model=_T(_stack, 10, nn.Sigmoid))),
    "sigmoid-conv": _small("vanishing-gradient", _pic.but(model=_T(stack_of_convolutions, 8, c=32, act=nn.Sigmoid))),
    "small-init-tanh": _small("vanishing-gradient", _vec.but(model=_T(_stack, 12, nn.Tanh, init=gaussian(0.03)), optimizer=SGD, lr=0.01), "signal-collapse"),
    "default-mlp-20": _small("vanishing-gradient", _vec.but(model=_T(_stack, 20), optimizer=SGD, lr=0.01), "signal-collapse"),
    "vgg-20-default": _small("vanishing-gradient", _pic.but(model=_T(stack_of_convolutions, 20, c=32), optimizer=SGD, lr=0.01, steps=60), "signal-collapse"),
    "small-init-mlp": _small("signal-collapse", _vec.but(model=_T(_stack, 12, init=gaussian(0.02)), optimizer=SGD, lr=0.01), "dead-units", "vanishing-gradient"),
    "default-mlp-12-wide": _small("signal-collapse", _vec.but(model=_T(_stack, 12, width=256), steps=40, optimizer=SGD, lr=0.01), "vanishing-gradient"),
    "large-init-mlp": _small("signal-explosion exploding-gradient", _vec.but(model=_T(_stack, 12, init=gaussian(0.4)), steps=40, lr=1e-5), "update-too-small"),
    "batchnorm-60": _small("exploding-gradient", _vec.but(model=_T(_stack, 60, norm=nn.BatchNorm1d), steps=10, every=5)),
    "unnormalised": _small({"signal-explosion": "cells"}, _vec.but(model=_T(_cells, 12, norm=False, init=he, final=False), lr=1e-4), "exploding-gradient"),
    "unnormalised-normed-head": _small({"signal-explosion": "cells"}, _vec.but(model=_T(_cells, 16, norm=False, init=he), lr=1e-4), "exploding-gradient"),
    "unnormalised-conv": _small("signal-explosion", _pic.but(model=lambda: ConvNet(*[Unnormalised() for _ in range(12)]), lr=1e-6, steps=60), "exploding-gradient", "update-too-small"),
    "unnormalised-transformer": _small({"signal-explosion": "blocks"}, _text.but(model=_T(transformer, 12, norm="none"), lr=1e-5, steps=60), "exploding-gradient"),
}  # fmt: skip

BRANCHES = {
    "two-zeros": _small({"silent-branch": "cells"}, _vec.but(model=_T(_cells, 6, gate=0.0, zero=True))),
    "one-silent": _small({"silent-branch": "cells.3"}, _vec.but(model=_T(_cells, 6, special={3: {"factor": 1e-5}}))),
    "gate-not-trained": _small({"silent-branch": "cells", "frozen-parameter": "gate"}, _vec.but(model=_T(_cells, 6, gate=0.0), parameters=without("gate"))),
    "wavenet-two-zeros": _small("silent-branch", _text.but(model=_T(WaveNet, zero=True))),
    "llama-silent": _small({"silent-branch": "layers.1.mlp"}, _text.but(model=lambda: after(library("llama"), "model.layers.1.mlp", lambda y: 1e-5 * y))),
    "dominant": _small({"dominant-branch": "cells.5"}, _vec.but(model=_T(_cells, 8, special={5: {"factor": 60.0}}))),
    "dominant-conv": _small({"dominant-branch": "blocks.3"}, _pic.but(model=lambda: after(ConvNet(*[Squeeze() for _ in range(5)]), "blocks.3.norm", lambda y: 100 * y)), "saturated-activation"),
    "inert": _small({"inert-depth": "cells"}, _vec.but(model=_T(_cells, 10, factor=0.005), steps=600, every=50, lr=3e-4)),
    "detached-branch": _small({"blocked-gradient": "cells.2"}, _vec.but(model=_T(_cells, 6, special={2: {"cut": True}}))),
    "detached-mlp": _small("blocked-gradient", _vec.but(model=lambda: Cut(*_stack(5, init=he)))),
    "vit-detached": _small({"blocked-gradient": "layers.2.mlp"}, _pic.but(model=lambda: after(library("vit"), "vit.layers.2.mlp", detached))),
    "mixer-detached": _small({"blocked-gradient": "channels.1"}, Setup(lambda: after(MixerNet(), "channels.1", detached), rows, steps=120)),
    "vgg-detached": _small("blocked-gradient", _pic.but(model=lambda: after(stack_of_convolutions(6, c=32, init=he), "6", detached)), "dead-units"),
}  # fmt: skip

NUMBERS = {
    "diverging": _small("nonfinite", _vec.but(model=_T(_stack, 4, init=he), optimizer=SGD, lr=0.02, rate=after_step(100, 1000.0), steps=200, options={"momentum": 0.9}, every=10), "exploding-gradient"),
    "resnet-diverging": _small("exploding-gradient nonfinite", _pic.but(model=lambda: ConvNet(*[Unnormalised() for _ in range(3)]), optimizer=SGD, lr=1.0, options={"momentum": 0.9})),
    "mlp-diverging": _small("exploding-gradient nonfinite", _vec.but(model=_T(_stack, 4, init=he, classes=1), loss=sine, optimizer=SGD, lr=0.02, rate=after_step(100, 7.0), steps=160, every=4)),
    "log-of-negative": _small("nonfinite", _vec.but(model=_broken_after(torch.log), steps=5)),
    "log-from-step-40": _small("nonfinite", _vec.but(model=_broken_after(torch.log, 40), steps=80)),
    "root-of-zero": _small("nonfinite", _vec.but(model=_broken_after(lambda x: x + (0 * x).sqrt()), steps=5)),
    "nan-in-batch": _small({"nonfinite": "inlet"}, _vec.but(data=_nan_inputs, steps=3)),
    "loss-of-log": _small({"nonfinite": "loss"}, _vec.but(loss=log_of_relu, steps=3)),
    "gpt2-log": _small({"nonfinite": "h.2"}, _text.but(model=lambda: after(library("gpt2"), "transformer.h.2.mlp.c_fc", torch.log), steps=4)),
    "convnext-root": _small({"nonfinite": "blocks.2"}, _pic.but(model=lambda: ConvNet(Depthwise(16), Depthwise(16), Depthwise(16, operation=torch.sqrt)), steps=4)),
    "spike": _small("gradient-spike", _vec.but(factor=at_steps({60}, 300.0), every=10, optimizer=SGD)),
    "transformer-spike": _small("gradient-spike", _text.but(model=_T(transformer, 3), factor=at_steps({80}, 300.0), every=10)),
    "half-precision": _small("gradient-underflow", _vec.but(factor=1e-6, **_half)),
    "gpt2-half-precision": _small("gradient-underflow", _text.but(model=_T(library, "gpt2"), factor=1e-7, steps=60, **_half)),
    "tiny-loss": _small("below-epsilon", _text.but(factor=1e-9)),
    "tiny-loss-residual": _small("below-epsilon", _vec.but(factor=1e-8)),
}  # fmt: skip

TRAINING = {
    "sharp-attention": _small("attention-logit-growth attention-entropy-collapse", _text.but(model=lambda: multiplied(transformer(4), _qk, 30.0))),
    "llama-sharp": _small("attention-logit-growth attention-entropy-collapse", _text.but(model=lambda: multiplied(library("llama"), ("q_proj", "k_proj"), 100.0))),
    "dead-bias": _small("dead-units", _vec.but(model=lambda: shifted(_stack(3), "2.bias", -5.0), data=_T(vectors, batch=256))),
    "dead-sgd": _small("dead-units", _vec.but(model=lambda: shifted(_stack(5, init=he), "4.bias", -10.0), data=_T(vectors, batch=128), optimizer=SGD, lr=0.01), "update-too-small"),
    "vgg-dead": _small("dead-units", _pic.but(model=lambda: shifted(stack_of_convolutions(5, c=32), "4.bias", -8.0))),
    "saturated-tanh": _small("saturated-activation", _vec.but(model=_T(_stack, 4, nn.Tanh, init=gaussian(1.0)))),
    "saturated-tanh-deep": _small("saturated-activation", _vec.but(model=_T(_stack, 6, nn.Tanh, init=gaussian(0.8)))),
    "saturated-sigmoid": _small("saturated-activation", _vec.but(model=_T(_stack, 3, nn.Sigmoid, init=gaussian(3.0)))),
    "too-fast": _small("update-too-large", _text.but(lr=0.3), "dead-units", "attention-logit-growth", "attention-entropy-collapse"),
    "gpt2-too-fast": _small("update-too-large attention-logit-growth", _text.but(model=_T(library, "gpt2"), lr=0.5), "attention-entropy-collapse"),
    "too-slow": _small("update-too-small", _text.but(lr=1e-8)),
    "gpt2-too-slow": _small("update-too-small", _text.but(model=_T(library, "gpt2"), lr=1e-8)),
    "forgotten-parameters": _small({"frozen-parameter": "outlet"}, _vec.but(parameters=without("outlet"))),
    "encoder-forgotten": _small({"frozen-parameter": "embed"}, _text.but(model=_T(TextEncoder, dropout=0.1), parameters=without("embed"))),
    "unused-layer": _small({"frozen-parameter": "extra"}, _vec.but(model=_with_unused)),
}  # fmt: skip

SMALL = {**DEEP, **BRANCHES, **NUMBERS, **TRAINING}
