"""Small models of many kinds, and ways to make them ill, for the trainings that rules are tried on."""

from __future__ import annotations

import copy
import functools

import torch
import torch.nn.functional as F
from rule_training import T, V, train, vectors
from torch import nn

from gradflow.models import LanguageModel

D = 32


def language_model(depth=4, *, norm="post", residual=True, seed=0, **options):
    torch.manual_seed(seed)
    return LanguageModel(
        V, D, depth, 4, max_tokens=T, norm=norm, residual=residual, dropout=options.pop("dropout", 0.0), **options
    )


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

    def __init__(
        self, width=D, *, norm=True, gate=None, zero=False, factor=1.0, detach=False, hidden=2, drop=0.0, init=None
    ):
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
        self.conv1, self.conv2 = (
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
        )
        self.bn1, self.bn2 = nn.BatchNorm2d(inputs if pre else outputs), nn.BatchNorm2d(outputs)
        self.short = (
            nn.Identity() if stride == 1 and inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        )
        self.pre = pre

    def forward(self, x):
        if self.pre:
            return self.short(x) + self.conv2(torch.relu(self.bn2(self.conv1(torch.relu(self.bn1(x))))))
        return torch.relu(self.short(x) + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


def resnet(*, pre=False, blocks=2, seed=0):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU()]
    for inputs, outputs, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2)):
        layers += [
            ConvBlock(inputs if i == 0 else outputs, outputs, stride if i == 0 else 1, pre=pre) for i in range(blocks)
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4))


class Mixer(nn.Module):
    """Token and channel mixing on 2x2 patches."""

    def __init__(self, depth=4, seed=0, width=32):
        torch.manual_seed(seed)
        super().__init__()
        self.patch = nn.Conv2d(3, width, 2, 2)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth))
        self.token = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(depth))
        self.channel = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width)) for _ in range(depth)
        )
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
            nn.ModuleList(nn.Sequential(nn.Linear(D, 64), nn.ReLU(), nn.Linear(64, D)) for _ in range(4))
            for _ in range(depth)
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
        "bert-model": ("BertModel", "BertConfig", {"num_hidden_layers": 3, "hidden_size": D, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": V, "max_position_embeddings": T}),
        "t5": ("T5ForConditionalGeneration", "T5Config", {"vocab_size": V, "d_model": D, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4, "decoder_start_token_id": 0}),
        "distilbert": ("DistilBertForMaskedLM", "DistilBertConfig", {"vocab_size": V + 1, "dim": D, "n_layers": 3, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": T}),
        "opt": ("OPTForCausalLM", "OPTConfig", {"vocab_size": V, "hidden_size": D, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 64, "max_position_embeddings": T, "word_embed_proj_dim": D}),
        "mixtral": ("MixtralForCausalLM", "MixtralConfig", {"vocab_size": V, "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "num_local_experts": 4, "max_position_embeddings": T}),
        "resnet": ("ResNetForImageClassification", "ResNetConfig", {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2], "layer_type": "basic", "num_labels": 4}),
        "convnext": ("ConvNextForImageClassification", "ConvNextConfig", {"num_stages": 2, "hidden_sizes": [16, 32], "depths": [2, 2], "num_labels": 4, "patch_size": 2}),
        "swin": ("SwinForImageClassification", "SwinConfig", {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "num_labels": 4}),
        "vit": ("ViTForImageClassification", "ViTConfig", {"num_hidden_layers": 4, "hidden_size": D, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 8, "patch_size": 2, "num_labels": 4}),
    }  # fmt: skip
    model, config, values = small[name]
    return getattr(transformers, model)(getattr(transformers, config)(**values, **options)).train()


class UNet(nn.Module):
    """Down, up and across by concatenation: no residual addition anywhere."""

    def __init__(self):
        super().__init__()
        conv = lambda i, o: nn.Sequential(nn.Conv2d(i, o, 3, 1, 1), nn.GroupNorm(4, o), nn.SiLU())
        self.a, self.b, self.middle, self.up, self.out = (
            conv(3, 16),
            conv(16, 32),
            conv(32, 32),
            conv(64, 16),
            conv(32, 16),
        )
        self.head = nn.Conv2d(16, 3, 1)

    def forward(self, x):
        a = self.a(x)
        b = self.b(F.avg_pool2d(a, 2))
        up = self.up(torch.cat([F.interpolate(self.middle(F.avg_pool2d(b, 2)), scale_factor=2), b], 1))
        return self.head(self.out(torch.cat([F.interpolate(up, scale_factor=2), a], 1)))


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = mlp(2, classes=8), mlp(2, inputs=4, classes=16)

    def forward(self, x):
        mean, log = self.encoder(x).chunk(2, -1)
        return self.decoder(mean + torch.randn_like(mean) * (log / 2).exp()), mean, log


def elbo(model, batch):
    out, mean, log = model(batch[0])
    return F.mse_loss(out, batch[0]) + 1e-2 * (mean**2 + log.exp() - 1 - log).mean()


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


class GraphNet(nn.Module):
    """Residual graph convolutions over a fixed graph of 64 nodes."""

    def __init__(self, depth=4):
        super().__init__()
        edges = (torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) < 0.1).float()
        edges = ((edges + edges.T) > 0).float() + torch.eye(64)
        scale = edges.sum(1) ** -0.5
        self.register_buffer("edges", scale[:, None] * edges * scale)
        self.stem, self.head = nn.Linear(16, D), nn.Linear(D, 4)
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(depth))

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = x + torch.relu(layer(self.edges @ x))
        return self.head(x)


class Squeeze(nn.Module):
    """Residual block with squeeze and excitation."""

    def __init__(self, c=16):
        super().__init__()
        self.conv, self.norm, self.down, self.up = (
            nn.Conv2d(c, c, 3, 1, 1),
            nn.BatchNorm2d(c),
            nn.Linear(c, 4),
            nn.Linear(4, c),
        )

    def forward(self, x):
        y = torch.relu(self.norm(self.conv(x)))
        gate = torch.sigmoid(self.up(torch.relu(self.down(y.mean((2, 3))))))
        return x + y * gate[:, :, None, None]


class ConvNeXt(nn.Module):
    """Depthwise convolution, norm, two linear maps, LayerScale; `operation` may break it after the norm."""

    def __init__(self, c=16, scale=1e-6, operation=None):
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(c, c, 7, 1, 3, groups=c), nn.LayerNorm(c)
        self.up, self.down, self.gamma = nn.Linear(c, 4 * c), nn.Linear(4 * c, c), nn.Parameter(scale * torch.ones(c))
        self.operation = operation or (lambda x: x)

    def forward(self, x):
        y = self.operation(self.norm(self.depthwise(x).permute(0, 2, 3, 1)))
        return x + (self.down(F.gelu(self.up(y))) * self.gamma).permute(0, 3, 1, 2)


class Unnormalised(nn.Module):
    """x + relu(conv(x)) with He weights and no norm."""

    def __init__(self, c=16):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, 1, 1)
        he(self.conv.weight)

    def forward(self, x):
        return x + torch.relu(self.conv(x))


def convolutional(*blocks, c=16):
    """A stem, the blocks, pooling and a head."""
    return nn.Sequential(nn.Conv2d(3, c, 3, 1, 1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 4))


def vgg(depth, *, norm=False, init=None, activation=nn.ReLU):
    """A plain stack of 3x3 convolutions."""
    torch.manual_seed(0)
    layers, inputs = [], 3
    for _ in range(depth):
        layers += [nn.Conv2d(inputs, 32, 3, 1, 1), *([nn.BatchNorm2d(32)] if norm else []), activation()]
        inputs = 32
        if init:
            init(next(layer for layer in reversed(layers) if isinstance(layer, nn.Conv2d)).weight)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))


