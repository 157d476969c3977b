"""Healthy runs of the outside zoo: ordinary trainings as people do them."""

from __future__ import annotations

import functools
import math
import warnings

import torch
import torch.nn.functional as F
from torch import nn

from zoo.losses import elbo, own, reconstruction, seq2seq, square
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
    walks,
    waves,
    words,
)
from zoo.outside.models import hub
from zoo.outside.pictures import ConvAutoencoder, ConvMixer, DenseNet, ResUNet, WideResNet, mobile, siren
from zoo.outside.sequences import IRNN, TCN, Attending, Decoder, LSTMModel, Padded, PatchTransformer
from zoo.outside.sick_flow import _padded
from zoo.outside.sick_training import repeat
from zoo.outside.vectors import (
    DQN,
    GAN,
    Both,
    Denoiser,
    Experts,
    Flow,
    Highway,
    PointNet,
    ResMLP,
    Siamese,
    adversarial,
    bellman,
    contrast,
    diffusion,
    stack,
)
from zoo.training import Setup

SGD, AdamW = torch.optim.SGD, torch.optim.AdamW
_T = functools.partial
_mom = {"optimizer": SGD, "options": {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}}
_adamw = {"optimizer": AdamW, "options": {"weight_decay": 0.1, "betas": (0.9, 0.95)}, "warmup": 20, "clip": 1.0}


def cosine(steps):
    return lambda step: 0.1 + 0.45 * (1 + math.cos(math.pi * min(step, steps) / steps))


def masked(model, batch):
    """A masked autoencoder's own loss, the patches it hides drawn anew."""
    return model(pixel_values=batch[0]).loss


def speech(model, batch):
    """Whisper's loss of symbols told by the shape of their sound."""
    sound = F.one_hot(batch[0], 16).float().unflatten(2, (8, 2)).sum(-1).repeat_interleave(4, 1).transpose(1, 2)
    return model(input_features=sound + 0.1 * torch.randn_like(sound), labels=batch[1]).loss


def hinge(model, batch):
    return F.multi_margin_loss(model(batch[0]), batch[1])


def info_nce(model, batch):
    """Two noisy views of each digit, told apart from those of all others (SimCLR)."""
    x = batch[0].mean(1).flatten(1)
    a, b = (F.normalize(model(x + 0.1 * torch.randn_like(x)), dim=-1) for _ in range(2))
    return F.cross_entropy(a @ b.T / 0.2, torch.arange(len(x)))


def _generator_and_critic(model):
    return [{"params": model.generator.parameters()}, {"params": model.critic.parameters()}]


def _low_rank():
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # peft asks by the old name
        return get_peft_model(hub("qwen2"), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1))


def _probe():
    model = hub("dinov2").requires_grad_(False)
    model.classifier.requires_grad_(True)
    return model


