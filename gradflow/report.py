"""The report: findings and pictures of a run, put together as one HTML file that loads nothing and runs nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from gradflow import gallery, inventory, summary
from gradflow.errors import RunError
from gradflow.grids import View
from gradflow.plot_style import THEME, number, printable

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from gradflow.grids import Tables
    from gradflow.gallery import Picture
    from gradflow.records import Finding
    from gradflow.store import Run


@dataclass(frozen=True, slots=True)
class Shown:
    """A picture as it stands on the page."""

    key: str
    title: str
    reading: str
    svg: Markup


@dataclass(frozen=True, slots=True)
class Section:
    """Pictures under one heading."""

    id: str
    title: str
    pictures: tuple[Shown, ...]


def report(run: Run, path: str | os.PathLike[str], *, findings: Sequence[Finding] | None = None) -> Path:
    """Write the report of a run to `path` and return it.

    Args:
        run: What to report on.
        path: The HTML file; its folder is made if need be, and an older report there is replaced as a whole.
        findings: What is wrong, if already known; by default `gradflow.diagnose(run)`.

    Raises:
        RunError: The file cannot be written.
    """
    return _write(render(run, findings=findings), path)


def render(run: Run, *, findings: Sequence[Finding] | None = None) -> str:
    """The report as text, for those who want to store or show it themselves."""
    view = View(run)
    found = summary.ordered(_diagnose(run) if findings is None else findings)
    checks = _checks()
    strip = summary.depth_strip(run, found)
    return _environment().get_template("report.html").render(
        **_common(),
        model=str(run.meta.get("model") or "unnamed model"),
        path=str(run.path) if run.path else "",
        verdict=summary.make_verdict(run, found, len(checks)),
        findings=found,
        serious=[(at, finding) for at, finding in enumerate(found, 1) if finding.severity != "info"],
        strip=strip,
        strip_text=_strip_text(strip),
        figures=summary.key_figures(view),
        troubles=summary.troubles(run),
        sections=_sections([*gallery.PICTURES, *gallery.ledgers(view)], view, found),
        branches=inventory.branches(view, found),
        points=inventory.points(view, found),
        layers=inventory.layers(view, found),
        parameters=inventory.parameters(view, found),
        recording=summary.recording(run),
        checks=checks,
    )  # fmt: skip


def _diagnose(run: Run) -> list[Finding]:
    from gradflow.rules import diagnose  # rules are not needed where findings are given

    return diagnose(run)


def _checks() -> dict[str, str]:
    """What a diagnosis looks for: code and meaning of each rule."""
    from gradflow.rules import RULES

    return {code: rule.says for code, rule in RULES.items()}


def _strip_text(strip: Sequence[summary.Cell]) -> str:
    marked = [f"{cell.severity} at {cell.first}" for cell in strip if cell.severity]
    return f"Depth from input to output: {', '.join(marked[:6])}{' and more' if len(marked) > 6 else ''}"


def _sections(
    pictures: Sequence[Picture], run: Tables | Mapping[str, Tables], findings: Sequence[Finding]
) -> list[Section]:
    """The pictures that have data, drawn, under their headings."""
    runs = run.values() if isinstance(run, dict) else (run,)
    drawn: dict[str, list[Shown]] = {}
    for picture in pictures:
        if any(picture.available(one) for one in runs):
            svg = Markup(gallery.picture_svg(picture, run, findings=findings))  # noqa: S704 (made by an XML writer)
            drawn.setdefault(picture.section, []).append(Shown(picture.key, picture.title, picture.reading, svg))
    return [
        Section(re.sub(r"\W+", "-", title.lower()), title, tuple(drawn[title]))
        for title in gallery.SECTIONS
        if title in drawn
    ]


def _common() -> dict[str, Any]:
    from gradflow import __version__

    light, dark = ([(name, pair[side]) for name, pair in THEME.items()] for side in (0, 1))
    return {"version": __version__, "theme": {"light": light, "dark": dark}}


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("gradflow", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(printable=lambda value: printable(str(value)), plain=plain, words=words)
    return environment


def words(key: str) -> str:
    """A key of the evidence as words."""
    return printable(str(key)).replace("_", " ")


def plain(value: Any) -> str:
    """A value of the evidence as a person writes it."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
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


def _write(text: str, path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    beside = target.with_name(f".{target.name}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text, encoding="utf-8", errors="backslashreplace")
        beside.replace(target)
    except OSError as error:
        raise RunError(
            f"expected a path for the report that can be written, got {target}: {error}; choose another path"
        ) from error
    return target
