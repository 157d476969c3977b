"""Sick runs of the outside zoo whose trouble lies in depth, in a branch or in numbers."""

from __future__ import annotations

import functools

import torch
from torch import nn

from zoo import proofs as proof
from zoo.case import Case, clip_said, eps_said, scale_said
from zoo.disturbances import after_step, at_steps
from zoo.losses import elbo, square
from zoo.outside import proofs as more
from zoo.outside.data import (
    WORDS,
    clouds,
    copies,
    digits16,
    friedman,
    gaps,
    moons,
    noisy,
    patches,
    pixels,
    source,
    table,
    twins,
    waves,
    words,
)
from zoo.outside.models import hub
from zoo.outside.pictures import ConvAutoencoder, ConvMixer, ResUNet, Wave, WideResNet, siren, vgg
from zoo.outside.sequences import IRNN, TCN, Decoder, LSTMModel, Padded, PatchTransformer
from zoo.outside.vectors import Denoiser, Experts, Normed, PointNet, ResMLP, Siamese, contrast, diffusion, stack
from zoo.surgery import After, after, detached, gaussian, he, multiplied
from zoo.training import Setup

SGD, AdamW = torch.optim.SGD, torch.optim.AdamW
_T = functools.partial
_mom = {"optimizer": SGD, "options": {"momentum": 0.9}}
_half = {"autocast": torch.float16, "precision": "16-mixed"}
_adamw = {"optimizer": AdamW, "options": {"weight_decay": 0.05}, "warmup": 10, "clip": 1.0}
_waves = Setup(TCN, waves, square, steps=120, every=15)
_cancer = _T(table, name="breast_cancer")
_bytes = Setup(Decoder, source, lr=2e-3, **_adamw)
_photo = Setup(ResUNet, noisy, square, every=10)
_blur = Setup(Denoiser, moons, diffusion, steps=200, every=25)
_friedman = Setup(_T(ResMLP, 10, classes=1), friedman, square)


def _channel(model, value=4000.0):
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 5] += value
    return model


def _bias(model, value=20000.0):
    with torch.no_grad():
        model.start.bias[3] += value
    return model


def _closed(model, path):
    """A last layer that is zero and, by mistake, not trained."""
    layer = model.get_submodule(path).requires_grad_(False)
    nn.init.zeros_(layer.weight)
    return model


def _faint(model):
    """Every block's output multiplied by a constant that is far too small."""
    for block in model.blocks:
        block.append(After(nn.Identity(), lambda y: 1e-7 * y))
    return model


def _detached_attention():
    model = hub("qwen3", num_hidden_layers=2)
    return after(after(model, "model.layers.0.self_attn", detached), "model.layers.1.self_attn", detached)


def _all_alike(now, batch):
    return (batch[0][:1].expand_as(batch[0]), batch[1]) if now == 37 else batch


def _padded(generator):
    """Symbols to be repeated in place, the last few of each sequence padding."""
    x, _ = copies(generator)
    x = torch.where(torch.arange(x.shape[1]) < torch.randint(4, 16, (len(x), 1), generator=generator), x, 0)
    return x, torch.where(x == 0, -100, x)


def _empty(now, batch):
    """At one step a sequence of padding alone slips in."""
    return (torch.cat([torch.zeros_like(batch[0][:1]), batch[0][1:]]), batch[1]) if now == 40 else batch


def own_softmax(model, batch):
    """Cross-entropy by hand: the log of a probability that may have rounded to zero."""
    p = model(batch[0]).softmax(-1)
    return -p.gather(1, batch[1][:, None]).log().mean()


_deep_soft = _T(stack, 13, *[32] * 12, 3, act=nn.Softsign)
_plain = _T(stack, 30, *[64] * 9, 2, act=nn.GELU)
_coords = _T(stack, 2, *[64] * 9, 3, act=_T(Wave, 1.0))

