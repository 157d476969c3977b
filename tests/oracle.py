"""An independent oracle: every column of the recorded tables from explicit forward passes and plain autograd, in float64.

Nothing here is shared with gradflow. A net is written out by hand over a `Tape`; each tensor whose gradient is asked for
is retained. What comes back along a path is the gradient of a view that only that path reads.
"""

from dataclasses import dataclass, field

import torch


def own(x):
    """The same values as a tensor of their own, so that its gradient is that of one path alone."""
    seen = x.view_as(x)
    if seen.requires_grad:
        seen.retain_grad()
    return seen


def kept(x):
    if x.requires_grad:
        x.retain_grad()
    return x


@dataclass
class Join:
    fork: torch.Tensor
    along: torch.Tensor
    through: list
    skip: torch.Tensor
    branches: list
    out: torch.Tensor


@dataclass
class Tape:
    joins: list = field(default_factory=list)
    layers: list = field(default_factory=list)  # (name or None, kind, output, activation)

    def join(self, fork, *branches, skip=lambda s: s, scales=None, blocked=False):
        """y = skip(fork) + Σ scale·branch(fork), every part retained."""
        fork = kept(fork)
        along = fork.detach() if blocked else own(fork)
        through = [own(fork) for _ in branches]
        a = skip(along)
        scales = scales or [1.0] * len(branches)
        parts = [scale * branch(start) for scale, branch, start in zip(scales, branches, through)]
        out = a
        for part in parts:
            out = out + part
        self.joins.append(Join(fork, along, through, a, parts, kept(out)))
        return out

    def layer(self, out, kind="", activation=False):
        self.layers.append((kind, kept(out), activation))
        return out


def square(x):
    return float(x.detach().double().square().sum())


def product(x, y):
    return float((x.detach().double() * y.detach().double()).sum())


def gradient(x):
    if x.grad is None:
        return None
    return x.grad.detach()


def branch_columns(join, number):
    """Raw columns of one branch by their definitions."""
    a, f, y = (t.detach() for t in (join.skip, join.branches[number], join.out))
    a, f = a.expand(y.shape), f.expand(y.shape)
    row = {
        "n": y.numel(), "skip_sq": square(a), "branch_sq": square(f), "dot": product(a, f), "out_sq": square(y),
        "out_max": float(y.abs().max()) if y.numel() else 0.0,
        "nonfinite": int((~torch.isfinite(y)).sum()),
    }
    at_out, at_fork = gradient(join.out), gradient(join.fork)
    row["grad_out_sq"] = None if at_out is None else square(at_out)
    row["grad_fork_sq"] = row["grad_branch_sq"] = row["grad_dot"] = None
    if at_fork is not None:
        row["grad_fork_sq"] = square(at_fork)
        back = gradient(join.along)
        rest = at_fork if back is None else at_fork - back
        row["grad_branch_sq"] = square(rest)
        row["grad_dot"] = None if back is None else product(back, rest)
    return row


def signal_shares(joins):
    """Shares of the start and of every branch in the end of a chain of joins x_L = x_0 + Σ f."""
    end = joins[-1].out.detach()
    parts = [joins[0].skip, *(f for join in joins for f in join.branches)]
    return [product(part.expand(end.shape), end) / square(end) for part in parts]


def gradient_shares(joins):
    """Shares of the end's gradient and of what came back through every branch in the gradient at the start."""
    first = gradient(joins[0].fork)
    end = gradient(joins[-1].out) if len(joins) > 1 else gradient(joins[0].along)
    parts = [end]
    for join in joins:
        back = gradient(join.fork) - gradient(join.along)
        others = [gradient(t) for t in join.through[1:]]
        parts += [back - sum(others) if others else back, *others]
    return [product(part, first) / square(first) for part in parts]


SATURATES = {
    "tanh": lambda y: y.abs() > 0.97, "sigmoid": lambda y: (y < 0.03) | (y > 0.97),
    "Tanh": lambda y: y.abs() > 0.97, "Sigmoid": lambda y: (y < 0.03) | (y > 0.97),
}


def layer_columns(kind, out, activation, channel=-1):
    """Raw columns of one layer."""
    y, g = out.detach(), gradient(out)
    row = {
        "kind": kind, "n": y.numel(), "out_sum": float(y.double().sum()), "out_sq": square(y),
        "out_max": float(y.abs().max()), "zeros": int((y == 0).sum()), "nonfinite": int((~torch.isfinite(y)).sum()),
        "grad_out_sq": None if g is None else square(g), "grad_zeros": None if g is None else int((g == 0).sum()),
        "saturated": None, "units": None, "dead_units": None,
    }
    if activation:
        live = (y != 0).movedim(channel, -1).reshape(-1, y.shape[channel]).any(0)
        row["units"], row["dead_units"] = live.numel(), int((~live).sum())
        if kind in SATURATES:
            row["saturated"] = int(SATURATES[kind](y).sum())
    return row


def geometry(x, channel=-1):
    """Geometry of a tensor whose positions all fit into the sample: (sequence, position, width)."""
    x = x.detach().double().movedim(channel, -1)
    x = x.reshape(x.shape[0], -1, x.shape[-1]) if x.dim() > 2 else x[None]
    cosines = []
    for sequence in x:
        pairs = [
            torch.dot(a, b) / (a.norm() * b.norm())
            for i, a in enumerate(sequence) for j, b in enumerate(sequence) if i != j
        ]
        cosines.append(torch.stack(pairs).mean())
    flat = x.reshape(-1, x.shape[-1])
    sigma = torch.linalg.svdvals(flat)
    p = sigma / sigma.sum()
    p = p[p > 1e-13]
    values = flat.flatten()
    return {
        "token_cosine": float(torch.stack(cosines).mean()),
        "effective_rank": float(torch.exp(-(p * p.log()).sum())),
        "kurtosis": float((values**4).mean() / (values**2).mean() ** 2),
        "max_over_median": float(values.abs().max() / values.abs().sort().values[(values.numel() - 1) // 2]),
    }


def stream_columns(x, channel=-1, sequences=True):
    """Raw columns of a stream's point besides its shares."""
    g = gradient(x)
    row = {"n": x.numel(), "out_sq": square(x), "grad_sq": None if g is None else square(g), **geometry(x, channel)}
    if not sequences:
        row["token_cosine"] = None
    return row


def attention_columns(q, k, *, scale=None, mask=None, causal=False, softcap=None):
    """Columns of an attention call over all heads and queries: q (..., heads, queries, width), k likewise."""
    q, k = q.detach().double(), k.detach().double()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = torch.einsum("...qd,...kd->...qk", q, k) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    allowed = torch.ones_like(logits, dtype=torch.bool)
    if causal:
        allowed = torch.ones(logits.shape[-2:], dtype=torch.bool).tril().expand_as(logits)
    if mask is not None and mask.dtype == torch.bool:
        allowed = allowed & mask
    elif mask is not None:
        logits = logits + mask
        allowed = allowed & (mask > -1e4)
    entropy = torch.zeros(logits.shape[:-1], dtype=torch.float64)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in logits.shape[:-1])).tolist():
        z = logits[tuple(place)][allowed[tuple(place)]]
        p = torch.exp(z - z.logsumexp(0))
        entropy[tuple(place)] = -(p * p.log()).sum()
    heads = entropy.mean(-1)
    heads = heads.reshape(-1, heads.shape[-1]).mean(0)
    return {
        "entropy": float(entropy.mean()), "entropy_min": float(heads.min()), "logit_max": float(logits[allowed].max()),
        "keys": float(allowed.sum(-1).double().mean()),
    }
