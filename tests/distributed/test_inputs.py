"""Statistics of the inputs of layers on several ranks, each of which sees a part of the batch or of its features."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.ranks import Ranks
from tests.support.sharded import LAYOUTS
from tests.support.watched import (
    apart,
    beside_one_process,
    kept_by_owners,
    loaded_by,
    loads_one_process,
    refused,
    saved_by,
    seen_by_few,
)

Of = Callable[[int], Ranks]

FEW = ("fsdp 2", "fsdp 2, every layer", "shard(1) 2", "tp 2", "replicate 2", "mesh 2", "ddp 2")
MANY = tuple(layout for layout in LAYOUTS if layout not in FEW)
EVERY = [*FEW, *(pytest.param(layout, marks=pytest.mark.exhaustive) for layout in MANY)]


def size_of(layout: str) -> int:
    return LAYOUTS.get(layout, 2)


@pytest.mark.parametrize("layout", EVERY)
def test_a_step_is_that_of_one_process(ranks_of: Of, layout: str) -> None:
    """Each rank has a part of the batch, in tensor parallelism all of it."""
    for distance, state in ranks_of(size_of(layout)).run(beside_one_process, layout):
        assert distance <= 1e-5
        assert state <= 1e-5


@pytest.mark.parametrize("layout", ["fsdp 2", "tp 2", "mesh 2"])
def test_the_owner_alone_keeps_the_average(ranks_of: Of, layout: str) -> None:
    every = ranks_of(2).run(kept_by_owners, layout)
    for name, side in {"up.weight": 6, "down.weight": 8, "head.weight": 6}.items():
        assert sorted(each[name] for each in every) == [0, side * side]


@pytest.mark.parametrize("layout", ["fsdp 2", "mesh 2", "ddp 2"])
def test_ranks_that_have_seen_no_input(ranks_of: Of, layout: str) -> None:
    """They take the average of the others' inputs; where nobody has seen any all raise, or keep the average."""
    for error, has_state, few, none in ranks_of(2).run(seen_by_few, layout):
        assert "up.weight' moves by InputWhitened" in error and "no statistics of its layer's inputs" in error
        assert not has_state
        assert few <= 1e-6 and none <= 1e-6


OTHERS = {"fsdp 2": {"tp 2": 2, "fsdp 1": 1, "plain": 1}, "fsdp 4": {"fsdp+tp 2x2": 4, "hsdp 2x2": 4, "fsdp 2": 2}}


@pytest.mark.parametrize("layout", ["fsdp 2", pytest.param("fsdp 4", marks=pytest.mark.exhaustive)])
def test_a_checkpoint_loads_into_other_layouts(ranks_of: Of, tmp_path: Path, layout: str) -> None:
    saved, end = ranks_of(size_of(layout)).run(saved_by, layout, str(tmp_path))[0]
    for other, size in OTHERS[layout].items():
        for state, weights in ranks_of(size).run(loaded_by, other, str(tmp_path)):
            assert apart(state, saved) == 0, other
            assert (weights - end).abs().max() <= 1e-6, other


@pytest.mark.parametrize("layout", ["fsdp 2", pytest.param("fsdp+tp 2x2", marks=pytest.mark.exhaustive)])
def test_the_state_of_one_process_loads(ranks_of: Of, layout: str) -> None:
    for loaded, distance in ranks_of(size_of(layout)).run(loads_one_process, layout):
        assert loaded == 0
        assert distance <= 1e-5


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_processes_without_a_part_in_a_weight_are_refused(ranks_of: Of, size: int) -> None:
    """Plain weights, and those on a device mesh of half of the ranks."""
    several = size // 2
    for found in ranks_of(size).run(refused):
        assert f"each {several} of {size} processes would keep statistics of their own inputs of" in found["error"]
        assert "name the process_group of the ranks that have parts of one batch" in found["error"]