DEPTH = {
    "tcn-sigmoid": Case(
        "vanishing-gradient", r"layers|inlet|acts", _waves.but(model=_T(TCN, 10, act=nn.Sigmoid, skip=False)),
        proof.gradient("layers.0", "layers.9", below=1e-3), "ReLU|residual", {"model": _T(TCN, 10, skip=False, init=he)},
    ),
    "softsign-stack": Case(
        "vanishing-gradient", r".", Setup(_T(_deep_soft, init=gaussian(0.05)), table, lr=0.05, steps=150, every=25, **_mom),
        proof.gradient("0", "22", below=1e-3), "residual|gain|xavier|kaiming", {"model": _T(_deep_soft, init=nn.init.xavier_normal_)}, ("signal-collapse",),
    ),
    "vgg-batchnorm-45": Case(
        "exploding-gradient", r".", Setup(_T(vgg, 45), digits16, lr=3e-4, steps=40, every=10),
        proof.gradient("0", "1.44", above=100, initial=True), "residual", {"model": _T(vgg, 45, residual=True)},
    ),
    "irnn-large": Case(
        "exploding-gradient", r".", _waves.but(model=_T(IRNN, size=1.4), lr=1e-4, steps=60, every=10),
        more.through_time("again", above=100), "clip|initialis|orthogonal|identity|scale|gain|smaller", {"model": IRNN}, ("signal-explosion", "update-too-large"),
    ),
    "restart-too-high": Case(
        "exploding-gradient", r".", Setup(_T(stack, 10, 48, 48, 48, 1, init=he), friedman, square, optimizer=SGD, lr=0.03, steps=120, every=3, rate=after_step(90, 20.0)),
        proof.outgrown(90, above=100), "learning rate", {"rate": None}, ("nonfinite", "update-too-large"), since=90,
    ),
    "wide-resnet-no-norm": Case(
        "signal-explosion", r"blocks", Setup(_T(WideResNet, blocks=8, norm=False, init=he, widths=(16, 16)), digits16, lr=1e-5, steps=60, every=10),
        proof.signal("blocks.0", "blocks.15", above=1e2), "[Nn]ormali", {"model": _T(WideResNet, blocks=8, init=he, widths=(16, 16))}, ("exploding-gradient",),
    ),
    "decoder-no-norm": Case(
        "signal-explosion", r"feed|attend", _bytes.but(model=_T(Decoder, 6, norm=False, init=nn.init.xavier_normal_), lr=1e-4, steps=60, every=10),
        proof.signal("feed.0", "feed.5", above=1e2), "[Nn]ormali", {"model": _T(Decoder, 6, init=nn.init.xavier_normal_)}, ("exploding-gradient",),
    ),
    "tables-no-norm": Case(
        "signal-explosion", r"blocks", Setup(_T(ResMLP, depth=14, norm=False, init=he), _cancer, lr=3e-5, steps=80),
        proof.signal("blocks.0", "blocks.13", above=1e2), "[Nn]ormali", {"model": _T(ResMLP, depth=14, init=he)}, ("exploding-gradient",),
    ),
    "sines-small": Case(
        "signal-collapse", r".", Setup(_T(_coords, init=gaussian(0.05)), pixels, square, optimizer=SGD, lr=1e-3, steps=150, every=25),
        proof.signal("0", "16", below=1e-2), "gain|kaiming|xavier|initialis", {"model": _T(siren, 9)}, ("vanishing-gradient",),
    ),
    "tables-bert-init": Case(
        "signal-collapse", r".", Setup(_T(_plain, init=gaussian(0.02)), _cancer, lr=0.02, steps=100, every=10, **_mom),
        proof.signal("0", "16", below=1e-2), "gain|kaiming|initialis", {"model": _T(_plain, init=he)}, ("vanishing-gradient",),
    ),
    "decoder-no-skips": Case(
        "rank-collapse", r"attend|feed", _bytes.but(model=_T(Decoder, 10, skip=False, vocabulary=WORDS), data=words, lr=1e-3),
        proof.alike("attend.9", above=0.99), "residual", {"model": _T(Decoder, 10, vocabulary=WORDS)}, ("vanishing-gradient",),
    ),
    "patches-no-skips": Case(
        "rank-collapse", r"attend|norms|up|down", Setup(_T(PatchTransformer, 8, skip=False), patches, steps=120, every=10),
        proof.alike("attend.7", above=0.99), "residual", {"model": _T(PatchTransformer, 8)}, ("vanishing-gradient",),
    ),
}  # fmt: skip

