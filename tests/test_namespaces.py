"""Both Lightning namespaces, each alone and together, and LightningCLI with the callback in YAML."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

import gradflow

ROOT = Path(__file__).parent.parent
TASK = """
import sys, torch, warnings
warnings.simplefilter("ignore")
from torch import nn
torch.set_num_threads(1)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.layer, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 1)
    def forward(self, x):
        x = self.inner(x)
        return self.head(x + torch.relu(self.layer(x)))

class Task(pl.LightningModule):
    def __init__(self, width: int = 8):
        super().__init__()
        self.net = Net()
    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)
    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.randn(12, 4), batch_size=2)
"""
BLOCK = """
import importlib.abc, sys
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] == "{name}":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
"""
FIT = """
import gradflow.callbacks
callback = gradflow.callbacks.GradientFlowMonitor(sys.argv[1] + "/gradflow", every_n_steps=2, report=False, strict=True)
assert isinstance(callback, pl.Callback)
trainer = pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False, default_root_dir=sys.argv[1], callbacks=[callback])
trainer.fit(Task())
print("steps", callback.run.steps)
"""


def python(code: str, *arguments: str, cwd=None) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code, *arguments], env=environment, cwd=cwd, capture_output=True, text=True, timeout=240, check=False)


NAMESPACES = {
    "pytorch_lightning": "import pytorch_lightning as pl\n",
    "lightning": "import lightning.pytorch as pl\n",
    "gradflow first, pytorch_lightning": "import gradflow.callbacks\ngradflow.callbacks.GradientFlowMonitor\nimport pytorch_lightning as pl\n",
    "gradflow first, lightning": "import gradflow.callbacks\ngradflow.callbacks.GradientFlowMonitor\nimport lightning.pytorch as pl\n",
    "pytorch_lightning alone": BLOCK.format(name="lightning") + "import pytorch_lightning as pl\n",
    "lightning alone": BLOCK.format(name="pytorch_lightning") + "import lightning.pytorch as pl\n",
}  # fmt: skip


@pytest.mark.parametrize("how", NAMESPACES)
def test_callback_works_in_namespace(how, tmp_path):
    done = python(NAMESPACES[how] + TASK + FIT, str(tmp_path))
    assert "steps [0, 1, 2, 4]" in done.stdout, done.stderr[-3000:]
    assert gradflow.load(tmp_path / "gradflow").steps == [0, 1, 2, 4]


@pytest.mark.parametrize("namespace", ["pytorch_lightning", "lightning.pytorch"])
def test_command_line_takes_the_callback_from_yaml(namespace, tmp_path):
    config = {
        "trainer": {
            "max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
            "enable_model_summary": False, "default_root_dir": str(tmp_path),
            "callbacks": [{
                "class_path": "gradflow.callbacks.GradientFlowMonitor",
                "init_args": {"dirpath": str(tmp_path / "run"), "every_n_steps": 2, "tables": ["branches", "layers"], "on_finding": "stop", "report": False},
            }],
        },
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    code = f"import {namespace} as pl\nfrom {namespace}.cli import LightningCLI\n" + TASK + textwrap.dedent(
        """
        LightningCLI(Task, args=["fit", "--config", sys.argv[1]], save_config_callback=None)
        """
    )
    done = python(code, str(tmp_path / "config.yaml"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    run = gradflow.load(tmp_path / "run")
    assert run.steps == [0, 1, 2, 4]
    assert run.meta["config"]["tables"] == ["branches", "layers"]


def test_importing_gradflow_imports_no_trainer():
    done = python("import gradflow, sys; print([n for n in ('lightning', 'pytorch_lightning', 'transformers', 'matplotlib') if n in sys.modules])")
    assert done.stdout.strip() == "[]"
