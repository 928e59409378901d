"""Bounds on weights, each alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import normopt
from normopt import (
    Ball,
    Column,
    Constraint,
    FrobeniusSphere,
    RadialBrake,
    Row,
    RowBound,
    RowFloor,
    SoftSpectralCap,
    Spectral,
    SpectralCap,
    SpectralNormalize,
    Sphere,
    SteepestDescent,
    Stiefel,
    View,
)
from normopt.constraints.spectrum import soft_coefficient
from normopt.ingredient import Context
from normopt.numerics.singular import singular_values
from tests.support.bounded import noise
from tests.support.strategies import NORMS, from_spectrum, label

seeds = st.integers(0, 2**32 - 1)
sizes = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))


def context(w: Tensor, rate: float = 0.1, shrink: float = 1.0, is_vector: bool = False) -> Context:
    return Context(w, w, 1, rate, None, lambda: w, shrink=shrink, is_vector=is_vector)


def put(constraint: Constraint, w: Tensor, start: Tensor | None = None, **known: Any) -> Tensor:
    """Where ``constraint`` puts weights that began at ``start``."""
    return constraint.weight(w, constraint.init_state(w, lambda: w if start is None else start), context(w, **known))


@given(sizes, seeds, st.sampled_from([-1, -2]), st.sampled_from([0.3, 1.0, 4.0]))
def test_row_bound_shortens_long_rows_and_no_others(size: tuple[int, ...], seed: int, axis: int, radius: float) -> None:
    w = noise(size, seed)
    new, lengths = put(RowBound(radius, axis), w), w.norm(dim=axis, keepdim=True)
    assert (new.norm(dim=axis) <= radius * (1 + 1e-14)).all()
    inside = (lengths <= radius).expand_as(w)
    assert torch.equal(new[inside], w[inside])
    torch.testing.assert_close(new, w * (radius / lengths).clamp(max=1))
    assert torch.equal(put(RowBound(radius, axis), new), new)


@given(sizes, seeds, st.sampled_from([0.3, 1.0, 4.0]))
def test_row_bound_is_the_ball_of_the_row_norm(size: tuple[int, ...], seed: int, radius: float) -> None:
    w = noise(size, seed)
    torch.testing.assert_close(put(RowBound(radius), w), put(Ball(Row("unit"), radius), w))
    torch.testing.assert_close(put(RowBound(radius, -2), w), put(Ball(Column("unit"), radius), w))


@given(sizes, seeds, st.sampled_from([-1, -2]), st.sampled_from([0.3, 1.0]))
def test_sphere_gives_rows_their_length(size: tuple[int, ...], seed: int, axis: int, radius: float) -> None:
    w = noise(size, seed)
    new = put(Sphere(radius, axis), w)
    torch.testing.assert_close(new, w / w.norm(dim=axis, keepdim=True) * radius)
    assert torch.equal(put(Sphere(radius, axis), new), new)


@given(sizes, seeds)
def test_frobenius_sphere_keeps_the_length_of_the_start(size: tuple[int, ...], seed: int) -> None:
    start, w = noise(size, seed), noise(size, seed + 1)
    new = put(FrobeniusSphere(), w, start)
    torch.testing.assert_close(new.norm(dim=(-2, -1)), start.norm(dim=(-2, -1)))
    torch.testing.assert_close(new / new.norm(), w / w.norm() if len(w) == 1 else new / new.norm())
    assert torch.equal(put(FrobeniusSphere(), start, start), start)
    torch.testing.assert_close(put(FrobeniusSphere(2.5), w).norm(dim=(-2, -1)), torch.full(size[:1], 2.5).double())


def test_bounds_of_zeros_and_vectors() -> None:
    zero, w = torch.zeros(2, 3, 4), torch.randn(2, 3, 4)
    for constraint in (
        RowBound(),
        Sphere(),
        FrobeniusSphere(1.0),
        FrobeniusSphere(),
        SpectralCap(),
        SoftSpectralCap(),
        Stiefel(),
        RadialBrake(),
    ):
        assert torch.equal(put(constraint, zero), zero)
    assert torch.equal(put(FrobeniusSphere(), w, zero), w), "there is no length to keep"
    for constraint in (FrobeniusSphere(1.0), SpectralCap(), SpectralNormalize(), Stiefel(), RadialBrake()):
        vector = torch.randn(1, 1, 5)
        assert torch.equal(put(constraint, vector, is_vector=True), vector)


@pytest.mark.parametrize("size", [1e22, 1e-25])
@pytest.mark.parametrize("axis", [-1, -2])
def test_bounds_of_lengths_whose_squares_overflow_or_underflow(size: float, axis: int) -> None:
    """In float32, beside rows of ordinary length."""
    w = noise((2, 3, 4), 0).float()
    close = functools.partial(torch.testing.assert_close, rtol=1e-6, atol=0)
    close(put(Sphere(0.3, axis), w * size), put(Sphere(0.3, axis), w))
    close(put(FrobeniusSphere(0.3), w * size), put(FrobeniusSphere(0.3), w))
    close(put(FrobeniusSphere(), w, w * size), put(FrobeniusSphere(), w) * size)
    close(put(RowBound(0.3 * size, axis), w * size), put(RowBound(0.3, axis), w) * size)
    several = torch.cat([w, w * size], dim=-3)
    close(put(Sphere(0.3, axis), several), put(Sphere(0.3, axis), torch.cat([w, w], dim=-3)))
    tiny = torch.full((1, 2, 2), 1e-42)
    assert torch.equal(put(Sphere(), tiny), tiny), "nothing in float32 is large enough to make it longer"


@pytest.mark.parametrize("norm", NORMS, ids=label)
def test_ball_of_every_norm(norm: normopt.Norm) -> None:
    w = noise((2, 4, 5), 0)
    radius = 0.5 * norm.norm(w).min().item()
    new = put(Ball(norm, radius), w)
    assert (norm.norm(new) <= radius * (1 + 1e-6)).all()
    torch.testing.assert_close(new, norm.project(w, radius))
    torch.testing.assert_close(put(Ball(norm, 4 * radius), w / 4), w / 4)


@given(st.integers(2, 20), st.integers(2, 20), seeds, st.sampled_from(["unit", "rms"]), st.sampled_from([0.2, 1.0]))
def test_spectral_cap_is_the_projection(m: int, n: int, seed: int, scale: str, radius: float) -> None:
    w = noise((2, m, n), seed)
    torch.testing.assert_close(
        put(SpectralCap(radius, scale), w), put(Ball(Spectral(scale), radius), w), rtol=0, atol=2e-3
    )


def test_spectral_cap_cuts_and_leaves_the_rest() -> None:
    torch.manual_seed(0)
    values = torch.tensor([30.0, 3, 1.5, 1.1, 0.9, 0.5, 0.1, 1e-3, 1e-6], dtype=torch.float64)
    for m, n in [(9, 9), (30, 9), (9, 30)]:
        new = singular_values(put(SpectralCap(1.0, "unit"), from_spectrum(m, n, values)))
        torch.testing.assert_close(new.sort(descending=True).values, values.clamp(max=1), rtol=0, atol=1e-7)


@given(st.sampled_from([0.01, 0.1, 0.3]), st.sampled_from([0.5, 0.99, 1.0]), st.sampled_from([0.3, 1.0, 5.0]), seeds)
def test_soft_spectral_cap_keeps_what_starts_in_the_ball(reach: float, shrink: float, radius: float, seed: int) -> None:
    torch.manual_seed(seed % 2**31)
    rate = reach * radius
    w = from_spectrum(5, 7, torch.linspace(0.1, 1, 5, dtype=torch.float64)) * radius
    update = from_spectrum(5, 7, torch.ones(5, dtype=torch.float64))
    moved = shrink * w - rate * update
    new = put(SoftSpectralCap(radius, "unit", max_update=1.0), moved, w, rate=rate, shrink=shrink)
    assert singular_values(new).amax() <= radius * (1 + 1e-12)
    at_worst = from_spectrum(5, 7, torch.linspace(0.0, shrink * radius + rate, 5, dtype=torch.float64))
    values = singular_values(
        put(SoftSpectralCap(radius, "unit", max_update=1.0), at_worst, w, rate=rate, shrink=shrink)
    )
    assert abs(values.amax() - min(radius, shrink * radius + rate)) < 1e-12 * radius
    assert (values.diff() <= 0).all()


@given(st.floats(1, 1e6))
def test_soft_spectral_cap_coefficient(k: float) -> None:
    a = soft_coefficient(k)
    x = k - a * k**3
    assert a >= 0 and abs(x + a * x**3 - 1) < 1e-9
    torch.testing.assert_close(soft_coefficient(torch.tensor(k, dtype=torch.float64)), torch.tensor(a).double())


@given(sizes, seeds, st.sampled_from([0.3, 1.0, 4.0]), st.sampled_from(["unit", "rms"]))
def test_stiefel_is_the_polar_factor_at_its_radius(size: tuple[int, ...], seed: int, radius: float, scale: Any) -> None:
    w = noise(size, seed)
    new, unit = put(Stiefel(radius, scale, "exact"), w), radius * Spectral(scale).factor(w.shape)
    torch.testing.assert_close(singular_values(new), torch.full_like(singular_values(new), unit))
    torch.testing.assert_close((new * w).sum(), unit * singular_values(w).sum())
    torch.testing.assert_close(put(Stiefel(radius, scale, "exact"), new), new)


def test_stiefel_by_the_polar_express_is_exact_in_float32() -> None:
    w = (torch.eye(9, 7) + 0.1 * noise((9, 7), 0)).float()[None]
    torch.testing.assert_close(put(Stiefel(), w), put(Stiefel(method="exact"), w), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_radial_brake_leaves_a_part_of_growth(factor: float, dtype: torch.dtype) -> None:
    """Of three matrices: one grows, one shrinks, one is 0; twice, with decay and momentum before it."""
    start = [noise((4, 6), 0).to(dtype), noise((4, 6), 1).to(dtype), torch.zeros(4, 6, dtype=dtype)]
    w = [nn.Parameter(x.clone()) for x in start]
    optimizer = SteepestDescent(w, 0.05, "euclidean", 0.5, constraint=["WeightDecay(0.1)", RadialBrake(factor)])
    plain = [nn.Parameter(x.clone()) for x in start]
    free = SteepestDescent(plain, 0.05, "euclidean", 0.5, constraint="WeightDecay(0.1)")
    for i in range(2):
        before = [p.detach().clone() for p in w]
        for p, q, sign in zip(w, plain, (-1.0, 1.0, 1.0), strict=True):
            q.detach().copy_(p)
            p.grad = q.grad = (sign * start[0] if sign < 0 else start[1]).clone() + 0.3 * noise((4, 6), i + 2).to(dtype)
        optimizer.step()
        free.step()
        for old, new, moved in zip(before[:2], w, plain, strict=False):
            radial = ((moved - old).double() * old.double()).sum() / old.double().norm()
            wanted = old.double().norm() + radial * (factor if radial > 0 else 1.0)
            tolerance = 1e-12 if dtype == torch.float64 else 2e-2
            torch.testing.assert_close(new.detach().double().norm(), wanted, rtol=tolerance, atol=0)
            along = new.detach().double() / new.detach().double().norm()
            torch.testing.assert_close(
                along, moved.detach().double() / moved.detach().double().norm(), rtol=0, atol=tolerance
            )
    assert all(p.any() for p in w)


def test_row_floor_lengthens_short_rows_of_updates() -> None:
    w = nn.Parameter(noise((5, 7), 0))
    g = noise((5, 7), 1) * torch.tensor([1e-3, 0.0, 1.0, 30.0, 1e-12])[:, None].double()
    w.grad, before = g.clone(), w.detach().clone()
    SteepestDescent([w], 0.1, "identity", constraint=RowFloor(0.5)).step()
    d, sizes = (before - w.detach()) / 0.1, before.norm(dim=1)
    lengths = torch.maximum(g.norm(dim=1), 0.5 * sizes) * (g.norm(dim=1) > 0)
    torch.testing.assert_close(d.norm(dim=1), lengths, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(d[2:4], g[2:4] * (lengths / g.norm(dim=1))[2:4, None])
    seen = RowFloor(0.5).seen_through(View(transpose=True))
    assert seen == RowFloor(0.5, axis=-2) and RowFloor().reduces == "row" and seen.reduces == "column"


def check_spectral_normalization(m: int, n: int, seed: int) -> None:
    """Of a batch of two; the power iteration has 2,000 steps to tell close singular values apart."""
    start = noise((2, m, n), seed)
    constraint = SpectralNormalize(1.0, "unit")
    state, w = constraint.init_state(start, lambda: start), 0.1 * start
    assert torch.equal(constraint.weight(w, state, context(w)), w), "inside the ball"
    w = 3 * start
    largest = singular_values(w).amax(dim=-1)[..., None, None]
    torch.testing.assert_close(constraint.weight(w, state, context(w)), w / largest.clamp(min=1), rtol=1e-6, atol=0)
    other = noise((2, m, n), seed + 1) * 5
    for _ in range(2000):
        new = constraint.weight(other, state, context(other))
    assert (singular_values(new).amax(dim=-1) <= 1 + 1e-3).all()


@pytest.mark.parametrize(("m", "n"), [(2, 9), (7, 3), (6, 6)])
def test_spectral_normalization(m: int, n: int) -> None:
    check_spectral_normalization(m, n, 0)


@pytest.mark.slow
@given(st.integers(2, 9), st.integers(2, 9), seeds)
def test_spectral_normalization_of_any_shape(m: int, n: int, seed: int) -> None:
    check_spectral_normalization(m, n, seed)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RowBound(0.0), "RowBound: radius must be positive"),
        (lambda: Sphere(-1.0), "Sphere: radius must lie in"),
        (lambda: RowBound(axis=0), "axis must be -1"),
        (lambda: FrobeniusSphere(float("inf")), "FrobeniusSphere: radius must lie in"),
        (lambda: Ball(radius="one"), "Ball: radius must be a number"),
        (lambda: SpectralCap(scale="big"), "unknown scale 'big'"),
        (lambda: SoftSpectralCap(max_update=0), "max_update must be positive"),
        (lambda: Stiefel(method="qr"), "Stiefel: unknown method 'qr'"),
        (lambda: RadialBrake(1.5), "RadialBrake: factor must lie in"),
        (lambda: RowFloor(0.0), "RowFloor: ratio must be positive"),
        (lambda: RowFloor(axis=1), "axis must be -1"),
        (lambda: SpectralNormalize(iterations=0), "iterations must be a whole number"),
    ],
)
def test_bounds_refuse_bad_arguments(make: Callable[[], Constraint], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_soft_spectral_cap_refuses_what_it_cannot_press_into_the_ball() -> None:
    w = nn.Parameter(torch.eye(3))
    w.grad = torch.ones(3, 3)
    for lr, radius, message in [(0.1, 0.5, "starts with norm 1, outside the ball"), (0.5, 1.0, "must be 0.3 at most")]:
        optimizer = SteepestDescent([w], lr, Spectral("unit"), constraint=SoftSpectralCap(radius, "unit"))
        with pytest.raises(ValueError, match=message):
            optimizer.step()
        assert torch.equal(w, torch.eye(3)) and all(state["step"] == 0 for state in optimizer.state.values())
    for rule in ({"step_size": "dual"}, {"norm": "max"}, {"norm": "Spectral(scale='unit')"}):
        with pytest.raises(ValueError, match=r"needs (steps of bounded length|to know how large updates can be)"):
            SteepestDescent([w], **rule, constraint="soft-spectral-cap")
    row = nn.Parameter(torch.tensor([[5.0, 0.0]]))
    row.grad = torch.ones(1, 2)
    with pytest.raises(ValueError, match="starts with norm 5"):
        SteepestDescent([row], 0.1, Spectral("unit"), constraint=SoftSpectralCap(1.0, "unit")).step()
