"""`gradflow probe --depths 4,8,16`: a model probed at several depths or widths, printed and drawn."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from gradflow.cli import console
from gradflow.errors import UsageError
from gradflow.plotting.depth_series import scaling
from gradflow.plotting.series import write_scaling

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gradflow.store import Run

_SHOWN = ("steps", "signal", "expected_signal", "gradient", "expected_gradient", "token_cosine", "grad_norm")
_FORMATS = (".svg", ".png", ".pdf")


def run(probed: Callable[[int], Run], *, depths: str | None, widths: str | None, out: Path, as_json: bool) -> None:
    """Probe a model at several depths or widths, print the series and draw it; `probed` makes a size's run."""
    if depths is not None and widths is not None:
        raise UsageError("expected --depths or --widths, got both; vary one at a time")
    by = "depth" if depths is not None else "width"
    sizes = _sizes(depths if depths is not None else widths or "", by)
    if out.suffix.lower() not in _FORMATS:
        raise UsageError(f"expected a picture that ends in {', '.join(_FORMATS)}, got {out}")
    rows = scaling({size: probed(size) for size in sizes})
    write_scaling(rows, out, by=by)
    if as_json:
        console.print_json([asdict(row) for row in rows])
        return
    shown = [[str(row.size), *(_short(getattr(row, name)) for name in _SHOWN)] for row in rows]
    console.print_table(f"scaling with {by}", [by, *_SHOWN], shown)
    console.say(f"wrote {out}")


def _sizes(text: str, by: str) -> list[int]:
    """Distinct positive numbers of a list such as 4,8,16."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"expected --{by}s to be positive integers with commas between, as 4,8,16, got {text!r}")
    return sorted({int(part) for part in parts})


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
