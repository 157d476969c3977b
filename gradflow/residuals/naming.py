"""Names of branches and joins: from module paths and occurrences within them, never from counters over the pass."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradflow.records import Addend, Graph
    from gradflow.residuals.ancestry import Ancestry
    from gradflow.residuals.roles import Roles


class Label(NamedTuple):
    """A branch's name and which occurrence of its module it is."""

    name: str
    occurrence: int


def name_branches(
    graph: Graph, roles: Roles, ancestry: Ancestry, joins: Sequence[tuple[int, int, tuple[Addend, ...]]]
) -> list[tuple[str, list[Label]]]:
    """For every join (node, fork, addends): its name, and the labels of its branches."""
    in_call = Counter(graph.nodes[node].call for node, _, _ in joins)
    with_grad = [_with_grad(graph, node) for node, _, _ in joins]
    seen: Counter[tuple[str, bool]] = Counter()
    used: Counter[str] = Counter()
    named = []
    stops = {node: graph.nodes[node].call for node, _, _ in joins}
    makers = [
        [_makers(graph, roles, ancestry, (node, fork, addend.node), stops) for addend in addends]
        for node, fork, addends in joins
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
    if name == scope or (scope and name.startswith((f"{scope}.", f"{scope}@"))):
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
    common = common_path(parts)
    return scope if scope.startswith(common) and scope != common else common


def common_path(paths: Sequence[str]) -> str:
    """The leading segments that all dotted paths share."""
    common: list[str] = []
    for segments in zip(*(path.split(".") for path in paths), strict=False):
        if len(set(segments)) > 1:
            break
        common.append(segments[0])
    return ".".join(common)


def _makers(
    graph: Graph, roles: Roles, ancestry: Ancestry, place: tuple[int, int, int], stops: dict[int, int]
) -> list[str]:
    """Paths of the outermost modules called in the join's forward (else: the parameters) that the branch passes.

    `place` is join, fork and branch. Going back from the branch, a join evaluated outside the modules that this forward
    calls (`stops`) is where the branch begins, even if the fork lies before it, as in reversible blocks.
    """
    join, fork, branch = place
    call, scope = graph.nodes[join].call, graph.nodes[join].scope
    bit = ancestry.bit[fork]
    queue, seen = [branch], {branch}
    order: list[int] = []
    while queue:
        index = queue.pop()
        outside = not ancestry.ancestors[index] & bit
        if outside or (index in stops and not _below(graph, stops[index], call)):
            continue
        order.append(index)
        new = [p for p in graph.nodes[index].parents if p not in seen]
        seen.update(new)
        queue += new
    found = [
        _child(graph, index, call) or _weight_name(graph, index, scope)
        for index in sorted(order)
        if roles.weights[index] is not None
    ]
    if not found and stops:
        return _makers(graph, roles, ancestry, place, {})
    return list(dict.fromkeys(found))


def _below(graph: Graph, call: int, outer: int) -> bool:
    """Whether a call ran, directly or not, inside another one."""
    while call >= 0:
        call = graph.calls[call].parent
        if call == outer:
            return True
    return False


def _child(graph: Graph, index: int, call: int) -> str | None:
    """Path of the call below `call` that a node ran in (elsewhere: its own scope), None if it ran in `call` itself."""
    current = graph.nodes[index].call
    if current == call:
        return None
    while current >= 0 and graph.calls[current].parent != call:
        current = graph.calls[current].parent
    return graph.calls[current].module if current >= 0 else graph.nodes[index].scope


def _weight_name(graph: Graph, index: int, scope: str) -> str:
    """The weight of an operation that ran in no submodule, or the operation's own name."""
    for parent in graph.nodes[index].parents:
        node = graph.nodes[parent]
        while len(node.parents) == 1:
            node = graph.nodes[node.parents[0]]
        if node.op == "parameter" and node.detail.get("name"):
            return str(node.detail["name"]).removesuffix(".weight")
    return f"{scope}.{graph.nodes[index].op}" if scope else graph.nodes[index].op
