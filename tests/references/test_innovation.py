"""Directions that see the gradient beside its average: PRISM, Muon-NSR and Muon-VS."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from normopt import EMA, Chain, Innovated, NoiseScaled, Smoothed, Spectral, SteepestDescent
from normopt.ingredient import Context
from tests.support.paths import MATRICES, assert_same_path
from tests.support.strategies import assert_close
from tests.support.written import State, Written, average, gaussian, newton_schulz, polar

EXACT = Spectral("unit", "exact")


def damped(m: Tensor, d: Tensor) -> Tensor:
    """``m (m^T m + d^T d)^(-1/2)``."""
    values, vectors = torch.linalg.eigh(m.mT @ m + d.mT @ d)
    return m @ (vectors * values**-0.5) @ vectors.mT


def once(direction: Innovated, m: Tensor, g: Tensor) -> Tensor:
    context = Context(g, g, step=1, rate=0.1, direction=direction, weights=lambda: g)
    return direction(m, {}, context)


@pytest.mark.parametrize("shape", [(6, 4), (5, 5), (4, 7)])
@pytest.mark.parametrize("gamma", [0.3, 1.0, 20.0])
def test_innovated_is_the_momentum_over_the_root_of_both_grams(shape: tuple[int, int], gamma: float) -> None:
    m, g = gaussian(*shape), gaussian(*shape)
    d = once(Innovated(EXACT, gamma), m, g)
    assert_close(d, damped(m, gamma * (g - m)), 1e-9)
    assert torch.linalg.matrix_norm(d, 2) <= 1 + 1e-9


def test_innovated_without_innovation_is_the_polar_factor() -> None:
    m, g = gaussian(6, 4), gaussian(6, 4)
    assert_close(once(Innovated(EXACT, 0.0), m, g), polar(m), 1e-9)
    assert_close(once(Innovated(Spectral(2.0, "exact"), 3.0), m, m), 2 * polar(m), 1e-9)


def test_prism_by_its_recurrence() -> None:
    def update(g: Tensor, state: State, step: int) -> Tensor:
        m = average(g, state, 0.9, nesterov=False)
        u, s, vh = torch.linalg.svd(torch.cat((m, 0.5 * (g - m))), full_matrices=False)
        held = s > 1e-4 * s[0]  # at the first step both halves are multiples of one gradient
        return 0.02 * ((u * held) @ vh)[: len(g)]

    assert_same_path(
        lambda p: SteepestDescent(p, 0.02, Innovated(EXACT, 0.5), EMA(0.9)),
        lambda p: Written(p, update),
        MATRICES,
        2e-5,
    )


@pytest.mark.parametrize("gamma", [10.0, 1000.0, None], ids=["NSR 10", "NSR 1000", "VS"])
def test_variance_adaptive_muon_by_its_recurrence(gamma: float | None) -> None:
    """arXiv 2601.14603, with the small number where the authors' code has it."""
    beta = 0.9

    def update(g: Tensor, state: State, step: int) -> Tensor:
        old = state.setdefault("m", torch.zeros_like(g)).clone()
        variance = state.setdefault("variance", torch.zeros_like(g))
        variance.mul_(beta).add_(beta * (1 - beta) * (old - g) ** 2)
        m = average(g, state, beta, nesterov=False)
        correction = 1 - beta**step
        ahead = beta / (1 - beta) * m / correction + g
        noise = variance / correction
        squares = noise if gamma is None else ahead**2 + gamma * noise
        return 0.02 * newton_schulz(ahead / (squares.sqrt() + 1e-8))

    stages = Chain(NoiseScaled(beta, gamma), Spectral("unit", "newton-schulz", dtype=None))
    assert_same_path(
        lambda p: SteepestDescent(p, 0.02, stages, EMA(beta)), lambda p: Written(p, update), MATRICES, 5e-5
    )


def test_a_steady_gradient_has_no_noise() -> None:
    """Of one gradient for ever, Muon-NSR's stage is its sign; noise makes entries smaller."""
    torch.manual_seed(0)
    steady, noisy = (torch.nn.Parameter(torch.zeros(4, 3)) for _ in range(2))
    optimizer = SteepestDescent([steady, noisy], 1.0, NoiseScaled(0.9, 10.0), EMA(0.9))
    g = torch.randn(4, 3)
    for _ in range(60):
        before = [w.detach().clone() for w in (steady, noisy)]
        steady.grad, noisy.grad = g.clone(), g + 3 * torch.randn(4, 3)
        optimizer.step()
    moves = [old - w.detach() for old, w in zip(before, (steady, noisy), strict=True)]
    assert_close(moves[0], g.sign(), 0.05)
    assert moves[1].abs().mean() < 0.75


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NoiseScaled(0.0), "NoiseScaled: beta must be positive"),
        (lambda: NoiseScaled(1.0), r"NoiseScaled: beta must lie in \[0, 1\)"),
        (lambda: NoiseScaled(gamma=-1.0), "NoiseScaled: gamma must"),
        (lambda: Innovated(gamma=-1.0), "Innovated: gamma must"),
        (lambda: Innovated(Smoothed("max")), "Innovated"),
    ],
)
def test_numbers_out_of_range_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()
