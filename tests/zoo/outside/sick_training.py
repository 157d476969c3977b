"""Sick runs of the outside zoo whose trouble lies in activations, attention or the optimizer."""

from __future__ import annotations

import functools

import torch
from torch import nn

from zoo import proofs as proof
from zoo.case import Case, rate_said
from zoo.disturbances import split, without
from zoo.losses import elbo, seq2seq, square
from zoo.outside.data import copies, digits16, friedman, gaps, moons, noisy, patches, source, table, twins, walks, waves
from zoo.outside.models import hub
from zoo.outside.pictures import ConvAutoencoder, DenseNet, ResUNet, WideResNet, mobile
from zoo.outside.sequences import TCN, Decoder
from zoo.outside.vectors import DQN, Denoiser, Siamese, Two, bellman, contrast, diffusion, stack
from zoo.surgery import gaussian, multiplied, qk_norm, shifted
from zoo.training import Setup

SGD, AdamW = torch.optim.SGD, torch.optim.AdamW
_T = functools.partial
_mom = {"optimizer": SGD, "options": {"momentum": 0.9}}
_adamw = {"optimizer": AdamW, "options": {"weight_decay": 0.05}, "warmup": 10, "clip": 1.0}
_qk = ("q_proj", "k_proj")
_xavier2 = _T(nn.init.xavier_normal_, gain=2.0)
_cancer = _T(table, name="breast_cancer")
_attention = ("attention-logit-growth", "attention-entropy-collapse")


def repeat(generator):
    """Symbols to be said again."""
    _, said = copies(generator)
    return said[:, 8:], said[:, 8:]


def _groups(words, lr):
    """The named matrices at a learning rate of their own, too high."""
    return lambda m: [
        {"params": [p for n, p in m.named_parameters() if any(w in n for w in words)], "lr": lr},
        {"params": [p for n, p in m.named_parameters() if not any(w in n for w in words)]},
    ]


def bellman_square(model, batch, *, discount=0.9):
    """Mean square error of the values, rewards as they come."""
    values, later = model(batch[0])
    return (values.gather(1, batch[1][0][:, None])[:, 0] - batch[1][1] - discount * later.amax(1).detach()).pow(2).mean()


def _from_here(remedy):
    return {**rate_said(remedy), "rate": None}


_values = Setup(DQN, walks, bellman, steps=150, every=25)

_tanh_tcn = _T(TCN, act=nn.Tanh, skip=False)

ACTIVATIONS = {
    "inverse-scale": Case(
        "attention-entropy-collapse", r"attend", Setup(_T(Decoder, 3, init=_xavier2, scale=12**0.5), source, lr=1e-3, steps=120, every=10),
        proof.one_hot("attend.1.q", "attend.1.k", below=0.1, times=12.0), "QK norm|scale|temperature", {"model": _T(Decoder, 3, init=_xavier2)}, _attention,
    ),
    "qwen2-sharp": Case(
        "attention-entropy-collapse", r"layers", Setup(lambda: multiplied(hub("qwen2"), _qk, 60.0), source, lr=2e-3, steps=150, every=25),
        proof.one_hot("model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj", below=0.15), "QK norm",
        {"model": lambda: qk_norm(multiplied(hub("qwen2"), _qk, 60.0), _qk, 12)}, _attention,
    ),
    "bart-logits": Case(
        "attention-logit-growth", r"layers", Setup(_T(hub, "bart"), repeat, seq2seq, parameters=_groups(_qk, 0.05), steps=150, every=10),
        proof.logit("model.encoder.layers.1.self_attn.q_proj", "model.encoder.layers.1.self_attn.k_proj", above=50, causal=False), "QK norm|learning rate",
        {"model": lambda: qk_norm(hub("bart"), _qk)}, (*_attention, "update-too-large"),
    ),
    "beit-logits": Case(
        "attention-logit-growth", r"layers", Setup(lambda: multiplied(hub("beit"), (*_qk, "query", "key"), 150.0), digits16, every=10),
        proof.logit("beit.layers.1.attention.q_proj", "beit.layers.1.attention.k_proj", above=50, causal=False), "QK norm",
        {"model": lambda: qk_norm(multiplied(hub("beit"), (*_qk, "query", "key"), 150.0), (*_qk, "query", "key"), 12)}, _attention,
    ),
    "rewards-in-thousands": Case(
        "dead-units", r"net", _values.but(data=_T(walks, reward=1000.0), loss=bellman_square, optimizer=SGD, lr=1e-4, options={"momentum": 0.9}),
        proof.dead("net.3", above=0.4), ".", {"lr": 1e-5}, ("update-too-large", "gradient-spike"),
    ),
    "coder-negative-bias": Case(
        "dead-units", r"encoder\.1", Setup(lambda: shifted(ConvAutoencoder(), "encoder.1.0.bias", -3.0), patches, lambda m, b: (m(b[0]) - b[0]).pow(2).mean(), every=10),
        proof.dead("encoder.1.1", above=0.4), "bias", {"model": ConvAutoencoder},
    ),
    "mobile-shifted": Case(
        "dead-units", r"4\.widen", Setup(lambda: shifted(mobile(), "4.widen.1.bias", -6.0), digits16, lr=3e-3, steps=120, every=10),
        proof.dead("4.widen.2", above=0.4), "bias", {"model": mobile},
    ),
    "wine-raw": Case(
        "saturated-activation", r"^[01]$", Setup(_T(stack, 13, 32, 32, 3, act=nn.Tanh), _T(table, raw=True), steps=150, every=25),
        proof.at_ends("1", low=-0.97, high=0.97, above=0.5), "[Nn]ormalis|[Ss]tandardis|smaller", {"data": table},
    ),
    "tables-sharp-sigmoid": Case(
        "saturated-activation", r".", Setup(_T(stack, 30, 40, 40, 40, 2, act=nn.Sigmoid, init=gaussian(2.5)), _cancer, steps=120, every=10),
        proof.at_ends("3", low=0.03, high=0.97, above=0.5), "smaller|xavier|[Nn]ormalis",
        {"model": _T(stack, 30, 40, 40, 40, 2, act=nn.Sigmoid, init=nn.init.xavier_normal_)},
    ),
    "tcn-wide-tanh": Case(
        "saturated-activation", r"acts|layers", Setup(lambda: multiplied(_tanh_tcn(), ("layers.1.", "layers.2."), 20.0), waves, square, steps=150, every=25),
        proof.at_ends("acts.2", low=-0.97, high=0.97, above=0.5), "smaller|xavier|[Nn]ormalis", {"model": _tanh_tcn},
    ),
}  # fmt: skip