class Sine(nn.Module):
    def forward(self, x):
        return torch.sin(x)


class Policy(nn.Module):
    """A tanh trunk with two heads, as in reinforcement learning."""

    def __init__(self):
        super().__init__()
        self.trunk, self.policy, self.value = mlp(2, nn.Tanh, classes=64), nn.Linear(64, 4), nn.Linear(64, 1)

    def forward(self, x):
        x = torch.tanh(self.trunk(x))
        return self.policy(x), self.value(x)


def actor_critic(model, batch):
    logits, value = model(batch[0])
    return F.cross_entropy(logits, batch[1]) + 0.5 * value.pow(2).mean()


class Averaged(nn.Module):
    """A network beside an untrained copy of itself that still requires gradients, as careless averaging leaves it."""

    def __init__(self):
        super().__init__()
        self.net = Residual(4)
        self.average = copy.deepcopy(self.net)

    def forward(self, x):
        return self.net(x)


class WithPooler(nn.Module):
    """BERT whose pooler runs and is not used."""

    def __init__(self):
        super().__init__()
        self.bert, self.head = hugging("bert-model"), nn.Linear(D, V)

    def forward(self, tokens):
        return self.head(self.bert(tokens).last_hidden_state)


class Checkpointed(Residual):
    """Residual blocks whose activations are recomputed."""

    def forward(self, x):
        from torch.utils.checkpoint import checkpoint

        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(self.norm(x))


def plain_encoder(depth):
    """torch's encoder with its residual additions taken out."""

    class Plain(nn.TransformerEncoderLayer):
        def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
            x = self.norm1(self._sa_block(src, src_mask, src_key_padding_mask))
            return self.norm2(self._ff_block(x))

    model = Encoder(1, dropout=0.0)
    model.encoder = nn.TransformerEncoder(Plain(D, 4, 64, 0.0, batch_first=True), depth, enable_nested_tensor=False)
    return model


def frozen_backbone():
    model = Residual(4)
    model.stem.requires_grad_(False)
    model.blocks.requires_grad_(False)
    return model


def trained():
    model = Residual(6)
    train(model, vectors, steps=100)
    return model


# --- ways to make a model ill -----------------------------------------------------------------------------------------


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


def inject(model, path, operation):
    """The model with an operation behind the output of one of its modules."""
    module = model.get_submodule(path)
    forward = module.forward
    module.forward = lambda *args, **kwargs: operation(forward(*args, **kwargs))
    return model


def detach(x):
    return x.detach()


def shifted(model, name, value):
    """The model with one parameter moved by a constant."""
    with torch.no_grad():
        dict(model.named_parameters())[name].add_(value)
    return model


def scaled(model, words, factor):
    """The model with the matrices whose names hold one of the words multiplied."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(word in name for word in words) and parameter.dim() > 1:
                parameter.mul_(factor)
    return model


def cut_mlp():
    class Cut(nn.Sequential):
        def forward(self, x):
            for i, layer in enumerate(self):
                x = layer(x)
                x = x.detach() if i == 5 else x
            return x

    return Cut(*mlp(5, init=he))


def without(model, word):
    """The parameters whose names do not hold the word."""
    return [p for n, p in model.named_parameters() if word not in n]


def with_unused(model):
    model.extra = nn.Linear(64, 64)
    return model


def small(w):
    return nn.init.normal_(w, std=0.02)


def normal(std):
    return lambda w: nn.init.normal_(w, std=std)
