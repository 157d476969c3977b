"""Data and a training loop for small real trainings under gradflow.Recorder."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import gradflow
from gradflow import schema
from gradflow.store import Run, load

V, T, B = 40, 16, 8
"""Vocabulary, tokens, sequences of the text task."""


# --- data -------------------------------------------------------------------------------------------------------------


@functools.cache
def _text() -> torch.Tensor:
    source = "".join(path.read_text() for path in sorted(Path(contextlib.__file__).parent.glob("c*.py"))[:12])
    letters = sorted(set(source), key=lambda c: -source.count(c))[: V - 1]
    return torch.tensor([letters.index(c) if c in letters else V - 1 for c in source])


def text(generator):
    """Characters of Python source: (batch, token) and the next ones."""
    start = torch.randint(len(_text()) - T - 1, (B,), generator=generator)
    rows = torch.stack([_text()[s : s + T + 1] for s in start])
    return rows[:, :-1], rows[:, 1:]


def vectors(generator, *, width=16, classes=4, batch=64, scale=1.0):
    """Noisy class prototypes as vectors."""
    prototypes = torch.randn(classes, width, generator=torch.Generator().manual_seed(9))
    y = torch.randint(classes, (batch,), generator=generator)
    return scale * (prototypes[y] + torch.randn(batch, width, generator=generator)), y


def images(generator, *, classes=4, batch=16, size=8):
    """Noisy class prototypes as images."""
    prototypes = torch.randn(classes, 3, size, size, generator=torch.Generator().manual_seed(9))
    y = torch.randint(classes, (batch,), generator=generator)
    return prototypes[y] + torch.randn(batch, 3, size, size, generator=generator), y


def classify(model, batch):
    out = model(batch[0])
    return F.cross_entropy(out.flatten(0, -2), batch[1].flatten())


# --- training ---------------------------------------------------------------------------------------------------------


def train(
    model, data, *, loss=classify, steps=120, lr=1e-3, optimizer=torch.optim.Adam, every=20, seed=0, warmup=0,
    accumulate=1, autocast=None, clip=None, before=None, parameters=None, info=None, **options,
) -> Run:  # fmt: skip
    """Train with the recorder attached and return what it stored."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(seed)
    used = list(model.parameters()) if parameters is None else parameters
    used = used if used and isinstance(used[0], dict) else [p for p in used if p.requires_grad]
    opt = optimizer(used, lr=lr, **options)
    with tempfile.TemporaryDirectory() as folder:
        recorder = gradflow.Recorder(model, opt, f"{folder}/run", every_n_steps=every, strict=True, info=info)
        for step in range(steps + 1):
            if before is not None:
                before(step, model, opt)
            if warmup:
                for group in opt.param_groups:
                    group["lr"] = lr * min(1.0, (step + 1) / warmup)
            with recorder.step():
                opt.zero_grad()
                for _ in range(accumulate):
                    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
                        value = loss(model, data(generator)) / accumulate
                    value.backward()
                if clip:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                opt.step()
        recorder.close()
        return _whole(load(recorder.dirpath))


def _whole(run: Run) -> Run:
    """The run with its tables read, so that its folder may go."""
    tables = {
        name: run.table(name).select([column.name for column in columns]) for name, columns in schema.TABLES.items()
    }
    return Run(run.meta, tables, run.problems)


def of_logits(model, batch):
    """Cross-entropy of a transformers model."""
    return F.cross_entropy(model(batch[0]).logits.flatten(0, -2), batch[1].flatten())


def masked(model, batch):
    """Masked-language loss: 15 % of the characters hidden (token V) and to be found."""
    x = batch[0].clone()
    hidden = torch.rand(x.shape, generator=torch.Generator().manual_seed(int(x.sum()))) < 0.15
    hidden[:, 0] = True
    x[hidden] = V
    return F.cross_entropy(model(x).logits[hidden], batch[0][hidden])


def denoise(model, batch):
    """Mean square error of predicting the noise that was added to an image."""
    noise = torch.randn(
        batch[0].shape, generator=torch.Generator().manual_seed(abs(int(1000 * batch[0].sum())) % 10000)
    )
    return F.mse_loss(model(batch[0] + noise), noise)


def regression(model, batch):
    """Mean square error of a smooth function of the first input."""
    return F.mse_loss(model(batch[0]), batch[0][:, :1].sin())


def spiky(model, batch):
    """Cross-entropy times what `spike_at` set for this step."""
    return getattr(model, "scale", 1.0) * classify(model, batch)


def spike_at(*steps):
    """A `before` that makes the loss 300 times as large at some steps."""

    def before(step, model, _):
        model.scale = 300.0 if step in steps else 1.0

    return before


def tick(step, model, _):
    """A `before` that tells the model which step it is."""
    model.now = step
