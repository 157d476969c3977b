"""The stranger's runs: sick ones with what proves and cures them, and healthy ones."""

from __future__ import annotations

import functools
import math

import torch
from torch import nn

from zoo import proofs as proof
from zoo.case import Case, clip_said, eps_said, rate_said, scale_said
from zoo.disturbances import louder, without
from zoo.losses import square
from zoo.stranger.models import (
    TCN,
    Adversaries,
    Auxiliary,
    Codes,
    Decoder,
    GraphNet,
    Lion,
    Student,
    Switch,
    Words,
    addition,
    contrast,
    diabetes,
    gratings,
    last,
    layers,
    nodes,
    oscillator,
    pictures_net,
    program,
    reinforce,
    series,
    spirals,
    temporal_difference,
    tiny,
    unit_net,
    views,
    wide,
    wine,
)
from zoo.surgery import gaussian, he, initialise, low_rank, qk_norm
from zoo.training import Setup, pretrained

SGD, AdamW = torch.optim.SGD, torch.optim.AdamW
_T = functools.partial
_series = Setup(TCN, series, square)
_program = Setup(Decoder, program, optimizer=AdamW)
_sums = Setup(_T(Decoder, 3, letters=14), addition, last)
_wine = Setup(_T(layers, 3, nn.ReLU), wine)
_qk = ("query", "key")


