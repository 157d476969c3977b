"""Questions about the ways from a fork to a branch: how it enters, whether a norm comes first, what it passes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradflow.residuals import families

if TYPE_CHECKING:
    from gradflow.residuals.roles import Roles

_SIDEWAYS = families.ADDITIONS | {"mul", "div", "where", "masked_fill", "maximum", "minimum"}
# States of a way, as bits: nothing learned yet; learned; nonlinear after that; learned again after that.
_PLAIN, _ONCE, _BENT, _TWICE = 1, 2, 4, 8


def enters_by_itself(roles: Roles, fork: int, branch: int) -> bool:
    """Whether something other than a sum or a product is the first to read the fork on its way into the branch."""
    within = set(roles.between(fork, branch))
    queue, seen = [fork], {fork}
    while queue:
        index = queue.pop()
        for consumer in roles.consumers[index]:
            if consumer in seen or consumer not in within:
                continue
            node = roles.nodes[consumer]
            if roles.like.identity_parent(consumer) == index or _with_fixed(roles, consumer):
                seen.add(consumer)
                queue.append(consumer)
            elif node.op in _SIDEWAYS or (node.op == families.ATTENTION and index not in node.parents[:3]):
                continue
            elif node.floating:
                return True
    return False


def _with_fixed(roles: Roles, index: int) -> bool:
    """Whether a node is a sum of tensors that carry no data, such as a learned query and its position."""
    node = roles.nodes[index]
    return node.op in families.ADDITIONS and not any(roles.data[p] for p in node.parents)


def begins_with_norm(roles: Roles, fork: int, branch: int) -> bool:
    """Whether every way from the fork into the branch passes a norm before anything learned."""
    within = set(roles.between(fork, branch))
    queue, seen, normed = [fork], {fork}, False
    while queue:
        index = queue.pop()
        for consumer in roles.consumers[index]:
            if consumer in seen or consumer not in within:
                continue
            if roles.like.is_norm(consumer):
                normed = True
            elif roles.weights[consumer] is not None or consumer == branch:
                return False
            else:
                seen.add(consumer)
                queue.append(consumer)
    return normed


def is_learned_twice(roles: Roles, fork: int, branch: int, skip: int) -> bool:
    """Whether some way from the fork to the branch is learned, nonlinear, and learned again.

    Ways through a gate do not count, nor do those through the weight of the skip's own map: there the fork is an input
    that a recurrence takes in at every step.
    """
    own = roles.roots(roles.weights[skip] or ())
    states = {fork: _PLAIN}
    for index in roles.between(fork, branch):
        node = roles.nodes[index]
        ways = [p for p in dict.fromkeys(node.parents) if p in states]
        if roles.weights[index] is not None and node.op in families.WEIGHTED:
            ways = [p for p in ways if p == node.parents[0]]
        if own and not own.isdisjoint(roles.roots(roles.weights[index] or ())):
            ways = []
        elif node.op == "mul" and len(node.parents) > 1:
            ways = [p for p in ways if not _is_gate(roles, p)] or ([] if len(ways) < 2 else ways)
        state = 0
        for way in ways:
            state |= states[way]
        if state:
            states[index] = _after(roles, index, state, len(ways))
    return bool(states.get(branch, 0) & _TWICE)


def enters_otherwise(roles: Roles, fork: int, skip: int) -> bool:
    """Whether a tensor is read by anything but operations with the weights of the skip's map."""
    own = roles.roots(roles.weights[skip] or ())
    queue = [fork]
    while queue:
        index = queue.pop()
        for consumer in roles.consumers[index]:
            if roles.like.identity_parent(consumer) == index:
                queue.append(consumer)
            elif own.isdisjoint(roles.roots(roles.weights[consumer] or ())):
                return True
    return not own


def _is_gate(roles: Roles, index: int) -> bool:
    """Whether a factor is a sigmoid's or a softmax's output, or a slice of one."""
    current: int | None = index
    while current is not None:
        node = roles.nodes[current]
        if node.op in families.GATES:
            return True
        current = node.parents[0] if node.op in families.SLICES else roles.like.identity_parent(current)
    return False


def _after(roles: Roles, index: int, state: int, ways: int) -> int:
    """State of the ways after a node."""
    node = roles.nodes[index]
    if node.op in families.NETWORKS or (node.op == "opaque" and roles.weights[index] is not None):
        return _TWICE
    if roles.weights[index] is not None and node.op != families.ATTENTION:
        return (_ONCE if state & (_PLAIN | _ONCE) else 0) | (_TWICE if state & (_BENT | _TWICE) else 0)
    product = node.op in {"mul", "div"} or node.op in families.LINEAR_MAPS
    if ways > 1 if product else node.op not in families.LINEAR:
        return (state & ~_ONCE) | (_BENT if state & _ONCE else 0)
    return state
