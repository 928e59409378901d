"""Every optimizer, and every rule, on a sharded model is what it is in one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

import normopt
from tests.support.ranks import Ranks
from tests.support.sharded import BFLOAT16, FLOAT32, LAYOUTS, Outcome, of_optimizers, of_rules, squares

NAMES = normopt.list_optimizers()
#: Weights in bfloat16: an update that differs in float32's last bit, as products of other batches do, now and then
#: rounds to the neighbouring number. So many of the model's 1,300 entries may.
FLIPS = 5

Of = Callable[[int], Ranks]


@pytest.mark.parametrize("layout", ["fsdp 2", pytest.param("fsdp 4", marks=pytest.mark.slow)])
def test_every_optimizer(ranks_of: Of, layout: str) -> None:
    check(NAMES, ranks_of(LAYOUTS[layout]).run(of_optimizers, NAMES, layout, 2))


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_optimizer_in_every_layout(ranks_of: Of, layout: str) -> None:
    check(NAMES, ranks_of(LAYOUTS[layout]).run(of_optimizers, NAMES, layout, 20))


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rule(ranks_of: Of, layout: str) -> None:
    check(FLOAT32, ranks_of(LAYOUTS[layout]).run(of_rules, [*FLOAT32], layout, 10))


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_in_bfloat16(ranks_of: Of, layout: str) -> None:
    for found in ranks_of(LAYOUTS[layout]).run(of_rules, [*BFLOAT16], layout, 10):
        for name in BFLOAT16:
            assert isinstance(found[name], Outcome), found[name]
            assert found[name].spread == 0, name
            assert found[name].flipped <= FLIPS, name


@pytest.mark.parametrize("name", ["muon", "scion", "muonplusplus", "soap"])
def test_products_are_chosen_by_one_matrix(ranks_of: Of, name: str) -> None:
    """Not by the batch, which is smaller on each owner than in one process."""
    for distance, _, _ in ranks_of(2).run(squares, name, True):
        assert distance <= 1e-5


@pytest.mark.parametrize("name", ["muon", "scion"])
def test_ranks_agree_on_what_was_measured(ranks_of: Of, name: str) -> None:
    every = ranks_of(2).run(squares, name, False)
    assert every[0][1] == every[1][1]
    assert all(spread == 0 for _, _, spread in every)


def check(names: Sequence[str] | Mapping[str, Any], every: list[dict[str, Outcome | str]]) -> None:
    """On all ranks within 1e-5 of the distance travelled, and replicas equal to the bit after every step."""
    wrong = {}
    for name in names:
        found = [each.get(name, "not run") for each in every]
        if any(isinstance(x, str) or not x.distance <= 1e-5 or x.spread != 0 for x in found):
            wrong[name] = next((x for x in found if isinstance(x, str)), found)
    assert not wrong, "\n".join(f"{name}: {found}" for name, found in wrong.items())
