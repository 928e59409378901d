"""Sums, preconditioned directions and lengths of two stages: Contra-Muon, FISMO, PMuon, NAMO and AdaGO's kin."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from normopt import (
    EMA,
    Chain,
    Conjugated,
    Decayed,
    Direction,
    Euclidean,
    Grafted,
    Identity,
    Max,
    Normalized,
    Row,
    Smoothed,
    Spectral,
    SteepestDescent,
    Sum,
)
from normopt.ingredient import Context
from tests.support.paths import MATRICES, assert_same_path
from tests.support.strategies import assert_close
from tests.support.written import State, Written, average, gaussian, polar

EXACT = Spectral("unit", "exact")


def once(direction: Direction, g: Tensor) -> Tensor:
    context = Context(g, g, step=1, rate=0.1, direction=direction, weights=lambda: g)
    return direction(g, direction.init_state(g), context)


def inverse_power(gram: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    return (vectors * values**-exponent) @ vectors.mT


# Sums ----------------------------------------------------------------------------------------------------------------


def test_contra_muon_has_singular_values_that_fall_with_those_of_the_gradient() -> None:
    g = gaussian(6, 10)
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    d = once(Sum(EXACT, Normalized(EXACT), -0.2), g)
    assert_close(d, (u * (1 - 0.2 * s / s[0])) @ vh, 1e-9)


def test_contra_muon_by_its_recurrence() -> None:
    def update(g: Tensor, state: State, step: int) -> Tensor:
        m = average(g, state, 0.95, nesterov=True)
        return 0.02 * (polar(m) - 0.2 * m / torch.linalg.matrix_norm(m, 2))

    contra = Sum(EXACT, Normalized(EXACT), -0.2)
    assert_same_path(
        lambda p: SteepestDescent(p, 0.02, contra, EMA(0.95, True)), lambda p: Written(p, update), MATRICES, 2e-5
    )


def test_both_terms_keep_their_memory() -> None:
    both = Sum(Smoothed(Max(), 0.5), Smoothed(Row(), 0.9), 2.0)
    start, gradients = gaussian(4, 5), [gaussian(4, 5) for _ in range(5)]

    def run(direction: Direction) -> Tensor:
        w = torch.nn.Parameter(start.clone())
        optimizer = SteepestDescent([w], 0.1, direction)
        for g in gradients:
            w.grad = g.clone()
            optimizer.step()
        return w.detach() - start

    assert_close(run(both), run(both.first) + 2 * run(both.second), 1e-9)


# Preconditioned ------------------------------------------------------------------------------------------------------


def test_conjugation_is_steepest_descent_in_preconditioned_coordinates() -> None:
    """With P = L^-1/2 . R^-1/2: no t with ||P^-1 t|| <= 1 has a larger <g, t> than P(polar(P(g)))."""
    g = gaussian(5, 5)
    memory = Smoothed(Spectral("unit", exponent=0.5), 0.5, 0.0)
    d = once(Conjugated(EXACT, memory), g)
    left, right = inverse_power(g @ g.mT, 0.5), inverse_power(g.mT @ g, 0.5)
    expected = left @ polar(left @ g @ right) @ right
    assert_close(d, expected * (5**0.5 / expected.norm()), 1e-7)

    def norm(t: Tensor) -> Tensor:
        return torch.linalg.matrix_norm(torch.linalg.inv(left) @ t @ torch.linalg.inv(right), 2)

    for _ in range(50):
        other = d + 0.3 * torch.randn_like(d)
        assert (g * other).sum() / norm(other) <= (g * d).sum() / norm(d) * (1 + 1e-9)


def test_conjugated_by_its_recurrence() -> None:
    """FISMO's step from averages of g g^T and g^T g, as long as the polar factor."""

    def update(g: Tensor, state: State, step: int) -> Tensor:
        m = average(g, state, 0.9, nesterov=False)
        roots = []
        for name, gram in ("left", g @ g.mT), ("right", g.mT @ g):
            gram_average = state.setdefault(name, torch.zeros_like(gram))
            gram_average.mul_(0.8).add_(0.2 * gram)
            roots.append(inverse_power(gram_average / (1 - 0.8**step) + 0.01 * torch.eye(len(gram)), 0.25))
        left, right = roots
        o = polar(left @ m @ right)
        d = left @ o @ right
        return 0.02 * d * o.norm() / d.norm()

    memory = Smoothed(Spectral("unit", exponent=0.25), 0.8, 0.01)
    assert_same_path(
        lambda p: SteepestDescent(p, 0.02, Conjugated(EXACT, memory), EMA(0.9)),
        lambda p: Written(p, update),
        MATRICES,
        2e-4,
    )


def test_pmuon_preconditions_once() -> None:
    """Sums of g g^T with a decay of 0.95, roots of power 0.3, then the polar factor, whose length hides the rest."""
    g = gaussian(5, 5)
    left, right = inverse_power(g @ g.mT, 0.3), inverse_power(g.mT @ g, 0.3)
    pmuon = Chain(Smoothed(Spectral("unit", exponent=0.3), 0.95, 0.0), EXACT)
    assert_close(once(pmuon, g), polar(left @ g @ right), 1e-7)


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
def test_the_size_of_gradients_does_not_matter(size: float) -> None:
    g = gaussian(4, 6)
    for direction in (
        Conjugated(EXACT, Smoothed(Row(), 0.5, 0.0)),
        Normalized(EXACT),
        Sum(EXACT, Normalized(EXACT), -0.5),
        Grafted(EXACT, Smoothed(Euclidean("unit"), 0.5, 0.0), relative=True),
    ):
        assert_close(once(direction, size * g), once(direction, g), 1e-9)


# Lengths -------------------------------------------------------------------------------------------------------------


def test_namo_by_its_recurrence() -> None:
    """The polar factor and the decay, both times the bias-corrected ``||m|| / sqrt(average of ||g||^2)``."""
    lr, mu1, mu2, decay = 0.02, 0.95, 0.99, 0.1

    class NAMO(Written):
        @torch.no_grad()
        def step(self, closure: None = None) -> None:
            self.steps += 1
            for p in self.param_groups[0]["params"]:
                state = self.state[p]
                m, v = average(p.grad, state, mu1, False), state.setdefault("v", torch.zeros(()))
                v.mul_(mu2).add_((1 - mu2) * p.grad.square().sum())
                alpha = (1 - mu2**self.steps) ** 0.5 / (1 - mu1**self.steps) * m.norm() / (v.sqrt() + 1e-8)
                p.sub_(lr * alpha * (polar(m) + decay * p))

    scale = Smoothed(Euclidean("unit"), mu2, 1e-8, eps_at="raw")
    namo = Grafted(Chain(EXACT, Decayed(decay)), scale, relative=True)
    assert_same_path(
        lambda p: SteepestDescent(p, lr, namo, EMA(mu1, bias_correction=True)),
        lambda p: NAMO(p, lambda g, state, step: g),
        MATRICES,
        2e-5,
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sum("max", "row", float("nan")), "factor must lie in"),
        (lambda: Conjugated("max", "row"), "unknown smoothed 'row'"),
    ],
)
def test_pairs_refuse_what_is_none(make: Callable[[], Direction], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_identity_is_the_first_term_of_a_sum() -> None:
    g = gaussian(3, 4)
    assert_close(once(Sum(Identity(), "max", 0.5), g), g + 0.5 * g.sign(), 1e-12)
