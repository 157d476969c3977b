"""Residual sums that are no additions of two tensors, and are therefore named instead of measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradflow.records import Problem
from gradflow.residuals import families

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradflow.records import Node
    from gradflow.residuals.ancestry import Ancestry
    from gradflow.residuals.roles import Roles


def fused_sums(roles: Roles, ancestry: Ancestry) -> list[Problem]:
    """Fused sums, and sums over a stack, whose operands stand to each other as skip and branch do."""
    found = []
    for node in roles.nodes:
        operands = fused_operands(roles, node)
        if operands and any(
            _is_skip(roles, ancestry, skip, operands)
            for skip in operands[: 1 if node.op in families.FUSED_SUMS else None]
        ):
            reason = "a residual sum inside this operation is not measured; written as x + f(x) it would be"
            found.append(Problem(node.op, node.scope, reason))
    return found


def fused_operands(roles: Roles, node: Node) -> Sequence[int]:
    """What a fused sum adds up, nothing for other operations."""
    if node.op in families.FUSED_SUMS:
        return node.parents
    if node.op == "lerp":  # with a weight that depends on the data it is a gate
        return () if any(roles.data[weight] for weight in node.parents[2:]) else node.parents[:2]
    stacked = node.op == "sum" and len(node.parents) == 1 and roles.nodes[node.parents[0]].op == "stack"
    return roles.nodes[node.parents[0]].parents if stacked else ()


def _is_skip(roles: Roles, ancestry: Ancestry, skip: int, operands: Sequence[int]) -> bool:
    others = [operand for operand in operands if operand != skip]
    for fork in roles.like.chain(skip):
        bit = ancestry.bit.get(fork, 0)
        if roles.data[fork] and any(ancestry.through_weight[other] & bit for other in others):
            return True
    return False
