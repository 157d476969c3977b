"""Real small trainings, healthy and sick, recorded by gradflow.Recorder: what the rules are tried on.

Every function makes one run. Sick ones say in their entry of `SICK` which code must be found, and a word that the place
must contain. All are small enough for a second or three on one core.
"""

from __future__ import annotations

import contextlib
import functools
import math
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import gradflow
from gradflow.models import LanguageModel
from gradflow.store import Run, load

V, T, B, D = 40, 16, 8, 32


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
    return Run(run.meta, dict(run._raw), run.problems)


# --- models -----------------------------------------------------------------------------------------------------------


def language_model(depth=4, *, norm="post", residual=True, seed=0, **options):
    torch.manual_seed(seed)
    return LanguageModel(V, D, depth, 4, max_tokens=T, norm=norm, residual=residual, dropout=options.pop("dropout", 0.0), **options)


def mlp(depth, activation=nn.ReLU, *, width=64, init=None, inputs=16, classes=4, seed=0, norm=None):
    torch.manual_seed(seed)
    layers, fan = [], inputs
    for _ in range(depth):
        layers += [nn.Linear(fan, width), *([norm(width)] if norm else []), activation()]
        fan = width
    model = nn.Sequential(*layers, nn.Linear(width, classes))
    if init:
        for layer in model:
            if isinstance(layer, nn.Linear):
                init(layer.weight)
                nn.init.zeros_(layer.bias)
    return model


he = functools.partial(nn.init.kaiming_normal_, nonlinearity="relu")


class Block(nn.Module):
    """x + gate · f(norm(x)) with every switch that a trap or a sickness needs."""

    def __init__(self, width=D, *, norm=True, gate=None, zero=False, factor=1.0, detach=False, hidden=2, drop=0.0, init=None):
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.up, self.down = nn.Linear(width, hidden * width), nn.Linear(hidden * width, width)
        if init:
            for layer in (self.up, self.down):
                init(layer.weight)
                nn.init.zeros_(layer.bias)
        if zero:
            nn.init.zeros_(self.down.weight)
            nn.init.zeros_(self.down.bias)
        self.gate = None if gate is None else nn.Parameter(torch.full((width,), float(gate)))
        self.factor, self.detach, self.drop = factor, detach, drop

    def forward(self, x):
        if self.training and self.drop and torch.rand(()) < self.drop:
            return x
        f = self.down(torch.relu(self.up(self.norm(x)))) * self.factor
        f = f if self.gate is None else f * self.gate
        return x + (f.detach() if self.detach else f)


class Residual(nn.Module):
    """Vectors in, `depth` blocks, classes out; `special` gives some blocks other options."""

    def __init__(self, depth=6, *, special=None, seed=0, width=D, inputs=16, classes=4, head_norm=True, **options):
        torch.manual_seed(seed)
        super().__init__()
        self.stem = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList(Block(width, **{**options, **(special or {}).get(i, {})}) for i in range(depth))
        self.norm = nn.LayerNorm(width) if head_norm else nn.Identity()
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class ConvBlock(nn.Module):
    """ResNet-v1 (or v2) basic block with a projection where the shape changes."""

    def __init__(self, inputs, outputs, stride=1, *, pre=False):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(inputs if pre else outputs), nn.BatchNorm2d(outputs)
        self.short = nn.Identity() if stride == 1 and inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.pre = pre

    def forward(self, x):
        if self.pre:
            return self.short(x) + self.conv2(torch.relu(self.bn2(self.conv1(torch.relu(self.bn1(x))))))
        return torch.relu(self.short(x) + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


def resnet(*, pre=False, blocks=2, seed=0):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU()]
    for inputs, outputs, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2)):
        layers += [ConvBlock(inputs if i == 0 else outputs, outputs, stride if i == 0 else 1, pre=pre) for i in range(blocks)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4))


class Mixer(nn.Module):
    """Token and channel mixing on 2x2 patches."""

    def __init__(self, depth=4, seed=0, width=32):
        torch.manual_seed(seed)
        super().__init__()
        self.patch = nn.Conv2d(3, width, 2, 2)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth))
        self.token = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(depth))
        self.channel = nn.ModuleList(nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width)) for _ in range(depth))
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        for i, (token, channel) in enumerate(zip(self.token, self.channel, strict=True)):
            x = x + token(self.norms[2 * i](x).transpose(1, 2)).transpose(1, 2)
            x = x + channel(self.norms[2 * i + 1](x))
        return self.head(x.mean(1))


