"""Measurements in plain PyTorch that prove a sickness of the zoo, without gradflow: hooks, autograd, arithmetic.

Each function takes a finished training (`zoo.training.Trained`) and returns the figure and whether it proves the label.
"""

from __future__ import annotations

import math

import torch


class Watch:
    """Inputs, outputs and their gradients of named modules over one forward and backward pass."""

    def __init__(self, trained, paths, *, initial=False, batch=None):
        self.model = trained.initial if initial else trained.model
        self.inputs, self.outputs, self.grads = {}, {}, {}
        handles = [self.model.get_submodule(path).register_forward_hook(self._keep(path)) for path in paths]
        self.model.zero_grad(set_to_none=True)
        (
            trained.loss(self.model, trained.batches[0] if batch is None else batch)
            * trained.setup.scale(trained.setup.steps)
        ).backward()
        for handle in handles:
            handle.remove()

    def _keep(self, path):
        def hook(module, args, out):
            out = out[0] if isinstance(out, tuple) else out
            self.inputs[path] = args[0].detach() if args else None
            self.outputs.setdefault(path, out.detach())
            if out.requires_grad:
                out.register_hook(lambda g: self.grads.update({path: g.detach()}))

        return hook


def rms(x):
    return float(x.double().pow(2).mean().sqrt())


def _within(value, below, above):
    return value, math.isfinite(value) and (below is None or value < below) and (above is None or value > above)


def gradient(first, last, *, below=None, above=None, initial=False):
    """RMS gradient at one module's output over that at a later one's."""

    def proof(trained):
        watch = Watch(trained, [first, last], initial=initial)
        return _within(rms(watch.grads[first]) / max(rms(watch.grads[last]), 1e-300), below, above)

    return proof


def signal(first, last, *, below=None, above=None, initial=False):
    """Mean square of one module's output over that of an earlier one's."""

    def proof(trained):
        watch = Watch(trained, [first, last], initial=initial)
        return _within((rms(watch.outputs[last]) / rms(watch.outputs[first])) ** 2, below, above)

    return proof


def branch(cell, *, part=None, below=None, above=None):
    """RMS of what a residual cell adds (or of one part's output) over that of what enters it."""

    def proof(trained):
        watch = Watch(trained, [cell, *([part] if part else [])])
        added = watch.outputs[part] if part else watch.outputs[cell] - watch.inputs[cell]
        return _within(rms(added) / rms(watch.inputs[cell]), below, above)

    return proof


def kept(cells, *, above):
    """Median cosine between what enters and what leaves residual cells."""

    def proof(trained):
        watch = Watch(trained, cells)
        cosine = torch.nn.functional.cosine_similarity
        values = [cosine(watch.inputs[c].flatten(), watch.outputs[c].flatten(), dim=0).item() for c in cells]
        return _within(float(torch.tensor(values).median()), None, above)

    return proof


def no_gradient(prefix, cell):
    """Parameters under a prefix get no gradient though the module's output is alive; others do."""

    def proof(trained):
        watch = Watch(trained, [cell])
        inside = [p.grad for n, p in watch.model.named_parameters() if n.startswith(prefix) and p.requires_grad]
        others = [p.grad for n, p in watch.model.named_parameters() if not n.startswith(prefix) and p.grad is not None]
        none = all(g is None or not g.any() for g in inside)
        return float(rms(watch.outputs[cell])), bool(inside) and none and any(g.any() for g in others) and rms(
            watch.outputs[cell]
        ) > 0

    return proof


def unmoved(word):
    """Parameters whose names hold a word end exactly as they began, though they require gradients."""

    def proof(trained):
        before = dict(trained.initial.named_parameters())
        moved = {
            n: float((p - before[n]).detach().abs().max())
            for n, p in trained.model.named_parameters()
            if p.requires_grad
        }
        inside = [v for n, v in moved.items() if word in n]
        return max(inside), max(inside) == 0 and max(moved.values()) > 0

    return proof


def dead(path, *, above):
    """Share of a module's units that are zero on every position of all held-out batches."""

    def proof(trained):
        alive = None
        for batch in trained.batches:
            out = Watch(trained, [path], batch=batch).outputs[path]
            out = out.movedim(1, -1) if out.dim() == 4 else out
            here = (out.flatten(0, -2) != 0).any(0)
            alive = here if alive is None else alive | here
        return _within(1 - alive.double().mean().item(), None, above)

    return proof


def at_ends(path, *, low, high, above):
    """Share of a module's output beyond the ends of its useful range."""

    def proof(trained):
        out = Watch(trained, [path]).outputs[path]
        return _within(((out < low) | (out > high)).double().mean().item(), None, above)

    return proof


