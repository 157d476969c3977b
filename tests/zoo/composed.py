"""Models made of models: teachers, views, experts, averages, heads."""

from __future__ import annotations

import copy

import torch
from torch import nn

from zoo.data import D, V
from zoo.dense import mlp
from zoo.library import library
from zoo.residual import ResidualNet


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


class Averaged(nn.Module):
    """A network beside an untrained copy of itself that still requires gradients, as careless averaging leaves it."""

    def __init__(self):
        super().__init__()
        self.net = ResidualNet(4, inputs=16, classes=4)
        self.average = copy.deepcopy(self.net)

    def forward(self, x):
        return self.net(x)


class Policy(nn.Module):
    """A tanh trunk with two heads, as in reinforcement learning."""

    def __init__(self):
        super().__init__()
        self.trunk, self.policy, self.value = mlp(2, nn.Tanh, inputs=16, width=64, classes=64), nn.Linear(64, 4), nn.Linear(64, 1)

    def forward(self, x):
        x = torch.tanh(self.trunk(x))
        return self.policy(x), self.value(x)


class VAE(nn.Module):
    """Mean and deviation, a sample, and what is made of it."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = mlp(2, inputs=16, classes=8), mlp(2, inputs=4, classes=16)

    def forward(self, x):
        mean, log = self.encoder(x).chunk(2, -1)
        return self.decoder(mean + torch.randn_like(mean) * (log / 2).exp()), mean, log


class WithPooler(nn.Module):
    """BERT whose pooler runs and is not used."""

    def __init__(self):
        super().__init__()
        self.bert, self.head = library("bert-model"), nn.Linear(D, V)

    def forward(self, tokens):
        return self.head(self.bert(tokens).last_hidden_state)
