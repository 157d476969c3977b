"""The sick runs of the labelled zoo whose trouble lies in numbers, activations or the optimizer."""

from __future__ import annotations

import functools

import torch
from torch import nn

from zoo import proofs as proof
from zoo.case import Case, clip_said, eps_said, rate_said, scale_said
from zoo.convolutions import ResNet, conv_net, stack_of_convolutions
from zoo.data import digits, hidden, pictures, rings, rows, text, waves
from zoo.dense import mlp
from zoo.disturbances import after_step, louder, split, without
from zoo.library import library
from zoo.losses import square
from zoo.residual import MixerNet, ResidualNet
from zoo.sequence import Recurrent, RowEncoder, transformer
from zoo.surgery import after, gaussian, he, multiplied, qk_norm, shifted
from zoo.training import Setup

SGD, AdamW = torch.optim.SGD, torch.optim.AdamW
_T = functools.partial
_res = Setup(ResidualNet, digits)
_gpt = Setup(_T(library, "gpt2"), text)
_bert = Setup(_T(library, "bert"), hidden, steps=140, lr=3e-3)
_half = {"autocast": torch.float16, "precision": "16-mixed"}
_qk = ("query", "key")


def _root(x, eps=0.0):
    """The distance of x from itself, whose derivative at 0 is 0 · infinity, unless there is an epsilon in the root."""
    return x + 1e-3 * ((x - x.detach()).pow(2).sum(-1, keepdim=True) + eps).sqrt()


def _blank(step):
    def corrupt(now, batch):
        return (torch.zeros_like(batch[0]), batch[1]) if now == step else batch

    return corrupt


class Scaled(nn.Module):
    """x over its own standard deviation, by hand, with or without an epsilon."""

    def __init__(self, eps):
        super().__init__()
        self.eps = eps

    def forward(self, x):
        return x / (x.std(-1, keepdim=True) + self.eps)


def _standardised(eps):
    return nn.Sequential(Scaled(eps), *mlp(3, init=he))


def _negative_log(eps):
    return conv_net(scale=0.1, operation=(lambda x: torch.log(x.pow(2) + eps)) if eps else torch.log)


NUMBERS = {
    "spiky-residual": Case(
        "gradient-spike", r".", _res.but(corrupt=louder(60, 40.0), every=10, model=lambda: ResidualNet(4, norm=False, final=False, factor=0.3), steps=120),
        proof.spiked(60, above=20), "[Cc]lip", clip_said, since=60,
    ),
    "spiky-regression": Case(
        "gradient-spike", r".", Setup(lambda: mlp(3, inputs=8, classes=1), waves, loss=square, corrupt=lambda s, b: (b[0], b[1] + 60) if s == 80 else b, every=10, optimizer=SGD, lr=0.02, steps=120),
        proof.spiked(80, above=20), "[Cc]lip", clip_said, since=80,
    ),
    "division-by-spread": Case(
        "nonfinite", r"^0|1", Setup(lambda: _standardised(0.0), digits, corrupt=_blank(40)),
        proof.broke(40), "epsilon|clamp", {"model": lambda: _standardised(1e-3)}, since=40,
    ),
    "log-of-negative": Case(
        "nonfinite", r"blocks\.0", Setup(_negative_log(0.0), pictures, steps=6),
        proof.broke(0), "epsilon|clamp", {"model": _negative_log(1e-3)},
    ),
    "root-backwards": Case(
        "nonfinite", r"cells\.[12]", _res.but(model=lambda: after(ResidualNet(5), "cells.1", _root), steps=8),
        proof.broke(0, backward=True), "epsilon", {"model": lambda: after(ResidualNet(5), "cells.1", _T(_root, eps=1e-6))},
    ),
    "half-overflow": Case(
        "nonfinite", r"cells\.[12]", _res.but(model=lambda: multiplied(ResidualNet(5, norm=False), ("cells.2.fc2", "cells.2.fc1", "cells.1.fc2", "cells.1.fc1"), 400.0), steps=8, **_half),
        proof.broke(0), "bf16|epsilon|clamp", None,
    ),
    "runaway-sgd": Case(
        "exploding-gradient", r".", Setup(lambda: mlp(4, inputs=8, classes=1, init=he), waves, loss=square, optimizer=SGD, lr=0.02, steps=140, every=4, rate=after_step(100, 12.0)),
        proof.outgrown(100, above=100), "learning rate", {"rate": None}, ("nonfinite", "update-too-large"), since=100,
    ),
    "tiny-loss-gpt2": Case(
        "below-epsilon", r".", _gpt.but(factor=1e-9, lr=3e-3),
        proof.tiny_gradient(1e-8), "eps", eps_said,
    ),
    "large-eps-mixer": Case(
        "below-epsilon", r".", Setup(MixerNet, rows, options={"eps": 1.0}, lr=1e-3),
        proof.tiny_gradient(1.0), "eps", eps_said,
    ),
    "half-loss-residual": Case(
        "gradient-underflow", r".", _res.but(factor=1e-6, **_half),
        proof.underflowed("cells", above=0.5), "GradScaler", scale_said,
    ),
    "half-loss-bert": Case(
        "gradient-underflow", r".", _bert.but(factor=1e-5, steps=60, **_half),
        proof.underflowed("layer", above=0.5), "GradScaler", scale_said,
    ),
}  # fmt: skip

