"""Attach gradflow to training that you already have: one line, and the LightningModule knows nothing of it.

    python examples/attach_to_lightning.py [--steps 200] [--out gradflow-example]
"""

import argparse
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from gradflow.callbacks import GradientFlowMonitor

SYMBOLS, LENGTH = 16, 12


class Reverser(pl.LightningModule):
    """Learns to reverse a sequence. An ordinary LightningModule: nothing here mentions gradflow."""

    def __init__(self, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(SYMBOLS, width)
        self.position = nn.Parameter(0.02 * torch.randn(LENGTH, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, SYMBOLS)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(tokens) + self.position))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (tokens,) = batch
        loss = cross_entropy(self(tokens).transpose(1, 2), tokens.flip(1))
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    parser.add_argument("--out", type=Path, default=Path("gradflow-example"), help="directory of run and report")
    options = parser.parse_args()

    pl.seed_everything(0)
    loader = DataLoader(TensorDataset(torch.randint(SYMBOLS, (8192, LENGTH))), batch_size=32, shuffle=True)
    monitor = GradientFlowMonitor(options.out)  # the one line
    trainer = pl.Trainer(
        max_steps=options.steps,
        callbacks=[monitor],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(Reverser(), loader)

    for finding in monitor.findings:
        print(f"{finding.severity}: {finding.claim}")
    print(f"report: {monitor.run.path}/report.html")


if __name__ == "__main__":
    main()