BRANCHES = {
    "convmixer-faint": Case(
        "silent-branch", r"spatial", Setup(_T(ConvMixer, 5, scales=[1e-6] * 5), digits16, lr=3e-3, steps=120, every=10),
        more.ratio("spatial.2", "spatial.2", times=1e-6, below=1e-3), "last layer|factor|gain|scale", {"model": _T(ConvMixer, 5)},
    ),
    "qwen2-closed": Case(
        "silent-branch", r"layers\.1\.self_attn", Setup(lambda: _closed(hub("qwen2"), "model.layers.1.self_attn.o_proj"), source, lr=2e-3, **_adamw),
        proof.branch("model.layers.1", part="model.layers.1.self_attn", below=1e-6), ".", {"model": _T(hub, "qwen2")}, ("blocked-gradient", "frozen-parameter"),
    ),
    "denoiser-faint": Case(
        "silent-branch", r"blocks", _blur.but(model=lambda: _faint(Denoiser())),
        proof.branch("blocks.2", part="blocks.2", below=1e-3), "last layer|factor|gain|scale", {"model": Denoiser},
    ),
    "decoder-loud-feed": Case(
        "dominant-branch", r"feed\.2", _bytes.but(model=lambda: multiplied(Decoder(), ("feed.2.down",), 60.0), every=10),
        more.ratio("feed.2", "norms.5", above=4), "scale|initialis", {"model": Decoder},
    ),
    "phi-loud-mlp": Case(
        "dominant-branch", r"layers\.2\.mlp", Setup(lambda: multiplied(hub("phi"), ("layers.2.mlp.fc2",), 400.0), source, steps=120, every=25),
        proof.branch("model.layers.2", part="model.layers.2.mlp", above=4), "scale|initialis", {"model": _T(hub, "phi")},
    ),
    "wide-block-loud": Case(
        "dominant-branch", r"blocks\.1", Setup(lambda: multiplied(WideResNet(), ("blocks.1.conv2",), 60.0), digits16, lr=0.02, steps=120, every=10, **_mom),
        proof.branch("blocks.1", above=4), "scale|initialis", {"model": WideResNet},
    ),
    "loud-embedding": Case(
        "inert-depth", r"layers", Setup(lambda: multiplied(hub("mistral"), ("embed_tokens",), 4000.0), source, lr=3e-5, steps=400, every=50, optimizer=AdamW),
        proof.kept([f"model.layers.{i}" for i in range(4)], above=0.9995), "scale|larger|[Nn]ormal", {"model": _T(hub, "mistral")},
    ),
    "tables-faint-blocks": Case(
        "inert-depth", r"blocks", _friedman.but(model=_T(ResMLP, 10, 10, classes=1, factor=0.003), lr=3e-4, steps=400, every=40),
        more.ratio("blocks.7", "blocks.7", times=0.003, below=0.03), "scale|larger", {"model": _T(ResMLP, 10, 10, classes=1)},
    ),
    "unet-no-graph": Case(
        "blocked-gradient", r"middle|down", _photo.but(model=_T(ResUNet, frozen=True), data=_T(noisy, size=32, noise=1.0), lr=3e-3, steps=150, every=25),
        proof.no_gradient("middle.", "middle"), "detach|no_grad", {"model": ResUNet},
    ),
    "points-through-numpy": Case(
        "blocked-gradient", r"local", Setup(_T(PointNet, lossy=True), clouds, steps=150, every=25),
        proof.no_gradient("local.", "local"), "detach|no_grad", {"model": PointNet},
    ),
    "qwen3-detached": Case(
        "blocked-gradient", r"layers\.[01]\.self_attn", Setup(_detached_attention, source, lr=2e-3, steps=300, every=25, **_adamw),
        proof.no_gradient("model.layers.0.self_attn.", "model.layers.0.self_attn"), "detach", {"model": _T(hub, "qwen3", num_hidden_layers=2)},
    ),
    "mistral-massive": Case(
        "massive-activation", r".", Setup(lambda: _channel(hub("mistral")), source, lr=3e-4, **_adamw),
        proof.massive("model.layers.1", above=1000), twin="outside/mistral",
    ),
    "tables-massive": Case(
        "massive-activation", r".", Setup(lambda: _bias(ResMLP()), _cancer),
        more.massive_input("blocks.2", above=1000),
    ),
}  # fmt: skip

