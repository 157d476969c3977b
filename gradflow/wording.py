"""Names and numbers as people read them, in pictures and on pages: nothing unseen, nothing too long, three digits."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

MOST_NAMES = 14  # labels that fit beside a heat map
MISSING = "\N{EN DASH}"


@dataclass(frozen=True, slots=True)
class Fact:
    """A figure with its name, and what it should be or where it comes from."""

    label: str
    value: str
    note: str = ""


def printable(text: str) -> str:
    r"""The text with what cannot be seen (control and format characters, lone surrogates) written as `\u202e`."""
    return "".join(_visible(char) for char in text)


def _visible(char: str) -> str:
    if unicodedata.category(char) not in {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}:
        return char
    return char.encode("unicode_escape", "surrogatepass").decode("ascii")


def label(text: str, limit: int = 34) -> str:
    """A name for a figure: printable, shortened in the middle, and never read as mathematics."""
    text = printable(text)
    if len(text) > limit:
        text = text[: limit // 2 - 1] + "…" + text[-(limit - limit // 2) :]
    return text.replace("$", r"\$")


def number(value: float) -> str:
    """A number as a person writes it: three digits, thousands with a comma, tiny and huge ones as 3.2×10⁻⁷."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("∞" if value > 0 else "\N{MINUS SIGN}∞")
    size = abs(value)
    if size == 0 or 1e-3 <= size < 1e4:
        text = f"{value:.3g}" if size < 1e3 else f"{value:,.0f}"
        if size < 1 and text.lstrip("-") == "1":  # 0.9998 is not 1 where a cosine is meant
            text = f"{value:.6f}".rstrip("0").rstrip(".")
        return text.replace("-", "\N{MINUS SIGN}")
    mantissa, exponent = f"{value:.1e}".split("e")
    power = "10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    mantissa = mantissa.removesuffix(".0").replace("-", "\N{MINUS SIGN}")
    return power if mantissa == "1" else f"{mantissa}×{power}"


def words(key: str) -> str:
    """A key of the evidence as words."""
    return printable(str(key)).replace("_", " ")


def plain(value: Any) -> str:
    """A value of the evidence as a person writes it."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: MISSING}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, dict):
        return ", ".join(f"{words(key)} {plain(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple, set, frozenset)):
        shown = [plain(item) for item in list(value)[:8]]
        return ", ".join(shown) + (f" and {len(value) - 8:,} more" if len(value) > 8 else "") or "none"
    return printable(str(value))


def rows_of_names(labels: Sequence[str], limit: int = MOST_NAMES) -> tuple[str, list[int], list[str]]:
    """What most names have in common, and a few of them to show: (common prefix, positions, short names).

    All are shown where they fit. Otherwise one a module (the first of `h.3.attn`, `h.3.mlp` as `h.3`), then every
    second module, and so on; never two so close that they would touch.
    """
    parts = [name.split(".") for name in labels]
    common = _shared_start(parts)
    short = [_after(part, common) for part in parts]
    positions, drop = list(range(len(short))), 0
    while len(positions) > limit and drop < 3:
        drop += 1
        keys = [tuple(part[: max(1, len(part) - drop)]) for part in short]
        positions = [i for i in range(len(keys)) if i == 0 or keys[i] != keys[i - 1]]
    positions = positions[:: math.ceil(len(positions) / limit)] if positions else []
    least = 0.8 * len(short) / limit
    apart: list[int] = []
    for position in reversed(positions):  # from below, so that of two the deeper one stays: `h.0` rather than `embed`
        if not apart or apart[-1] - position >= least:
            apart.append(position)
    names = [".".join(short[i][: max(1, len(short[i]) - drop)]) for i in reversed(apart)]
    return ".".join(common), apart[::-1], names


def _after(part: list[str], common: list[str]) -> list[str]:
    """What follows the common start; of a name that leaves it earlier, what follows from there."""
    at = 0
    while at < min(len(common), len(part) - 1) and part[at] == common[at]:
        at += 1
    return part[at:]


def _shared_start(parts: list[list[str]]) -> list[str]:
    """The longest dotted start that nine names of ten share (all but `embed`, at the head of a stream)."""
    common: list[str] = []
    while parts:
        following = Counter(
            part[len(common)] for part in parts if len(part) > len(common) + 1 and part[: len(common)] == common
        )
        best = following.most_common(1)
        if not best or best[0][1] < 0.9 * len(parts):
            break
        common.append(best[0][0])
    return common
