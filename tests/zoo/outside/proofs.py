"""Proofs in plain PyTorch that the first zoo had no need of."""

from __future__ import annotations

import torch

from zoo.proofs import Watch, _within, rms


def ratio(part, cell, *, times=1.0, below=None, above=None):
    """RMS of a module's output, `times` a factor, over that of another's input."""

    def proof(trained):
        watch = Watch(trained, [part, cell])
        return _within(times * rms(watch.outputs[part]) / rms(watch.inputs[cell]), below, above)

    return proof


def massive_input(path, *, above):
    """Largest over median absolute element of what enters a module."""

    def proof(trained):
        x = Watch(trained, [path]).inputs[path].abs()
        return _within((x.max() / x.median()).item(), None, above)

    return proof


def through_time(path, *, above):
    """RMS gradient at a repeated module's first output over that at its last, before training."""

    def proof(trained):
        told = []
        model = trained.initial
        handle = model.get_submodule(path).register_forward_hook(lambda m, a, out: (out.retain_grad(), told.append(out))[0])
        trained.loss(model, trained.batches[0]).backward()
        handle.remove()
        return _within(rms(told[0].grad) / rms(told[-1].grad), None, above)

    return proof


def norm_broke(step):
    """First step whose gradient or loss is not finite."""

    def proof(trained):
        bad = [i for i, pair in enumerate(zip(trained.losses, trained.norms, strict=True)) if not torch.tensor(pair).isfinite().all()]
        return (bad[0] if bad else -1), bool(bad) and bad[0] == step

    return proof