OPTIMIZER = {
    "electra-lr": Case(
        "update-too-large", r".", Setup(_T(hub, "electra"), gaps, lr=0.5, optimizer=AdamW, every=10),
        proof.blown(above=3), "learning rate", rate_said, (*_attention, "dead-units", "rank-collapse", "vanishing-gradient", "signal-explosion"),
    ),
    "siamese-lr": Case(
        "update-too-large", r".", Setup(Siamese, twins, contrast, lr=0.5, steps=120, every=10),
        proof.blown(above=3), "learning rate", rate_said, ("dead-units", "gradient-spike", "exploding-gradient"),
    ),
    "wide-resnet-lr": Case(
        "update-too-large", r".", Setup(WideResNet, digits16, lr=1.0, steps=120, every=25),
        proof.blown(above=3), "learning rate", rate_said, ("dead-units", "signal-explosion"),
    ),
    "endless-warm-up": Case(
        "update-too-small", r".", Setup(DenseNet, digits16, rate=lambda s: (s + 1) / 1e7, steps=150, every=10),
        proof.moved(below=1e-5), "[Rr]aise", _from_here,
    ),
    "vae-lr-small": Case(
        "update-too-small", r".", Setup(_T(ConvAutoencoder, noise=True), patches, elbo, lr=1e-8, steps=150, every=25),
        proof.moved(below=1e-5), "[Rr]aise", rate_said,
    ),
    "albert-lr-small": Case(
        "update-too-small", r".", Setup(_T(hub, "albert"), gaps, lr=1e-7, steps=120, every=10, **_mom),
        proof.moved(below=1e-5), "[Rr]aise", rate_said,
    ),
    "unet-forgotten": Case(
        "frozen-parameter", r"decode", Setup(ResUNet, noisy, square, every=10, parameters=without("decode")), proof.unmoved("decode"), "optimizer", {"parameters": None},
    ),
    "mistral-forgotten": Case(
        "frozen-parameter", r"embed_tokens", Setup(_T(hub, "mistral"), source, lr=2e-3, steps=150, every=50, parameters=without("embed_tokens"), **_adamw),
        proof.unmoved("embed_tokens"), "optimizer", {"parameters": None},
    ),
    "side-head": Case(
        "frozen-parameter", r"side", Setup(Two, friedman, square, every=10), proof.unmoved("side"), ".", {"model": _T(Two, used=True)},
    ),
    "time-without-rate": Case(
        "frozen-parameter", r"time", Setup(Denoiser, moons, diffusion, steps=200, every=25, parameters=split("time", 0.0)),
        proof.unmoved("time"), "learning rate", {"parameters": None},
    ),
}  # fmt: skip
