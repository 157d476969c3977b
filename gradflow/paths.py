"""Questions about the ways from a fork to a branch: how it enters, whether a norm comes first, what it passes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradflow import families
from gradflow.ancestry import bits

if TYPE_CHECKING:
    from gradflow.ancestry import Ancestry

_SIDEWAYS = families.ADDITIONS | {"mul", "div", "where", "masked_fill", "maximum", "minimum"}
_ATTENTION = "scaled_dot_product_attention"
# States of a way, as bits: nothing learned yet; learned; nonlinear after that; learned again after that.
_PLAIN, _ONCE, _BENT, _TWICE = 1, 2, 4, 8


def interior(facts: Ancestry, fork: int, end: int) -> list[int]:
    """Nodes on the ways from `fork` to `end`, `end` included, in order."""
    mask = (facts.ancestors[end] | 1 << end) >> (fork + 1)
    return [n for n in (b + fork + 1 for b in bits(mask)) if facts.ancestors[n] >> fork & 1]


def enters_by_itself(facts: Ancestry, fork: int, branch: int) -> bool:
    """Whether something other than a sum or a product is the first to read the fork on its way into the branch."""
    within = facts.ancestors[branch] | 1 << branch
    queue, seen = [fork], {fork}
    while queue:
        index = queue.pop()
        for consumer in facts.consumers[index]:
            if consumer in seen or not within >> consumer & 1:
                continue
            node = facts.nodes[consumer]
            if facts.identity_parent(consumer) == index or _with_fixed(facts, consumer):
                seen.add(consumer)
                queue.append(consumer)
            elif node.op in _SIDEWAYS or (node.op == _ATTENTION and index not in node.parents[:3]):
                continue
            elif node.floating:
                return True
    return False


def _with_fixed(facts: Ancestry, index: int) -> bool:
    """Whether a node is a sum of tensors that carry no data, such as a learned query and its position."""
    node = facts.nodes[index]
    return node.op in families.ADDITIONS and not any(facts.data[p] for p in node.parents)


def begins_with_norm(facts: Ancestry, fork: int, branch: int) -> bool:
    """Whether every way from the fork into the branch passes a norm before anything learned."""
    within = facts.ancestors[branch] | 1 << branch
    queue, seen, normed = [fork], {fork}, False
    while queue:
        index = queue.pop()
        for consumer in facts.consumers[index]:
            if consumer in seen or not within >> consumer & 1:
                continue
            if facts.is_norm(consumer):
                normed = True
            elif facts.learned[consumer] or consumer == branch:
                return False
            else:
                seen.add(consumer)
                queue.append(consumer)
    return normed


def is_learned_twice(facts: Ancestry, fork: int, branch: int) -> bool:
    """Whether some way from the fork to the branch is learned, nonlinear, and learned again, gates not counted."""
    states = {fork: _PLAIN}
    for index in interior(facts, fork, branch):
        node = facts.nodes[index]
        ways = [p for p in dict.fromkeys(node.parents) if p in states]
        if facts.learned[index] and node.op in families.WEIGHTED:
            ways = [p for p in ways if p == node.parents[0]]
        elif node.op == "mul" and len(node.parents) > 1:
            ways = [p for p in ways if not _is_gate(facts, p)] or ([] if len(ways) < 2 else ways)
        state = 0
        for way in ways:
            state |= states[way]
        if state:
            states[index] = _after(facts, index, state, len(ways))
    return bool(states.get(branch, 0) & _TWICE)


def _is_gate(facts: Ancestry, index: int) -> bool:
    """Whether a factor is a sigmoid's or a softmax's output, or a slice of one."""
    current: int | None = index
    while current is not None:
        node = facts.nodes[current]
        if node.op in families.GATES:
            return True
        current = node.parents[0] if node.op in families.SLICES else facts.identity_parent(current)
    return False


def _after(facts: Ancestry, index: int, state: int, ways: int) -> int:
    """State of the ways after a node."""
    node = facts.nodes[index]
    if node.op in families.NETWORKS or (node.op == "opaque" and facts.learned[index]):
        return _TWICE
    if facts.learned[index]:
        return (_ONCE if state & (_PLAIN | _ONCE) else 0) | (_TWICE if state & (_BENT | _TWICE) else 0)
    product = node.op in {"mul", "div"} or node.op in families.LINEAR_MAPS
    if (ways > 1 if product else node.op not in families.LINEAR):
        return (state & ~_ONCE) | (_BENT if state & _ONCE else 0)
    return state
