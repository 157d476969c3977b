"""Real trainings for tests: tiny models of every kind, and a Trainer that does nothing but train."""

from __future__ import annotations

import random
import warnings
from types import SimpleNamespace

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from gradflow.callbacks import GradientFlowMonitor

WIDTH, TOKENS, BATCH = 8, 5, 4


def seed(value: int = 0) -> None:
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def random_states() -> tuple:
    state = np.random.get_state()
    return random.getstate(), (state[0], state[1].tobytes(), *state[2:]), torch.get_rng_state().tolist()


# ---------------------------------------------------------------- models


class Block(nn.Module):
    """A pre-norm attention and MLP block of plain modules, with dropout."""

    def __init__(self, width: int = WIDTH, dropout: float = 0.1) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 2, dropout=dropout, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * width, width))

    def forward(self, x):
        h = self.norm1(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    def __init__(self, layers: int = 2, checkpointing: str = "no", dropout: float = 0.1) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block(dropout=dropout) for _ in range(layers))
        self.head = nn.Linear(WIDTH, 3)
        self.checkpointing = checkpointing

    def forward(self, x):
        x = self.inner(x)
        for block in self.blocks:
            if self.checkpointing == "no":
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.checkpointing == "reentrant")
        return self.head(x)


class ResidualMLP(nn.Module):
    """The smallest residual network: x + relu(linear(x)), twice, in place if asked."""

    def __init__(self, inplace: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, 3)
        self.inplace, self.dropout = inplace, dropout

    def forward(self, x):
        x = self.inner(x)
        for layer in self.layers:
            f = F.dropout(F.relu(layer(x), inplace=self.inplace), self.dropout, self.training)
            if self.inplace:
                f += x
                x = f
            else:
                x = x + f
        return self.head(x)


