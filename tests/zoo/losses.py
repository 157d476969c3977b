"""Losses of the zoo: `loss(model, batch)`, a batch being (inputs, targets)."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def classify(model, batch):
    """Cross-entropy of a model's output, a tensor or the library's record of logits."""
    out = model(batch[0])
    out = getattr(out, "logits", out)
    return F.cross_entropy(out.flatten(0, -2), batch[1].flatten())


def square(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def distilled(model, batch):
    """Cross-entropy, and the distance to what a teacher says."""
    out = model(batch[0])
    return F.cross_entropy(out, batch[1]) + model.distance(batch[0], out)


def own(model, batch):
    """What the model returns is its loss."""
    return model(batch[0])


def reconstruction(model, batch):
    """Mean square error of the input's reconstruction."""
    return F.mse_loss(model(batch[0]), batch[0])


def signs(model, batch):
    """Cross-entropy of the reconstruction of each input's sign."""
    return F.binary_cross_entropy(model(batch[0]), (batch[0] > 0).float())


def sine(model, batch):
    """Mean square error of a smooth function of the first input."""
    return F.mse_loss(model(batch[0]), batch[0][:, :1].sin())


def denoise(model, batch):
    """Mean square error of predicting the noise that was added to an image."""
    noise = torch.randn(
        batch[0].shape, generator=torch.Generator().manual_seed(abs(int(1000 * batch[0].sum())) % 10000)
    )
    return F.mse_loss(model(batch[0] + noise), noise)


def elbo(model, batch):
    """Reconstruction error and divergence of a variational autoencoder."""
    out, mean, log = model(batch[0])
    return F.mse_loss(out, batch[0]) + 1e-2 * (mean**2 + log.exp() - 1 - log).mean()


def actor_critic(model, batch):
    """Cross-entropy of the policy, mean square of the value."""
    logits, value = model(batch[0])
    return F.cross_entropy(logits, batch[1]) + 0.5 * value.pow(2).mean()


def seq2seq(model, batch):
    """The loss of an encoder-decoder of the library."""
    return model(input_ids=batch[0], labels=batch[1].contiguous()).loss


def log_of_relu(model, batch):
    """A loss that takes the log of what may be zero."""
    return -torch.log(F.relu(model(batch[0]))[:, 0]).mean()
