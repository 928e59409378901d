"""Decompositions that are kept for some steps: each matrix renews its own at a step of its own."""

from __future__ import annotations

import copy
import inspect
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normopt
from normopt import SteepestDescent
from normopt.engine import plan
from normopt.ingredient import Option
from normopt.ingredient.base import Ingredient
from normopt.rule import rule_of

PERIOD = 4
#: What each optimizer of the registry calls the number of steps from one refresh to the next.
PERIODS = {
    "shampoo": "preconditioning_frequency",
    "soap": "precondition_frequency",
    "klshampoo": "precondition_frequency",
    "splus": "inverse_steps",
}
KEPT = ("basis", "root")

turned = pytest.mark.parametrize("name", PERIODS)


def parameters(count: int = 8, shape: tuple[int, int] = (6, 5)) -> list[nn.Parameter]:
    noise = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=noise, dtype=torch.float64)) for _ in range(count)]


def make(name: str, params: list[Any], **options: Any) -> SteepestDescent:
    # With so large an eps that Shampoo's roots fit every gradient until their turn.
    more = {"eps": 1e3} if name == "shampoo" else {}
    return normopt.create(name, params, lr=1e-3, **{PERIODS[name]: PERIOD}, **more, **options)


def step(optimizer: SteepestDescent, params: list[nn.Parameter], i: int, *, missing: tuple[int, ...] = ()) -> None:
    noise = torch.Generator().manual_seed(100 + i)
    for j, p in enumerate(params):
        g = torch.randn(p.shape, generator=noise, dtype=torch.float64)
        p.grad = None if j in missing else g
    optimizer.step()


def kept(optimizer: SteepestDescent, p: Tensor) -> list[Tensor]:
    return [x.clone() for name, x in optimizer.state[p].items() if any(word in name for word in KEPT)]


def renewed(optimizer: SteepestDescent, params: list[nn.Parameter], steps: range) -> list[list[int]]:
    """Which matrices have other bases or roots after each step."""
    found = []
    for i in steps:
        before = [kept(optimizer, p) for p in params]
        step(optimizer, params, i)
        after = [kept(optimizer, p) for p in params]
        assert all(before)
        found.append([j for j, (a, b) in enumerate(zip(before, after, strict=True)) if not all(map(torch.equal, a, b))])
    return found


def test_whatever_keeps_a_decomposition_can_be_staggered() -> None:
    """Every ingredient with a period, and every optimizer that has one of them."""
    fields = {name: inspect.signature(cls).parameters for name, cls in Ingredient._classes.items()}
    periodic = {name for name, parameters in fields.items() if "frequency" in parameters}
    assert periodic and all("staggered" in fields[name] for name in periodic)
    with_period = set()
    for name in normopt.list_optimizers():
        optimizer = normopt.create(name, [nn.Parameter(torch.zeros(4, 3))])
        parts = rule_of(optimizer.param_groups[0]).every_part()
        periods = [getattr(part, "frequency") for part in parts if hasattr(part, "frequency")]  # noqa: B009
        can_change = {"frequency", *PERIODS.values()} & optimizer.arguments.keys()
        if any(isinstance(period, Option) or period > 1 for period in periods) or (periods and can_change):
            with_period.add(name)
            assert optimizer.arguments["staggered"] is True
    assert with_period == {*PERIODS}


@turned
def test_as_many_matrices_have_their_turn_at_every_step(name: str) -> None:
    params = parameters()
    optimizer = make(name, params)
    for i in range(2):
        step(optimizer, params, i)
    found = renewed(optimizer, params, range(2, 2 + 2 * PERIOD))
    assert [len(each) for each in found] == [len(params) // PERIOD] * len(found)
    assert found[:PERIOD] == found[PERIOD:] and {j for each in found for j in each} == {*range(len(params))}


@turned
def test_all_matrices_have_their_turn_at_once_where_that_is_wanted(name: str) -> None:
    params = parameters()
    optimizer = make(name, params, staggered=False)
    for i in range(2):
        step(optimizer, params, i)
    found = renewed(optimizer, params, range(2, 2 + 2 * PERIOD))
    assert sorted(map(len, found)) == [0] * 2 * (PERIOD - 1) + [len(params)] * 2


@turned
def test_names_say_when_a_matrix_has_its_turn(name: str) -> None:
    """Whichever others there are: each moves as it does alone."""
    together, apart = parameters(), parameters()
    names = [f"layers.{i}.weight" for i in range(len(together))]
    optimizer = make(name, [*zip(names, together, strict=True)])
    alone = [make(name, [pair]) for pair in zip(names, apart, strict=True)]
    for i in range(9):
        step(optimizer, together, i)
        for p, q, single in zip(together, apart, alone, strict=True):
            q.grad = p.grad
            single.step()
    for p, q in zip(together, apart, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


@turned
def test_the_first_matrix_has_its_turn_at_the_multiples(name: str) -> None:
    """So that a single matrix moves as without turns, to the bit."""
    runs = [parameters(1), parameters(1)]
    for params, staggered in zip(runs, (True, False), strict=True):
        optimizer = make(name, params, staggered=staggered)
        for i in range(10):
            step(optimizer, params, i)
    assert torch.equal(runs[0][0], runs[1][0])


@turned
@pytest.mark.parametrize("save", [copy.deepcopy, lambda state: torch.load(_file(state))], ids=["copied", "saved"])
def test_resuming_between_turns_is_exact(name: str, save: Callable[[Any], Any]) -> None:
    whole, halves = parameters(), parameters()
    optimizer = make(name, whole)
    for i in range(11):
        step(optimizer, whole, i)
    first = make(name, halves)
    for i in range(6):
        step(first, halves, i)
    second = make(name, halves)
    second.load_state_dict(save(first.state_dict()))
    for i in range(6, 11):
        step(second, halves, i)
    assert all(map(torch.equal, whole, halves))


def _file(state: dict[str, Any]) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


@turned
def test_turns_do_not_depend_on_batches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On which matrices are batched together, and on which have gradients."""
    runs = [parameters(), parameters()]
    for params, entries in zip(runs, (1 << 22, 1), strict=True):
        monkeypatch.setattr(plan, "MAX_ENTRIES", entries)
        optimizer = make(name, params)
        for i in range(11):
            step(optimizer, params, i, missing=(2, 5) if i in (4, 7) else ())
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_blocks_of_one_matrix_have_turns_of_their_own() -> None:
    params = parameters(1, (8, 6))
    optimizer = normopt.create(
        "shampoo", params, lr=1e-3, block_size=2, eps=1e3, preconditioning_frequency=3, staggered=True
    )
    for i in range(2):
        step(optimizer, params, i)
    found = []
    for i in range(2, 5):
        before = kept(optimizer, params[0])[0]
        step(optimizer, params, i)
        found.append((before != kept(optimizer, params[0])[0]).flatten(-2).any(dim=-1).sum().item())
    assert found == [4, 4, 4]
