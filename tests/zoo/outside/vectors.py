"""Networks of vectors: tables, points, values of actions, pairs, diffusion, experts, flows, highways, a GAN."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from zoo.surgery import initialise


def stack(*sizes, act=nn.ReLU, init=None):
    """Linear maps of these sizes with activations between."""
    layers = []
    for i, o in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(i, o), act()]
    model = nn.Sequential(*layers[:-1])
    return initialise(model, init) if init else model


class ResMLP(nn.Module):
    """Residual MLP for tables; `factor` multiplies each branch (of one block with `only`)."""

    def __init__(self, inputs=30, depth=6, width=40, *, classes=2, norm=True, factor=1.0, only=None, init=None):
        super().__init__()
        self.start, self.finish = nn.Linear(inputs, width), nn.Linear(width, classes)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width) if norm else nn.Identity(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)) for _ in range(depth)
        )
        self.factors = [factor if only in (None, i) else 1.0 for i in range(depth)]
        if init:
            initialise(self, init)

    def forward(self, x):
        x = self.start(x)
        for block, factor in zip(self.blocks, self.factors, strict=True):
            x = x + factor * block(x)
        return self.finish(x)


class PointNet(nn.Module):
    """A map of each point, the largest over points, a head; `lossy` sends the points through NumPy in between."""

    def __init__(self, *, lossy=False):
        super().__init__()
        self.local, self.wide, self.head, self.lossy = stack(3, 32, 32), stack(32, 64, 64), stack(64, 32, 4), lossy

    def forward(self, x):
        x = torch.relu(self.local(x))
        x = torch.tensor(x.detach().numpy()) if self.lossy else x
        return self.head(self.wide(x).amax(1))


class DQN(nn.Module):
    """Values of actions beside those of an older copy of itself, the target."""

    def __init__(self, act=nn.ReLU, width=64):
        super().__init__()
        self.net = stack(8, width, width, width, 2, act=act)
        self.target = copy.deepcopy(self.net).requires_grad_(False)

    def forward(self, states):
        return self.net(states[0]), self.target(states[1])


def bellman(model, batch, *, discount=0.9):
    """Huber loss of the values against reward and discounted value of the next state; the target creeps after."""
    values, later = model(batch[0])
    action, paid = batch[1]
    if model.training and torch.is_grad_enabled():
        with torch.no_grad():
            for old, new in zip(model.target.parameters(), model.net.parameters(), strict=True):
                old.lerp_(new, 0.05)
    return F.smooth_l1_loss(values.gather(1, action[:, None])[:, 0], paid + discount * later.amax(1).detach())


class Siamese(nn.Module):
    """One network for both of a pair; their distance, with `eps` under its root."""

    def __init__(self, *, eps=1e-6, act=nn.ReLU):
        super().__init__()
        self.body, self.eps = stack(256, 64, 64, 32, act=act), eps

    def forward(self, x):
        a, b = self.body(x[:, 0]), self.body(x[:, 1])
        return ((a - b).pow(2).sum(-1) + self.eps).sqrt()


def contrast(model, batch, *, margin=1.0):
    """Contrastive loss (Hadsell et al. 2006): like pairs near, unlike ones a margin apart."""
    distance = model(batch[0])
    return (batch[1] * distance.pow(2) + (1 - batch[1]) * (margin - distance).clamp_min(0).pow(2)).mean()


class Denoiser(nn.Module):
    """Noise of a point of the plane, given how much there is, through residual blocks that are told so."""

    def __init__(self, depth=4, width=48):
        super().__init__()
        self.start, self.finish = nn.Linear(2, width), nn.Linear(width, 2)
        self.time = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)) for _ in range(depth))

    def forward(self, x, t):
        told, x = self.time(t), self.start(x)
        for block in self.blocks:
            x = x + block(x + told)
        return self.finish(x)


def diffusion(model, batch):
    """Mean square error of the noise in points blurred by a random amount."""
    x = batch[0]
    t, noise = torch.rand(len(x), 1), torch.randn_like(x)
    return F.mse_loss(model((1 - t).sqrt() * x + t.sqrt() * noise, t), noise)


class Experts(nn.Module):
    """Two of six experts for each row, chosen by a router, and a loss that balances them; residual."""

    def __init__(self, inputs=10, width=32, experts=6):
        super().__init__()
        self.start, self.router, self.finish = nn.Linear(inputs, width), nn.Linear(width, experts), nn.Linear(width, 1)
        self.experts = nn.ModuleList(stack(width, 48, width) for _ in range(experts))

    def forward(self, x):
        x = torch.tanh(self.start(x))
        best, chosen = self.router(x).topk(2, -1)
        weight = torch.zeros(len(x), len(self.experts)).scatter(1, chosen, best.softmax(-1))
        return self.finish(x + sum(w[:, None] * expert(x) for w, expert in zip(weight.T, self.experts, strict=True)))


class Flow(nn.Module):
    """RealNVP in the plane: couplings that shift and stretch one coordinate by the other; the negative log-likelihood."""

    def __init__(self, depth=6):
        super().__init__()
        self.couplings = nn.ModuleList(stack(1, 32, 32, 2) for _ in range(depth))

    def forward(self, x):
        total = 0.0
        for coupling in self.couplings:
            a, b = x.chunk(2, 1)
            stretch, shift = coupling(a).chunk(2, 1)
            stretch = torch.tanh(stretch)
            x, total = torch.cat([b * stretch.exp() + shift, a], 1), total + stretch.sum(1)
        return (x.pow(2).sum(1) / 2 - total).mean()


class Highway(nn.Module):
    """A highway network (Srivastava et al. 2015), gates that begin nearly closed."""

    def __init__(self, inputs=13, depth=8, width=32, classes=3, *, bias=-2.0):
        super().__init__()
        self.start, self.finish = nn.Linear(inputs, width), nn.Linear(width, classes)
        self.change, self.gate = (nn.ModuleList(nn.Linear(width, width) for _ in range(depth)) for _ in range(2))
        for gate in self.gate:
            nn.init.constant_(gate.bias, bias)

    def forward(self, x):
        x = self.start(x)
        for change, gate in zip(self.change, self.gate, strict=True):
            t = torch.sigmoid(gate(x))
            x = t * torch.relu(change(x)) + (1 - t) * x
        return self.finish(x)


class GAN(nn.Module):
    """A generator of points and its critic."""

    def __init__(self):
        super().__init__()
        self.generator, self.critic = stack(4, 48, 48, 2), stack(2, 48, 48, 1, act=nn.LeakyReLU)

    def forward(self, x):
        return self.critic(x)


def adversarial(model, batch):
    """Both sides' losses at once: the critic sees fakes without their graph, the generator a critic without weights to train."""
    real, fake = batch[0], model.generator(torch.randn(len(batch[0]), 4))
    told = torch.cat([model(real), model(fake.detach())])
    truth = torch.cat([torch.ones(len(real), 1), torch.zeros(len(real), 1)])
    fixed = {n: p.detach() for n, p in model.critic.named_parameters()}
    judged = torch.func.functional_call(model.critic, fixed, (fake,))
    return F.binary_cross_entropy_with_logits(told, truth) + F.softplus(-judged).mean()