class Encoder(nn.Module):
    """torch's own TransformerEncoder with embeddings and a causal mask."""

    def __init__(self, depth=4, *, norm_first=False, dropout=0.1, seed=0):
        torch.manual_seed(seed)
        super().__init__()
        self.embed, self.position = nn.Embedding(V, D), nn.Parameter(0.02 * torch.randn(T, D))
        layer = nn.TransformerEncoderLayer(D, 4, 64, dropout, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(D, V)

    def forward(self, tokens):
        mask = torch.triu(torch.full((T, T), -torch.inf), 1)
        return self.head(self.encoder(self.embed(tokens) + self.position, mask=mask))


class Recurrent(nn.Module):
    def __init__(self, kind=nn.GRU, seed=0):
        torch.manual_seed(seed)
        super().__init__()
        self.embed, self.rnn, self.head = nn.Embedding(V, D), kind(D, D, batch_first=True), nn.Linear(D, V)

    def forward(self, tokens):
        return self.head(self.rnn(self.embed(tokens))[0])


class Experts(nn.Module):
    """Residual blocks whose feed-forward is a top-1 mixture of four experts."""

    def __init__(self, depth=3, seed=0):
        torch.manual_seed(seed)
        super().__init__()
        self.stem, self.head = nn.Linear(16, D), nn.Linear(D, 4)
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(depth))
        self.routers = nn.ModuleList(nn.Linear(D, 4) for _ in range(depth))
        self.experts = nn.ModuleList(
            nn.ModuleList(nn.Sequential(nn.Linear(D, 64), nn.ReLU(), nn.Linear(64, D)) for _ in range(4)) for _ in range(depth)
        )

    def forward(self, x):
        x = self.stem(x)
        for norm, router, experts in zip(self.norms, self.routers, self.experts, strict=True):
            h = norm(x)
            weight, choice = router(h).softmax(-1).max(-1)
            mixed = torch.zeros_like(x)
            for i, expert in enumerate(experts):
                rows = torch.nonzero(choice == i).squeeze(-1)
                if len(rows):
                    mixed = mixed.index_add(0, rows, expert(h[rows]) * weight[rows, None])
            x = x + mixed
        return self.head(x)


class Distilled(nn.Module):
    """A student that learns its own slowly moving teacher's features, detached on purpose, beside the labels."""

    def __init__(self, seed=0):
        super().__init__()
        self.student, self.teacher = Residual(4, seed=seed), Residual(4, seed=seed + 1).requires_grad_(False)

    def forward(self, x):
        with torch.no_grad():
            wish = self.teacher(x)
        out = self.student(x)
        return out + 0.0 * (out - wish).pow(2).mean()


class Lora(nn.Module):
    """A frozen linear layer plus a trained low-rank update that starts at zero."""

    def __init__(self, base, rank=4):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a, self.b = nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


def with_lora():
    model = Residual(4).requires_grad_(False)
    for block in model.blocks:
        block.up, block.down = Lora(block.up), Lora(block.down)
    model.head.requires_grad_(True)
    return model


