"""Training with the monitor ends in the same bits as without it: parameters, buffers, optimizer state, losses, random state."""

from __future__ import annotations

import copy
import warnings

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from trainings import (
    WIDTH,
    Recurrent,
    ResidualMLP,
    ResNet,
    Shared,
    StochasticDepth,
    Task,
    Transformer,
    batches,
    half,
    same,
    trained,
)


class Manual(Task):
    """Two optimizers by hand, each with its own backward pass and its own clipping."""

    def __init__(self) -> None:
        super().__init__(ResidualMLP(dropout=0.1))
        self.other = ResidualMLP()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        loss = self.net(batch).square().mean()
        first.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(first, gradient_clip_val=0.5)
        first.step()
        other = (self.other(batch) - self.net(batch).detach()).square().mean()
        second.zero_grad()
        self.manual_backward(other)
        second.step()
        self.losses += [loss.detach().clone(), other.detach().clone()]

    def configure_optimizers(self):
        return torch.optim.Adam(self.net.parameters(), 1e-2), torch.optim.SGD(self.other.parameters(), 1e-2)


class Several(Task):
    """Three forwards a step: two views with gradient, a teacher in eval mode without."""

    def __init__(self) -> None:
        super().__init__(Transformer())
        self.teacher = copy.deepcopy(self.net).eval().requires_grad_(False)

    def computed(self, batch):
        with torch.no_grad():
            target = self.teacher(batch)
        return (self.net(batch) - target).square().mean() + (self.net(batch * 0.9) - target).abs().mean()


class FusedTeacher(Task):
    """A teacher of torch's own encoder layers, whose fused inference path rounds differently from the usual one."""

    def __init__(self, kind: str) -> None:
        super().__init__(ResidualMLP())
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.1, batch_first=True)
        self.kind = kind
        self.teacher = {
            "encoder": lambda: nn.TransformerEncoder(layer, 2), "layer": lambda: layer,
            "attention": lambda: nn.MultiheadAttention(WIDTH, 2, batch_first=True),
        }[kind]()  # fmt: skip
        self.adapter = nn.Linear(WIDTH, 3)
        self.teacher.requires_grad_(False)

    def computed(self, batch):
        self.teacher.eval()
        with torch.no_grad():
            h = self.teacher(batch, batch, batch)[0] if self.kind == "attention" else self.teacher(batch)
        frozen = self.teacher(batch, batch, batch)[0] if self.kind == "attention" else self.teacher(batch)
        return (self.net(batch) - self.adapter(h + frozen)).square().mean()


class AttentionGrows(Task):
    def __init__(self) -> None:
        super().__init__(nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.1, batch_first=True), 2))


def _lm(config, model_class, labels=True):
    """A language model of a few hundred weights from its configuration."""

    class Language(Task):
        def __init__(self) -> None:
            super().__init__(model_class(config()))
            self.net.train()

        def computed(self, batch):
            ids = (batch[..., 0] * 7).long().remainder(17)
            return self.net(input_ids=ids, labels=ids if labels else ids[:, 0] % 2).loss

    return Language


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return _lm(lambda: GPT2Config(vocab_size=17, n_positions=8, n_embd=8, n_layer=2, n_head=2), GPT2LMHeadModel)()


def bert():
    from transformers import BertConfig, BertForMaskedLM

    return _lm(lambda: BertConfig(vocab_size=17, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16), BertForMaskedLM)()


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    config = lambda: T5Config(vocab_size=17, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, decoder_start_token_id=0)
    return _lm(config, T5ForConditionalGeneration)()


def lora():
    from peft import LoraConfig, get_peft_model

    module = gpt2()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft asks transformers by an old name
        module.net = get_peft_model(module.net, LoraConfig(r=2, target_modules=["c_attn"], lora_dropout=0.1, fan_in_fan_out=True))
    return module


def frozen():
    module = Task(Transformer())
    module.net.inner.requires_grad_(False)
    module.net.blocks[0].requires_grad_(False)
    return module


CASES = {
    "transformer with dropout": lambda: Task(Transformer()),
    "torch's own encoder": AttentionGrows,
    "resnet with batch norm": lambda: Task(ResNet(), "sgd"),
    "lstm": lambda: Task(Recurrent(nn.LSTM)),
    "gru": lambda: Task(Recurrent(nn.GRU)),
    "gpt2": gpt2, "bert": bert, "t5": t5, "lora": lora,
    "shared weights": lambda: Task(Shared()),
    "manual optimization": Manual,
    "lbfgs": lambda: Task(ResidualMLP(), "lbfgs"),
    "fused optimizer": lambda: Task(ResidualMLP(dropout=0.2), "fused"),
    "several forwards a step": Several,
    "fused encoder as teacher": lambda: FusedTeacher("encoder"),
    "fused encoder layer as teacher": lambda: FusedTeacher("layer"),
    "fused attention as teacher": lambda: FusedTeacher("attention"),
    "checkpointing": lambda: Task(Transformer(checkpointing="yes")),
    "reentrant checkpointing": lambda: Task(Transformer(checkpointing="reentrant")),
    "in-place residuals": lambda: Task(ResidualMLP(inplace=True, dropout=0.1)),
    "stochastic depth": lambda: Task(StochasticDepth()),
    "frozen layers": frozen,
}  # fmt: skip


