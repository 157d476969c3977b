"""A small ResNet learns scikit-learn's handwritten digits under the monitor: convolutions, batch norm, projections.

    python examples/resnet_digits.py [--steps 200] [--out gradflow-digits]

Needs scikit-learn (`pip install 'gradflow-diagnostics[examples]'`); the digits come with it, nothing is downloaded.
"""

import argparse
from pathlib import Path

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu
from torch.utils.data import DataLoader, TensorDataset, random_split

import gradflow
from gradflow.callbacks import GradientFlowMonitor


class Block(nn.Module):
    """y = relu(skip(x) + f(x)), He et al. 2015, https://arxiv.org/abs/1512.03385; a change of shape projects."""

    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        f = self.norm2(self.conv2(relu(self.norm1(self.conv1(x)))))
        return relu(self.shortcut(x) + f)


class DigitResNet(pl.LightningModule):
    """Three stages of two blocks on images of 8 by 8 pixels."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
        self.stages = nn.Sequential(
            Block(channels, channels),
            Block(channels, channels),
            Block(channels, 2 * channels, stride=2),
            Block(2 * channels, 2 * channels),
            Block(2 * channels, 4 * channels, stride=2),
            Block(4 * channels, 4 * channels),
        )
        self.head = nn.Linear(4 * channels, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(images)).mean(dim=(2, 3)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return cross_entropy(self(images), labels)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("accuracy", (self(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    parser.add_argument("--out", type=Path, default=Path("gradflow-digits"), help="directory of run and report")
    options = parser.parse_args()

    pl.seed_everything(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1  # grey values 0..16 to -1..1
    training, held_out = random_split(TensorDataset(images, torch.tensor(digits.target)), [0.8, 0.2])

    model = DigitResNet()
    for branch in gradflow.find_branches(model, images[:4]):
        print(f"{branch.name:24} {branch.kind}")

    monitor = GradientFlowMonitor(options.out)
    trainer = pl.Trainer(
        max_steps=options.steps,
        callbacks=[monitor],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(model, DataLoader(training, batch_size=64, shuffle=True))
    trainer.test(model, DataLoader(held_out, batch_size=len(held_out)))

    for finding in monitor.findings:
        print(f"{finding.severity}: {finding.claim}")
    print(f"report: {monitor.run.path}/report.html")


if __name__ == "__main__":
    main()
