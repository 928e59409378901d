"""Directions that are made of others, and those that are no duality map: blocks, grafts, rotations, complements."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import normopt
from normopt import (
    EMA,
    Aligned,
    Chain,
    Column,
    Complement,
    CoshScaled,
    Euclidean,
    Grafted,
    LowRank,
    Max,
    Nuclear,
    Rotated,
    Row,
    Sinkhorn,
    Smoothed,
    Spectral,
    SteepestDescent,
    zoo,
)
from normopt.directions.algebra import Identity
from normopt.directions.bases import Eigenbasis
from normopt.directions.coordinates import Blocked
from normopt.directions.whitening import KLWhitened
from tests.support.preconditioned import give_gradients, seeing
from tests.support.strategies import assert_close
from tests.support.written import gaussian

# Blocks --------------------------------------------------------------------------------------------------------------


@given(
    shape=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    lead=st.sampled_from([(), (1,), (3,), (2, 2)]),
    size=st.integers(1, 10),
)
def test_blocked_joins_to_what_was_cut(shape: tuple[int, int], lead: tuple[int, ...], size: int) -> None:
    blocked = Blocked(Max(), size)
    x = torch.arange(math.prod((*lead, *shape)), dtype=torch.float32).reshape(*lead, *shape) + 1
    blocks = blocked.cut(x)
    assert max(blocks.shape[-2:]) <= size and blocks.shape[: len(lead)] == lead
    assert torch.equal(blocked.join(blocks, x.shape), x)
    assert (blocks != 0).sum() == x.numel()  # nothing but zeros besides
    tight = [-(-n // size) if n else 1 for n in shape]
    assert blocks.shape[-3] == math.prod(tight)


@pytest.mark.parametrize("shape", [(8, 12), (7, 10), (3, 11), (4, 4)], ids=str)
@pytest.mark.parametrize(
    "norm",
    [
        Smoothed(Spectral("unit"), 0.9, 1e-4),
        Grafted(Smoothed(Spectral("unit"), 0.9, 1e-4, frequency=3), Smoothed(Max())),
        Rotated(Smoothed(Max()), Eigenbasis(0.9, 3)),
        Euclidean("unit"),
        KLWhitened(0.9, frequency=2),
    ],
    ids=str,
)
def test_blocked_moves_blocks_as_tensors_of_their_own(shape: tuple[int, int], norm: Any) -> None:
    size = 4
    whole = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    rows, columns = (-(-n // -(-n // size)) for n in shape)
    # Where sides cannot be cut evenly, the tensor of a block is filled up with zeros as well.
    padded = nn.functional.pad(torch.ones(shape), (0, -shape[1] % columns, 0, -shape[0] % rows))
    cuts = [(i, j) for i in range(0, padded.shape[0], rows) for j in range(0, padded.shape[1], columns)]

    def block(x: Tensor, i: int, j: int) -> Tensor:
        part = x[i : i + rows, j : j + columns]
        return nn.functional.pad(part, (0, columns - part.shape[1], 0, rows - part.shape[0]))

    parts = [nn.Parameter(block(whole.detach(), i, j)) for i, j in cuts]
    first = SteepestDescent([whole], 0.1, Blocked(norm, size), 0.5)
    second = SteepestDescent(parts, 0.1, norm, 0.5)
    for i in range(7):
        give_gradients([whole], i)
        for part, cut in zip(parts, cuts, strict=True):
            part.grad = block(whole.grad, *cut)
        first.step()
        second.step()
    for part, cut in zip(parts, cuts, strict=True):
        torch.testing.assert_close(block(whole.detach(), *cut), part.detach(), rtol=0, atol=1e-9)


def test_blocked_knows_how_large_it_is() -> None:
    assert Blocked(Spectral("unit"), 4).rms((8, 16)) == Spectral("unit").rms((4, 4))
    g = torch.randn(2, 8, 8, dtype=torch.float64)
    norm = Spectral("unit", "exact")
    expected = sum(norm.dual_norm(g[:, i : i + 4, j : j + 4]) for i in (0, 4) for j in (0, 4))
    torch.testing.assert_close(Blocked(norm, 4).steepness(g, {}), expected)


# Grafts and rotations ------------------------------------------------------------------------------------------------


def test_grafted_takes_its_length_from_the_other() -> None:
    g = torch.randn(3, 4, 6)
    d = Grafted(Row("unit"), Identity())(g, {}, seeing(g))
    torch.testing.assert_close(d.norm(dim=(1, 2)), g.norm(dim=(1, 2)))
    row = Row("unit").dualize(g)
    torch.testing.assert_close(d / d.norm(dim=(1, 2), keepdim=True), row / row.norm(dim=(1, 2), keepdim=True))
    assert (Grafted(Row("unit"), Identity())(torch.zeros(1, 4, 6), {}, seeing(g)) == 0).all()


@pytest.mark.parametrize(
    "memory",
    [
        Smoothed(Max(), 0.9),
        Smoothed(Row("unit"), 0.9),
        Smoothed(Column("unit"), 0.9, maximum=True),
        Chain(Smoothed(Max(), 0.9), Euclidean()),
        Grafted(Smoothed(Column(), 0.9), Smoothed(Max(), 0.9)),
    ],
    ids=str,
)
def test_rotated_memory_follows_the_order_of_the_basis(memory: Any) -> None:
    """A basis whose columns are put in another order, with the memory, gives the same direction."""
    torch.manual_seed(0)
    rotated, g = Rotated(memory, Eigenbasis(0.9, 1)), torch.randn(2, 5, 6, dtype=torch.float64)
    state = rotated.init_state(g)
    rotated.look(g, state)
    context = seeing(g)
    rotated(g, state, context)
    expected = rotated.apply(g, state, context)
    left, right = torch.randperm(5), torch.randperm(6)
    for name, tensor in state.items():
        if name.endswith("basis"):
            tensor.copy_(tensor[..., left if "left" in name else right].clone())
        elif "gram" not in name:
            tensor = tensor.copy_(tensor[..., left, :].clone()) if tensor.shape[-2] == 5 else tensor
            tensor.copy_(tensor[..., right].clone()) if tensor.shape[-1] == 6 else None
    torch.testing.assert_close(rotated.apply(g, state, context), expected)


@pytest.mark.parametrize(
    "direction",
    [
        Smoothed(Spectral()),
        Euclidean(),
        Chain(Max(), EMA()),
        Smoothed(Max(), centered=True),
        Grafted(Max(), Smoothed(Max(), centered=True)),
        Rotated(Max(), Eigenbasis()),
        KLWhitened(),
    ],
    ids=str,
)
def test_rotated_refuses_what_would_have_to_turn(direction: Any) -> None:
    with pytest.raises(ValueError, match="Rotated: "):
        Rotated(direction, Eigenbasis())


def test_rotated_and_whitened_must_come_first() -> None:
    with pytest.raises(ValueError, match="must come first"):
        Chain(Row(), Rotated(Max(), Eigenbasis()))
    with pytest.raises(ValueError, match="must come first"):
        Chain(EMA(), KLWhitened())


# Lengths and zeros ---------------------------------------------------------------------------------------------------


def test_directions_leave_zeros_at_zero() -> None:
    g = gaussian(6, 8)
    g[2], g[:, 5] = 0, 0
    for direction in Sinkhorn(), CoshScaled(), Aligned(), LowRank():
        state = direction.init_state(g)
        assert not direction(torch.zeros_like(g), state, None).any()  # type: ignore[arg-type]
        for _ in range(3):
            update = direction(g, state, None)  # type: ignore[arg-type]
            assert update.isfinite().all() and update.norm() > 1
            assert update[2].abs().max() < 1e-12 and update[:, 5].abs().max() < 1e-12


def test_chain_leaves_the_dual_norm_to_what_sets_the_length() -> None:
    """NorMuon's and HybridAuON's updates are as long as polar factors, SWAN's as rows; a momentum's, as gradients."""
    g, polar_factor = gaussian(6, 10), Spectral("max1", "exact")
    rows = normopt.Grafted(Smoothed(Row("unit")), normopt.Identity())
    for last in rows, CoshScaled():
        chain = Chain(polar_factor, last)
        assert_close(chain.steepness(g, {}), polar_factor.dual_norm(g), 1e-9)
        assert chain.rms((6, 10)) == polar_factor.rms((6, 10))
    swan = Chain(Row("sqrt_in"), normopt.Grafted(polar_factor, normopt.Identity()))
    assert swan.rms((6, 10)) == pytest.approx(1.0)
    for unbounded in Chain(EMA(0.9)), CoshScaled():
        with pytest.raises(ValueError, match="bounds its result in no norm"):
            unbounded.steepness(g, {})


def test_complement_has_its_dual_norm() -> None:
    """<g, d> is the nuclear norm of what is left of g, in any rotation-invariant norm its dual norm."""
    noise = torch.Generator().manual_seed(0)
    w, g = torch.randn(2, 6, 4, generator=noise, dtype=torch.float64)
    for norm in (Spectral("unit", method="exact"), Nuclear("unit")):
        direction = Complement(norm, 2)
        state = direction.init_state(g)
        context = normopt.ingredient.Context(g, g, 1, 1.0, direction, lambda: w)
        d = direction(g, state, context)
        torch.testing.assert_close((g * d).sum(), direction.steepness(g, state))
        assert norm.norm(d) == pytest.approx(1.0)


# Bad arguments -------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a rotation that changes nothing": (lambda: Aligned(Spectral()), "the same in every basis"),
    "memory": (lambda: Aligned(Smoothed(Max())), "no memory"),
    "a length": (lambda: Aligned(normopt.Identity()), "ignore the length"),
    "a rank of 0": (lambda: LowRank(0.0), "rank_fraction must lie in"),
    "more than full rank": (lambda: LowRank(1.5), "rank_fraction must lie in"),
    "no decay": (lambda: LowRank(beta=1.0), "beta must lie in"),
    "no iterations": (lambda: Sinkhorn(0), "iterations must be a whole number"),
    "a negative length": (lambda: CoshScaled(-1.0), "gamma must lie in"),
    "an unknown base": (lambda: zoo.ARO([nn.Parameter(torch.zeros(2, 2))], base="rows"), "did you mean 'row'"),
}


@pytest.mark.parametrize(("build", "message"), REFUSED.values(), ids=REFUSED)
def test_directions_refuse_what_makes_no_sense(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
