"""`find_branches` sees exactly the joins that are there, and leaves the model as it found it."""

from collections import Counter

import pytest
import torch
import zoo
import zoo_sequence  # noqa: F401  (registers its traps)
import zoo_vision  # noqa: F401

from gradflow.discovery import find_branches


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", zoo.TRAPS)
def test_the_joins_of_every_trap_are_those_written_by_hand(name):
    trap = zoo.TRAPS[name]
    model, args = trap.build()
    branches = find_branches(model, *args)
    joins = {b.join: b for b in branches}
    assert Counter(b.module for b in joins.values()) == Counter(trap.joins)
    assert len(branches) == trap.branches
    assert sum(b.kind == "projection" for b in joins.values()) == trap.projections
    assert len({b.name for b in branches}) == len(branches)