ACTIVATIONS = {
    "sharp-transformer": Case(
        "attention-entropy-collapse", r"blocks", Setup(lambda: multiplied(transformer(3), _qk, 20.0), text),
        proof.one_hot("encoder.blocks.1.attention.query", "encoder.blocks.1.attention.key", below=0.1), "QK norm",
        {"model": lambda: qk_norm(multiplied(transformer(3), _qk, 20.0), _qk)}, ("attention-logit-growth",),
    ),
    "sharp-llama": Case(
        "attention-entropy-collapse", r"layers", Setup(lambda: multiplied(library("llama"), ("q_proj", "k_proj"), 60.0), text, lr=2e-3, steps=140),
        proof.one_hot("model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj", below=0.15), "QK norm",
        {"model": lambda: qk_norm(multiplied(library("llama"), ("q_proj", "k_proj"), 60.0), ("q_proj", "k_proj"))}, ("attention-logit-growth",),
    ),
    "vit-logits": Case(
        "attention-logit-growth", r"layers", Setup(lambda: multiplied(library("vit"), ("q_proj", "k_proj", "query", "key"), 120.0), pictures),
        proof.logit("vit.layers.1.attention.q_proj", "vit.layers.1.attention.k_proj", above=50, causal=False), "QK norm", {"model": lambda: qk_norm(multiplied(library("vit"), ("q_proj", "k_proj", "query", "key"), 120.0), ("query", "key", "q_proj", "k_proj"))}, ("attention-entropy-collapse",),
    ),
    "transformer-logits-grow": Case(
        "attention-logit-growth", r"blocks", Setup(lambda: transformer(3), text, lr=0.03, parameters=lambda m: [{"params": [p for n, p in m.named_parameters() if any(w in n for w in _qk)]}, {"params": [p for n, p in m.named_parameters() if not any(w in n for w in _qk)], "lr": 1e-3}], steps=150),
        proof.logit("encoder.blocks.1.attention.query", "encoder.blocks.1.attention.key", above=50), "QK norm",
        {"model": lambda: qk_norm(transformer(3), _qk)}, ("attention-entropy-collapse", "update-too-large"),
    ),
    "dead-mlp": Case(
        "dead-units", r"^3|^2", Setup(lambda: shifted(mlp(3, width=64), "2.bias", -6.0), digits),
        proof.dead("3", above=0.4), "bias", {"model": lambda: mlp(3, width=64)},
    ),
    "dead-cnn": Case(
        "dead-units", r"^[67]", Setup(lambda: shifted(stack_of_convolutions(5, init=he), "6.bias", -12.0), pictures),
        proof.dead("7", above=0.4), "bias", {"model": lambda: stack_of_convolutions(5, init=he)},
    ),
    "dying-by-rate": Case(
        "dead-units", r".", Setup(lambda: mlp(3, width=64, init=he), digits, lr=0.1, steps=150),
        proof.dead("3", above=0.4), "learning rate", {"lr": 3e-3}, ("update-too-large", "vanishing-gradient", "signal-collapse"),
    ),
    "raw-pixels": Case(
        "saturated-activation", r"^1$|^0$", Setup(lambda: mlp(3, nn.Tanh), _T(digits, raw=True)),
        proof.at_ends("1", low=-0.97, high=0.97, above=0.5), "[Nn]ormalise|smaller", {"data": digits},
    ),
    "wide-tanh": Case(
        "saturated-activation", r".", Setup(lambda: mlp(4, nn.Tanh, init=gaussian(0.8)), digits),
        proof.at_ends("3", low=-0.97, high=0.97, above=0.5), "smaller", {"model": lambda: mlp(4, nn.Tanh, init=nn.init.xavier_normal_)},
    ),
    "saturated-sigmoid": Case(
        "saturated-activation", r".", Setup(lambda: mlp(3, nn.Sigmoid, inputs=2, classes=4, init=gaussian(4.0)), rings),
        proof.at_ends("3", low=0.03, high=0.97, above=0.5), "smaller", {"model": lambda: mlp(3, nn.Sigmoid, inputs=2, classes=4, init=nn.init.xavier_normal_)},
    ),
}  # fmt: skip

