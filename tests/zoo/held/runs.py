"""The runs of the last set, sick and healthy."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

from zoo import proofs as proof
from zoo.case import Case, clip_said, eps_said, rate_said, scale_said
from zoo.disturbances import without
from zoo.held.models import (
    GMLP,
    Flowing,
    Forecaster,
    GraphAttention,
    MixtureDensity,
    Perceiver,
    Plain,
    Towers,
    ahead,
    likings,
)
from zoo.losses import square
from zoo.outside.data import BYTES, LENGTH, WORDS, clouds, digits16, friedman, moons, patches, source, table, words
from zoo.outside.proofs import norm_broke, ratio
from zoo.outside.vectors import stack
from zoo.surgery import gaussian, multiplied, shifted
from zoo.training import Setup

SGD, AdamW = torch.optim.SGD, torch.optim.AdamW
_T = functools.partial
_mom = {"optimizer": SGD, "options": {"momentum": 0.9}}
_adamw = {"optimizer": AdamW, "options": {"weight_decay": 0.05}, "warmup": 15, "clip": 1.0}
_gmlp = Setup(_T(GMLP, WORDS), words, lr=2e-3, steps=120, every=10, **_adamw)
_graph = Setup(GraphAttention, clouds, lr=2e-3, steps=150, every=25)
_series = Setup(Forecaster, ahead, square, steps=150, every=10)
_likes = Setup(Towers, likings, square, lr=3e-3, steps=300, every=25)
_look = Setup(Perceiver, patches, lr=1e-3, steps=120, every=10)


def likelihood(model, batch):
    return model(*batch)


def outlier(now, batch):
    """One batch with a target in another unit."""
    return (batch[0], torch.cat([50 + batch[1][:1], batch[1][1:]])) if now == 30 else batch


def percent(generator):
    """The same numbers, their inputs told in hundredths."""
    x, y = friedman(generator)
    return 100 * x, y


def smoothed(model, batch):
    """Cross-entropy with mixed up inputs and smoothed labels."""
    x, y = batch
    mixed = 0.8 * x + 0.2 * x.flip(0)
    out = model(mixed)
    return 0.8 * F.cross_entropy(out, y, label_smoothing=0.1) + 0.2 * F.cross_entropy(out, y.flip(0), label_smoothing=0.1)


def small(name):
    """A tiny language model of the library that neither zoo uses."""
    import transformers as t

    sizes = {"vocab_size": BYTES, "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": LENGTH}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if name == "olmo":
        return t.OlmoForCausalLM(t.OlmoConfig(**sizes, intermediate_size=96, **ends)).train()
    if name == "starcoder":
        return t.Starcoder2ForCausalLM(t.Starcoder2Config(**sizes, num_key_value_heads=2, intermediate_size=96, **ends)).train()
    return t.GPTNeoForCausalLM(t.GPTNeoConfig(**{**sizes, "num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]], "window_size": 8}, **ends)).train()


def tied_weight_norm():
    """An MLP with weight norm, as parametrisations do it."""
    model = stack(13, 40, 40, 3)
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.utils.parametrizations.weight_norm(layer)
    return model


SICK = {
    "series-small-tanh": Case(
        "vanishing-gradient", r".", Setup(_T(Plain, 10, act=nn.Tanh, init=gaussian(0.03)), ahead, square, lr=0.02, steps=120, every=10, **_mom),
        proof.gradient("layers.0", "layers.9", below=1e-3), "residual|gain|xavier|kaiming|initialis", {"model": _T(Plain, 10, act=nn.Tanh, skip=True)}, ("signal-collapse",),
    ),
    "gmlp-without-norms": Case(
        "signal-explosion", r"narrow", _gmlp.but(model=_T(GMLP, WORDS, 8, norm=False, gain=2.5), steps=150),
        proof.signal("narrow.0", "narrow.7", above=1e2), "[Nn]ormali", {"model": _T(GMLP, WORDS, 8, gain=2.5)}, ("exploding-gradient",),
    ),
    "graph-hard": Case(
        "attention-entropy-collapse", r".", _graph.but(model=_T(GraphAttention, hard=150.0)),
        proof.one_hot("query.1", "key.1", below=0.1, heads=1, causal=False, times=150.0), "QK norm|scale|temperature", {"model": GraphAttention}, ("attention-logit-growth",),
    ),
    "graph-detached": Case(
        "blocked-gradient", r"out\.0|value\.0", _graph.but(model=_T(GraphAttention, 1, cut=0)),
        proof.no_gradient("out.0", "out.0"), "detach", {"model": _T(GraphAttention, 1)},
    ),
    "density-by-hand": Case(
        "nonfinite", r"loss|head|^$", Setup(_T(MixtureDensity, naive=True), friedman, likelihood, steps=80, every=10, corrupt=outlier),
        norm_broke(30), "log|epsilon|clamp", {"model": MixtureDensity}, since=30,
    ),
    "towers-forgotten": Case(
        "frozen-parameter", r"thing", _likes.but(parameters=without("thing")), proof.unmoved("thing"), "optimizer", {"parameters": None},
    ),
    "towers-slow": Case(
        "update-too-small", r".", _likes.but(optimizer=SGD, lr=1e-6, steps=80, every=10), proof.moved(below=1e-5), "[Rr]aise", rate_said,
    ),
    "perceiver-fast": Case(
        "update-too-large", r".", _look.but(lr=0.3, optimizer=AdamW), proof.blown(above=3), "learning rate", rate_said,
        ("attention-logit-growth", "attention-entropy-collapse", "dead-units", "rank-collapse", "vanishing-gradient", "signal-explosion"),
    ),
    "density-percent": Case(
        "saturated-activation", r"body\.[01]$", Setup(_T(MixtureDensity, act=nn.Tanh), percent, likelihood, lr=3e-3, steps=200, every=25),
        proof.at_ends("body.1", low=-0.97, high=0.97, above=0.5), "smaller|xavier|[Nn]ormalis", {"data": friedman},
    ),
    "forecaster-dead": Case(
        "dead-units", r"blocks\.[0-4]\.1", _series.but(model=lambda: functools.reduce(lambda m, i: shifted(m, f"blocks.{i}.0.bias", -8.0), range(5), Forecaster())),
        proof.dead("blocks.2.1", above=0.4), "bias", {"model": Forecaster},
    ),
    "forecaster-loud": Case(
        "dominant-branch", r"blocks\.3", _series.but(model=lambda: multiplied(Forecaster(depth=6), ("blocks.3.4",), 100.0), lr=1e-4),
        ratio("blocks.3", "blocks.3", above=4), "scale|initialis", {"model": _T(Forecaster, depth=6)},
    ),
    "perceiver-large-eps": Case(
        "below-epsilon", r".", _look.but(optimizer=AdamW, options={"eps": 1.0}), proof.tiny_gradient(1.0), "eps", eps_said,
    ),
    "gmlp-half-loss": Case(
        "gradient-underflow", r".", _gmlp.but(factor=1e-6, autocast=torch.float16, precision="16-mixed", clip=None),
        proof.underflowed("narrow", above=0.5), "GradScaler", scale_said, ("below-epsilon",),
    ),
    "density-outlier": Case(
        "gradient-spike", r".", Setup(MixtureDensity, friedman, likelihood, lr=0.01, optimizer=SGD, steps=120, every=10, corrupt=outlier),
        proof.spiked(30, above=20), "[Cc]lip", clip_said, since=30,
    ),
}  # fmt: skip

HEALTHY = {
    "gmlp": _gmlp,
    "graph-attention": _graph,
    "flowing": Setup(Flowing, moons, lr=5e-3, steps=200, every=25),
    "mixture-density": Setup(MixtureDensity, friedman, likelihood, lr=3e-3, steps=200, every=10),
    "towers": _likes,
    "perceiver": _look.but(every=25, **_adamw),
    "forecaster": _series,
    "series-residual": Setup(_T(Plain, 6, act=nn.ReLU, skip=True), ahead, square, lr=2e-3, steps=150, every=10),
    "olmo-bf16": Setup(_T(small, "olmo"), source, lr=2e-3, steps=120, every=10, autocast=torch.bfloat16, precision="bf16-mixed", **_adamw),
    "starcoder": Setup(_T(small, "starcoder"), source, lr=2e-3, steps=150, every=50, rate=lambda s: 0.5 * (1 + math.cos(math.pi * s / 151)), **_adamw),
    "gpt-neo": Setup(_T(small, "neo"), source, lr=1e-3, steps=100, every=5, accumulate=2),
    "mixed-up": Setup(lambda: nn.Sequential(nn.Flatten(), stack(768, 96, 96, 10)), digits16, smoothed, lr=0.05, steps=200, every=25, **_mom),
    "weight-norm": Setup(tied_weight_norm, table, lr=3e-3, steps=150, every=10, optimizer=torch.optim.RMSprop),
}  # fmt: skip
