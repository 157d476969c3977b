"""Healthy runs of other kinds of models, losses, lengths and optimizers than the traps of `zoo.healthy`."""

from __future__ import annotations

import functools

import torch
from torch import nn

from zoo.composed import VAE, Averaged, Policy, WithPooler
from zoo.convolutions import ConvNet, ResNet, Squeeze, UNet, stack_of_convolutions
from zoo.data import hidden, pictures, text, vectors
from zoo.dense import Sine, mlp
from zoo.disturbances import at_steps
from zoo.library import library
from zoo.losses import actor_critic, denoise, elbo, seq2seq, signs, sine
from zoo.residual import Checkpointed, GraphNet, ResidualNet
from zoo.sequence import Recurrent, TextEncoder, WaveNet, transformer
from zoo.surgery import he
from zoo.training import Setup, pretrained

SGD, AdamW = torch.optim.SGD, torch.optim.AdamW
_T = functools.partial
_stack = _T(mlp, width=64, inputs=16, classes=4)
_cells = _T(ResidualNet, inputs=16, classes=4, act=torch.relu)
_large = _T(pictures, size=16)
_mom = {"optimizer": SGD, "options": {"momentum": 0.9}}


def _same(_generator):
    """One batch, over and over."""
    return vectors(torch.Generator().manual_seed(1))


def _random_labels(generator):
    return vectors(generator)[0], torch.randint(4, (64,), generator=generator)


def _bf16(generator):
    x, y = vectors(generator)
    return x.bfloat16(), y


def _frozen_but_head():
    model = _cells(4).requires_grad_(False)
    model.last.requires_grad_(True)
    model.outlet.requires_grad_(True)
    return model


def _pooled_convolutions():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10)
    )


KINDS = {
    "mlp-overfit": Setup(_T(_stack, 3), _same, steps=300, lr=3e-3),
    "mlp-8-default": Setup(_T(_stack, 8), vectors, steps=120),
    "mlp-6-default-sgd": Setup(_T(_stack, 6), vectors, lr=0.1, steps=300, **_mom),
    "mlp-10-he": Setup(_T(_stack, 10, init=he), vectors, steps=120),
    "mlp-leaky": Setup(_T(_stack, 6, nn.LeakyReLU, init=he), vectors, steps=120),
    "mlp-selu": Setup(_T(_stack, 8, nn.SELU, init=_T(nn.init.kaiming_normal_, nonlinearity="linear")), vectors, steps=120),
    "mlp-sigmoid-3": Setup(_T(_stack, 3, nn.Sigmoid), vectors, lr=1e-2, steps=120),
    "mlp-sine": Setup(_T(_stack, 4, Sine, init=nn.init.xavier_normal_), vectors, steps=120),
    "large-inputs": Setup(_T(_stack, 4), _T(vectors, scale=50.0), steps=300),
    "long": Setup(_T(_stack, 4), vectors, steps=2000, every=100, lr=3e-3),
    "regression-sine": Setup(_T(_stack, 4, classes=1), vectors, loss=sine, lr=3e-3, steps=200),
    "autoencoder-signs": Setup(lambda: _stack(3, nn.Tanh, classes=16).append(nn.Sigmoid()), vectors, loss=signs, lr=3e-3, steps=200),
    "vae": Setup(VAE, vectors, loss=elbo, steps=120),
    "policy": Setup(Policy, vectors, loss=actor_critic, steps=120),
    "cnn-pooled": Setup(_pooled_convolutions, pictures, steps=120),
    "cnn-8-he": Setup(lambda: stack_of_convolutions(8, init=he), pictures, steps=120),
    "cnn-batchnorm-16": Setup(lambda: stack_of_convolutions(16, norm=True), pictures, steps=60),
    "resnet-pre-activation": Setup(lambda: ResNet(pre=True), pictures, steps=120),
    "squeeze-excite": Setup(lambda: ConvNet(Squeeze(), Squeeze(), Squeeze()), pictures, steps=120),
    "unet": Setup(UNet, _large, loss=denoise, steps=60),
    "residual-zero-last-sgd": Setup(_T(_cells, 8, zero=True), vectors, optimizer=SGD, lr=0.05, steps=120),
    "residual-gate-1e-5": Setup(_T(_cells, 8, gate=1e-5), vectors, steps=120),
    "rezero-slow": Setup(_T(_cells, 8, gate=0.0, norm=False), vectors, steps=1100, every=50, lr=0.01, optimizer=SGD),
    "layer-scale-slow": Setup(_T(_cells, 8, gate=1e-6), vectors, steps=1100, every=50, lr=1e-4),
    "frozen-backbone": Setup(_frozen_but_head, vectors, steps=120),
    "fine-tuning": Setup(lambda: pretrained(_cells(6), vectors), vectors, lr=1e-5, steps=150),
    "averaged-copy": Setup(Averaged, vectors, parameters=lambda m: list(m.net.parameters()), steps=120),
    "checkpointed": Setup(_T(Checkpointed, 6, inputs=16, classes=4, act=torch.relu), vectors, steps=120),
    "random-labels": Setup(_T(_cells, 6), _random_labels, steps=120),
    "batch-of-one": Setup(_T(_cells, 4), _T(vectors, batch=1), steps=120),
    "noisy": Setup(_T(_cells, 4), _T(vectors, batch=2), steps=1000, every=25, lr=1e-2, **_mom),
    "fast-but-fine": Setup(_T(_cells, 6), vectors, lr=1e-2, steps=120),
    "bf16-weights": Setup(lambda: _cells(6).bfloat16(), _bf16, lr=3e-3, steps=120),
    "clipped-spike": Setup(_T(_cells, 6), vectors, factor=at_steps({60}, 300.0), every=10, optimizer=SGD, clip=1.0, steps=120),
    "graph": Setup(GraphNet, vectors, steps=120),
    "clipped-spike-adam": Setup(_T(transformer, 3), text, factor=at_steps({80}, 300.0), every=10, clip=1.0, steps=120),
    "warm-up-to-the-end": Setup(_T(transformer, 4), text, warmup=100, steps=120),
    "post-norm-12": Setup(_T(transformer, 12, norm="post"), text, lr=3e-4, warmup=50, steps=150),
    "post-norm-8-slow": Setup(_T(transformer, 8, norm="post"), text, lr=1e-4, steps=150),
    "shallow-without-norm": Setup(_T(transformer, 2, norm="none"), text, lr=5e-4, steps=120),
    "strong-decay": Setup(_T(transformer, 4), text, optimizer=AdamW, lr=2e-3, options={"weight_decay": 0.5}, steps=120),
    "one-step": Setup(_T(transformer, 6, norm="post"), text, steps=0),
    "text-encoder": Setup(_T(TextEncoder, dropout=0.1), text, warmup=30, steps=120),
    "text-encoder-pre": Setup(_T(TextEncoder, dropout=0.1, norm_first=True), text, steps=120),
    "wavenet": Setup(WaveNet, text, steps=120),
    "lstm": Setup(lambda: Recurrent(nn.LSTM), text, steps=120),
    "unused-pooler": Setup(WithPooler, text, steps=120),
    "t5": Setup(_T(library, "t5"), text, loss=seq2seq, steps=60),
    "distilbert": Setup(_T(library, "distilbert"), hidden),
    "opt": Setup(_T(library, "opt"), text, steps=120),
    "library-resnet": Setup(_T(library, "resnet"), _large, steps=60),
    "library-convnext": Setup(_T(library, "convnext"), _large, steps=60),
    "swin": Setup(_T(library, "swin"), _large, steps=60),
}  # fmt: skip
