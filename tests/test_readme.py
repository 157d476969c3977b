"""The README is run, not only read: its code, its commands, its files."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from gradflow import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_code_of_a_plain_loop_runs_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = (block for block in blocks("python") if "Recorder" in block)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False)
    names = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), 0.1), "batches": torch.randn(3, 2, 5, 8)}
    exec(code, names)
    assert "<svg" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert names["recorder"].run.steps == [0, 1, 2]


def test_code_for_lightning_runs_as_written(tmp_path, monkeypatch):
    pl = pytest.importorskip("pytorch_lightning")
    from pytorch_lightning.demos.boring_classes import BoringModel, RandomDataset

    monkeypatch.chdir(tmp_path)
    (code,) = (block for block in blocks("python") if "Trainer" in block)
    quiet = {"max_steps": 2, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    monkeypatch.setattr(pl, "Trainer", lambda **options: Trainer(**options, **quiet, enable_model_summary=False))
    Trainer = pl.trainer.Trainer
    model = BoringModel()
    model.val_dataloader = model.validation_step = None
    names = {"model": model, "loader": torch.utils.data.DataLoader(RandomDataset(32, 8))}
    with pytest.warns():  # Lightning's advice on loaders
        exec(code, names)
    assert (tmp_path / "gradflow" / "report.html").is_file()


def test_commands_are_those_of_the_command_line_and_the_makefile():
    shell = "\n".join(blocks("sh"))
    commands = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    named = set(re.findall(r"^gradflow (\w+)", shell, re.MULTILINE))
    assert {"branches", "probe", "report", "compare", "check"} == named <= commands
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    made = set(re.findall(r"^make ([\w-]+)", shell + "\n" + contributing, re.MULTILINE))
    assert {"demo", "test"} <= made <= targets


def test_pictures_and_files_that_are_named_exist():
    paths = re.findall(r"\]\(((?!http)[^)]+)\)", README) + re.findall(r"`((?:examples|docs|tests)/[^`]+)`", README)
    assert paths
    assert [path for path in paths if not (ROOT / path).is_file()] == []
