"""Rates, batches and parameter groups that make a training sick."""


def after_step(step, factor):
    return lambda now: factor if now >= step else 1.0


def louder(step, factor):
    """One batch whose inputs are far too large."""
    return lambda now, batch: (batch[0] * factor, batch[1]) if now == step else batch


def without(word):
    return lambda model: [p for n, p in model.named_parameters() if word not in n]


def split(word, lr):
    def groups(model):
        named = list(model.named_parameters())
        return [
            {"params": [p for n, p in named if word not in n]},
            {"params": [p for n, p in named if word in n], "lr": lr},
        ]

    return groups