def hugging(name, **options):
    """A tiny model of the transformers library from its configuration."""
    import transformers

    torch.manual_seed(0)
    small = {
        "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_layer": 4, "n_embd": D, "n_head": 4, "vocab_size": V, "n_positions": T}),
        "bert": ("BertForMaskedLM", "BertConfig", {"num_hidden_layers": 4, "hidden_size": D, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": V + 1, "max_position_embeddings": T}),
        "llama": ("LlamaForCausalLM", "LlamaConfig", {"num_hidden_layers": 4, "hidden_size": D, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 64, "vocab_size": V, "max_position_embeddings": T}),
        "vit": ("ViTForImageClassification", "ViTConfig", {"num_hidden_layers": 4, "hidden_size": D, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 8, "patch_size": 2, "num_labels": 4}),
    }  # fmt: skip
    model, config, values = small[name]
    return getattr(transformers, model)(getattr(transformers, config)(**values, **options)).train()


def of_logits(model, batch):
    return F.cross_entropy(model(batch[0]).logits.flatten(0, -2), batch[1].flatten())


def masked(model, batch):
    """Masked-language loss: 15 % of the characters hidden (token V) and to be found."""
    x = batch[0].clone()
    hidden = torch.rand(x.shape, generator=torch.Generator().manual_seed(int(x.sum()))) < 0.15
    hidden[:, 0] = True
    x[hidden] = V
    return F.cross_entropy(model(x).logits[hidden], batch[0][hidden])


# --- healthy ----------------------------------------------------------------------------------------------------------

HEALTHY = {
    "mlp": lambda: train(mlp(4), vectors),
    "mlp-he-sgd": lambda: train(mlp(6, init=he), vectors, optimizer=torch.optim.SGD, lr=0.05, momentum=0.9),
    "mlp-tanh": lambda: train(mlp(5, nn.Tanh, init=nn.init.xavier_normal_), vectors),
    "mlp-batchnorm": lambda: train(mlp(8, norm=nn.BatchNorm1d), vectors),
    "mlp-overfit": lambda: train(mlp(3), lambda g: vectors(torch.Generator().manual_seed(1)), steps=300, lr=3e-3),
    "cnn": lambda: train(
        nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 4)),
        images,
    ),
    "resnet-v1": lambda: train(resnet(), images, optimizer=torch.optim.SGD, lr=0.05, momentum=0.9),
    "resnet-v2": lambda: train(resnet(pre=True), images),
    "mixer": lambda: train(Mixer(), images),
    "residual": lambda: train(Residual(8), vectors),
    "layer-scale": lambda: train(Residual(8, gate=1e-5), vectors),
    "rezero": lambda: train(Residual(8, gate=0.0, norm=False), vectors),
    "zero-last-layer": lambda: train(Residual(8, zero=True), vectors, optimizer=torch.optim.SGD, lr=0.05),
    "stochastic-depth": lambda: train(Residual(8, drop=0.3), vectors, every=10),
    "bf16": lambda: train(Residual(8), vectors, autocast=torch.bfloat16),
    "accumulation": lambda: train(Residual(6), vectors, accumulate=4, steps=60),
    "warmup": lambda: train(language_model(norm="pre"), text, warmup=100, steps=120),
    "clipped": lambda: train(language_model(norm="pre"), text, clip=0.1, lr=3e-3),
    "experts": lambda: train(Experts(), vectors),
    "distilled": lambda: train(Distilled(), vectors),
    "lora": lambda: train(with_lora(), vectors),
    "frozen-backbone": lambda: train(_frozen_backbone(), vectors),
    "post-norm": lambda: train(language_model(4, norm="post"), text, lr=1e-3, warmup=50, steps=200),
    "post-norm-12": lambda: train(language_model(12, norm="post"), text, lr=3e-4, warmup=50, steps=150),
    "pre-norm-12": lambda: train(language_model(12, norm="pre"), text, steps=150),
    "pre-norm-dropout": lambda: train(language_model(6, norm="pre", dropout=0.1), text),
    "torch-encoder": lambda: train(Encoder(), text, warmup=30),
    "torch-encoder-pre": lambda: train(Encoder(norm_first=True), text),
    "gru": lambda: train(Recurrent(), text),
    "lstm": lambda: train(Recurrent(nn.LSTM), text),
    "gpt2": lambda: train(hugging("gpt2"), text, loss=of_logits),
    "bert": lambda: train(hugging("bert"), text, loss=masked, steps=200),
    "llama": lambda: train(hugging("llama"), text, loss=of_logits),
    "vit": lambda: train(hugging("vit"), images, loss=of_logits),
    "one-step": lambda: train(language_model(6, norm="post"), text, steps=0),
    "three-steps": lambda: train(hugging("gpt2"), text, loss=of_logits, steps=2),
    "autoencoder": lambda: train(
        mlp(3, nn.Tanh, classes=16).append(nn.Sigmoid()), vectors,
        loss=lambda m, b: F.binary_cross_entropy(m(b[0]), (b[0] > 0).float()), lr=3e-3, steps=200,
    ),
    "fine-tuning": lambda: train(_trained(), vectors, lr=1e-5, steps=150),
}  # fmt: skip


