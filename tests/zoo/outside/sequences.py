"""Networks of sequences: a decoder written anew, attention without skips, TCN, LSTM, an unrolled RNN, attention over a GRU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from zoo.outside.data import BYTES, WORDS
from zoo.surgery import initialise


class Attention(nn.Module):
    """Attention of several heads; `scale` multiplies the products (one over the root of the head's width by default)."""

    def __init__(self, width, heads=4, *, causal=True, scale=None):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.heads, self.causal, self.scale = heads, causal, scale

    def forward(self, x, allowed=None):
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        if allowed is None:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, scale=self.scale)
        else:
            mixed = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~allowed, -torch.inf).softmax(-1) @ v
        return self.o(mixed.transpose(1, 2).flatten(2))


class Gated(nn.Module):
    """SwiGLU."""

    def __init__(self, width):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Decoder(nn.Module):
    """Pre-norm decoder of today: RMSNorm, SwiGLU, learned positions. `skip` and `norm` leave those out."""

    def __init__(self, depth=4, width=48, *, vocabulary=BYTES, skip=True, norm=True, init=None, feed=True, **attention):
        super().__init__()
        normed = (lambda: nn.RMSNorm(width)) if norm else nn.Identity
        self.embed, self.place = nn.Embedding(vocabulary, width), nn.Parameter(0.02 * torch.randn(64, width))
        nn.init.normal_(self.embed.weight, std=0.1 if norm else 1.0)
        self.attend = nn.ModuleList(Attention(width, **attention) for _ in range(depth))
        self.feed = nn.ModuleList(Gated(width) if feed else nn.Identity() for _ in range(depth))
        self.norms = nn.ModuleList(normed() for _ in range(2 * depth))
        self.last, self.head, self.skip, self.fed = normed(), nn.Linear(width, vocabulary), skip, feed
        if init:
            initialise(self, init)

    def forward(self, tokens, allowed=None):
        x = self.embed(tokens) + self.place[: tokens.shape[1]]
        for i, (attend, feed) in enumerate(zip(self.attend, self.feed, strict=True)):
            a = attend(self.norms[2 * i](x), allowed)
            x = x + a if self.skip else a
            if self.fed:
                f = feed(self.norms[2 * i + 1](x))
                x = x + f if self.skip else f
        return self.head(self.last(x))


class Padded(Decoder):
    """The same for padded sequences: padding (token 0) may not be looked at; `own` always lets a token see itself."""

    def __init__(self, *args, own=False, **options):
        super().__init__(*args, causal=False, **options)
        self.own = own

    def forward(self, tokens):
        allowed = (tokens != 0)[:, None, None].expand(-1, 1, tokens.shape[1], -1)
        return super().forward(tokens, allowed | torch.eye(tokens.shape[1], dtype=torch.bool) if self.own else allowed)


class PatchTransformer(nn.Module):
    """A vision transformer, written anew, over patches of 4 x 4 pixels; without `skip` no residual additions."""

    def __init__(self, depth=4, width=32, *, skip=True, act=F.gelu, **attention):
        super().__init__()
        self.patch, self.place = nn.Conv2d(3, width, 4, 4), nn.Parameter(0.02 * torch.randn(16, width))
        self.attend = nn.ModuleList(Attention(width, causal=False, **attention) for _ in range(depth))
        self.up, self.down = (nn.ModuleList(nn.Linear(*s) for _ in range(depth)) for s in ((width, 2 * width), (2 * width, width)))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth))
        self.fc, self.skip, self.act = nn.Linear(width, 10), skip, act

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2) + self.place
        for i, (attend, up, down) in enumerate(zip(self.attend, self.up, self.down, strict=True)):
            a = attend(self.norms[2 * i](x))
            x = x + a if self.skip else a
            f = down(self.act(up(self.norms[2 * i + 1](x))))
            x = x + f if self.skip else f
        return self.fc(x.mean(1))


class TCN(nn.Module):
    """Dilated causal convolutions over a signal, plain or with residual connections; the next value at each time."""

    def __init__(self, depth=4, c=24, *, act=nn.ReLU, skip=True, init=None, norm=False):
        super().__init__()
        self.inlet, self.outlet = nn.Conv1d(1, c, 1), nn.Conv1d(c, 1, 1)
        self.layers = nn.ModuleList(nn.Conv1d(c, c, 3, dilation=2 ** (i % 4)) for i in range(depth))
        self.acts = nn.ModuleList(act() for _ in range(depth))
        self.norms = nn.ModuleList(nn.BatchNorm1d(c) if norm else nn.Identity() for _ in range(depth))
        self.skip = skip
        if init:
            initialise(self, init, (nn.Conv1d,))

    def forward(self, x):
        x = self.inlet(x)
        for i, (layer, norm, act) in enumerate(zip(self.layers, self.norms, self.acts, strict=True)):
            y = act(norm(layer(F.pad(x, (2 * 2 ** (i % 4), 0)))))
            x = x + y if self.skip else y
        return self.outlet(x).squeeze(1)


class LSTMModel(nn.Module):
    """A language model of two LSTM layers with dropout."""

    def __init__(self, width=64, drop=0.2):
        super().__init__()
        self.embed, self.rnn, self.head = nn.Embedding(WORDS, width), nn.LSTM(width, width, 2, batch_first=True, dropout=drop), nn.Linear(width, WORDS)
        self.drop = nn.Dropout(drop)

    def forward(self, tokens):
        return self.head(self.drop(self.rnn(self.drop(self.embed(tokens)))[0]))


class IRNN(nn.Module):
    """A recurrent network of ReLUs by hand (Le et al. 2015), its recurrent matrix `size` times the identity."""

    def __init__(self, width=32, *, size=1.0):
        super().__init__()
        self.inlet, self.again, self.outlet = nn.Linear(1, width), nn.Linear(width, width), nn.Linear(width, 1)
        with torch.no_grad():
            self.again.weight.copy_(size * torch.eye(width))
            self.again.bias.zero_()

    def forward(self, x):
        state, told = torch.zeros(len(x), self.again.in_features), []
        for t in range(x.shape[2]):
            state = torch.relu(self.inlet(x[:, :, t]) + self.again(state))
            told.append(self.outlet(state))
        return torch.cat(told, 1)


class Attending(nn.Module):
    """A GRU over what was said and another that attends to it and repeats it."""

    def __init__(self, symbols=16, width=32):
        super().__init__()
        self.embed, self.reader, self.writer = nn.Embedding(symbols, width), nn.GRU(width, width, batch_first=True), nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(2 * width, symbols)

    def forward(self, tokens):
        read, state = self.reader(self.embed(tokens))
        wrote, _ = self.writer(self.embed(tokens), state)
        seen = (wrote @ read.mT / 32**0.5).softmax(-1) @ read
        return self.head(torch.cat([wrote, seen], -1))