class ConvBlock(nn.Module):
    def __init__(self, width: int, project: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential(nn.Conv2d(width, width, 1), nn.BatchNorm2d(width)) if project else nn.Identity()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.shortcut(x)
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.layer = nn.Sequential(ConvBlock(4, False), ConvBlock(4, True))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.layer(self.stem(x.reshape(x.shape[0], 1, x.shape[1], -1)))
        return self.head(x.mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.rnn = kind(WIDTH, WIDTH, num_layers=2, batch_first=True, dropout=0.1)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        return self.head(x + self.rnn(x)[0])


class Shared(nn.Module):
    """One block called three times, and a head tied to the input map."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH, bias=False)
        self.block = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU())
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head.weight = self.inner.weight

    def forward(self, x):
        x = self.inner(x)
        for _ in range(3):
            x = x + self.block(x)
        return self.head(x)


class StochasticDepth(nn.Module):
    """Branches are dropped at random: the graph changes from step to step."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            if random.random() < 0.7:
                x = x + torch.tanh(layer(x)) * (np.random.rand() + 0.5)
        return x + self.layers[0](x)


# ---------------------------------------------------------------- Lightning modules


class Task(pl.LightningModule):
    """Trains a model on noise: cross entropy of its output against fixed labels."""

    def __init__(self, net: nn.Module, optimizer: str = "adamw", loss=None) -> None:
        super().__init__()
        self.net = net
        self.optimizer = optimizer
        self.loss = loss
        self.losses: list = []

    def forward(self, x):
        return self.net(x)

    def computed(self, batch):
        out = self.net(batch)
        return out.float().square().mean() + out.float().mean() if self.loss is None else self.loss(self, out)

    def training_step(self, batch, batch_idx):
        loss = self.computed(batch)
        self.losses.append(loss.detach().clone())
        return loss

    def validation_step(self, batch, batch_idx):
        return self.computed(batch)

    test_step = predict_step = validation_step

    def configure_optimizers(self):
        make = {
            "adamw": lambda p: torch.optim.AdamW(p, 1e-2), "sgd": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9),
            "lbfgs": lambda p: torch.optim.LBFGS(p, 0.1, max_iter=3), "fused": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
        }[self.optimizer]
        return make([p for p in self.parameters() if p.requires_grad])


def batches(count: int = 6, shape: tuple[int, ...] = (TOKENS, WIDTH), batch: int = BATCH, number: int = 7) -> DataLoader:
    generator = torch.Generator().manual_seed(number)
    return DataLoader(torch.randn(count * batch, *shape, generator=generator), batch_size=batch)


def trainer(root, *callbacks, namespace=pl, **options):
    """A Trainer that only trains; options of the Trainer override."""
    settings = {
        "max_epochs": 1, "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": str(root), "callbacks": list(callbacks),
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return namespace.Trainer(**(settings | options))


def half() -> dict:
    """Trainer options for fp16 autocast with a loss scaler on the CPU, which Lightning would turn into bfloat16."""
    return {"plugins": [pl.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]}


def fit(made, module, data=None, validation=None, **options):
    """`Trainer.fit` without Lightning's own warnings (workers of a loader, deprecations inside it)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.fit(module, batches() if data is None else data, validation, **options)
    return module


def monitor(root, every: int = 1, **options) -> GradientFlowMonitor:
    options = {"report": False, "on_finding": "ignore", "strict": True} | options
    return GradientFlowMonitor(root / "gradflow", every_n_steps=every, **options)


def trained(tmp_path, make, *, every=None, data=None, validation=None, callbacks=(), start=0, **options):
    """Train a fresh `make()` with (a cadence) or without (None) the monitor: all that training leaves behind."""
    seed(start)
    module = make()
    watching = [] if every is None else [monitor(tmp_path / str(every), every)]
    made = trainer(tmp_path / str(every), *(c() for c in callbacks), *watching, **options)
    fit(made, module, data() if data else None, validation() if validation else None)
    return SimpleNamespace(
        module=module, trainer=made, monitor=watching[0] if watching else None, state=module.state_dict(),
        optimizers=[o.state_dict() for o in made.optimizers], losses=list(getattr(module, "losses", ())),
        random=random_states(),
        gradients={n: p.grad for n, p in module.named_parameters()},
    )  # fmt: skip


def same(a, b) -> bool:
    """Whether two nested values are equal, tensors bit for bit (NaN equals NaN)."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and _bits(a) == _bits(b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def _bits(x: torch.Tensor) -> bytes:
    return x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# ---------------------------------------------------------------- what must not remain

HOOKS = [
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs",
]  # fmt: skip


def traces(model: nn.Module, *optimizers) -> dict:
    """Everything that a monitor could leave on a model, on its optimizers and in the process, in a comparable form."""
    from torch.nn.modules import module as globally

    found = {f"{name}.{kind}": len(getattr(m, kind)) for name, m in model.named_modules() for kind in HOOKS if getattr(m, kind, None)}
    found |= {f"{name}.__dict__": sorted(vars(m)) for name, m in model.named_modules()}
    found |= {f"{name}.training": m.training for name, m in model.named_modules()}
    found |= {f"{name}.hooks": len(p._backward_hooks or ()) for name, p in model.named_parameters()}
    found |= {f"{name}.requires_grad": p.requires_grad for name, p in model.named_parameters()}
    found |= {f"{name}.attributes": sorted(vars(p)) for name, p in model.named_parameters()}
    for i, optimizer in enumerate(optimizers):
        found[f"optimizer {i}"] = (len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks))
        found[f"optimizer {i} attributes"] = sorted(vars(optimizer))
    found["modes"] = torch._C._len_torch_function_stack()
    found["dispatch modes"] = torch._C._len_torch_dispatch_stack()
    found["global hooks"] = len(globally._global_forward_hooks) + len(globally._global_forward_pre_hooks)
    found["grad"] = torch.is_grad_enabled()
    found["autocast"] = torch.is_autocast_enabled("cpu")
    found["threads"] = torch.get_num_threads()
    if "torch._dynamo" in __import__("sys").modules:
        from torch._dynamo import eval_frame

        found["stance"] = eval_frame._stance.stance
    return found