def _frozen_backbone():
    model = Residual(4)
    model.stem.requires_grad_(False)
    model.blocks.requires_grad_(False)
    return model


def _trained():
    model = Residual(6)
    train(model, vectors, steps=100)
    return model


# --- sick -------------------------------------------------------------------------------------------------------------


def _no_log(x):
    return torch.log(x)


class Broken(Residual):
    """A residual stack with an operation in block 2 that breaks from some step on."""

    def __init__(self, operation, since, **options):
        super().__init__(6, **options)
        self.operation, self.since, self.now = operation, since, 0

    def forward(self, x):
        x = self.stem(x)
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i == 2 and self.now >= self.since:
                x = self.operation(x)
        return self.head(self.norm(x))


def _tick(step, model, _):
    model.now = step


def _spike(at):
    def before(step, model, _):
        model.scale = 300.0 if step in at else 1.0
    return before  # fmt: skip


def _spiky_loss(model, batch):
    return getattr(model, "scale", 1.0) * classify(model, batch)


def _shift_bias(model, name, value):
    with torch.no_grad():
        dict(model.named_parameters())[name].add_(value)
    return model


def _scaled(model, word, factor):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if word in name and parameter.dim() > 1:
                parameter.mul_(factor)
    return model


def _cut_mlp():
    class Cut(nn.Sequential):
        def forward(self, x):
            for i, layer in enumerate(self):
                x = layer(x)
                x = x.detach() if i == 5 else x
            return x

    return Cut(*mlp(5, init=he))


def _without(model, word):
    return [p for n, p in model.named_parameters() if word not in n]


def _small(w):
    return nn.init.normal_(w, std=0.02)