def _drawn(model, words, std):
    """The model with the named matrices drawn with a spread of their own."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 and any(word in name for word in words):
                p.normal_(std=std)
    return model


def _loud_place(model):
    with torch.no_grad():
        model.places[0, 5] += 3000.0
    return model


def _empty(step):
    """A row of the batch is nothing but padding, or a record without measurements, at one step."""

    def corrupt(now, batch):
        if now != step:
            return batch
        x = batch[0].clone()
        x[0] = 0
        return x, batch[1]

    return corrupt


def _likelihood(model, batch, eps=0.0):
    """Binary cross-entropy written out."""
    p, y = model(batch[0])[:, 0].sigmoid(), (batch[1] == 0).float()
    return -(y * (p + eps).log() + (1 - y) * (1 - p + eps).log()).mean()


def _slow_start(remedy):
    return {**rate_said(remedy), "warmup": 0}


SICK = {
    "sigmoid-regression": Case(
        "vanishing-gradient", r".", Setup(_T(layers, 8, nn.Sigmoid, inputs=10, classes=1), diabetes, square, optimizer=AdamW),
        proof.gradient("0", "14", below=1e-3), "ReLU|GELU", {"model": _T(layers, 8, nn.ReLU, inputs=10, classes=1, init=he)},
    ),
    "tcn-without-skips": Case(
        "vanishing-gradient", r".", _series.but(model=_T(TCN, 10, skip=False, norm=False, act=torch.tanh), optimizer=SGD, lr=0.02),
        proof.gradient("inlet", "blocks.9", below=1e-3), "residual|skip", {"model": _T(TCN, 10, norm=False, act=torch.tanh)}, ("signal-collapse",),
    ),
    "ramp-too-long": Case(
        "exploding-gradient", r".", Setup(_T(layers, 3, nn.ReLU, inputs=10, classes=1), diabetes, square, optimizer=SGD, lr=0.02, options={"momentum": 0.9}, steps=150, every=4, rate=lambda s: 1.3 ** max(0, s - 100)),
        proof.outgrown(100, above=100), "learning rate", {"rate": None}, ("nonfinite", "update-too-large", "signal-explosion", "dead-units"), since=112,
    ),
    "sensor-glitch": Case(
        "gradient-spike", r".", _series.but(model=_T(TCN, 4, norm=False), corrupt=louder(70, 8.0), every=10, optimizer=SGD, lr=0.01),
        proof.spiked(70, above=20), "[Cc]lip", clip_said, since=70,
    ),
    "blind-feed-forward": Case(
        "blocked-gradient", r"blocks\.[01]\.mlp", _sums.but(model=_T(Decoder, 2, letters=14, blind=1), lr=3e-3),
        proof.no_gradient("blocks.1.mlp", "blocks.1.mlp"), "detach|no_grad", {"model": _T(Decoder, 2, letters=14)},
    ),
    "rounded-code": Case(
        "blocked-gradient", r"encoder", Setup(_T(Codes, False), spirals, steps=150, lr=3e-3),
        proof.no_gradient("encoder", "encoder"), "detach|straight|round", {"model": _T(Codes, True)},
    ),
    "half-decoder": Case(
        "gradient-underflow", r".", _program.but(factor=1e-6, autocast=torch.float16, precision="16-mixed"),
        proof.underflowed("blocks", above=0.5), "GradScaler", scale_said,
    ),
    "bloom-tiny-loss": Case(
        "below-epsilon", r".", Setup(_T(tiny, "bloom"), program, factor=1e-9, lr=3e-3), proof.tiny_gradient(1e-8), "eps", eps_said,
    ),
    "decay-given-as-eps": Case(
        "below-epsilon", r".", _wine.but(optimizer=AdamW, options={"eps": 0.1}), proof.tiny_gradient(0.1), "eps", eps_said,
    ),
    "leaky-stack": Case(
        "signal-explosion", r".", _wine.but(model=_T(layers, 12, nn.LeakyReLU, init=gaussian(0.6)), lr=1e-4),
        proof.signal("0", "22", above=1e3), "kaiming", {"model": _T(layers, 12, nn.LeakyReLU, init=he)}, ("exploding-gradient",),
    ),
    "tcn-without-norms": Case(
        "signal-explosion", r"blocks", _series.but(model=_T(TCN, 12, norm=False, init=he), lr=1e-4),
        proof.signal("blocks.0", "blocks.11", above=1e2), "[Nn]ormalise", {"model": _T(TCN, 12, init=he)}, ("exploding-gradient",),
    ),
    "bert-init-perceptron": Case(
        "signal-collapse", r".", Setup(lambda: initialise(layers(8, nn.ReLU, inputs=2), gaussian(0.02)), spirals, optimizer=SGD, lr=0.05),
        proof.signal("0", "14", below=1e-2), "kaiming", {"model": _T(layers, 8, nn.ReLU, inputs=2, init=he)}, ("vanishing-gradient",),
    ),
    "closed-gates": Case(
        "silent-branch", r"blocks\.[1-4]", _series.but(model=_T(TCN, 5, gates=[0.0, -14.0, -14.0, -14.0, -14.0]), steps=150),
        proof.branch("blocks.3", below=1e-3), "last layer|factor|gain|gate|bias", {"model": _T(TCN, 5, gates=[0.0] * 5)}, ("saturated-activation",),
    ),
    "root-for-inverse-root": Case(
        "dominant-branch", r"blocks\.3\.mlp", _sums.but(model=lambda: _drawn(Decoder(6, letters=14), ["blocks.3.mlp.down"], 8.0), steps=120),
        proof.branch("blocks.3", part="blocks.3.mlp", above=2), "scale|initialis", {"model": _T(Decoder, 6, letters=14)},
    ),
    "faint-decoder": Case(
        "inert-depth", r"blocks", _sums.but(model=_T(Decoder, 6, letters=14, factor=0.004), steps=400, every=50, lr=5e-5),
        proof.kept([f"blocks.{i}" for i in range(6)], above=0.999), "scale|larger|factor", {"model": _T(Decoder, 6, letters=14)},
    ),
    "oversmoothed-graph": Case(
        "rank-collapse", r"layers", Setup(_T(GraphNet, 12, skip=False), nodes),
        proof.alike("layers.11", above=0.99), "residual|skip", {"model": GraphNet}, ("vanishing-gradient", "dead-units"),
    ),
    "randn-queries": Case(
        "attention-entropy-collapse", r"blocks", _program.but(model=lambda: _drawn(Decoder(3, 64, heads=2), _qk, 1.0)),
        proof.one_hot("blocks.1.attention.query", "blocks.1.attention.key", below=0.1, heads=2), "QK norm",
        {"model": lambda: qk_norm(_drawn(Decoder(3, 64, heads=2), _qk, 1.0), _qk, 32)}, ("attention-logit-growth",),
    ),
    "qwen-fast-queries": Case(
        "attention-logit-growth", r"layers", Setup(_T(tiny, "qwen"), program, lr=0.05, steps=150, parameters=lambda m: [{"params": [p for n, p in m.named_parameters() if "q_proj" in n or "k_proj" in n]}, {"params": [p for n, p in m.named_parameters() if "q_proj" not in n and "k_proj" not in n], "lr": 1e-3}]),
        proof.logit("model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj", above=50), "QK norm",
        {"model": lambda: qk_norm(tiny("qwen"), ("q_proj", "k_proj"))}, ("attention-entropy-collapse", "update-too-large"),
    ),
    "bad-start": Case(
        "dead-units", r".", _wine.but(model=_T(layers, 3, nn.ReLU, width=64), data=_T(wine, batch=128), rate=lambda s: 300.0 if s < 3 else 1.0),
        proof.dead("3", above=0.3), "learning rate|[Ww]arm|bias", {"rate": None}, ("update-too-large",),
    ),
    "detector-bias-everywhere": Case(
        "dead-units", r"^[0-5]$", Setup(_T(pictures_net, bias=-4.6), gratings, lr=1e-3),
        proof.dead("3", above=0.4), "bias", {"model": pictures_net}, ("vanishing-gradient", "signal-collapse"),
    ),
    "raw-wine": Case(
        "saturated-activation", r"^[01]$", _wine.but(model=_T(layers, 2, nn.Tanh), data=_T(wine, raw=True)),
        proof.at_ends("1", low=-0.97, high=0.97, above=0.5), "[Nn]ormalise|[Ss]tandardise|smaller", {"data": wine},
    ),
    "sharp-oscillator": Case(
        "saturated-activation", r".", Setup(_T(layers, 3, nn.Tanh, inputs=1, classes=1, init=gaussian(1.5)), diabetes, oscillator),
        proof.at_ends("3", low=-0.97, high=0.97, above=0.5), "smaller|xavier", {"model": _T(layers, 3, nn.Tanh, inputs=1, classes=1, init=nn.init.xavier_normal_)}, ("exploding-gradient",),
    ),
    "loud-place": Case("massive-activation", r".", _program.but(model=lambda: _loud_place(Decoder(4))), proof.massive("blocks.1", above=1000), "[Nn]othing"),
    "all-padding": Case(
        "nonfinite", r"blocks\.0", _sums.but(model=_T(Decoder, 3, letters=14, hidden=-math.inf), corrupt=_empty(40)),
        proof.broke(40), "mask|epsilon|clamp|finite", {"model": _T(Decoder, 3, letters=14, hidden=-1e4)}, since=40,
    ),
    "unit-of-nothing": Case(
        "nonfinite", r"^2|^1$", _wine.but(model=unit_net, corrupt=_empty(60)), proof.broke(60), "epsilon|clamp", {"model": _T(unit_net, 1e-6)}, since=60,
    ),
    "likelihood-by-hand": Case(
        "nonfinite", r"loss", _wine.but(model=lambda: nn.Sequential(nn.Linear(13, 1)), data=_T(wine, raw=True), loss=_likelihood),
        proof.broke(0), "epsilon|clamp|log", {"loss": _T(_likelihood, eps=1e-6)},
    ),
    "lstm-lr-1": Case(
        "update-too-large", r".", Setup(Words, program, lr=1.0), proof.blown(above=3), "learning rate", rate_said, ("saturated-activation", "rank-collapse", "exploding-gradient"),
    ),
    "wide-lr": Case(
        "update-too-large", r".", Setup(wide, gratings, lr=0.5, optimizer=AdamW), proof.blown(above=3), "learning rate", rate_said, ("signal-explosion", "dead-units"),
    ),
    "warm-up-in-tokens": Case(
        "update-too-small", r".", _program.but(warmup=10_000_000, steps=120), proof.moved(below=1e-5), "[Rr]aise|warm", _slow_start,
    ),
    "graph-sgd-micro": Case(
        "update-too-small", r".", Setup(_T(GraphNet, 4), nodes, optimizer=SGD, lr=1e-6), proof.moved(below=1e-5), "[Rr]aise", rate_said,
    ),
    "new-head-not-given": Case(
        "frozen-parameter", r"head", Setup(Words, program, lr=2e-3, parameters=without("head")), proof.unmoved("head"), "optimizer", {"parameters": None},
    ),
    "spare-head": Case("frozen-parameter", r"spare", _wine.but(model=Auxiliary), proof.unmoved("spare"), "loss|use|requires_grad"),
}  # fmt: skip


def _cosine(steps):
    return lambda s: 0.5 * (1 + math.cos(math.pi * min(1.0, s / steps)))


def _known(model, data, steps, frozen=""):
    """A model after some training, parts of it frozen."""
    model = pretrained(model, data, steps=steps)
    for name, p in model.named_parameters():
        p.requires_grad_(not (frozen and name.startswith(frozen)))
    return model


def _own(model, batch):
    return model(batch[0])


HEALTHY = {
    "qwen-recipe": Setup(_T(tiny, "qwen"), program, lr=3e-3, optimizer=AdamW, options={"betas": (0.9, 0.95), "weight_decay": 0.1}, warmup=20, rate=_cosine(140), clip=1.0, steps=140),
    "deep-tied": _program.but(model=_T(Decoder, 12, tied=True, std=0.02), steps=80, warmup=10),
    "zero-branches": _program.but(model=_T(Decoder, 4, zero=True), every=10),
    "wide-nesterov": Setup(_T(wide, 4, zero=True), gratings, optimizer=SGD, lr=0.1, options={"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}, rate=_cosine(120), steps=120),
    "layer-scale": Setup(_T(wide, 5, scale=1e-4), gratings, optimizer=AdamW, lr=2e-3, options={"weight_decay": 0.05}, steps=150),
    "frozen-trunk": Setup(lambda: _known(layers(4, nn.ReLU, inputs=2), spirals, 150, "0"), spirals, lr=1e-3),
    "bloom-low-rank": Setup(lambda: low_rank(pretrained(tiny("bloom"), program, steps=60), ("query_key_value",)), program, lr=1e-3, optimizer=AdamW),
    "byol": Setup(lambda: Student(layers(2, nn.ReLU, classes=16, norm=True), layers(1, nn.ReLU, inputs=16, classes=16)), wine, views),
    "q-learning": Setup(lambda: Student(layers(2, nn.ReLU)), wine, temporal_difference, steps=200, every=10, clip=10.0),
    "reinforce": Setup(_T(layers, 2, nn.Tanh), _T(wine, batch=16), reinforce, steps=200, every=10, lr=3e-3),
    "wine-dropout": _wine.but(model=_T(layers, 3, nn.ReLU, width=64, dropout=0.5), data=_T(wine, batch=16), optimizer=AdamW, options={"weight_decay": 0.1}, steps=200),
    "qwen-bf16": Setup(_T(tiny, "qwen"), program, lr=1e-3, optimizer=AdamW, autocast=torch.bfloat16, precision="bf16-mixed", clip=1.0, steps=80),
    "albert-accumulated": Setup(_T(tiny, "albert"), program, lr=2e-3, optimizer=AdamW, accumulate=4, clip=1.0, warmup=10, steps=50, every=10),
    "lstm-pairs": Setup(Words, _T(program, batch=2), lr=2e-3, clip=1.0, steps=120, every=10),
    "lion": _program.but(optimizer=Lion, lr=3e-4, options={"weight_decay": 0.1}, warmup=10),
    "adafactor": _program.but(optimizer=torch.optim.Adafactor, lr=1e-2, options={}),
    "sgd-lr-half": Setup(_T(layers, 3, nn.ReLU, norm=True), wine, optimizer=SGD, lr=0.5),
    "switch": _program.but(model=_T(Decoder, 3, mlp=Switch), lr=2e-3),
    "gan": Setup(Adversaries, spirals, _own, lr=1e-3, options={"betas": (0.5, 0.999)}, steps=200),
    "converged": Setup(lambda: _known(layers(3, nn.ReLU, inputs=2), spirals, 1200), spirals, lr=1e-3, rate=_cosine(120), steps=120),
    "first-thirty": _program.but(model=_T(tiny, "bloom"), warmup=100, steps=30, every=5),
    "fine-tuned": _program.but(model=lambda: _known(Decoder(4), program, 250), lr=2e-5, warmup=10, options={"weight_decay": 0.01}),
    "pinn": Setup(_T(layers, 3, nn.Tanh, inputs=1, classes=1, init=nn.init.xavier_normal_), diabetes, oscillator, lr=2e-3, steps=150),
    "contrastive": Setup(_T(layers, 3, nn.GELU, classes=16), _T(wine, batch=64), contrast),
    "tcn": _series.but(model=_T(TCN, 8), lr=2e-3),
    "graph": Setup(_T(GraphNet, 6), nodes, lr=2e-3, optimizer=AdamW),
    "sums-grokking-decay": _sums.but(optimizer=AdamW, lr=1e-3, options={"weight_decay": 1.0}, steps=200),
    "squeeze": _series.but(model=_T(TCN, 5, gates=[0.0] * 5), optimizer=torch.optim.RMSprop),
}  # fmt: skip
