"""Every optimizer on sharded models is the optimizer of one process."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import normopt
from tests.support.ranks import Ranks
from tests.support.sharded import LAYOUTS, distances

NAMES = normopt.list_optimizers()


@pytest.mark.parametrize("layout", ["fsdp 2", "fsdp 4"])
def test_every_optimizer(ranks_of: Callable[[int], Ranks], layout: str) -> None:
    check(ranks_of(LAYOUTS[layout]), layout, 4)


def check(ranks: Ranks, layout: str, steps: int) -> None:
    every = ranks.run(distances, NAMES, layout, steps)
    wrong = {}
    for found in every:
        for name, result in found.items():
            if isinstance(result, str) or not result[0] <= 1e-5 or result[1] != 0:
                wrong[name] = result
    assert not wrong, "\n".join(f"{name}: {result}" for name, result in wrong.items())
