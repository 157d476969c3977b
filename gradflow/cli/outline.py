"""The branches of a model as text: a tree of the modules in whose forward they are added, and what was not followed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gradflow.records import Branch, Problem, Stream, Structure


@dataclass(slots=True)
class _Place:
    """A module with the branches added in its own forward and the modules below it, in order of execution."""

    label: str
    entries: list[Branch | _Place] = field(default_factory=list)
    below: dict[str, _Place] = field(default_factory=dict)


def render_tree(structure: Structure) -> str:
    """Return the branches as a tree of modules, then the streams, then what could not be followed."""
    lines = [_heading(structure), *_draw(_tree(structure.branches))]
    for title, entries in (
        ("streams, from input to output:", [_stream_line(stream) for stream in structure.streams]),
        ("could not be followed:", [_problem_line(problem) for problem in structure.problems]),
    ):
        if entries:
            lines += ["", title, *(f"  {entry}" for entry in entries)]
    return "\n".join(lines)


def _heading(structure: Structure) -> str:
    branches, joins = len(structure.branches), len(structure.joins)
    if not branches:
        return "no residual branches found in this forward pass"
    many = "" if branches == 1 else "es"
    return f"{branches} residual branch{many} in {joins} join{'' if joins == 1 else 's'}"


def _tree(branches: list[Branch]) -> _Place:
    root = _Place("")
    for branch in branches:
        place = root
        for name in filter(None, branch.module.split(".")):
            if name not in place.below:
                place.below[name] = _Place(name)
                place.entries.append(place.below[name])
            place = place.below[name]
        place.entries.append(branch)
    return root


def _draw(place: _Place, margin: str = "") -> Iterator[str]:
    for position, entry in enumerate(place.entries):
        last = position == len(place.entries) - 1
        corner, below = ("└─ ", "   ") if last else ("├─ ", "│  ")
        if isinstance(entry, _Place):
            label, inner = _collapsed(entry)
            yield f"{margin}{corner}{label}"
            yield from _draw(inner, margin + below)
        else:
            yield f"{margin}{corner}{_branch_line(entry)}"


def _collapsed(place: _Place) -> tuple[str, _Place]:
    """Return a module that holds nothing but one other module as one line, `encoder.layers`."""
    label = place.label
    while len(place.entries) == 1 and isinstance(place.entries[0], _Place):
        place = place.entries[0]
        label += f".{place.label}"
    return label, place


def _branch_line(branch: Branch) -> str:
    facts = [f"depth {branch.depth}", branch.kind]
    if branch.placement != "none":
        facts.append(branch.placement)
    if branch.occurrence:
        facts.append(f"call {branch.occurrence + 1} of a shared module")
    return f"{branch.name}  ({', '.join(facts)})"


def _stream_line(stream: Stream) -> str:
    ends = f"{stream.points[0]} to {stream.points[-1]}" if stream.points else "no points"
    return f"{stream.name}  ({stream.kind} of {len(stream.points)} points, {ends})"


def _problem_line(problem: Problem) -> str:
    where = f" in {problem.where}" if problem.where else ""
    return f"{problem.what}{where}: {problem.reason}"