def alike(path, *, above, initial=False):
    """Mean off-diagonal cosine between the positions of a sequence at a module's output."""

    def proof(trained):
        x = torch.nn.functional.normalize(Watch(trained, [path], initial=initial).outputs[path].double(), dim=-1)
        n = x.shape[1]
        cosine = ((x @ x.mT).sum((1, 2)) - n) / (n * (n - 1))
        return _within(cosine.mean().item(), None, above)

    return proof


def _logits(trained, query, key, heads):
    watch = Watch(trained, list(dict.fromkeys([query, key])))
    q, k = watch.outputs[query], watch.outputs[key]
    if query == key:
        q, k, _ = q.chunk(3, -1)
    q, k = (x.unflatten(-1, (-1, k.shape[-1] // heads)).transpose(1, 2).double() for x in (q, k))
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return q @ k.mT / math.sqrt(q.shape[-1])


def _causal(logits, causal):
    hidden = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    return logits.masked_fill(hidden, -torch.inf) if causal else logits


def one_hot(query, key, *, below, heads=4, causal=True, times=1.0):
    """Entropy of attention over ln(keys), from queries and keys multiplied by hand, and `times` more."""

    def proof(trained):
        p = _causal(times * _logits(trained, query, key, heads), causal).softmax(-1)[:, :, 4:]
        entropy = -(p * p.clamp_min(1e-300).log()).sum(-1)
        keys = torch.arange(5, 5 + p.shape[2]).double() if causal else torch.tensor(p.shape[-1]).double()
        return _within((entropy / keys.log()).mean().item(), below, None)

    return proof


def logit(query, key, *, above, heads=4, causal=True):
    """Largest attention logit, from queries and keys multiplied by hand."""

    def proof(trained):
        return _within(_causal(_logits(trained, query, key, heads), causal).max().item(), None, above)

    return proof


def spiked(step, *, above):
    """Gradient norm of a step over the median of the twenty before."""

    def proof(trained):
        before = torch.tensor(trained.norms[step - 20 : step]).median().item()
        return _within(trained.norms[step] / before, None, above)

    return proof


def outgrown(step, *, above):
    """Largest finite gradient norm from a step on over the median before it."""

    def proof(trained):
        late = [v for v in trained.norms[step:] if math.isfinite(v)]
        return _within(max(late) / torch.tensor(trained.norms[:step]).median().item(), None, above)

    return proof


def broke(step, *, backward=False):
    """First step with a loss, or a gradient, that is not finite."""

    def proof(trained):
        bad = [
            i
            for i, (l, g) in enumerate(zip(trained.losses, trained.norms, strict=True))
            if not math.isfinite(g if backward else l)
        ]
        fine = backward is False or math.isfinite(trained.losses[step])
        return (bad[0] if bad else -1), bool(bad) and bad[0] == step and fine

    return proof


def tiny_gradient(eps):
    """Median over matrices of the RMS gradient over the optimizer's eps, at the end."""

    def proof(trained):
        model = Watch(trained, []).model
        values = [rms(p.grad) for p in model.parameters() if p.dim() > 1 and p.grad is not None]
        return _within(torch.tensor(values).median().item() / eps, 1.0, None)

    return proof


def underflowed(word, *, above):
    """Share of a weight gradient that is exactly zero in half precision and not in float32."""

    def proof(trained):
        half = {n: p.grad.clone() for n, p in Watch(trained, []).model.named_parameters() if word in n and p.dim() > 1}
        setup, trained.setup = trained.setup, trained.setup.but(autocast=None)
        full = {n: p.grad for n, p in Watch(trained, []).model.named_parameters() if n in half}
        trained.setup = setup
        lost = [((half[n] == 0) & (full[n] != 0)).double().mean().item() for n in half]
        return _within(max(lost), None, above)

    return proof


def moved(*, below=None, above=None):
    """Median over matrices of the last step's change over the weight."""
    return lambda trained: _within(trained.update, below, above)


def massive(path, *, above):
    """Largest over median absolute element of a module's output."""

    def proof(trained):
        x = Watch(trained, [path]).outputs[path].abs()
        return _within((x.max() / x.median()).item(), None, above)

    return proof


def blown(*, above):
    """Median over matrices of the weight's norm at the end over that at the start."""

    def proof(trained):
        before = dict(trained.initial.named_parameters())
        growth = [(p.norm() / before[n].norm()).item() for n, p in trained.model.named_parameters() if p.dim() > 1]
        return _within(torch.tensor(growth).median().item(), None, above)

    return proof