OPTIMIZER = {
    "gpt2-lr-1": Case(
        "update-too-large", r".", _gpt.but(lr=1.0), proof.blown(above=3), "learning rate", rate_said,
        ("attention-logit-growth", "attention-entropy-collapse", "dead-units", "signal-explosion", "rank-collapse"),
    ),
    "encoder-lr": Case(
        "update-too-large", r".", Setup(lambda: RowEncoder(3), rows, lr=0.5, optimizer=AdamW), proof.blown(above=3), "learning rate", rate_said,
        ("attention-logit-growth", "attention-entropy-collapse", "dead-units", "rank-collapse", "vanishing-gradient"),
    ),
    "residual-lr": Case(
        "update-too-large", r".", _res.but(lr=1.0), proof.blown(above=3), "learning rate", rate_said, ("signal-explosion", "dead-units"),
    ),
    "cnn-lr-small": Case(
        "update-too-small", r".", Setup(lambda: ResNet(), pictures, optimizer=SGD, lr=1e-7), proof.moved(below=1e-5), "[Rr]aise", rate_said,
    ),
    "transformer-lr-small": Case(
        "update-too-small", r".", Setup(lambda: transformer(3, norm="post"), text, lr=3e-8), proof.moved(below=1e-5), "[Rr]aise", rate_said,
    ),
    "gru-lr-small": Case(
        "update-too-small", r".", Setup(lambda: Recurrent(nn.GRU), text, lr=1e-8, optimizer=AdamW), proof.moved(below=1e-5), "[Rr]aise", rate_said,
    ),
    "forgotten-head": Case(
        "frozen-parameter", r"fc", Setup(MixerNet, rows, parameters=without("fc.")), proof.unmoved("fc."), "optimizer", {"parameters": None},
    ),
    "forgotten-embedding": Case(
        "frozen-parameter", r"wte|wpe", _gpt.but(parameters=without("wpe")), proof.unmoved("wpe"), "optimizer", {"parameters": None},
    ),
    "group-without-rate": Case(
        "frozen-parameter", r"cells\.[0-5]|inlet", _res.but(parameters=split("cells", 0.0)), proof.unmoved("cells"), "learning rate", {"parameters": None},
    ),
    "lstm-forgotten": Case(
        "frozen-parameter", r"rnn", Setup(lambda: Recurrent(nn.LSTM), text, parameters=without("rnn"), lr=3e-3), proof.unmoved("rnn"), "optimizer", {"parameters": None},
    ),
}  # fmt: skip
