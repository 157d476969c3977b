"""Models and data of the stranger's runs."""

from __future__ import annotations

import argparse
import copy
import functools
import inspect
import math

import torch
import torch.nn.functional as F
from torch import nn

LETTERS = 64


@functools.cache
def _program():
    return torch.tensor([min(ord(c), 127) * 7 % LETTERS for c in inspect.getsource(argparse)])


def program(generator, *, batch=8, tokens=24):
    """Characters of a Python program, (batch, token), and the next ones."""
    start = torch.randint(len(_program()) - tokens - 1, (batch,), generator=generator)
    rows = torch.stack([_program()[s : s + tokens + 1] for s in start])
    return rows[:, :-1], rows[:, 1:]


def addition(generator, *, batch=64, modulus=13):
    """Two numbers and the sign of equality: the class is their sum modulo 13."""
    x = torch.randint(modulus, (batch, 2), generator=generator)
    return torch.cat([x, torch.full((batch, 1), modulus)], 1), x.sum(1) % modulus


def series(generator, *, batch=32, tokens=24):
    """The last points of two superposed oscillations, (batch, 1, token), and the next one."""
    phase = 6.28 * torch.rand(batch, 2, 1, generator=generator)
    slow = torch.tensor([0.35, 0.9])[:, None] * (1 + 0.1 * torch.randn(batch, 1, 1, generator=generator))
    wave = (slow * torch.arange(tokens + 1) + phase).sin().sum(1) + 0.05 * torch.randn(
        batch, tokens + 1, generator=generator
    )
    return wave[:, None, :-1], wave[:, -1:]


@functools.cache
def _table(name):
    from sklearn import datasets

    x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y)


def wine(generator, *, batch=48, raw=False):
    """Thirteen measurements of a wine, standardised or `raw`, and which of three growers it is of."""
    x, y = _table("wine")
    at = torch.randint(len(x), (batch,), generator=generator)
    return (x[at] if raw else (x[at] - x.mean(0)) / x.std(0)), y[at]


def diabetes(generator, *, batch=64):
    """Ten measurements of a patient and the progress of the illness, standardised."""
    x, y = _table("diabetes")
    at = torch.randint(len(x), (batch,), generator=generator)
    return x[at] / x.std(0), ((y[at] - y.mean()) / y.std()).float()[:, None]


def spirals(generator, *, batch=96):
    """Points on three arms of a spiral, with noise."""
    y = torch.randint(3, (batch,), generator=generator)
    r = torch.rand(batch, generator=generator)
    angle = 4 * r + 2.094 * y + 0.15 * torch.randn(batch, generator=generator)
    return 2 * torch.stack([r * angle.cos(), r * angle.sin()], 1), y


def gratings(generator, *, batch=24, size=12):
    """Noisy gratings of three colours, (batch, 3, 12, 12): the class is the direction, of four."""
    y = torch.randint(4, (batch,), generator=generator)
    angle, phase = (
        0.785 * y + 0.1 * torch.randn(batch, generator=generator),
        6.28 * torch.rand(batch, generator=generator),
    )
    u = torch.arange(size)
    wave = (
        1.1 * (u[:, None] * angle.sin()[:, None, None] + u * angle.cos()[:, None, None]) + phase[:, None, None]
    ).sin()
    return wave[:, None] + torch.randn(batch, 3, size, size, generator=generator), y


@functools.cache
def _links(nodes=20):
    g = torch.Generator().manual_seed(3)
    near = torch.eye(nodes)
    for i in range(nodes):
        near[i, torch.randperm(nodes, generator=g)[:5]] = 1.0
    return near / near.sum(1, keepdim=True)


def nodes(generator, *, batch=12):
    """Features of the twenty nodes of one graph; the class of a node is the largest of three among itself and its neighbours."""
    x = torch.randn(batch, 20, 8, generator=generator)
    return x, (x[..., :3] + 2 * _links() @ x[..., :3]).argmax(-1)


def last(model, batch):
    """Cross-entropy at the last token."""
    out = model(batch[0])
    return F.cross_entropy(getattr(out, "logits", out)[:, -1], batch[1])


