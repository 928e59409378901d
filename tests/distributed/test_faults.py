"""All ranks take a step, or none does and all say why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.ranks import Ranks
from tests.support.sharded import after_the_death, fault, nan_at_the_first_step, of_own_ingredients, until_killed

Of = Callable[[int], Ranks]

NAMES = ("muon", *(pytest.param(name, marks=pytest.mark.slow) for name in ("adamw", "soap", "prodigy", "scale")))
LAYOUTS = ("fsdp 2", "mesh 2", "plain")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("deferred", [False, True], ids=["at once", "late"])
def test_nan_on_one_rank(ranks_of: Of, name: str, layout: str, deferred: bool) -> None:
    for policy in ("raise", "skip"):
        every = ranks_of(2).run(fault, name, layout, "nan", policy, deferred)
        errors = {found.late if deferred else found.error for found in every}
        assert len(errors) == 1
        if policy == "raise":
            assert "rank 1: NaN or Inf in the gradient of parameter 'up.weight'" in errors.pop()
        else:
            assert errors == {""}
        for found in every:
            assert not found.has_moved and not found.has_counted
            assert found.distance <= 1e-5


@pytest.mark.parametrize("name", ["muon", "adamw", "soap", "prodigy"])
@pytest.mark.parametrize("layout", ["fsdp 2", "mesh 2"])
def test_a_first_step_that_is_not_taken_leaves_no_state(ranks_of: Of, name: str, layout: str) -> None:
    for error, parameters in ranks_of(2).run(nan_at_the_first_step, name, layout):
        assert "rank 1: NaN or Inf" in error
        assert parameters == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("deferred", [False, True], ids=["at once", "late"])
def test_a_gradient_that_one_rank_lacks(ranks_of: Of, name: str, layout: str, deferred: bool) -> None:
    for found in ranks_of(2).run(fault, name, layout, "missing", "raise", deferred):
        error = found.late if deferred else found.error
        assert "'up.weight': some ranks have a gradient, but not rank 1" in error
        assert not found.has_moved and not found.has_counted
        assert found.distance <= 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_one_rank_finds_wrong_all_raise(ranks_of: Of, layout: str) -> None:
    for found in ranks_of(2).run(fault, "muon", layout, "state", "raise", False):
        assert "the state 'step' must be a number of steps" in found.error
        assert not found.has_moved
        assert found.distance <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "hanging"])
def test_a_rank_that_is_gone(tmp_path: Path, how: str) -> None:
    folder = tmp_path / "checkpoint"
    (tmp_path / "first").mkdir()
    ranks = Ranks(2, tmp_path / "first", timeout=10)
    try:
        for rank in range(2):
            ranks.send(rank, until_killed, "fsdp 2", str(folder), 1, how)
        rank, (is_fine, text) = ranks.answer(60)
        assert rank == 0 and is_fine
        assert text, "the step was taken without the other rank"
    finally:
        for process in ranks.processes:
            process.kill()
    (tmp_path / "second").mkdir()
    ranks = Ranks(2, tmp_path / "second")
    try:
        assert all(ranks.run(after_the_death, "fsdp 2", str(folder)))
    finally:
        ranks.close()


def test_own_ingredients(ranks_of: Of) -> None:
    for found in ranks_of(2).run(of_own_ingredients, "fsdp 2"):
        assert found["undeclared"] <= 1e-5
        assert found["sums"] <= 1e-5
        assert "has asked for the weights" in found["wrong"]
        assert "Silent does not say which sums its survey makes" in found["silent"]
