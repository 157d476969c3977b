"""What recording costs: steps with and without it alternate in one process, and their paired ratios are compared.

`make bench` prints the figures and appends them, with date and machine, to RESULTS.md beside this file. Differences of
a few per cent cannot be seen between whole runs on a shared machine; pairs of neighbouring steps see them.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import gradflow

RESULTS = Path(__file__).with_name("RESULTS.md")
Made = tuple[nn.Module, Callable[[nn.Module], Tensor]]
"""A model, and what computes its loss."""
WAYS = {"sampled": "sampled step over bare step", "not sampled": "step that is not sampled", "guarded": "guarded step"}


class BasicBlock(nn.Module):
    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer)
        self.conv2, self.bn2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False), nn.BatchNorm2d(outer)
        self.shortcut = nn.Identity() if stride == 1 else nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(out + self.shortcut(x))


def resnet20(images: int = 64) -> Made:
    widths = [16] * 3 + [32] * 3 + [64] * 3
    blocks = [BasicBlock(([16, *widths])[i], width, 2 if i in {3, 6} else 1) for i, width in enumerate(widths)]
    model = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    x, y = torch.randn(images, 3, 32, 32), torch.randint(0, 10, (images,))
    return model, lambda m: nn.functional.cross_entropy(m(x), y)


def gpt2(layers: int = 6, width: int = 384, tokens: int = 128, vocabulary: int = 5000) -> Made:
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"n_layer": layers, "n_embd": width, "n_head": width // 64, "n_positions": tokens, "vocab_size": vocabulary}
    ids = torch.randint(0, vocabulary, (8, tokens))
    return GPT2LMHeadModel(GPT2Config(**shape)), lambda m: m(input_ids=ids, labels=ids).loss


def mixed(made: Made) -> Made:
    """The same under bfloat16 autocast."""
    model, loss = made

    def autocast(model: nn.Module) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return loss(model)

    return model, autocast


MODELS = {
    "cpu": {
        "GPT-2, 6 layers, width 384, 8 x 128 tokens": gpt2,
        "ResNet-20, 64 images of 32 x 32": resnet20,
    },
    "cuda": {
        "GPT-2, 6 layers, width 384, 8 x 128 tokens": gpt2,
        "GPT-2, 12 layers, width 768, 8 x 1024 tokens, bfloat16": lambda: mixed(gpt2(12, 768, 1024, 50257)),
        "GPT-2, 24 layers, width 1024, 8 x 1024 tokens, bfloat16": lambda: mixed(gpt2(24, 1024, 1024, 50257)),
        "ResNet-20, 2048 images of 32 x 32": lambda: resnet20(2048),
    },
}


def timed(action: Callable[[], None]) -> float:
    """Seconds until everything is done, on a device too."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    wait()
    start = time.perf_counter()
    action()
    wait()
    return time.perf_counter() - start


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """Median of paired ratios and its 95 % bootstrap interval."""
    generator = np.random.default_rng(0)
    medians = np.median(generator.choice(ratios, (2000, len(ratios))), axis=1)
    return statistics.median(ratios), float(np.quantile(medians, 0.025)), float(np.quantile(medians, 0.975))


def measure(make: Callable[[], Made], device: str, pairs: int, chosen: list[str]) -> dict[str, tuple[float, float, float]]:
    """Ratios of a step with recording over the step beside it without, for the `chosen` kinds of step."""
    torch.manual_seed(0)
    with torch.device(device):
        model, loss = make()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)

    def bare() -> None:
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()

    def recorded(recorder: gradflow.Recorder) -> Callable[[], None]:
        def step() -> None:
            with recorder.step():
                bare()

        return step

    with tempfile.TemporaryDirectory() as root:
        sampling = gradflow.Recorder(model, optimizer, f"{root}/all", every_n_steps=1, strict=True)
        resting = gradflow.Recorder(model, optimizer, f"{root}/none", every_n_steps=10**9, strict=True)
        guarding = gradflow.Recorder(model, optimizer, f"{root}/guard", every_n_steps=10**9, strict=True, nan_guard=True)
        resting.count = guarding.count = 3  # not a power of two: they sample nothing for a long time
        ways = {"sampled": recorded(sampling), "not sampled": recorded(resting), "guarded": recorded(guarding)}
        ways = {name: ways[name] for name in chosen}
        for warm in (bare, *ways.values(), bare):
            warm()
        ratios: dict[str, list[float]] = {name: [] for name in ways}
        for pair in range(pairs):
            for name, step in ways.items():
                resting.count = guarding.count = 3
                first, second = (bare, step) if pair % 2 else (step, bare)
                a, b = timed(first), timed(second)
                ratios[name].append(b / a if pair % 2 else a / b)
        sampling.close()
    return {name: interval(found) for name, found in ratios.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=24, help="pairs of steps a model")
    parser.add_argument("--steps", nargs="+", choices=WAYS, default=list(WAYS), help="kinds of step to measure")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=MODELS, default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    machine = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.machine()
    lines = [
        f"\n## {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {machine}, {arguments.threads} threads, torch {torch.__version__}, {arguments.pairs} pairs\n",
        f"| model | {' | '.join(f'{WAYS[name]} (95 %)' for name in arguments.steps)} |",
        f"| --- |{' --- |' * len(arguments.steps)}",
    ]
    for name, make in MODELS[arguments.device].items():
        found = measure(make, arguments.device, arguments.pairs, arguments.steps)
        cells = [f"{median:.3f} ({low:.3f}–{high:.3f})" for median, low, high in found.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    print("\n".join(lines))
    if not RESULTS.exists():
        RESULTS.write_text("# Cost of recording, as measured by `make bench`\n")
    with RESULTS.open("a") as file:
        file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