class SwiGLU(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Switch(nn.Module):
    """Each token goes to the one of four experts that its router chooses."""

    def __init__(self, d):
        super().__init__()
        self.router, self.experts = nn.Linear(d, 4), nn.ModuleList(SwiGLU(d) for _ in range(4))

    def forward(self, x):
        p, which = self.router(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            out[which == i] = p[which == i][:, None] * expert(x[which == i])
        return out


class Heads(nn.Module):
    """Causal self-attention, or over the keys of a mask with `hidden` for the logits of the others."""

    def __init__(self, d, heads=4):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(d, d) for _ in range(4))

    def forward(self, x, seen=None):
        q, k, v = (m(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.query, self.key, self.value))
        if seen is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            logits = q @ k.mT / math.sqrt(q.shape[-1]) + torch.where(seen[0], 0.0, seen[1])[:, None, None]
            y = logits.softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, d, heads, *, factor=1.0, blind=False, mlp=SwiGLU):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(d), nn.RMSNorm(d)
        self.attention, self.mlp = Heads(d, heads), mlp(d)
        self.factor, self.blind = factor, blind

    def forward(self, x, seen=None):
        x = x + self.factor * self.attention(self.norm1(x), seen)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.blind):
            added = self.mlp(self.norm2(x))
        return x + self.factor * added


class Decoder(nn.Module):
    """Pre-norm decoder with RMS norms and gated feed-forwards; where `hidden` is a logit, token 0 pads."""

    def __init__(
        self,
        depth=4,
        d=32,
        *,
        heads=4,
        letters=LETTERS,
        tied=False,
        zero=False,
        blind=None,
        hidden=None,
        std=None,
        **options,
    ):
        super().__init__()
        self.embed, self.places = nn.Embedding(letters, d), nn.Parameter(0.1 * torch.randn(24, d))
        self.blocks = nn.ModuleList(Block(d, heads, blind=i == blind, **options) for i in range(depth))
        self.norm, self.head, self.hidden = nn.RMSNorm(d), nn.Linear(d, letters, bias=False), hidden
        if std:
            for name, p in self.named_parameters():
                if p.dim() > 1:
                    nn.init.normal_(p, std=std / math.sqrt(2 * depth) if "out." in name or "down." in name else std)
        for block in self.blocks if zero else ():
            nn.init.zeros_(block.attention.out.weight)
            nn.init.zeros_(block.mlp.down.weight)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x):
        h = self.embed(x) + self.places[: x.shape[1]]
        for block in self.blocks:
            h = block(h, None if self.hidden is None else (x != 0, self.hidden))
        return self.head(self.norm(h))


class Causal(nn.Conv1d):
    def forward(self, x):
        return super().forward(F.pad(x, (2 * self.dilation[0], 0)))


class Temporal(nn.Module):
    """Two dilated causal convolutions, with a skip or without, gated by a squeeze of the whole where `gate` is a bias."""

    def __init__(self, c, dilation, *, skip=True, norm=True, gate=None, act=F.relu):
        super().__init__()
        self.norm = nn.GroupNorm(4, c) if norm else nn.Identity()
        self.conv1, self.conv2 = Causal(c, c, 3, dilation=dilation), Causal(c, c, 3, dilation=dilation)
        self.skip, self.act, self.squeeze = skip, act, None if gate is None else nn.Linear(c, c)
        if gate is not None:
            nn.init.constant_(self.squeeze.bias, gate)

    def forward(self, x):
        y = self.conv2(self.act(self.conv1(self.act(self.norm(x)))))
        if self.squeeze:
            y = y * self.squeeze(y.mean(-1)).sigmoid()[..., None]
        return x + y if self.skip else y


class TCN(nn.Module):
    def __init__(self, depth=5, c=24, *, gates=None, init=None, **options):
        super().__init__()
        self.inlet = nn.Conv1d(1, c, 1)
        self.blocks = nn.ModuleList(
            Temporal(c, 2 ** (i % 3), gate=gates[i] if gates else None, **options) for i in range(depth)
        )
        self.head = nn.Linear(c, 1)
        for m in self.modules() if init else ():
            if isinstance(m, Causal):
                init(m.weight)

    def forward(self, x):
        x = self.inlet(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x[..., -1])