SICK = {
    "no-residual": ({"rank-collapse": "blocks", "vanishing-gradient": "blocks"}, lambda: train(language_model(12, residual=False), text, steps=200)),
    "no-residual-encoder": ({"rank-collapse": "blocks"}, lambda: train(language_model(8, residual=False, norm="post"), text, lr=3e-4)),
    "sigmoid-mlp": ({"vanishing-gradient": ""}, lambda: train(mlp(10, nn.Sigmoid), vectors)),
    "default-mlp-20": ({"vanishing-gradient": ""}, lambda: train(mlp(20), vectors, optimizer=torch.optim.SGD, lr=0.01)),
    "small-init-mlp": ({"signal-collapse": ""}, lambda: train(mlp(12, init=_small), vectors, optimizer=torch.optim.SGD, lr=0.01)),
    "default-mlp-12-wide": ({"signal-collapse": ""}, lambda: train(mlp(12, width=256), vectors, steps=40, optimizer=torch.optim.SGD, lr=0.01)),
    "large-init-mlp": ({"signal-explosion": "", "exploding-gradient": ""}, lambda: train(mlp(12, init=lambda w: nn.init.normal_(w, std=0.4)), vectors, steps=40, lr=1e-5)),
    "batchnorm-60": ({"exploding-gradient": ""}, lambda: train(mlp(60, norm=nn.BatchNorm1d), vectors, steps=10, every=5)),
    "unnormalised": ({"signal-explosion": "blocks"}, lambda: train(Residual(12, norm=False, init=he, head_norm=False), vectors, lr=1e-4)),
    "unnormalised-normed-head": ({"signal-explosion": "blocks"}, lambda: train(Residual(16, norm=False, init=he), vectors, lr=1e-4)),
    "diverging": ({"nonfinite": ""}, lambda: train(mlp(4, init=he), vectors, optimizer=torch.optim.SGD, lr=0.02, steps=200, before=lambda s, m, o: [g.update(lr=20.0) for g in o.param_groups] if s >= 100 else None, momentum=0.9, every=10)),
    "two-zeros": ({"silent-branch": "blocks"}, lambda: train(Residual(6, gate=0.0, zero=True), vectors)),
    "one-silent": ({"silent-branch": "blocks.3"}, lambda: train(Residual(6, special={3: {"factor": 1e-5}}), vectors)),
    "gate-not-trained": ({"silent-branch": "blocks", "frozen-parameter": "gate"}, lambda: _without_gate()),
    "log-of-negative": ({"nonfinite": ""}, lambda: train(Broken(_no_log, 0), vectors, steps=5, before=_tick)),
    "log-from-step-40": ({"nonfinite": ""}, lambda: train(Broken(_no_log, 40), vectors, steps=80, before=_tick)),
    "root-of-zero": ({"nonfinite": ""}, lambda: train(Broken(lambda x: x + (0 * x).sqrt(), 0), vectors, steps=5, before=_tick)),
    "nan-in-batch": ({"nonfinite": "stem"}, lambda: train(Residual(4), lambda g: (torch.full((64, 16), torch.nan), vectors(g)[1]), steps=3)),
    "loss-of-log": ({"nonfinite": "loss"}, lambda: train(Residual(4), vectors, loss=lambda m, b: -torch.log(F.relu(m(b[0]))[:, 0]).mean(), steps=3)),
    "detached-branch": ({"blocked-gradient": "blocks.2"}, lambda: train(Residual(6, special={2: {"detach": True}}), vectors)),
    "detached-mlp": ({"blocked-gradient": ""}, lambda: train(_cut_mlp(), vectors)),
    "dead-bias": ({"dead-units": ""}, lambda: train(_shift_bias(mlp(3, width=64), "2.bias", -5.0), lambda g: vectors(g, batch=256))),
    "dead-sgd": ({"dead-units": ""}, lambda: train(_shift_bias(mlp(5, init=he), "4.bias", -10.0), lambda g: vectors(g, batch=128), optimizer=torch.optim.SGD, lr=0.01)),
    "saturated-tanh": ({"saturated-activation": ""}, lambda: train(mlp(4, nn.Tanh, init=lambda w: nn.init.normal_(w, std=1.0)), vectors)),
    "saturated-sigmoid": ({"saturated-activation": ""}, lambda: train(mlp(3, nn.Sigmoid, init=lambda w: nn.init.normal_(w, std=3.0)), vectors)),
    "spike": ({"gradient-spike": ""}, lambda: train(Residual(6), vectors, loss=_spiky_loss, before=_spike({60}), every=10, optimizer=torch.optim.SGD, lr=1e-3)),
    "too-fast": ({"update-too-large": ""}, lambda: train(language_model(4, norm="pre"), text, lr=0.3)),
    "too-slow": ({"update-too-small": ""}, lambda: train(language_model(4, norm="pre"), text, lr=1e-8)),
    "forgotten-parameters": ({"frozen-parameter": "head"}, lambda: _forgotten("head")),
    "dominant": ({"dominant-branch": "blocks.5"}, lambda: train(Residual(8, special={5: {"factor": 60.0}}), vectors)),
    "inert": ({"inert-depth": "blocks"}, lambda: train(Residual(10, factor=0.005), vectors, steps=600, every=50, lr=3e-4)),
    "sharp-attention": ({"attention-logit-growth": "", "attention-entropy-collapse": ""}, lambda: train(_scaled(_scaled(language_model(4, norm="pre"), "query", 30.0), "key", 30.0), text)),
    "tiny-loss": ({"below-epsilon": ""}, lambda: train(language_model(4, norm="pre"), text, loss=lambda m, b: 1e-9 * classify(m, b))),
    "half-precision": ({"gradient-underflow": ""}, lambda: train(Residual(6), vectors, loss=lambda m, b: 1e-6 * classify(m, b), autocast=torch.float16, info={"precision": "16-mixed"})),
}  # fmt: skip

ALSO_TRUE = {
    "sigmoid-mlp": set(),
    "no-residual-encoder": {"vanishing-gradient"},
    "default-mlp-20": {"signal-collapse"},
    "default-mlp-12-wide": {"vanishing-gradient"},
    "small-init-mlp": {"dead-units", "vanishing-gradient"},
    "large-init-mlp": {"update-too-small"},
    "unnormalised": {"exploding-gradient"},
    "unnormalised-normed-head": {"exploding-gradient"},
    "diverging": {"exploding-gradient"},
    "dead-sgd": {"update-too-small"},
    "too-fast": {"dead-units"},
    "sharp-attention": set(),
}
"""What else holds in a sick run, as measured: the gradient of an exploding stack explodes too, and the like."""


def _without_gate():
    model = Residual(6, gate=0.0)
    return train(model, vectors, parameters=_without(model, "gate"))


def _forgotten(word):
    model = Residual(6)
    return train(model, vectors, parameters=_without(model, word))
