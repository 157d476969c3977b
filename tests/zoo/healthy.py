"""The healthy runs of the labelled zoo: the traps that fixed thresholds fall into."""

from __future__ import annotations

import functools

import torch
from torch import nn

from zoo.composed import Contrast, Routed, Student
from zoo.convolutions import ConvNet, Depthwise, ResNet, stack_of_convolutions
from zoo.data import digits, hidden, pictures, recall, rings, rows, text, waves
from zoo.dense import Plain, mlp
from zoo.healthy_kinds import KINDS
from zoo.library import library
from zoo.losses import distilled, own, reconstruction, square
from zoo.residual import MixerNet, ResidualNet
from zoo.sequence import Recurrent, RowEncoder, Unrolled, transformer
from zoo.surgery import he, low_rank
from zoo.training import Setup

SGD, AdamW = torch.optim.SGD, torch.optim.AdamW
_T = functools.partial
_mom = {"optimizer": SGD, "options": {"momentum": 0.9}}


def _bias_apart(model):
    """Decay for matrices alone, as usual."""
    return [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]


def _cosine(step):
    import math

    return 0.5 * (1 + math.cos(math.pi * min(step, 99) / 100))


HEALTHY = {
    **KINDS,
    "mlp-relu": Setup(lambda: mlp(4), digits),
    "mlp-he-momentum": Setup(lambda: mlp(5, init=he), digits, lr=0.03, **_mom),
    "mlp-tanh": Setup(lambda: mlp(4, nn.Tanh, init=nn.init.xavier_normal_), digits),
    "mlp-gelu-adamw": Setup(lambda: mlp(5, nn.GELU), digits, optimizer=AdamW, lr=2e-3),
    "mlp-batchnorm": Setup(lambda: mlp(6, norm=nn.BatchNorm1d), digits),
    "mlp-rings": Setup(lambda: mlp(3, inputs=2, classes=4), rings, lr=5e-3, steps=200),
    "regression": Setup(lambda: mlp(3, inputs=8, classes=1), waves, loss=square, lr=3e-3),
    "autoencoder-relu": Setup(lambda: nn.Sequential(*mlp(2, classes=8), *mlp(2, inputs=8, classes=64)), digits, loss=reconstruction, lr=3e-3),
    "cnn-plain": Setup(lambda: stack_of_convolutions(6, init=he), pictures, lr=2e-3),
    "cnn-batchnorm-10": Setup(lambda: stack_of_convolutions(10, norm=True), pictures, lr=2e-3),
    "resnet-momentum": Setup(ResNet, pictures, lr=0.05, **_mom),
    "resnet-adam-small-batch": Setup(lambda: ResNet(blocks=3), _T(pictures, batch=4)),
    "resnet-no-norm": Setup(lambda: ResNet(norm=False), pictures),
    "convnext-layerscale": Setup(lambda: ConvNet(*[Depthwise(16) for _ in range(6)]), pictures, lr=3e-3, optimizer=AdamW),
    "mixer": Setup(lambda: MixerNet(5), rows),
    "residual-deep": Setup(lambda: ResidualNet(16), digits),
    "residual-zero-last": Setup(lambda: ResidualNet(8, zero=True), digits),
    "residual-rezero": Setup(lambda: ResidualNet(10, gate=0.0, norm=False), digits, lr=2e-3),
    "residual-gate-tiny": Setup(lambda: ResidualNet(10, gate=1e-4), digits, optimizer=AdamW),
    "residual-drop-path": Setup(lambda: ResidualNet(8, drop=0.25), digits, every=10),
    "residual-post-norm": Setup(lambda: ResidualNet(8, post=True), digits),
    "residual-bf16": Setup(ResidualNet, digits, autocast=torch.bfloat16, precision="bf16-mixed"),
    "residual-fp16-scaled": Setup(ResidualNet, digits, autocast=torch.float16, precision="16-mixed", scaler=2.0**16),
    "residual-accumulated": Setup(ResidualNet, _T(digits, batch=12), accumulate=4, steps=60),
    "residual-batch-of-two": Setup(ResidualNet, _T(digits, batch=2), lr=3e-4),
    "residual-relu-unscaled-shallow": Setup(lambda: ResidualNet(3, norm=False, act=torch.relu), digits),
    "experts": Setup(Routed, rows),
    "distillation": Setup(Student, digits, loss=distilled),
    "simsiam": Setup(Contrast, digits, loss=own, lr=3e-4),
    "lora-vit": Setup(lambda: low_rank(library("vit"), ("q_proj", "v_proj", "query", "value", "fc1")), pictures, lr=3e-3),
    "lora-residual": Setup(lambda: low_rank(ResidualNet(6), ("fc1", "fc2")), digits, lr=3e-3),
    "pre-norm-14": Setup(lambda: transformer(14), text, steps=80),
    "post-norm-warmup": Setup(lambda: transformer(4, norm="post"), text, warmup=40, steps=160),
    "post-norm-10-warmup": Setup(lambda: transformer(10, norm="post"), text, lr=3e-4, warmup=60, steps=120),
    "pre-norm-untied-dropout": Setup(lambda: transformer(4, tie_weights=False, dropout=0.2), text),
    "pre-norm-long": Setup(lambda: transformer(3), _T(text, batch=2), steps=60),
    "pre-norm-clipped": Setup(lambda: transformer(4), text, clip=0.05, lr=3e-3),
    "pre-norm-adamw-cosine": Setup(lambda: transformer(4), text, optimizer=AdamW, lr=3e-3, parameters=_bias_apart, warmup=10, rate=_cosine),
    "encoder-post": Setup(lambda: RowEncoder(4, dropout=0.1), rows),
    "encoder-pre": Setup(lambda: RowEncoder(6, norm_first=True), rows),
    "gpt2": Setup(_T(library, "gpt2"), text),
    "gpt2-four-steps": Setup(_T(library, "gpt2"), text, steps=3, every=1),
    "bert": Setup(_T(library, "bert"), hidden),
    "roberta-warmup": Setup(_T(library, "roberta"), hidden, warmup=30, optimizer=AdamW),
    "llama": Setup(_T(library, "llama"), text, lr=3e-3),
    "neox-parallel": Setup(_T(library, "neox"), text),
    "mixtral": Setup(_T(library, "mixtral"), text, steps=60),
    "vit": Setup(_T(library, "vit"), pictures),
    "deit": Setup(_T(library, "deit"), pictures, steps=60),
    "mamba": Setup(_T(library, "mamba"), text, steps=40),
    "gru": Setup(lambda: Recurrent(nn.GRU), text, lr=3e-3),
    "lstm-two-layers": Setup(lambda: Recurrent(nn.LSTM, 2), text, lr=3e-3),
    "unrolled-gru": Setup(lambda: Unrolled(nn.GRUCell), recall, lr=3e-3, steps=80),
    "unrolled-rnn": Setup(lambda: Unrolled(nn.RNNCell), _T(recall, tokens=6), lr=3e-3, steps=80),
    "ten-steps": Setup(lambda: transformer(6, norm="post"), text, steps=9),
    "plain-loop-8": Setup(lambda: Plain(8), digits, lr=2e-3, steps=200),
}  # fmt: skip
