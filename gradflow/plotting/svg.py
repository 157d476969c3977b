"""A matplotlib figure as SVG that stands inside a page: small, safe, the same each time, and legible on light and dark.

matplotlib writes a whole document with fixed colours and ids that repeat from figure to figure. Here it is parsed as
XML (never edited as text: names in it are user input), stripped, and its colours become CSS variables of the page.
"""

from __future__ import annotations

import io
import re
import warnings
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import matplotlib.style
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from gradflow.plotting.style import SETTINGS, SIZE, css_color

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.axes import Axes

_COLOUR = re.compile(r"#[0-9a-f]{6}\b")
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_DROPPED = {"metadata", "style"}
_NUMBER = re.compile(r"-?\d+\.\d{3,}")


def new_figure(draw: Callable[[Axes], object], *, size: tuple[float, float] = SIZE) -> Figure:
    """A figure of its own with one picture drawn into it; neither pyplot nor the caller's settings take part."""
    with matplotlib.style.context(["default", SETTINGS]), quiet():
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
    return figure


def to_svg(figure: Figure, *, key: str, title: str, description: str) -> str:
    """The figure as an `<svg>` element for a page, with a text alternative; `key` makes its ids unique there."""
    file = io.BytesIO()
    with matplotlib.style.context(["default", SETTINGS]), quiet():
        # Not figure.savefig, which draws everything twice.
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})  # type: ignore[no-untyped-call]
    root = ET.fromstring(file.getvalue())  # noqa: S314 (written by matplotlib a line above)
    _shrink(root)
    _own_ids(root, key)
    width, height = (root.get(side, "0").removesuffix("pt") for side in ("width", "height"))
    root.attrib = {
        "viewBox": f"0 0 {width} {height}", "role": "img", "class": "plot",
        "aria-labelledby": f"{key}-title", "aria-describedby": f"{key}-desc",
    }  # fmt: skip
    for place, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ET.Element(tag, {"id": f"{key}-{tag}"})
        element.text = text
        root.insert(place, element)
    return ET.tostring(root, encoding="unicode", short_empty_elements=True)


class quiet(warnings.catch_warnings):  # noqa: N801 (reads as a function)
    """Silences what matplotlib says about glyphs its own font lacks: the browser draws the text, with its own fonts."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.filterwarnings("ignore", message="(?s).*[Gg]lyph.*missing from")


def _shrink(root: ET.Element) -> None:
    """Plain tags, short numbers, theme colours; no metadata, comments or style sheet."""
    for element in root.iter():
        element.tag = element.tag.rsplit("}", 1)[-1]
        element.attrib = {name.rsplit("}", 1)[-1]: value for name, value in element.attrib.items()}
        for name in element.attrib.keys() & {"d", "x", "y"}:
            element.attrib[name] = _NUMBER.sub(
                lambda found: f"{float(found[0]):.2f}", " ".join(element.attrib[name].split())
            )
        for name in element.attrib.keys() & {"style", "fill", "stroke"}:
            element.attrib[name] = _COLOUR.sub(lambda found: css_color(found[0]), element.attrib[name])
        if element.tag != "text" and element.text and not element.text.strip():
            element.text = None
        if element.tail and not element.tail.strip():
            element.tail = None
    for parent in root.iter():
        for child in [child for child in parent if child.tag in _DROPPED or (child.tag == "defs" and not len(child))]:
            parent.remove(child)


def _own_ids(root: ET.Element, key: str) -> None:
    """Ids that something refers to get the figure's key before them; the others go."""
    used = set()
    for element in root.iter():
        for value in element.attrib.values():
            used.update(_REFERENCE.findall(value))
        if element.get("href", "").startswith("#"):
            used.add(element.attrib["href"][1:])
    for element in root.iter():
        if element.get("id") in used:
            element.attrib["id"] = f"{key}-{element.attrib['id']}"
        else:
            element.attrib.pop("id", None)
        for name, value in element.attrib.items():
            if name == "href" and value.startswith("#"):
                element.attrib[name] = f"#{key}-{value[1:]}"
            elif "url(#" in value:
                element.attrib[name] = _REFERENCE.sub(lambda found: f"url(#{key}-{found[1]})", value)
