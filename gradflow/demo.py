"""`gradflow demo`: Transformers that differ in one switch learn to write Python, and the monitor says what it saw.

The text is the source code of Python's own standard library, one character a token, so nothing is downloaded. Every
model sees the same characters in the same order and starts from the same weights.
"""

from __future__ import annotations

import logging
import math
import shutil
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from gradflow.callbacks import GradientFlowMonitor
from gradflow.cli.console import print_table, say
from gradflow.corpus import make_corpus, read_sources
from gradflow.errors import RunError, UsageError
from gradflow.models import EncoderOptions, LanguageModel
from gradflow.report import compare, report
from gradflow.rules import diagnose

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
    from torch import Tensor

    from gradflow.corpus import Corpus
    from gradflow.records import Finding
    from gradflow.store import Run

STEPS, DEPTH = 300, 12
WIDTH, HEADS, CONTEXT, BATCH = 64, 4, 64, 16
SEED, WARMUP = 0, 100
LEARNING_RATE = 1e-3
"""At the default depth. A post-norm stack of 16 blocks collapses at it, so deeper ones take proportionally less."""
REPORT_STEPS = 25
"""What writing one report counts for on the progress bar: it takes about as long as so many steps of training."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One of the models that are compared: its name, its folder and the switches that make it what it is."""

    name: str
    folder: str
    options: EncoderOptions = field(default_factory=EncoderOptions)


VARIANTS = (
    Variant("post-norm, with residuals", "post-norm"),
    Variant("post-norm, without residuals", "no-residuals", {"residual": False}),
    Variant("pre-norm, with residuals", "pre-norm", {"norm": "pre"}),
)
COMPARISON = "comparison.html"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a variant: its run, the findings in it, the loss on held-out text (nat a character), its report."""

    variant: Variant
    run: Run
    findings: list[Finding]
    loss: float
    report: Path


def run(out: Path, *, steps: int | None = None, depth: int | None = None, force: bool = False) -> list[Outcome]:
    """Train every variant under the monitor, write a report each and one comparison, and print what was found.

    Args:
        out: Directory of the runs and reports. Where something is there already, `out-1`, `out-2`, ... is taken.
        steps: Optimizer steps of each training.
        depth: Blocks of each model.
        force: Write into `out` all the same, and replace an earlier demo there.

    Raises:
        UsageError: `steps` or `depth` is below 1, or this Python came without its sources.
        RunError: The directory cannot be written.
    """
    steps, depth = STEPS if steps is None else steps, DEPTH if depth is None else depth
    if min(steps, depth) < 1:
        raise UsageError(f"expected steps and depth of 1 or more, got {steps} and {depth}")
    corpus = make_corpus(read_sources(), CONTEXT + 1)
    out = _make_directory(out, force=force)
    say(
        f"Three Transformers of {depth} blocks learn to write Python, {steps} steps each, "
        f"on {corpus.training.numel():,} characters of its standard library."
    )
    with _progress() as bar, _quiet(), _settled():
        task = bar.add_task("", total=len(VARIANTS) * (steps + REPORT_STEPS) + REPORT_STEPS)
        outcomes = []
        for variant in VARIANTS:
            bar.update(task, description=f"training: {variant.name}")
            model, monitor = _train(variant, corpus, out, steps=steps, depth=depth, tick=lambda: bar.advance(task))
            bar.update(task, description=f"report: {variant.name}")
            outcomes.append(_conclude(variant, model, monitor.run, corpus, out))
            bar.advance(task, REPORT_STEPS)
        bar.update(task, description="report: comparison")
        runs = {outcome.variant.name: outcome.run for outcome in outcomes}
        compare(runs, out / COMPARISON, findings=[outcome.findings for outcome in outcomes])
        bar.update(task, advance=REPORT_STEPS, description="done")
    _print(outcomes, corpus, out)
    return outcomes


class CharacterModel(pl.LightningModule):
    """Predicts the next character; AdamW with the warm-up that post-norm needs (Xiong et al. 2020, section 3)."""

    def __init__(self, network: LanguageModel, *, learning_rate: float, warmup: int) -> None:
        super().__init__()
        self.network, self.learning_rate, self.warmup = network, learning_rate, warmup

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """Return the loss, nat a character, of a batch of windows (batch, CONTEXT + 1)."""
        return self.loss(batch[0])

    def loss(self, windows: Tensor) -> Tensor:
        """Return the mean cross-entropy between each character's prediction and the character that follows."""
        logits = self.network(windows[:, :-1])
        return cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return AdamW and its linear warm-up, which advances with every step."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / self.warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class _Tick(pl.Callback):
    def __init__(self, tick: Callable[[], None]) -> None:
        self.tick = tick

    def on_train_batch_end(self, *_: object) -> None:
        self.tick()


