"""Names of branches and joins: from module paths and occurrences within them, never from counters over the pass."""

from __future__ import annotations

import os
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradflow.roles import Roles
    from gradflow.records import Addend, Graph


class Label(NamedTuple):
    """A branch's name and which occurrence of its module it is."""

    name: str
    occurrence: int


def name_branches(
    graph: Graph, roles: Roles, joins: Sequence[tuple[int, int, tuple[Addend, ...]]]
) -> list[tuple[str, list[Label]]]:
    """For every join (node, fork, addends): its name, and the labels of its branches."""
    in_call = Counter(graph.nodes[node].call for node, _, _ in joins)
    with_grad = [_with_grad(graph, node) for node, _, _ in joins]
    seen: Counter[tuple[str, bool]] = Counter()
    used: Counter[str] = Counter()
    named = []
    stops = {node: graph.nodes[node].call for node, _, _ in joins}
    makers = [
        [_makers(graph, roles, node, fork, addend.node, stops) for addend in addends] for node, fork, addends in joins
    ]
    children = {parts[0] for several in makers for parts in several if len(parts) == 1}
    for (node, _, addends), several, grad in zip(joins, makers, with_grad, strict=True):
        mark = "" if grad or not any(with_grad) else "@nograd"
        scope = graph.nodes[node].scope
        alone = len(addends) == 1 and in_call[graph.nodes[node].call] == 1 and scope not in children
        labels = []
        for parts in several:
            base = _base(parts, scope, alone=alone)
            occurrence = seen[base, grad]
            seen[base, grad] += 1
            labels.append(Label(base + mark + (f"@{occurrence}" if occurrence else ""), occurrence))
        join = f"{scope}:" + "+".join(_relative(label.name, scope) for label in labels)
        used[join] += 1
        named.append((join if used[join] == 1 else f"{join}#{used[join] - 1}", labels))
    return named


def _with_grad(graph: Graph, node: int) -> bool:
    call = graph.nodes[node].call
    return graph.nodes[node].requires_grad or (call >= 0 and graph.calls[call].grad)


def _relative(name: str, scope: str) -> str:
    if scope and name.startswith((f"{scope}.", f"{scope}@")) or name == scope:
        rest = name[len(scope) :].lstrip(".")
        return rest if rest and not rest.startswith("@") else f"sum{rest}"
    return name


def _base(parts: Sequence[str], scope: str, *, alone: bool) -> str:
    """Path of what makes a branch (by its `parts`), without its occurrence."""
    if not parts:
        return f"{scope}.sum" if scope else "sum"
    if len(parts) == 1:
        return parts[0]
    if alone and scope:
        return scope
    if all(part.startswith(f"{scope}." if scope else "") for part in parts):
        return f"{parts[0]}-{_relative(parts[-1], scope)}"
    common = _common(parts)
    return scope if scope.startswith(common) and scope != common else common


def _common(paths: Sequence[str]) -> str:
    return ".".join(os.path.commonprefix([path.split(".") for path in paths]))


def _makers(
    graph: Graph, roles: Roles, join: int, fork: int, branch: int, stops: dict[int, int]
) -> list[str]:
    """Paths of the outermost modules called in the join's forward (else: the parameters) that the branch passes.

    Going back from the branch, a join evaluated outside the modules that this forward calls (`stops`) is where the
    branch begins, even if the fork lies before it, as in reversible blocks.
    """
    call = graph.nodes[join].call
    scope = graph.nodes[join].scope
    within = set(roles.between(fork, branch))
    found: list[str] = []
    queue, seen = [branch], {branch}
    order: list[int] = []
    while queue:
        index = queue.pop()
        if index not in within or (index in stops and not _below(graph, stops[index], call)):
            continue
        order.append(index)
        new = [p for p in graph.nodes[index].parents if p not in seen]
        seen.update(new)
        queue += new
    for index in sorted(order):
        if roles.weights[index] is not None:
            found.append(_child(graph, index, call) or _weight_name(graph, index, scope))
    if not found and stops:
        return _makers(graph, roles, join, fork, branch, {})
    return list(dict.fromkeys(found))


def _below(graph: Graph, call: int, outer: int) -> bool:
    """Whether a call ran, directly or not, inside another one."""
    while call >= 0:
        call = graph.calls[call].parent
        if call == outer:
            return True
    return False


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
