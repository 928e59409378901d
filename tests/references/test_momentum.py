"""Momenta beyond one average, by their published recurrences."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normopt import EMA, Corrected, Identity, Mixture, Spectral, SteepestDescent
from normopt.momentum.base import Momentum
from normopt.momentum.mixture import age_of, weights_of_age
from tests.support.paths import MATRICES, assert_same_path
from tests.support.written import State, Written, polar

# Mixture -------------------------------------------------------------------------------------------------------------


def run(momentum: Momentum, gradients: list[Tensor]) -> list[Tensor]:
    """What the momentum makes of these gradients."""
    w = nn.Parameter(torch.zeros_like(gradients[0]))
    optimizer, found = SteepestDescent([w], 1.0, Identity(), momentum), []
    for g in gradients:
        with torch.no_grad():
            w.zero_()
        w.grad = g.clone()
        optimizer.step()
        found.append(-w.detach().clone())
    return found


def test_bi_maxwell_by_its_recurrence() -> None:
    """Two averages that start at the onset from the one before, then Nesterov's blend with the gradient."""

    def update(g: Tensor, state: State, step: int) -> Tensor:
        m = state.setdefault("m", torch.zeros_like(g))
        if step <= 5:
            m.lerp_(g, 0.05)
            state["f"], state["s"] = m.clone(), m.clone()
        else:
            state["f"].lerp_(g, 0.15)
            state["s"].lerp_(g, 0.02)
            m = 0.4385 * state["f"] + 0.5615 * state["s"]
        return 0.1 * (0.05 * g + 0.95 * m)

    assert_same_path(
        lambda p: SteepestDescent(p, 0.1, Identity(), Mixture(onset=5)), lambda p: Written(p, update), MATRICES, 1e-5
    )


@pytest.mark.parametrize("nesterov", [True, False, 0.8])
def test_up_to_the_onset_it_is_the_plain_average_to_the_bit(nesterov: bool | float) -> None:
    gradients = [torch.randn(7, 5) for _ in range(9)]
    betas = (0.5, 0.8, 0.9, 0.99)
    mixed = run(Mixture(betas, None, 6, (3.0, 20.0), 8, 0.9, nesterov), gradients)
    plain = run(EMA(0.9, nesterov), gradients)
    assert [torch.equal(a, b) for a, b in zip(mixed, plain, strict=True)] == [True] * 6 + [False] * 3


def test_equal_averages_are_mixed_to_the_bit() -> None:
    gradients = [torch.randn(7, 5) for _ in range(5)]
    mixed = run(Mixture((0.9, 0.9, 0.9), (0.3, 0.5, 0.2), beta=0.9), gradients)
    assert all(map(torch.equal, mixed, run(EMA(0.9, True), gradients)))


@pytest.mark.parametrize("betas", [(0.85, 0.98), tuple(1 - 1 / (1 + 2.0**i) for i in range(8)), (0.9, 0.9)])
def test_weights_are_convex_and_have_the_wanted_mean_age(betas: tuple[float, ...]) -> None:
    ages = [age_of(beta) for beta in betas]
    for age in (min(ages), sum(ages) / len(ages), 0.3 * min(ages) + 0.7 * max(ages), max(ages)):
        weights = weights_of_age(betas, age)
        assert min(weights) >= 0 and math.fsum(weights) == pytest.approx(1)
        assert sum(w * a for w, a in zip(weights, ages, strict=True)) == pytest.approx(age, rel=1e-3)


def test_two_averages_of_mean_age_30_have_bi_maxwells_weights() -> None:
    assert weights_of_age((0.85, 0.98), 30.0) == pytest.approx((0.4385, 0.5615), abs=1e-4)


def test_ages_are_annealed_from_the_onset_to_the_last_step() -> None:
    mixture = Mixture((0.5, 0.9, 0.99), None, 10, (58.0, 26.0), 30)
    found = [
        sum(w * age_of(b) for w, b in zip(mixture.weights_at(step), mixture.betas, strict=True))
        for step in (1, 10, 20, 30, 99)
    ]
    assert found == pytest.approx([58, 58, 42, 26, 26], rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": ()}, "betas must be a tuple of decay rates"),
        ({"betas": (0.9, 1.0)}, "betas must lie in"),
        ({"weights": (0.5, 0.6)}, "with a sum of 1"),
        ({"weights": (1.0,)}, "one for each of"),
        ({"weights": (-0.5, 1.5)}, "weights must lie in"),
        ({"onset": -1}, "onset must be a whole number from 0 up"),
        ({"ages": (30.0, 20.0)}, "either weights or ages"),
        ({"weights": None, "ages": (30.0, 20.0)}, "a last step after onset"),
        ({"weights": None, "ages": (30.0, 60.0), "last": 9}, r"ages must lie in \[5.66667, 49\]"),
        ({"nesterov": 1.5}, "nesterov must lie in"),
    ],
)
def test_mixtures_refuse_what_is_none(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mixture(**options)


# MARS-M --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"beta": 0.8, "gamma": 0.1, "clip": 3.0}, {"clip": math.inf}], ids=str)
def test_mars_m_by_its_recurrence(options: dict[str, Any]) -> None:
    beta, gamma, clip = (
        {"beta": 0.95, "gamma": 0.025, "clip": 1.0, **options}[key] for key in ("beta", "gamma", "clip")
    )

    def update(g: Tensor, state: State, step: int) -> Tensor:
        m, last = (state.setdefault(key, torch.zeros_like(g)) for key in ("m", "last"))
        c = g + gamma * beta / (1 - beta) * (g - last)
        c = c * min(1.0, clip / float(c.norm()))
        last.copy_(g)
        return 0.02 * polar(m.mul_(beta).add_((1 - beta) * c))

    assert_same_path(
        lambda p: SteepestDescent(p, 0.02, Spectral("unit", "exact"), Corrected(**options)),
        lambda p: Written(p, update),
        MATRICES,
        2e-5,
    )


@pytest.mark.parametrize("options", [{"beta": 1.0}, {"gamma": -1.0}, {"clip": 0.0}], ids=str)
def test_corrections_refuse_what_is_none(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"Corrected: {next(iter(options))} must"):
        Corrected(**options)
