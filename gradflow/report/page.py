"""The report: findings and pictures of a run, put together as one HTML file that loads nothing and runs nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from gradflow.errors import RunError, UsageError
from gradflow.plotting import gallery
from gradflow.plotting.comparison import look
from gradflow.plotting.style import THEME, css_color
from gradflow.report import differences, inventory, summary
from gradflow.store.grids import View
from gradflow.wording import printable

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from gradflow.plotting.gallery import Picture
    from gradflow.records import Finding
    from gradflow.store import Run
    from gradflow.store.grids import Tables


Progress: TypeAlias = Callable[[float, str], object]
"""Is told what part of the work is done, from 0 to 1, and what comes next."""


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


def report(
    run: Run,
    path: str | os.PathLike[str],
    *,
    findings: Sequence[Finding] | None = None,
    progress: Progress = gallery.silent,
) -> Path:
    """Write the report of a run to `path` and return it.

    Args:
        run: What to report on.
        path: The HTML file; its folder is made if need be, and an older report there is replaced as a whole.
        findings: What is wrong, if already known; by default `gradflow.diagnose(run)`.
        progress: Is told what part of the work is done and what comes next.

    Raises:
        RunError: The file cannot be written.
    """
    return _write(render(run, findings=findings, progress=progress), path)


def render(run: Run, *, findings: Sequence[Finding] | None = None, progress: Progress = gallery.silent) -> str:
    """The report as text, for those who want to store or show it themselves."""
    view = View(run)
    progress(0.0, "looking for findings")
    found = summary.ordered(_diagnose(run) if findings is None else findings)
    checks = _checks()
    strip = summary.depth_strip(run, found)
    progress(0.35, "reading figures")
    tables = {
        "figures": summary.key_figures(view),
        "branches": inventory.branches(view, found),
        "points": inventory.points(view, found),
        "layers": inventory.layers(view, found),
        "parameters": inventory.parameters(view, found),
    }
    pictures = [*gallery.PICTURES, *gallery.ledgers(view)]
    sections = _sections(pictures, view, found, lambda part, what: progress(0.45 + 0.55 * part, what))
    return _environment().get_template("report.html").render(
        **_common(),
        model=str(run.meta.get("model") or "unnamed model"),
        path=str(run.path) if run.path else "",
        verdict=summary.make_verdict(view, found, len(checks)),
        findings=found,
        serious=[(at, finding) for at, finding in enumerate(found, 1) if finding.severity != "info"],
        strip=strip,
        strip_text=_strip_text(strip),
        **tables,
        points_are=_points_are(run),
        troubles=summary.troubles(run),  # after everything has been read: a broken part shows when it is
        sections=sections,
        recording=summary.recording(run, view),
        checks=checks,
    )  # fmt: skip


def compare(
    runs: Sequence[Run] | Mapping[str, Run],
    path: str | os.PathLike[str],
    *,
    findings: Sequence[Sequence[Finding]] | None = None,
) -> Path:
    """Write one page that sets any number of runs side by side to `path` and return it.

    Args:
        runs: The runs; as a mapping, its keys are their names. Otherwise a run is named after its folder or its model.
        path: The HTML file.
        findings: What is wrong with each, in the order of `runs`; by default `gradflow.diagnose` of each.

    Raises:
        UsageError: There is no run to compare.
        RunError: The file cannot be written.
    """
    named = dict(runs) if isinstance(runs, Mapping) else _named(runs)
    if not named:
        raise UsageError("expected one run or more to compare, got none; pass the runs that gradflow.load returned")
    return _write(render_comparison(named, findings=findings), path)


def render_comparison(runs: Mapping[str, Run], *, findings: Sequence[Sequence[Finding]] | None = None) -> str:
    """The comparison as text."""
    views = {name: View(run) for name, run in runs.items()}
    given = findings if findings is not None else [_diagnose(run) for run in runs.values()]
    found = {name: summary.ordered(one) for name, one in zip(runs, given, strict=True)}
    checks, figures = len(_checks()), differences.table(views)
    columns = []
    for number_, (name, run) in enumerate(runs.items()):
        line = look(number_)
        columns.append(
            {
                "name": name,
                "model": str(run.meta.get("model") or "unnamed model"),
                "color": css_color(line["color"]),
                "dashes": _dashes(line["linestyle"]),
                "verdict": summary.make_verdict(views[name], found[name], checks),
                "codes": list(dict.fromkeys(f.code for f in found[name] if f.severity != "info")),
                "figures": figures[name],
                "findings": found[name],
                "troubles": summary.troubles(run),
            }
        )
    return _environment().get_template("compare.html").render(
        **_common(),
        runs=columns,
        columns=[measure.title for measure in differences.MEASURES],
        differences=differences.in_words(views, found),
        sections=_sections(gallery.COMPARISONS, views, ()),
    )  # fmt: skip


def _dashes(linestyle: Any) -> str:
    """Matplotlib's dashes, counted in line widths, for a line 3 wide."""
    return "" if isinstance(linestyle, str) else " ".join(f"{3 * length:g}" for length in linestyle[1])