HEALTHY = {
    "mistral": Setup(_T(hub, "mistral"), source, lr=2e-3, steps=200, every=10, rate=cosine(200), **_adamw),
    "qwen3-bf16": Setup(_T(hub, "qwen3"), source, lr=3e-3, steps=150, every=25, autocast=torch.bfloat16, precision="bf16-mixed", **_adamw),
    "gemma": Setup(_T(hub, "gemma", vocab_size=WORDS), words, lr=1e-3, steps=120, every=10, **_adamw),
    "bloom": Setup(_T(hub, "bloom"), words, lr=2e-3, steps=150, every=50, rate=cosine(150), **_adamw),
    "phi": Setup(_T(hub, "phi"), source, lr=1e-3, steps=100, every=1, accumulate=2),
    "falcon": Setup(_T(hub, "falcon"), source, lr=1e-3, steps=120, every=10),
    "gptj": Setup(_T(hub, "gptj"), source, lr=3e-3, steps=120, every=25, **_adamw),
    "electra": Setup(_T(hub, "electra"), gaps, lr=1e-3, steps=200, every=25, **_adamw),
    "albert": Setup(_T(hub, "albert"), gaps, lr=1e-3, steps=150, every=10, **_adamw),
    "mpnet": Setup(_T(hub, "mpnet"), gaps, lr=5e-4, steps=150, every=50, warmup=30),
    "deberta": Setup(_T(hub, "deberta"), gaps, lr=1e-3, steps=120, every=10, **_adamw),
    "fnet": Setup(_T(hub, "fnet"), gaps, lr=1e-3, steps=150, every=25),
    "bart-repeats": Setup(_T(hub, "bart"), repeat, seq2seq, lr=1e-3, steps=300, every=25, **_adamw),
    "whisper": Setup(_T(hub, "whisper"), repeat, speech, lr=1e-3, steps=200, every=10, **_adamw),
    "masked-autoencoder": Setup(_T(hub, "mae"), patches, masked, lr=1e-3, steps=150, every=25, **_adamw),
    "beit": Setup(_T(hub, "beit"), digits16, lr=1e-3, steps=120, every=10, **_adamw),
    "dinov2-probe": Setup(_probe, digits16, lr=1e-2, steps=150, every=25),
    "mobilenet-v2": Setup(_T(hub, "mobilenet"), digits16, lr=1e-3, steps=150, every=25),
    "convnext-v2": Setup(_T(hub, "convnext2"), digits16, lr=2e-3, steps=120, every=10, **_adamw),
    "regnet": Setup(_T(hub, "regnet"), digits16, lr=0.05, steps=100, every=25, rate=cosine(100), **_mom),
    "poolformer": Setup(_T(hub, "poolformer"), digits16, lr=2e-3, steps=120, every=10, **_adamw),
    "segformer": Setup(_T(hub, "segformer"), digits16, lr=1e-3, steps=120, every=25, **_adamw),
    "unet-denoises": Setup(ResUNet, noisy, square, lr=2e-3, steps=200, every=10),
    "autoencoder": Setup(ConvAutoencoder, patches, reconstruction, steps=300, every=50, lr=2e-3),
    "vae": Setup(_T(ConvAutoencoder, noise=True), patches, elbo, steps=150, every=10),
    "wide-resnet": Setup(_T(WideResNet, drop=0.2), digits16, lr=0.05, steps=200, every=25, rate=cosine(200), accumulate=2, **_mom),
    "densenet": Setup(DenseNet, digits16, lr=0.1, steps=120, every=10, **_mom),
    "mobile": Setup(mobile, digits16, lr=3e-3, steps=200, every=50, **_adamw),
    "convmixer": Setup(ConvMixer, digits16, lr=5e-3, steps=150, every=25, **_adamw),
    "siren": Setup(siren, pixels, square, lr=3e-4, steps=400, every=50),
    "coordinates-relu": Setup(_T(stack, 2, 64, 64, 64, 3), pixels, square, lr=1e-3, steps=200, every=10),
    "decoder": Setup(Decoder, source, lr=3e-3, steps=600, every=50, rate=cosine(600), **_adamw),
    "padded": Setup(_T(Padded, 3, vocabulary=16, own=True), _padded, lr=1e-3, steps=120, every=10),
    "patch-transformer": Setup(_T(PatchTransformer, 6), patches, lr=1e-3, steps=150, every=25, **_adamw),
    "tcn": Setup(_T(TCN, 8), waves, square, lr=2e-3, steps=200, every=25),
    "lstm-words": Setup(LSTMModel, words, optimizer=SGD, lr=2.0, steps=200, every=10, clip=0.25),
    "irnn": Setup(IRNN, waves, square, lr=3e-4, steps=150, every=25, clip=1.0),
    "gru-attention": Setup(Attending, copies, lr=3e-3, steps=300, every=50),
    "pointnet": Setup(PointNet, clouds, lr=1e-3, steps=150, every=10),
    "dqn": Setup(DQN, walks, bellman, lr=1e-3, steps=400, every=50),
    "siamese": Setup(Siamese, twins, contrast, lr=1e-3, steps=150, every=10),
    "simclr": Setup(_T(stack, 256, 64, 64, 32), digits16, info_nce, lr=1e-3, steps=150, every=25, options={"weight_decay": 1e-4}),
    "diffusion": Setup(Denoiser, moons, diffusion, lr=2e-3, steps=400, every=50, **_adamw),
    "experts": Setup(Experts, friedman, square, lr=3e-3, steps=200, every=10),
    "flow": Setup(Flow, moons, own, lr=2e-3, steps=250, every=25, clip=5.0),
    "highway": Setup(Highway, table, lr=0.05, steps=200, every=25, **_mom),
    "gan": Setup(GAN, moons, adversarial, lr=5e-4, optimizer=Both, options={"betas": (0.5, 0.99)}, parameters=_generator_and_critic, steps=300, every=25),
    "lora-qwen2": Setup(_low_rank, source, lr=5e-3, steps=150, every=10),
    "tables-residual": Setup(ResMLP, _T(table, name="breast_cancer"), lr=1e-3, steps=150, every=10, **_adamw),
    "logistic": Setup(_T(nn.Linear, 30, 2), _T(table, name="breast_cancer"), lr=0.05, optimizer=SGD, steps=50, every=1),
    "linear-regression": Setup(_T(nn.Linear, 10, 1), _T(table, name="diabetes"), square, lr=0.05, optimizer=SGD, steps=100, every=10),
    "hinge": Setup(_T(stack, 13, 24, 3), table, hinge, lr=0.1, optimizer=SGD, steps=100, every=5),
}  # fmt: skip