class Both:
    """One optimizer for the first group of parameters and another for the second."""

    def __init__(self, groups, lr, kind=torch.optim.Adam, **options):
        self.all = [kind([group], lr=lr, **options) for group in groups]
        self.param_groups = [group for one in self.all for group in one.param_groups]

    def zero_grad(self):
        for one in self.all:
            one.zero_grad()

    def step(self):
        for one in self.all:
            one.step()


class Two(nn.Module):
    """A shared body with a head that is used and another that is not, as when a task was taken out of the loss."""

    def __init__(self, *, used=False):
        super().__init__()
        self.body, self.main, self.side, self.used = stack(10, 48, 48), nn.Linear(48, 1), nn.Sequential(nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 1)), used

    def forward(self, x):
        x = torch.relu(self.body(x))
        side = self.side(x)
        return self.main(x) + side if self.used else self.main(x)


class Normed(nn.Module):
    """Features standardised over the batch by hand, with `eps` beside the spread."""

    def __init__(self, eps):
        super().__init__()
        self.first, self.second, self.eps = nn.Linear(13, 32), nn.Linear(32, 3), eps

    def forward(self, x):
        x = self.first(x)
        x = (x - x.mean(0)) / ((x - x.mean(0)).pow(2).mean(0) + self.eps).sqrt()
        return self.second(torch.relu(x))
