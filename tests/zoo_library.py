"""Tiny models of the transformers library, and wrappers around models, for the labelled zoo."""

from __future__ import annotations

import torch
from torch import nn
from zoo_data import MASK, T, V
from zoo_models import D, ResidualNet

SIZES = {"num_hidden_layers": 4, "hidden_size": D, "num_attention_heads": 4, "intermediate_size": 64}


def library(name, **options):
    """A model of the library from a tiny configuration."""
    import transformers as t

    text = {**SIZES, "vocab_size": V, "max_position_embeddings": T}
    image = {**SIZES, "image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
    small = {
        "gpt2": (t.GPT2LMHeadModel, t.GPT2Config, {"n_layer": 4, "n_embd": D, "n_head": 4, "vocab_size": V, "n_positions": T}),
        "bert": (t.BertForMaskedLM, t.BertConfig, {**text, "vocab_size": MASK + 1}),
        "llama": (t.LlamaForCausalLM, t.LlamaConfig, {**text, "num_key_value_heads": 2}),
        "vit": (t.ViTForImageClassification, t.ViTConfig, image),
        "neox": (t.GPTNeoXForCausalLM, t.GPTNeoXConfig, text),
        "roberta": (t.RobertaForMaskedLM, t.RobertaConfig, {**text, "vocab_size": MASK + 1, "max_position_embeddings": T + 2, "pad_token_id": 1}),
        "mixtral": (t.MixtralForCausalLM, t.MixtralConfig, {**text, "num_hidden_layers": 2, "num_key_value_heads": 2, "num_local_experts": 4}),
        "mamba": (t.MambaForCausalLM, t.MambaConfig, {"vocab_size": V, "hidden_size": D, "num_hidden_layers": 3, "state_size": 4, "expand": 1}),
        "deit": (t.DeiTForImageClassification, t.DeiTConfig, image),
    }  # fmt: skip
    model, config, values = small[name]
    return model(config(**values, **{"bos_token_id": 0, "eos_token_id": 0, **options})).train()


class LowRank(nn.Module):
    """A frozen linear map and a trained low-rank update that starts at zero."""

    def __init__(self, base, rank=4):
        super().__init__()
        self.base, self.lora_a = base.requires_grad_(False), nn.Linear(base.in_features, rank, bias=False)
        self.lora_b = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_b.weight)

    def forward(self, x):
        return self.base(x) + self.lora_b(self.lora_a(x))


def low_rank(model, words):
    """The model frozen, the named linear maps with low-rank updates."""
    model.requires_grad_(False)
    for path in [p for p, m in model.named_modules() if isinstance(m, nn.Linear) and any(w in p for w in words)]:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, LowRank(model.get_submodule(path)))
    return model


class Student(nn.Module):
    """A student that also learns the features of a frozen teacher, which are detached on purpose."""

    def __init__(self):
        super().__init__()
        self.student, self.teacher = ResidualNet(4), ResidualNet(6).requires_grad_(False)

    def forward(self, x):
        return self.student(x)

    def distance(self, x, out):
        """Mean square distance of the student's output from the teacher's."""
        with torch.no_grad():
            wish = self.teacher(x)
        return (out - wish).pow(2).mean()


class Contrast(nn.Module):
    """SimSiam: two views, a predictor, and a stop-gradient on the other side, on purpose."""

    def __init__(self):
        super().__init__()
        self.body, self.predictor = (
            ResidualNet(4, classes=16),
            nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)),
        )

    def forward(self, x):
        a, b = self.body(x + 0.1 * torch.randn_like(x)), self.body(x + 0.1 * torch.randn_like(x))
        cosine = nn.functional.cosine_similarity
        return -(cosine(self.predictor(a), b.detach()).mean() + cosine(self.predictor(b), a.detach()).mean()) / 2


class Routed(nn.Module):
    """Residual top-1 mixture of experts over the rows of a digit."""

    def __init__(self, depth=3, experts=4):
        super().__init__()
        self.embed, self.fc = nn.Linear(8, D), nn.Linear(D, 10)
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(depth))
        self.routers = nn.ModuleList(nn.Linear(D, experts) for _ in range(depth))
        self.experts = nn.ModuleList(
            nn.ModuleList(nn.Sequential(nn.Linear(D, 64), nn.ReLU(), nn.Linear(64, D)) for _ in range(experts))
            for _ in range(depth)
        )

    def forward(self, x):
        x = self.embed(x)
        for norm, router, experts in zip(self.norms, self.routers, self.experts, strict=True):
            h = norm(x).flatten(0, 1)
            weight, choice = router(h).softmax(-1).max(-1)
            mixed = torch.zeros_like(h)
            for i, expert in enumerate(experts):
                chosen = torch.nonzero(choice == i).squeeze(-1)
                if len(chosen):
                    mixed = mixed.index_add(0, chosen, expert(h[chosen]) * weight[chosen, None])
            x = x + mixed.view_as(x)
        return self.fc(x.mean(1))
