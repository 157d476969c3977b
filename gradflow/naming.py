"""Names of branches and joins: from module paths and occurrences within them, never from counters over the pass."""

from __future__ import annotations

import os
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from gradflow.paths import interior

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradflow.ancestry import Ancestry
    from gradflow.records import Addend, Graph


class Label(NamedTuple):
    """A branch's name and which occurrence of its module it is."""

    name: str
    occurrence: int


def name_branches(
    graph: Graph, facts: Ancestry, joins: Sequence[tuple[int, int, tuple[Addend, ...]]]
) -> list[tuple[str, list[Label]]]:
    """For every join (node, fork, addends): its name, and the labels of its branches."""
    in_call = Counter(graph.nodes[node].call for node, _, _ in joins)
    with_grad = [_with_grad(graph, node) for node, _, _ in joins]
    seen: Counter[tuple[str, bool]] = Counter()
    used: Counter[str] = Counter()
    named = []
    for (node, fork, addends), grad in zip(joins, with_grad, strict=True):
        mark = "" if grad or not any(with_grad) else "@nograd"
        alone = len(addends) == 1 and in_call[graph.nodes[node].call] == 1
        labels = []
        for addend in addends:
            base = _base(graph, facts, node, fork, addend.node, alone=alone)
            occurrence = seen[base, grad]
            seen[base, grad] += 1
            labels.append(Label(base + mark + (f"@{occurrence}" if occurrence else ""), occurrence))
        scope = graph.nodes[node].scope
        join = f"{scope}:" + "+".join(_relative(label.name, scope) for label in labels)
        used[join] += 1
        named.append((join if used[join] == 1 else f"{join}#{used[join] - 1}", labels))
    return named


def _with_grad(graph: Graph, node: int) -> bool:
    call = graph.nodes[node].call
    return graph.nodes[node].requires_grad or (call >= 0 and graph.calls[call].grad)


def _relative(name: str, scope: str) -> str:
    if scope and name.startswith(scope):
        return name[len(scope) :].lstrip(".") or "sum"
    return name


def _base(graph: Graph, facts: Ancestry, join: int, fork: int, branch: int, *, alone: bool) -> str:
    """Path of what makes a branch, without its occurrence."""
    scope = graph.nodes[join].scope
    parts = list(dict.fromkeys(_makers(graph, facts, join, fork, branch)))
    if not parts:
        return f"{scope}.sum" if scope else "sum"
    if len(parts) == 1:
        return parts[0]
    inside = all(part.startswith(f"{scope}." if scope else "") for part in parts)
    if alone and scope:
        return scope
    if not inside:
        common = _common(parts)
        return scope if scope.startswith(common) and scope != common else common or scope or "sum"
    return f"{parts[0]}-{_relative(parts[-1], scope)}"


def _common(paths: Sequence[str]) -> str:
    return ".".join(os.path.commonprefix([path.split(".") for path in paths]))


def _makers(graph: Graph, facts: Ancestry, join: int, fork: int, branch: int) -> list[str]:
    """Paths of the outermost modules called in the join's forward (else: the parameters) that the branch passes."""
    call = graph.nodes[join].call
    scope = graph.nodes[join].scope
    found = []
    for index in interior(facts, fork, branch):
        if facts.learned[index]:
            found.append(_child(graph, index, call) or _weight_name(graph, index, scope))
    return found


def _child(graph: Graph, index: int, call: int) -> str | None:
    """Path of the call below `call` that a node ran in (its own scope if elsewhere), None if it ran in `call` itself."""
    current = graph.nodes[index].call
    if current == call:
        return None
    while current >= 0 and graph.calls[current].parent != call:
        current = graph.calls[current].parent
    return graph.calls[current].module if current >= 0 else graph.nodes[index].scope


def _weight_name(graph: Graph, index: int, scope: str) -> str:
    """The weight of an operation that ran in no submodule, or the operation's own name."""
    for parent in graph.nodes[index].parents:
        while parent is not None:
            node = graph.nodes[parent]
            if node.op == "parameter" and node.detail.get("name"):
                return str(node.detail["name"]).removesuffix(".weight")
            parent = node.parents[0] if len(node.parents) == 1 else None
    return f"{scope}.{graph.nodes[index].op}" if scope else graph.nodes[index].op
