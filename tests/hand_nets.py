"""Nets that join in every way, each written twice: as a module does it, and by hand over the tape of `oracle.py`."""

import torch
import torch.nn.functional as F
from torch import nn

D = 12


class Sublayer(nn.Module):
    def __init__(self, width=D, hidden=20):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """`layers` sublayers behind an input map; a subclass says how they join, once for the net and once by hand."""

    count, shape = 3, (2, 7, D)

    def __init__(self):
        super().__init__()
        self.inp = nn.Linear(D, D)
        self.sub = nn.ModuleList(Sublayer() for _ in range(self.count))
        self.out = nn.Linear(D, 3)

    def forward(self, x):
        return self.out(self.joined(self.inp(x)))

    def by_hand(self, x, tape):
        return self.out(self.listed(self.inp(x), tape))

    def joined(self, x):
        for f in self.sub:
            x = x + f(x)
        return x

    def listed(self, x, tape):
        for f in self.sub:
            x = tape.join(x, f)
        return x


class PreNorm(Net):
    """The plain case."""


class Swapped(Net):
    """The branch stands on the left of the sum."""

    def joined(self, x):
        for f in self.sub:
            x = f(x) + x
        return x


class ScaledSkip(Net):
    """The skip is measured after its scaling."""

    def joined(self, x):
        for f in self.sub:
            x = 0.5 * x + f(x)
        return x

    def listed(self, x, tape):
        for f in self.sub:
            x = tape.join(x, f, skip=lambda s: 0.5 * s)
        return x


class LearnedGain(Net):
    """The skip passes a learned per-channel gain, and the branch a scalar one."""

    def __init__(self):
        super().__init__()
        self.gain, self.scale = nn.Parameter(torch.rand(D) + 0.5), nn.Parameter(torch.tensor(0.3))

    def joined(self, x):
        for f in self.sub:
            x = self.gain * x + self.scale * f(x)
        return x

    def listed(self, x, tape):
        for f in self.sub:
            x = tape.join(x, lambda t, f=f: self.scale * f(t), skip=lambda s: self.gain * s)
        return x


class Subtracted(Net):
    """A subtracted branch carries its sign."""

    def joined(self, x):
        for f in self.sub:
            x = x - f(x)
        return x

    def listed(self, x, tape):
        for f in self.sub:
            x = tape.join(x, f, scales=[-1.0])
        return x


class Alpha(Net):
    """The factor of `alpha=` belongs to the operand; in-place and out of place."""

    def joined(self, x):
        x = torch.add(x, self.sub[0](x), alpha=0.25)
        x = torch.sub(x, self.sub[1](x), alpha=2.0)
        return x.clone().add_(self.sub[2](x), alpha=-1.5)

    def listed(self, x, tape):
        for f, scale in zip(self.sub, (0.25, -2.0, -1.5)):
            x = tape.join(x, f, scales=[scale])
        return x


class InPlace(Net):
    """The sum overwrites an operand: the skip twice, the branch once."""

    def joined(self, x):
        h = self.sub[0](x)
        x = x.clone()
        x += h
        h = self.sub[1](x)
        x = x.clone().add_(h)
        h = self.sub[2](x)
        h += x
        return h


class OverwrittenView(Net):
    """The skip that is overwritten is a view (as a linear map of three axes gives): autograd leads past its own node."""

    def __init__(self):
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(D, D) for _ in self.sub)

    def joined(self, x):
        for f in self.maps:
            x = F.linear(x, f.weight, f.bias)
            h = torch.tanh(f(x * 2))
            x += h
        return x

    def listed(self, x, tape):
        for f in self.maps:
            x = tape.join(F.linear(x, f.weight, f.bias), lambda t, f=f: torch.tanh(f(t * 2)))
        return x


class Parallel(Net):
    """Several branches in one sum, in four orders of association."""

    count = 8

    def joined(self, x):
        a = self.sub
        x = x + a[0](x) + a[1](x)
        x = a[2](x) + (x + a[3](x))
        x = x + (a[4](x) + a[5](x))
        y = a[6](x) + a[7](x)
        y += x
        return y

    def listed(self, x, tape):
        a = self.sub
        for first, second in ((0, 1), (2, 3), (4, 5), (6, 7)):
            x = tape.join(x, a[first], a[second])
        return x


class ForkOfTwo(Net):
    """One fork feeds two joins."""

    def joined(self, x):
        left, right = x + self.sub[0](x), x + self.sub[1](x)
        return self.sub[2](left) * right

    def listed(self, x, tape):
        left, right = tape.join(x, self.sub[0]), tape.join(x, self.sub[1])
        return self.sub[2](left) * right


class Nested(Net):
    """A join inside a branch (an adapter)."""

    def joined(self, x):
        h = self.sub[0](x)
        h = h + self.sub[1](h)
        return x + self.sub[2](h)

    def listed(self, x, tape):
        def branch(t):
            return self.sub[2](tape.join(self.sub[0](t), self.sub[1]))

        return tape.join(x, branch)


class Shared(Net):
    """One module called three times."""

    count = 1

    def joined(self, x):
        for _ in range(3):
            x = x + self.sub[0](x)
        return x

    def listed(self, x, tape):
        for _ in range(3):
            x = tape.join(x, self.sub[0])
        return x


class DetachedBranch(Net):
    """No gradient comes back through the second branch."""

    def joined(self, x):
        x = x + self.sub[0](x)
        x = x + self.sub[1](x).detach()
        return x + self.sub[2](x)

    def listed(self, x, tape):
        x = tape.join(x, self.sub[0])
        x = tape.join(x, lambda t: self.sub[1](t).detach())
        return tape.join(x, self.sub[2])