NUMBERS = {
    "unit-error": Case(
        "gradient-spike", r".", Setup(Experts, friedman, square, lr=0.01, steps=150, every=10, corrupt=lambda s, b: (b[0], 100 * b[1]) if s == 90 else b, **_mom),
        proof.spiked(90, above=20), "[Cc]lip", clip_said, since=90,
    ),
    "bad-weight": Case(
        "gradient-spike", r".", Setup(LSTMModel, words, optimizer=SGD, lr=0.5, steps=200, every=20, factor=at_steps({100}, 300.0)),
        proof.spiked(100, above=20), "[Cc]lip", clip_said, since=100,
    ),
    "spread-of-alike": Case(
        "nonfinite", r"first|second", Setup(_T(Normed, 0.0), table, steps=80, every=10, corrupt=_all_alike),
        more.norm_broke(37), "epsilon|clamp", {"model": _T(Normed, 1e-3)}, since=40,
    ),
    "own-softmax": Case(
        "nonfinite", r"loss", Setup(_T(stack, 13, 32, 32, 3), _T(table, raw=True), own_softmax, steps=10, every=5),
        proof.broke(0), "epsilon|clamp|log_softmax|cross_entropy", {"loss": lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1])},
    ),
    "all-padding": Case(
        "nonfinite", r"attend|norms", Setup(_T(Padded, 3, vocabulary=16), _padded, steps=80, every=10, corrupt=_empty),
        more.norm_broke(40), "mask|epsilon|clamp", {"model": _T(Padded, 3, vocabulary=16, own=True)}, since=40,
    ),
    "half-overflow": Case(
        "nonfinite", r"^1\.", Setup(_T(vgg, 8, norm=False, init=gaussian(0.7)), digits16, lr=1e-5, steps=10, every=5, **_half),
        proof.broke(0), "bf16|bfloat16|epsilon|clamp|float32", {"autocast": torch.bfloat16, "precision": "bf16-mixed"},
        ("signal-explosion", "exploding-gradient"),
    ),
    "pair-with-itself": Case(
        "nonfinite", r"body|loss", Setup(_T(Siamese, eps=0.0), twins, contrast, steps=60, every=5, seed=3),
        more.norm_broke(10), "epsilon|clamp", {"model": Siamese}, since=10,
    ),
    "vae-tiny-loss": Case(
        "below-epsilon", r".", Setup(_T(ConvAutoencoder, noise=True), patches, elbo, factor=1e-9, every=25, steps=150),
        proof.tiny_gradient(1e-8), "eps", eps_said,
    ),
    "gemma-large-eps": Case(
        "below-epsilon", r".", Setup(_T(hub, "gemma"), source, lr=2e-3, optimizer=AdamW, options={"eps": 0.1}, steps=120, every=10),
        proof.tiny_gradient(0.1), "eps", eps_said,
    ),
    "electra-half-loss": Case(
        "gradient-underflow", r".", Setup(_T(hub, "electra"), gaps, factor=1e-5, steps=80, every=10, **_half),
        proof.underflowed("layer", above=0.5), "GradScaler", scale_said,
    ),
    "tables-half-loss": Case(
        "gradient-underflow", r".", _friedman.but(factor=1e-6, every=10, **_half),
        proof.underflowed("blocks", above=0.5), "GradScaler", scale_said,
    ),
}  # fmt: skip