def _train(
    variant: Variant, corpus: Corpus, out: Path, *, steps: int, depth: int, tick: Callable[[], None]
) -> tuple[CharacterModel, GradientFlowMonitor]:
    torch.manual_seed(SEED)
    # No dropout: one pass over the text does not overfit, and its noise would hide that tokens have become the same.
    network = LanguageModel(
        len(corpus.characters), WIDTH, depth, HEADS, max_tokens=CONTEXT, dropout=0.0, **variant.options
    )
    model = CharacterModel(network, learning_rate=LEARNING_RATE * min(1, DEPTH / depth), warmup=WARMUP)
    order = torch.Generator().manual_seed(SEED)
    batches = DataLoader(TensorDataset(corpus.training), BATCH, shuffle=True, drop_last=True, generator=order)
    cadence = max(1, steps // 12)
    monitor = GradientFlowMonitor(out / variant.folder, every_n_steps=cadence, on_finding="ignore", report=False)
    trainer = pl.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",  # small matrices: no faster elsewhere, and the same figures on every machine
        callbacks=[monitor, _Tick(tick)],
        default_root_dir=out,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, batches)
    return model, monitor


@torch.no_grad()
def _conclude(variant: Variant, model: CharacterModel, run: Run, corpus: Corpus, out: Path) -> Outcome:
    findings = diagnose(run)
    path = report(run, out / variant.folder / "report.html", findings=findings)
    return Outcome(variant, run, findings, model.eval().loss(corpus.held_out).item(), path)


def _print(outcomes: Sequence[Outcome], corpus: Corpus, out: Path) -> None:
    headers = ("model", "loss", "gradient, first/last point", "token cosine at the end", "findings")
    rows = [
        (outcome.variant.name, f"{outcome.loss:.2f}", *_ends(outcome.run), verdict(outcome.findings))
        for outcome in outcomes
    ]
    say("")
    print_table("What the monitor saw at the last sampled step", headers, rows)
    say(
        f"Loss in nat a character, on held-out text. The entropy of single characters is {corpus.entropy:.2f} nat: "
        "that is all a model learns whose tokens have become the same."
    )
    say(f"Comparison: {out / COMPARISON}")
    for outcome in outcomes:
        say(f"Report:     {outcome.report}")


def verdict(findings: Sequence[Finding]) -> str:
    """Return the codes of errors and warnings, the gravest first, or that nothing is wrong."""
    parts = []
    for severity in ("error", "warning"):
        codes = dict.fromkeys(finding.code for finding in findings if finding.severity == severity)
        if codes:
            parts.append(f"{severity}: {', '.join(codes)}")
    return "; ".join(parts) or "nothing wrong"


def _ends(run: Run) -> tuple[str, str]:
    """Return, of the last sampled step, the gradient's norm at the first point over the last, and the last cosine."""
    rows = [row for row in run.table("streams").to_pylist() if row["step"] == run.steps[-1]]
    if not rows:
        return "none", "none"  # a single block without a join has no depth
    first, last = rows[0], rows[-1]
    return f"{math.sqrt(first['grad_sq'] / last['grad_sq']):.1e}", f"{last['token_cosine']:.4f}"


def _make_directory(out: Path, *, force: bool) -> Path:
    """Return `out` as an empty directory (or cleared of an earlier demo), or the first free `out-1`, `out-2`, ..."""
    try:
        if force:
            for variant in VARIANTS:
                if (out / variant.folder / "run.json").is_file():
                    shutil.rmtree(out / variant.folder)
        elif out.exists() and (not out.is_dir() or any(out.iterdir())):
            out = next(path for n in count(1) if not (path := out.with_name(f"{out.name}-{n}")).exists())
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"expected a directory that can be written at {out}, got {error}; pass another --out") from error
    return out


def _progress() -> Progress:
    name = TextColumn("{task.description}", table_column=Column(min_width=40, no_wrap=True))
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    return Progress(name, BarColumn(20), TaskProgressColumn(), *times, console=Console(stderr=True))


@contextmanager
def _settled() -> Iterator[None]:
    """Compute on one thread: as quick for matrices this small, unhurt by a busy machine, and the same sums anywhere."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's advice back: what it says about loaders and devices is decided here on purpose."""
    # Lightning logs under the namespace that was imported last.
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning", "lightning.pytorch")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            for advice in ("does not have many workers", "GPU available but not used", "LeafSpec"):
                warnings.filterwarnings("ignore", message=f".*{advice}")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
