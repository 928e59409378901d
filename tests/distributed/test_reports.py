"""What people read of sharded models."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.ranks import Ranks
from tests.support.sharded import LAYOUTS, reported


@pytest.mark.parametrize(
    "layout", ["fsdp 2", "mesh 2", *(pytest.param(x, marks=pytest.mark.slow) for x in ("fsdp+tp 2x2",))]
)
def test_describe_and_metrics(ranks_of: Callable[[int], Ranks], layout: str) -> None:
    every = ranks_of(LAYOUTS[layout]).run(reported, "muon", layout)
    text = every[0][0]
    assert "moved by" in text
    assert "rank 0" in text and "rank 1" in text
    assert ("shards" in text) == (layout != "mesh 2")  # there all is moved by owners
    for _, mine, others in every:
        assert mine == pytest.approx(others, rel=1e-4)