def _named(runs: Sequence[Run]) -> dict[str, Run]:
    """Runs by a name each: the shortest end of the path that tells them apart, else the model's, else a number."""
    paths = [Path(run.path).parts if run.path else (str(run.meta.get("model") or "run"),) for run in runs]
    depth = 1
    while depth < max(map(len, paths), default=1) and len({path[-depth:] for path in paths}) < len(paths):
        depth += 1
    named: dict[str, Run] = {}
    for run, path in zip(runs, paths, strict=True):
        name = "/".join(path[-depth:])
        copies = sum(other == name or other.startswith(f"{name} (") for other in named)
        named[f"{name} ({copies + 1})" if copies else name] = run
    return named


def _diagnose(run: Run) -> list[Finding]:
    from gradflow.rules import diagnose  # rules are not needed where findings are given

    return diagnose(run)


def _points_are(run: Run) -> str:
    """What the points of the run's streams and trunks are called."""
    kinds = {stream.kind for stream in run.streams}
    several = "s" if len(run.streams) > 1 else ""
    if kinds == {"trunk"}:
        return f"members of the trunk{several}"
    return f"points of the stream{several}{' and trunks' if len(kinds) > 1 else ''}"


def _checks() -> dict[str, str]:
    """What a diagnosis looks for: code and meaning of each rule."""
    from gradflow.rules import RULES

    return {code: rule.says for code, rule in RULES.items()}


def _strip_text(strip: Sequence[summary.Cell]) -> str:
    marked = [f"{cell.severity} at {cell.first}" for cell in strip if cell.severity]
    return f"Depth from input to output: {', '.join(marked[:6])}{' and more' if len(marked) > 6 else ''}"


def _sections(
    pictures: Sequence[Picture],
    run: Tables | Mapping[str, Tables],
    findings: Sequence[Finding],
    progress: Progress = gallery.silent,
) -> list[Section]:
    """The pictures that have data, drawn, under their headings."""
    runs = run.values() if isinstance(run, Mapping) else (run,)
    drawn: dict[str, list[Shown]] = {}
    for place, picture in enumerate(pictures):
        progress(place / len(pictures), picture.title.lower())
        if any(picture.available(one) for one in runs):
            svg = Markup(gallery.picture_svg(picture, run, findings=findings))  # noqa: S704 (made by an XML writer)
            drawn.setdefault(picture.section, []).append(Shown(picture.key, picture.title, picture.reading, svg))
    if len(drawn.get(gallery.SIGNAL, [])) == len(drawn.get(gallery.GRADIENT, [])) == 1:
        # A trunk has one of each: side by side they fill a row.
        drawn[gallery.BOTH] = drawn.pop(gallery.SIGNAL) + drawn.pop(gallery.GRADIENT)
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
        loader=PackageLoader("gradflow.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        printable=lambda value: printable(str(value)), breakable=breakable, papers=papers, evidence=inventory.evidence
    )
    return environment


_PAPER = re.compile(r"arXiv:(\d{4}\.\d{4,5})")


def papers(text: str) -> Markup:
    """Escaped text in which each arXiv number is a link."""
    link = r'<a href="https://arxiv.org/abs/\1" rel="noreferrer">arXiv:\1</a>'
    return Markup(_PAPER.sub(link, str(escape(printable(text)))))  # noqa: S704 (escaped a moment before)


def breakable(name: str) -> Markup:
    """An escaped name that may go to the next line behind each dot, rather than in the middle of a word."""
    return Markup(str(escape(printable(str(name)))).replace(".", ".<wbr>"))  # noqa: S704 (escaped a moment before)


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