RARELY = ["transformer with dropout", "resnet with batch norm", "lbfgs", "manual optimization"]


@pytest.mark.parametrize(("name", "every"), [*((name, every) for name in CASES for every in (1, 2)), *((name, 50) for name in RARELY)])
def test_model_trains_to_the_same_bits(name, every, tmp_path):
    without, watched = trained(tmp_path, CASES[name]), trained(tmp_path, CASES[name], every=every)
    _assert_same(without, watched)
    assert watched.monitor.run.steps[0] == 0


def _assert_same(without, watched):
    for what in ("losses", "state", "optimizers", "random"):
        assert same(getattr(without, what), getattr(watched, what)), what
    assert without.losses


class Extras(pl.Callback):
    """A callback that uses the model and its own hooks in the middle of everything."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.handle = pl_module.net.register_forward_hook(lambda m, a, out: out * 1.01)

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        pl_module.net.eval()
        with torch.no_grad():
            pl_module.net(torch.ones(1, 5, WIDTH))
        pl_module.net.train()

    def on_after_backward(self, trainer, pl_module):
        for p in pl_module.parameters():
            if p.grad is not None:
                p.grad.mul_(0.5)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.handle.remove()


TRAINERS = {
    "accumulation": {"accumulate_grad_batches": 2},
    "clipping by norm": {"gradient_clip_val": 0.1},
    "clipping by value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "bf16 autocast": {"precision": "bf16-mixed"},
    "fp16 autocast and loss scale": {},
    "bf16 throughout": {"precision": "bf16-true"},
    "float64": {"precision": "64-true"},
    "validation inside": {"val_check_interval": 2},
    "anomaly detection": {"detect_anomaly": True},
    "several epochs": {"max_epochs": 2, "reload_dataloaders_every_n_epochs": 1},
    "other callbacks": {"callbacks": (Extras,)},
    "weight averaging": {"callbacks": (lambda: pl.callbacks.EMAWeightAveraging(decay=0.9),), "max_epochs": 2},
    "stochastic weight averaging": {"callbacks": (lambda: pl.callbacks.StochasticWeightAveraging(1e-3, swa_epoch_start=1),), "max_epochs": 3},
    "deterministic": {"deterministic": True},
}


@pytest.mark.parametrize("every", [1])
@pytest.mark.parametrize("name", TRAINERS)
def test_trainer_option_trains_to_the_same_bits(name, every, tmp_path):
    options = TRAINERS[name]
    make = lambda: Task(Transformer())
    validation = batches if "validation" in name else None
    plugins = half if "loss scale" in name else dict
    pair = [trained(tmp_path, make, every=e, validation=validation, **options, **plugins()) for e in (None, every)]
    _assert_same(*pair)
    torch.use_deterministic_algorithms(False)


class Changing(torch.utils.data.IterableDataset):
    """Batches of changing length and size."""

    def __iter__(self):
        generator = torch.Generator().manual_seed(3)
        for size, length in [(4, 5), (2, 7), (1, 1), (4, 5), (3, 2), (6, 9)]:
            yield torch.randn(size, length, WIDTH, generator=generator)


def test_batches_of_changing_shape_train_to_the_same_bits(tmp_path):
    data = lambda: torch.utils.data.DataLoader(Changing(), batch_size=None)
    pair = [trained(tmp_path, lambda: Task(Transformer()), every=e, data=data) for e in (None, 1)]
    _assert_same(*pair)
    assert pair[1].monitor.run.steps == [0, 1, 2, 3, 4, 5]


def test_gradients_that_are_kept_are_the_same_bits(tmp_path):
    pair = [trained(tmp_path, lambda: Task(Transformer()), every=e) for e in (None, 1)]
    assert same(pair[0].gradients, pair[1].gradients)
    assert any(g is not None for g in pair[0].gradients.values())


def test_cadence_changes_nothing(tmp_path):
    states = [trained(tmp_path, lambda: Task(Transformer(layers=1)), every=every).state for every in (None, 1, 2, 3, 7, 50)]
    assert all(same(states[0], state) for state in states[1:])
