"""The propositions of Bernstein & Newhouse, "Old Optimizer, New Norm: An Anthology", arXiv 2409.20325.

A lower value of the model <g, d> + lam/2 ||d||^2 would be a counterexample to most of them: random steps look for one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from normopt.norms import Column, Euclidean, Max, Norm, Row, Spectral
from normopt.polar import polar
from tests.support.strategies import NORMS, assert_close, from_spectrum, inner, label, orthogonal, spectrum

LAM = 3.0
TRIALS = 300


def spectral(scale: str | float = "unit") -> Spectral:
    return Spectral(scale=scale, method="exact")


def gaussian(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def competitors(best: Tensor) -> Tensor:
    """Random steps: near ``best``, along it, and anywhere, of very different lengths; shape (TRIALS, ...)."""
    away = gaussian(TRIALS, *best.shape) * best.abs().mean()
    length = torch.logspace(-6, 1, TRIALS, dtype=best.dtype).reshape(-1, *[1] * best.ndim)
    return torch.cat([best + away * length, best * (1 + length), best * (1 - length), away * length])


def attains_and_is_never_beaten(model: Callable[[list[Tensor]], Tensor], best: list[Tensor], value: float) -> None:
    at_best = float(model([d[None] for d in best]))
    assert at_best == pytest.approx(value, rel=1e-12)
    others = model([competitors(d) for d in best])
    # Rounding of a sum of about a hundred terms.
    assert (others >= value - 1e-12 * abs(value)).all()
    assert float(others.min()) == pytest.approx(value, rel=1e-3), "competitors come close enough to be a test"


# Proposition 1: steepest descent under one norm ------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS, ids=label)
@pytest.mark.parametrize("shape", [(4, 7), (6, 3)])
def test_p1_steepest_descent(norm: Norm, shape: tuple[int, int]) -> None:
    g = gaussian(*shape)
    dual = float(norm.dual_norm(g))
    best = -(dual / LAM) * norm.dualize(g)
    attains_and_is_never_beaten(
        lambda d: inner(g, d[0]) + LAM / 2 * norm.norm(d[0]) ** 2, [best], -(dual**2) / (2 * LAM)
    )


def test_table_1_one_layer() -> None:
    """Euclidean norm: gradient descent. Largest entry: sign descent. Spectral norm: Shampoo without accumulation."""
    g = gaussian(5, 8)
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    steps = {Euclidean(scale="unit"): g, Max(scale="unit"): g.abs().sum() * g.sign(), spectral(): s.sum() * u @ vh}
    for norm, expected in steps.items():
        assert_close(norm.dual_norm(g) * norm.dualize(g), expected)


# Propositions 2 and 3: sign descent ------------------------------------------------------------------------------


def test_p2_sign_descent_of_a_vector() -> None:
    g, norm = gaussian(20), Max(scale="unit")
    best = -(g.abs().sum() / LAM) * g.sign()
    assert_close(-(norm.dual_norm(g) / LAM) * norm.dualize(g), best)
    attains_and_is_never_beaten(
        lambda d: d[0] @ g + LAM / 2 * d[0].abs().amax(-1) ** 2, [best], -float(g.abs().sum() ** 2) / (2 * LAM)
    )


SHAPES = [(4, 7), (6, 3), (5, 5)]


def modular(norms: list[Norm], s: list[float], gs: list[Tensor]) -> tuple[Callable, list[Tensor], float]:
    """Model, minimizer and minimum under the norm ``max_l s_l ||W_l||_l``, as Proposition 7 has them."""

    def model(ds: list[Tensor]) -> Tensor:
        sizes = torch.stack([s_l * norm.norm(d) for norm, s_l, d in zip(norms, s, ds, strict=True)])
        return sum(inner(g, d) for g, d in zip(gs, ds, strict=True)) + LAM / 2 * sizes.amax(0) ** 2

    dual = sum(float(norm.dual_norm(g)) / s_l for norm, s_l, g in zip(norms, s, gs, strict=True))
    eta = dual / LAM
    best = [-(eta / s_l) * norm.dualize(g) for norm, s_l, g in zip(norms, s, gs, strict=True)]
    return model, best, -(dual**2) / (2 * LAM)


def test_equation_9_the_largest_entry_of_all_layers() -> None:
    ws, norm = [gaussian(*shape) for shape in SHAPES], Max(scale="unit")
    flat = torch.cat([w.flatten() for w in ws])
    by_rows = max(float(norm.norm(row)) for w in ws for row in w)
    assert float(norm.norm(flat)) == by_rows == max(float(norm.norm(w)) for w in ws)


def test_p3_sign_descent_with_one_step_size_for_all_layers() -> None:
    gs, norm = [gaussian(*shape) for shape in SHAPES], Max(scale="unit")
    model, best, value = modular([norm] * 3, [1.0] * 3, gs)
    eta = sum(g.abs().sum() for g in gs) / LAM
    for d, g in zip(best, gs, strict=True):
        assert_close(d, -eta * g.sign())
    attains_and_is_never_beaten(model, best, value)


# Propositions 4 to 6: spectral descent ---------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5)])
def test_p4_the_polar_factor_is_the_nearest_semi_orthogonal_matrix(shape: tuple[int, int]) -> None:
    g = gaussian(*shape)
    p = polar(g, "exact")
    squared_distance = float((g - p).square().sum())
    others = torch.stack([orthogonal(*shape) for _ in range(TRIALS)])
    near = polar(p + 1e-3 * gaussian(TRIALS, *shape), "exact")
    for a in (others, near):
        assert ((g - a).square().sum(dim=(-2, -1)) > squared_distance).all()
    nuclear, rank = float(spectral().dual_norm(g)), min(shape)
    assert squared_distance == pytest.approx(float(g.square().sum()) - 2 * nuclear + rank, rel=1e-12)


def test_p4_it_is_not_unique_where_the_rank_is_deficient() -> None:
    g = from_spectrum(5, 5, spectrum(3))
    u, _, vh = torch.linalg.svd(g)
    other = u @ torch.diag(torch.tensor([1, 1, 1, -1, 1], dtype=g.dtype)) @ vh
    assert float((u @ vh - other).norm()) == pytest.approx(2)
    assert float((g - u @ vh).norm()) == pytest.approx(float((g - other).norm()), rel=1e-12)


def test_p5_spectral_descent_with_one_step_size_for_all_layers() -> None:
    gs = [gaussian(*shape) for shape in SHAPES]
    model, best, value = modular([spectral()] * 3, [1.0] * 3, gs)
    factors = [torch.linalg.svd(g, full_matrices=False) for g in gs]
    eta = sum(s.sum() for _, s, _ in factors) / LAM
    for d, (u, _, vh) in zip(best, factors, strict=True):
        assert_close(d, -eta * u @ vh)
    attains_and_is_never_beaten(model, best, value)


def test_p5_the_step_is_not_unique_where_the_rank_is_deficient() -> None:
    g = from_spectrum(5, 5, spectrum(3))
    model, (best,), value = modular([spectral()], [1.0], [g])
    u, _, vh = torch.linalg.svd(g)
    completed = -float(spectral().dual_norm(g)) / LAM * u @ vh
    assert float((best - completed).norm() / best.norm()) > 0.5
    assert float(model([completed])) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(("out", "dim"), [(4, 7), (6, 3)])
def test_p6_the_spectral_norm_majorizes_the_square_loss_of_a_linear_predictor(out: int, dim: int) -> None:
    x, y, w = gaussian(50, dim), gaussian(50, out), gaussian(out, dim)
    x *= dim**0.5 / x.norm(dim=1, keepdim=True)

    def loss(w: Tensor) -> Tensor:
        return (y - x @ w.mT).square().sum(dim=(-2, -1)) / (2 * 50 * out)

    w.requires_grad_()
    (g,) = torch.autograd.grad(loss(w), w)
    w = w.detach()
    length = torch.logspace(-4, 2, 4 * TRIALS, dtype=w.dtype)[:, None, None]
    d = torch.cat([gaussian(4 * TRIALS, out, dim), polar(gaussian(4 * TRIALS, out, dim), "exact")])
    d *= torch.cat([length, length])
    bound = loss(w) + inner(g, d) + spectral("rms").norm(d) ** 2 / 2
    assert (loss(w + d) <= bound * (1 + 1e-12)).all()
    # With inputs of one direction only and a step along it, the bound is attained.
    x = x[:1].expand(50, dim)
    w.requires_grad_()
    (g,) = torch.autograd.grad(loss(w), w)
    w = w.detach()
    d = gaussian(out, 1) * x[:1]
    assert float(loss(w + d)) == pytest.approx(float(loss(w) + inner(g, d) + spectral("rms").norm(d) ** 2 / 2))


# Proposition 7: the modular norm ---------------------------------------------------------------------------------


def test_p7_steepest_descent_under_the_modular_norm() -> None:
    norms, s = [spectral("rms"), Column(), Row(), Max(), Euclidean()], [0.5, 2.0, 1.0, 7.0, 0.1]
    gs = [gaussian(*shape) for shape in (*SHAPES, (3, 4), (2, 6))]
    model, best, value = modular(norms, s, gs)
    assert [float(s_l * norm.norm(d)) for norm, s_l, d in zip(norms, s, best, strict=True)] == pytest.approx(
        [math.sqrt(-2 * value / LAM)] * 5
    ), "every layer's step has the same length"
    attains_and_is_never_beaten(model, best, value)


def test_p7_weights_are_scales() -> None:
    s, gs = [0.5, 2.0, 7.0], [gaussian(*shape) for shape in SHAPES]
    classes = [spectral, lambda scale: Column(scale=scale), lambda scale: Max(scale=scale)]
    _, weighted, value = modular([make("unit" if make is spectral else 1.0) for make in classes], s, gs)
    _, scaled, same = modular([make(1 / s_l) for make, s_l in zip(classes, s, strict=True)], [1.0] * 3, gs)
    assert same == pytest.approx(value)
    for a, b in zip(weighted, scaled, strict=True):
        assert_close(a, b)


# Proposition 8: induced operator norms ---------------------------------------------------------------------------


def rms(x: Tensor) -> Tensor:
    return x.square().mean(-1).sqrt()


def lp(p: float) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.linalg.vector_norm(x, p, dim=-1)


@pytest.mark.parametrize(
    ("norm", "before", "after"),
    [
        (Max(scale="unit"), lp(1), lp(math.inf)),
        (Column(scale="unit"), lp(1), lp(2)),
        (Row(scale="unit"), lp(2), lp(math.inf)),
        (spectral(), lp(2), lp(2)),
        # The recommended ones: embedding, head, linear layer.
        (Max(), lp(1), lp(math.inf)),
        (Column(), lp(1), rms),
        (Row(), rms, lp(math.inf)),
        (spectral("rms"), rms, rms),
    ],
    ids=lambda value: label(value) if isinstance(value, Norm) else "",
)
@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (1, 5), (5, 1)])
def test_p8_induced_norms(norm: Norm, before: Callable, after: Callable, shape: tuple[int, int]) -> None:
    w = gaussian(*shape)
    # Where these norms are attained: at basis vectors (l1), rows (into linf), right singular vectors (l2 into l2).
    corners = [torch.eye(shape[1], dtype=w.dtype), w, torch.linalg.svd(w).Vh]
    x = torch.cat([*corners, gaussian(2000, shape[1]), gaussian(2000, shape[1]).sign()])
    ratios = after(x @ w.mT) / before(x)
    assert float(ratios.max()) == pytest.approx(float(norm.norm(w)), rel=1e-12)


# Section 2: what else equals the polar factor --------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5)])
def test_one_step_of_shampoo_is_the_polar_factor(shape: tuple[int, int]) -> None:
    """(G G^T)^(-1/4) G (G^T G)^(-1/4) = (G G^T)^(-1/2) G = G (G^T G)^(-1/2) = U V^T, with pseudo-inverses."""
    norm = spectral()
    for rank in (min(shape), 2):
        g = from_spectrum(*shape, spectrum(rank))
        left, right = norm.second_moment(g)
        assert_close(left, g @ g.mT)
        assert_close(right, g.mT @ g)
        p = polar(g, "exact")
        # The Gram matrices square the condition number, 10; the roots' eigenvalues keep 13 digits.
        assert_close(norm.whiten(g, (left, right)), p, 1e-12)
        halves = [torch.linalg.pinv(_root(gram), rtol=1e-6) for gram in (left, right)]
        assert_close(halves[0] @ g, p, 1e-12)
        assert_close(g @ halves[1], p, 1e-12)


def _root(gram: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.mT


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5)])
def test_the_rms_to_rms_duality_map(shape: tuple[int, int]) -> None:
    g, (out, dim) = gaussian(*shape), shape
    t = spectral("rms").dualize(g)
    assert_close(t, math.sqrt(out / dim) * polar(g, "exact"))
    assert math.sqrt(dim / out) * float(torch.linalg.matrix_norm(t, 2)) == pytest.approx(1)
    assert float(inner(g, t)) == pytest.approx(math.sqrt(out / dim) * float(torch.linalg.matrix_norm(g, "nuc")))
    assert float(rms(spectral().dualize(g).flatten())) == pytest.approx(1 / math.sqrt(max(shape)))


def test_fused_matrices_are_not_their_parts() -> None:
    parts = [gaussian(4, 10), gaussian(4, 10)]
    fused, split = polar(torch.cat(parts), "exact"), torch.cat([polar(part, "exact") for part in parts])
    assert float((fused - split).norm() / split.norm()) > 0.1
