"""The text that the demo trains on: the source code of Python's own standard library, one character a token."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gradflow.errors import UsageError

CHARACTERS = 1_000_000
HELD_OUT = 20
"""Every so many windows one is held out, so that it comes from the same modules as its neighbours."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """Text cut into windows of character numbers.

    Attributes:
        characters: The vocabulary; a character's number is its place in it.
        training: (window, token), int64.
        held_out: (window, token), int64.
        entropy: What a model that knows no more than how often each character occurs loses on the held-out windows:
            the mean of −ln p(character), nat.
    """

    characters: str
    training: Tensor
    held_out: Tensor
    entropy: float


def read_sources(characters: int = CHARACTERS) -> str:
    """Return the start of the standard library, printable ASCII and line ends only, modules in order of name.

    Raises:
        UsageError: This Python has too little of its library as files.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    text = ""
    for path in sorted(library.glob("*.py")):
        source = path.read_text(encoding="utf-8", errors="ignore")
        text += "".join(c for c in source if c == "\n" or " " <= c <= "~")
        if len(text) >= characters:
            return text[:characters]
    raise UsageError(
        f"expected {characters:,} characters of Python source in {library}, got {len(text):,}; "
        "use a Python whose standard library lies there as files"
    )


def make_corpus(text: str, window: int) -> Corpus:
    """Cut a text into windows of `window` characters, one in `HELD_OUT` of them for evaluation."""
    characters = "".join(sorted(set(text)))
    number = {character: index for index, character in enumerate(characters)}
    numbers = torch.tensor([number[character] for character in text])
    windows = numbers.unfold(0, window, window)
    apart = torch.arange(len(windows)) % HELD_OUT == 0
    log_p = (numbers.bincount().double() / len(numbers)).log()
    return Corpus(characters, windows[~apart], windows[apart], -log_p[windows[apart][:, 1:]].mean().item())