class Message(nn.Module):
    def __init__(self, d, skip):
        super().__init__()
        self.norm, self.map, self.skip = nn.LayerNorm(d), nn.Linear(d, d), skip

    def forward(self, x):
        y = F.relu(self.map(_links() @ self.norm(x)))
        return x + y if self.skip else y


class GraphNet(nn.Module):
    def __init__(self, depth=12, d=24, *, skip=True):
        super().__init__()
        self.inlet, self.layers = nn.Linear(8, d), nn.ModuleList(Message(d, skip) for _ in range(depth))
        self.head = nn.Linear(d, 3)

    def forward(self, x):
        x = self.inlet(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Wide(nn.Module):
    """Pre-activation residual block with group norms; its last gain may start at 0, its scale may be learned from a small one."""

    def __init__(self, c, *, zero=False, scale=None):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.GroupNorm(4, c) for _ in range(3))
        self.conv1, self.conv2 = (nn.Conv2d(c, c, 3, padding=1) for _ in range(2))
        self.scale = None if scale is None else nn.Parameter(torch.full((c, 1, 1), scale))
        if zero:
            nn.init.zeros_(self.norm3.weight)

    def forward(self, x):
        y = self.norm3(self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x)))))))
        return x + (y if self.scale is None else self.scale * y)


def wide(depth=4, c=16, **options):
    return nn.Sequential(
        nn.Conv2d(3, c, 3, stride=2, padding=1), *[Wide(c, **options) for _ in range(depth)],
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 4),
    )  # fmt: skip


def layers(depth, act, *, width=32, inputs=13, classes=3, init=None, norm=False, dropout=0.0):
    """A plain perceptron of `depth` hidden layers."""
    parts: list[nn.Module] = []
    for i in range(depth):
        linear = nn.Linear(inputs if i == 0 else width, width)
        if init:
            init(linear.weight)
        parts += [linear, *([nn.LayerNorm(width)] if norm else []), act(), *([nn.Dropout(dropout)] if dropout else [])]
    return nn.Sequential(*parts, nn.Linear(width, classes))


def pictures_net(*, bias=None, c=32):
    """Four convolutions with ReLU; every bias may start at one value."""
    model = nn.Sequential(
        nn.Conv2d(3, c, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(c, c, 3, padding=1), nn.ReLU(), nn.Conv2d(c, c, 3, padding=1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 4),
    )  # fmt: skip
    for m in model if bias is not None else ():
        if isinstance(m, nn.Conv2d):
            nn.init.constant_(m.bias, bias)
    return model


class Codes(nn.Module):
    """Points through a code of rounded numbers, with a gradient straight through the rounding or without."""

    def __init__(self, straight):
        super().__init__()
        self.encoder, self.decoder = layers(2, nn.ReLU, inputs=2, classes=4), layers(2, nn.ReLU, inputs=4)
        self.straight = straight

    def forward(self, x):
        z = 3 * self.encoder(x)
        return self.decoder(z + (z.round() - z).detach() if self.straight else z.round())


class Unit(nn.Module):
    """Features at unit length, with or without an epsilon in the division."""

    def __init__(self, eps):
        super().__init__()
        self.eps = eps

    def forward(self, x):
        return x / (x.norm(dim=-1, keepdim=True) + self.eps)


def unit_net(eps=0.0):
    return nn.Sequential(
        nn.Linear(13, 32, bias=False), nn.ReLU(), Unit(eps), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3)
    )


class Auxiliary(nn.Module):
    """A net with a second head that no loss reads."""

    def __init__(self):
        super().__init__()
        self.trunk, self.head, self.spare = layers(2, nn.ReLU, classes=32), nn.Linear(32, 3), nn.Linear(32, 5)

    def forward(self, x):
        return self.head(self.trunk(x))


class Words(nn.Module):
    """Recurrent language model."""

    def __init__(self, kind=nn.LSTM, d=32):
        super().__init__()
        self.embed, self.rnn, self.head = (
            nn.Embedding(LETTERS, d),
            kind(d, d, num_layers=2, batch_first=True),
            nn.Linear(d, LETTERS),
        )

    def forward(self, x):
        return self.head(self.rnn(self.embed(x))[0])


