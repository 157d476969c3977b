"""Transformers and recurrent networks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from gradflow.models import LanguageModel
from zoo.data import D, T, V
from zoo.surgery import After, detached


def transformer(depth=4, *, norm="pre", **options):
    return LanguageModel(V, D, depth, 4, max_tokens=T, norm=norm, dropout=options.pop("dropout", 0.0), **options)


class RowEncoder(nn.Module):
    """torch's TransformerEncoder over the rows of a digit; `plain` leaves its residual additions out."""

    def __init__(self, depth=4, *, norm_first=False, dropout=0.0, plain=False, cut=None):
        super().__init__()
        kind = _PlainLayer if plain else nn.TransformerEncoderLayer
        layer = kind(D, 4, 64, dropout, batch_first=True, norm_first=norm_first)
        self.embed, self.pos = nn.Linear(8, D), nn.Parameter(0.02 * torch.randn(8, D))
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        for parameter in self.encoder.parameters():  # the layers are copies: draw each anew
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        if cut is not None:
            self.encoder.layers[cut] = After(self.encoder.layers[cut], detached)
        self.fc = nn.Linear(D, 10)

    def forward(self, x):
        return self.fc(self.encoder(self.embed(x) + self.pos).mean(1))


class _PlainLayer(nn.TransformerEncoderLayer):
    def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
        x = self.norm1(self._sa_block(src, src_mask, src_key_padding_mask))
        return self.norm2(self._ff_block(x))


class Recurrent(nn.Module):
    """Embedding, a recurrent layer, a head at every token."""

    def __init__(self, kind=nn.GRU, depth=1):
        super().__init__()
        self.embed, self.rnn, self.fc = nn.Embedding(V, D), kind(D, D, depth, batch_first=True), nn.Linear(D, V)

    def forward(self, tokens):
        return self.fc(self.rnn(self.embed(tokens))[0])


class Unrolled(nn.Module):
    """A recurrent cell called once a token, by hand; the class is told at the end."""

    def __init__(self, cell, width=D):
        super().__init__()
        self.embed, self.cell, self.fc = nn.Embedding(8, width), cell(width, width), nn.Linear(width, 8)

    def forward(self, tokens):
        x, state = self.embed(tokens), torch.zeros(len(tokens), self.fc.in_features)
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.fc(state)


class TextEncoder(RowEncoder):
    """The same over characters, with a causal mask and a head at every token."""

    def __init__(self, depth=4, **options):
        super().__init__(depth, **options)
        self.embed, self.pos, self.fc = nn.Embedding(V, D), nn.Parameter(0.02 * torch.randn(T, D)), nn.Linear(D, V)

    def forward(self, tokens):
        mask = torch.triu(torch.full((T, T), -torch.inf), 1)
        return self.fc(self.encoder(self.embed(tokens) + self.pos, mask=mask))


class WaveNet(nn.Module):
    """Dilated causal convolutions, gated; `zero` starts both the gates and the last layers at zero."""

    def __init__(self, depth=6, *, zero=False):
        super().__init__()
        self.embed, self.head = nn.Embedding(V, D), nn.Linear(D, V)
        self.filters = nn.ModuleList(nn.Conv1d(D, 2 * D, 2, dilation=2 ** (i % 4)) for i in range(depth))
        self.project = nn.ModuleList(nn.Conv1d(D, D, 1) for _ in range(depth))
        self.alpha = nn.Parameter(torch.zeros(depth)) if zero else None
        if zero:
            for layer in self.project:
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, tokens):
        x = self.embed(tokens).transpose(1, 2)
        for i, (filters, project) in enumerate(zip(self.filters, self.project, strict=True)):
            a, b = filters(F.pad(x, (2 ** (i % 4), 0))).chunk(2, 1)
            f = project(torch.tanh(a) * torch.sigmoid(b))
            x = x + (f if self.alpha is None else self.alpha[i] * f)
        return self.head(x.transpose(1, 2))