class DetachedSkip(Net):
    """No gradient comes back along the second skip."""

    def joined(self, x):
        x = x + self.sub[0](x)
        x = x.detach() + self.sub[1](x)
        return x + self.sub[2](x)

    def listed(self, x, tape):
        x = tape.join(x, self.sub[0])
        x = tape.join(x, self.sub[1], blocked=True)
        return tape.join(x, self.sub[2])


class PostNorm(Net):
    """The norm stands on the stream."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in self.sub)

    def joined(self, x):
        for f, norm in zip(self.sub, self.norms):
            x = norm(x + f(x))
        return x

    def listed(self, x, tape):
        for f, norm in zip(self.sub, self.norms):
            x = norm(tape.join(x, f))
        return x


class Broadcast(Net):
    """The branch is one row for the whole sequence."""

    def joined(self, x):
        for f in self.sub:
            x = x + f(x.mean(1, keepdim=True))
        return x

    def listed(self, x, tape):
        for f in self.sub:
            x = tape.join(x, lambda t, f=f: f(t.mean(1, keepdim=True)))
        return x


class FromInput(Net):
    """The fork is the model's input, which autograd does not follow."""

    def forward(self, x):
        return self.out(self.joined(x))

    def by_hand(self, x, tape):
        return self.out(self.listed(x, tape))


class SmallBranch(Net):
    """A branch that carries a thousandth of the gradient."""

    def joined(self, x):
        for f in self.sub:
            x = x + 1e-3 * f(x)
        return x

    def listed(self, x, tape):
        for f in self.sub:
            x = tape.join(x, lambda t, f=f: 1e-3 * f(t))
        return x


class Stacked(Net):
    """A sum over a stack: of the skip and a branch, of two branches and the skip between them."""

    count = 4

    def joined(self, x):
        a = self.sub
        x = torch.stack([x, a[0](x)]).sum(0)
        x = torch.stack([a[1](x), x], dim=-1).sum(-1)
        return torch.stack([a[2](x), x, a[3](x)], dim=1).sum(dim=1)

    def listed(self, x, tape):
        a = self.sub
        return tape.join(tape.join(tape.join(x, a[0]), a[1]), a[2], a[3])


class FusedProduct(Net):
    """The branch is a product, or a quotient, that no tensor holds; once the sum overwrites the skip."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.rand(D) + 0.5)

    def joined(self, x):
        x = torch.addcmul(x, self.gain, self.sub[0](x), value=0.5)
        h = self.sub[1](x)
        x = x.clone().addcmul_(h, torch.sigmoid(h), value=-2)
        return torch.addcdiv(x, self.sub[2](x), self.gain)

    def listed(self, x, tape):
        def gated(t):
            h = self.sub[1](t)
            return h * torch.sigmoid(h)

        x = tape.join(x, lambda t: self.gain * self.sub[0](t), scales=[0.5])
        x = tape.join(x, gated, scales=[-2.0])
        return tape.join(x, lambda t: self.sub[2](t) / self.gain)


class FusedMap(Net):
    """The branch's last map and the sum are one operation, with a factor for each operand."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(2, D, D) / 3)

    def joined(self, x):
        for f in self.sub:
            x = torch.baddbmm(x, f(x), self.w, beta=0.5, alpha=2)
        return x

    def listed(self, x, tape):
        for f in self.sub:
            x = tape.join(x, lambda t, f=f: f(t) @ self.w, skip=lambda s: 0.5 * s, scales=[2.0])
        return x


class Interpolated(Net):
    """(1 - w)·x + w·f(x) in one operation, with a number and with a learned weight, and the other way round."""

    def __init__(self):
        super().__init__()
        self.share = nn.Parameter(torch.tensor(0.3))

    def joined(self, x):
        x = torch.lerp(x, self.sub[0](x), 0.25)
        x = torch.lerp(x, self.sub[1](x), self.share)
        return self.sub[2](x).lerp(x, 0.25)

    def listed(self, x, tape):
        x = tape.join(x, self.sub[0], skip=lambda s: 0.75 * s, scales=[0.25])
        x = tape.join(x, lambda t: self.share * self.sub[1](t), skip=lambda s: (1 - self.share) * s)
        return tape.join(x, self.sub[2], skip=lambda s: 0.25 * s, scales=[0.75])


class Projection(Net):
    """The skip is mapped."""

    count = 0

    def __init__(self):
        super().__init__()
        self.short, self.up, self.down = nn.Linear(D, 5), nn.Linear(D, 9), nn.Linear(9, 5)
        self.out = nn.Linear(5, 3)

    def joined(self, x):
        return self.short(x) + self.down(torch.relu(self.up(x)))

    def listed(self, x, tape):
        return tape.join(x, lambda t: self.down(torch.relu(self.up(t))), skip=self.short)


NETS = [
    PreNorm, Swapped, OverwrittenView, ScaledSkip, LearnedGain, Subtracted, Alpha, InPlace, Parallel, ForkOfTwo, Nested, Shared,
    DetachedBranch, DetachedSkip, PostNorm, Broadcast, FromInput, SmallBranch, Projection, Stacked, FusedProduct, FusedMap,
    Interpolated,
]  # fmt: skip


class Conv(nn.Module):
    """Convolutions: features stand at axis 1."""

    def __init__(self):
        super().__init__()
        self.inp = nn.Conv2d(3, 8, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))

    def forward(self, x):
        x = self.inp(x)
        for conv, norm in zip(self.convs, self.norms):
            x = x + conv(F.relu(norm(x)))
        return x

    def by_hand(self, x, tape):
        x = self.inp(x)
        for conv, norm in zip(self.convs, self.norms):
            x = tape.join(x, lambda t, conv=conv, norm=norm: conv(F.relu(norm(t))))
        return x
