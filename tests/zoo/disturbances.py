"""Rates, batches and parameter groups that make a training sick."""


def after_step(step, factor):
    """A factor from a step on, 1 before."""
    return lambda now: factor if now >= step else 1.0


def louder(step, factor):
    """One batch whose inputs are far too large."""
    return lambda now, batch: (batch[0] * factor, batch[1]) if now == step else batch


def without(word):
    """All parameters but those whose names hold the word."""
    return lambda model: [p for n, p in model.named_parameters() if word not in n]


def split(word, lr):
    """Two groups of parameters: those whose names hold the word have a learning rate of their own."""

    def groups(model):
        named = list(model.named_parameters())
        return [
            {"params": [p for n, p in named if word not in n]},
            {"params": [p for n, p in named if word in n], "lr": lr},
        ]

    return groups


def at_steps(steps, factor):
    """A factor at some steps, 1 at all others."""
    return lambda now: factor if now in steps else 1.0