class Student(nn.Module):
    """A student that predicts what a fixed or slowly following copy of itself says of another view (BYOL, DQN)."""

    def __init__(self, net, predictor=None):
        super().__init__()
        self.net, self.target = net, copy.deepcopy(net).requires_grad_(False)
        self.predictor = predictor or nn.Identity()

    def forward(self, x):
        return self.predictor(self.net(x))

    @torch.no_grad()
    def follow(self, rate):
        for p, q in zip(self.target.parameters(), self.net.parameters(), strict=True):
            p.lerp_(q, rate)


def views(model, batch):
    """BYOL: cosine distance of the student's prediction to the target's projection of another view."""
    x = batch[0]
    a, b = x + 0.3 * torch.randn_like(x), x + 0.3 * torch.randn_like(x)
    with torch.no_grad():
        goal = model.target(b)
    if model.training and torch.is_grad_enabled():
        model.follow(0.02)
    return 1 - F.cosine_similarity(model(a), goal, dim=-1).mean()


def temporal_difference(model, batch):
    """Q-learning: Huber loss of the chosen action to a noisy reward plus the target's best."""
    x, y = batch
    value = model(x)
    action = torch.randint(3, y.shape)
    reward = (action == y).float() + 0.5 * torch.randn(y.shape)
    with torch.no_grad():
        goal = reward + 0.5 * model.target(x.roll(1, 0)).max(-1).values
    if torch.is_grad_enabled():
        model.follow(0.05)
    return F.smooth_l1_loss(value.gather(1, action[:, None])[:, 0], goal)


def reinforce(model, batch):
    """Policy gradient of one sampled action each, with the batch's mean reward as baseline."""
    policy = torch.distributions.Categorical(logits=model(batch[0]))
    action = policy.sample()
    reward = (action == batch[1]).float() + 0.3 * torch.randn(action.shape)
    return -(policy.log_prob(action) * (reward - reward.mean())).mean()


def contrast(model, batch):
    """InfoNCE of two views at temperature 0.1."""
    a, b = (F.normalize(model(batch[0] + 0.3 * torch.randn_like(batch[0])), dim=-1) for _ in range(2))
    return F.cross_entropy(a @ b.T / 0.1, torch.arange(len(a)))


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return -g


class Adversaries(nn.Module):
    """Generator and discriminator of points, trained together by a reversed gradient."""

    def __init__(self):
        super().__init__()
        leaky = functools.partial(nn.LeakyReLU, 0.2)
        self.generator, self.judge = layers(3, nn.ReLU, inputs=4, classes=2), layers(3, leaky, inputs=2, classes=1)

    def forward(self, x):
        made = Reverse.apply(self.generator(torch.randn(len(x), 4)))
        return F.softplus(-self.judge(x)).mean() + F.softplus(self.judge(made)).mean()


def oscillator(model, batch):
    """A net u(t) with u'' = -u, u(0) = 0, u'(0) = 1."""
    t = (3 * torch.rand(64, 1)).requires_grad_()
    with torch.enable_grad():

        def slope(y, x):
            return torch.autograd.grad(y.sum(), x, create_graph=True)[0]

        u, zero = model(t), torch.zeros(1, 1, requires_grad=True)
        at = model(zero)
        return (slope(slope(u, t), t) + u).pow(2).mean() + at.pow(2).mean() + (slope(at, zero) - 1).pow(2).mean()


class Lion(torch.optim.Optimizer):
    """Sign of an interpolated momentum (Chen et al. 2023)."""

    def __init__(self, params, lr=1e-4, weight_decay=0.1):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * m.lerp(p.grad, 0.1).sign())
                m.lerp_(p.grad, 0.01)


def tiny(name, **options):
    """A model of the transformers library from a tiny configuration."""
    import transformers as t

    small = {
        "vocab_size": LETTERS,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    if name == "qwen":
        return t.Qwen2ForCausalLM(
            t.Qwen2Config(**small, num_key_value_heads=4, max_position_embeddings=24, **options)
        ).train()
    if name == "bloom":
        return t.BloomForCausalLM(
            t.BloomConfig(
                vocab_size=LETTERS, hidden_size=32, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0, **options
            )
        ).train()
    return t.AlbertForMaskedLM(
        t.AlbertConfig(**{**small, "embedding_size": 16, "pad_token_id": 0}, max_position_embeddings=24, **options)
    ).train()
