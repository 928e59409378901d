"""What one layout has saved, another loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.optimizers import FAMILIES
from tests.support.ranks import Ranks
from tests.support.sharded import (
    Net,
    before_the_first_step,
    equal,
    goes_through_rank_0,
    loaded_by,
    loads_whole_state,
    one_process,
    saved_by,
)

Of = Callable[[int], Ranks]
#: Layouts that load what four ranks have saved: other placements, fewer ranks, a mesh of one, a plain module.
OTHERS = {"fsdp+tp 2x2": 4, "fsdp 2": 2, "fsdp 1": 1, "plain": 1}
#: One of each kind of state: entry-wise, rows, matrices, factors, bases, numbers of the whole optimizer.
KINDS = (
    "muon",
    "adamw",
    "normuon",
    "shampoo",
    "soap",
    "scale",
    "prodigy",
    "adafactor",
    "adamp",
    "muonh",
    "dion",
    "klshampoo",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_state_is_the_same_in_other_layouts(ranks_of: Of, name: str, tmp_path: Path) -> None:
    folder = str(tmp_path)
    saved, end = ranks_of(4).run(saved_by, name, "fsdp 4", folder)[0]
    for layout, size in OTHERS.items():
        for state, weights in ranks_of(size).run(loaded_by, name, layout, folder):
            assert equal(state, saved), layout
            assert (weights - end).abs().max() <= 1e-6, layout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["muon", "adamw", "shampoo"])
def test_tensor_parallel_state_and_flattened_names(ranks_of: Of, name: str, tmp_path: Path) -> None:
    options = {"flatten_optimizer_state_dict": True}
    saved = ranks_of(4).run(lambda_saved, name, str(tmp_path), options)[0]
    for state in ranks_of(4).run(lambda_loaded, name, str(tmp_path), options):
        assert equal(state, saved)


def lambda_saved(name: str, folder: str, options: dict[str, bool]) -> object:
    return saved_by(name, "fsdp+tp 2x2", folder, **options)[0]


def lambda_loaded(name: str, folder: str, options: dict[str, bool]) -> object:
    return loaded_by(name, "fsdp 4", folder, **options)[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_checkpoint_of_one_process_loads_into_many(ranks_of: Of, name: str) -> None:
    saved = one_process(name)
    for distance in ranks_of(4).run(loads_whole_state, name, "fsdp 4", saved):
        assert distance <= 1e-5


@pytest.mark.parametrize(
    "name", ["muon", *(pytest.param(x, marks=pytest.mark.slow) for x in ("adamw", "shampoo", "scale", "prodigy"))]
)
def test_a_whole_state_goes_through_the_first_rank(ranks_of: Of, name: str) -> None:
    assert all(ranks_of(2).run(goes_through_rank_0, name, "fsdp 2"))


@pytest.mark.parametrize("layout", ["fsdp 2", "mesh 2"])
def test_what_has_taken_no_step_has_no_state(ranks_of: Of, layout: str) -> None:
    for none, some in ranks_of(2).run(before_the_first_step, layout):
        assert none == 0
        assert some == len([*Net().parameters()]) - 2
