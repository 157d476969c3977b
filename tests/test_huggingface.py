"""The callback in a real `transformers.Trainer`."""

from __future__ import annotations

import os

import pytest
import torch
from trainings import same, seed, traces
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import gradflow
from gradflow.callbacks import GradientFlowCallback

pytestmark = pytest.mark.filterwarnings("ignore")


class Words(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        ids = torch.randint(0, 17, (6,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def trained(root, callback=None, *, cls=Trainer, resume=None, expect=None, **options):
    seed()
    model = GPT2LMHeadModel(GPT2Config(vocab_size=17, n_positions=8, n_embd=8, n_layer=2, n_head=2))
    settings = {
        "output_dir": str(root), "max_steps": 6, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True,
        "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no", "max_grad_norm": 0.01, "learning_rate": 1e-2,
    } | options  # fmt: skip
    trainer = cls(model, TrainingArguments(**settings), train_dataset=Words(), callbacks=[callback] if callback else [])
    if expect is None:
        trainer.train(resume_from_checkpoint=resume)
    else:
        with pytest.raises(expect):
            trainer.train(resume_from_checkpoint=resume)
    return model, trainer


def watching(root, **options):
    return GradientFlowCallback(root / "run", **({"every_n_steps": 1, "report": False, "on_finding": "ignore", "strict": True} | options))


def test_transformer_is_recorded_and_trains_to_the_same_bits(tmp_path):
    callback = watching(tmp_path)
    bare, _ = trained(tmp_path / "a")
    model, trainer = trained(tmp_path / "b", callback)
    assert same(bare.state_dict(), model.state_dict())
    run = callback.run
    assert run.steps == [0, 1, 2, 3, 4, 5]
    assert [branch.name for branch in run.branches] == [f"transformer.h.{i}.{part}" for i in (0, 1) for part in ("attn", "mlp")]
    assert all(gain > 0 for gain in run.table("branches")["gain"].to_pylist())
    assert all(loss > 0 for loss in run.table("steps")["loss"].to_pylist())
    assert run.table("steps")["microbatches"].to_pylist() == [1] * 6
    assert min(run.table("steps")["grad_norm"].to_pylist()) > 0.02  # before clipping
    assert run.meta["optimizers"][0]["class"] == "AdamW"
    assert "training_step" not in vars(trainer)
    assert not [key for key in traces(model) if key.endswith("_hooks")]
    assert traces(model)["modes"] == 0


def test_accumulated_micro_batches_are_one_step(tmp_path):
    callback = watching(tmp_path)
    trained(tmp_path, callback, gradient_accumulation_steps=2, max_steps=3)
    assert callback.run.table("steps")["microbatches"].to_pylist() == [2, 2, 2]
    assert callback.run.steps == [0, 1, 2]


def test_cadence_and_default_directory(tmp_path):
    callback = GradientFlowCallback(every_n_steps=3, report=False)
    trained(tmp_path, callback)
    assert gradflow.load(tmp_path / "gradflow").steps == [0, 1, 2, 3]


def test_exception_leaves_nothing(tmp_path):
    class Fails(Trainer):
        def compute_loss(self, *args, **kwargs):
            if self.state.global_step == 2:
                raise KeyboardInterrupt
            return super().compute_loss(*args, **kwargs)

    callback = watching(tmp_path)
    model, trainer = trained(tmp_path, callback, cls=Fails, expect=KeyboardInterrupt)
    assert not [key for key in traces(model) if key.endswith("_hooks")]
    assert traces(model)["modes"] == 0
    assert "training_step" not in vars(trainer)
    assert callback.run.steps == [0, 1]


def test_resumed_training_goes_on_in_the_same_run(tmp_path):
    first = watching(tmp_path)
    trained(tmp_path, first, save_strategy="steps", save_steps=3)
    old = first.run.meta["run_id"]
    second = watching(tmp_path)
    trained(tmp_path, second, resume=os.path.join(tmp_path, "checkpoint-3"), max_steps=8)
    assert second.run.meta["run_id"] == old
    assert second.run.steps == [0, 1, 2, 3, 4, 5, 6, 7]
    assert not (tmp_path / "run-1").exists()


def test_fault_of_ours_never_reaches_training(tmp_path, caplog, monkeypatch):
    from gradflow.recorder import recording

    bare, _ = trained(tmp_path / "a")
    monkeypatch.setattr(recording.ParameterTaps, "gradients", lambda *_, **__: 1 / 0)
    callback = watching(tmp_path, strict=False, report=True)
    model, _ = trained(tmp_path / "b", callback)
    assert same(bare.state_dict(), model.state_dict())
    assert len([record for record in caplog.records if record.name == "gradflow" and record.levelname == "WARNING"]) == 1
    assert callback.run.meta["stopped"]["step"] == 0
