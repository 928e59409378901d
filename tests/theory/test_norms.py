from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import normopt.norms
import normopt.polar
from normopt import Direction, Eigenbasis, Rotated, Smoothed, SteepestDescent, View
from normopt.ingredient import Context, Ingredient, Stage, parse
from normopt.ingredient.stage import ROTATED
from normopt.norms import Column, DualKyFan, Euclidean, KyFan, Lp, Max, Norm, Nuclear, PerBlock, Row, Schatten, Spectral
from normopt.norms.base import Scale
from normopt.polar import JORDAN, PolarCoefficients, polar
from tests.support.strategies import (
    KINDS,
    NORMS,
    RMS,
    SCALES,
    UNIT,
    WELL_CONDITIONED,
    assert_close,
    from_spectrum,
    inner,
    label,
    matrices,
    orthogonal,
    pairs,
    shapes,
    spectrum,
)

# Under every scale, or where hypothesis draws the scale or it does not matter, each only once.
every = pytest.mark.parametrize("norm", NORMS, ids=label)
each = pytest.mark.parametrize("norm", RMS, ids=label)
with_and_without_factor = pytest.mark.parametrize("norm", [n for n in NORMS if n.scale in ("unit", 2.5)], ids=label)
each_at_unit = pytest.mark.parametrize("norm", UNIT, ids=label)
each_with_memory = pytest.mark.parametrize("norm", [n for n in RMS if n.has_memory], ids=label)
of_vectors = pytest.mark.parametrize("norm", [n for n in NORMS if not n.needs_matrix], ids=label)
of_matrices = pytest.mark.parametrize("norm", [n for n in RMS if n.needs_matrix], ids=label)
scales = st.sampled_from(SCALES)

HALF = (torch.bfloat16, torch.float16)


def methods(norm: Norm) -> dict:
    """All that takes a tensor and returns one."""
    found = {"norm": norm.norm, "dual_norm": norm.dual_norm, "dualize": norm.dualize, "project": norm.project}
    return found | ({"whiten": lambda g: norm.whiten(g, norm.second_moment(g))} if norm.has_memory else {})


def full_rank(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """One matrix with singular values from 1 down to 0.1."""
    return from_spectrum(*shape, spectrum(min(shape))).to(dtype)


# What they are -------------------------------------------------------------------------------------------------

NORM = {
    "Max": lambda w: w.abs().max(),
    "Column": lambda w: w.square().sum(0).sqrt().max(),
    "Row": lambda w: w.square().sum(1).sqrt().max(),
    "Euclidean": lambda w: torch.linalg.matrix_norm(w, "fro"),
    "Spectral": lambda w: torch.linalg.matrix_norm(w, 2),
    "Nuclear": lambda w: torch.linalg.matrix_norm(w, "nuc"),
    "Lp": lambda w: w.abs().pow(4).sum() ** (1 / 4),
    "Schatten": lambda w: torch.linalg.svdvals(w).pow(4).sum() ** (1 / 4),
    "KyFan": lambda w: torch.linalg.svdvals(w)[:2].sum(),
    "DualKyFan": lambda w: max(torch.linalg.svdvals(w)[0], torch.linalg.svdvals(w).sum() / 2),
    "PerBlock": lambda w: torch.linalg.matrix_norm(w, 2) * (5 / 8) ** -0.5,
}
DUAL = {
    "Max": lambda g: g.abs().sum(),
    "Column": lambda g: g.square().sum(0).sqrt().sum(),
    "Row": lambda g: g.square().sum(1).sqrt().sum(),
    "Euclidean": NORM["Euclidean"],
    "Spectral": NORM["Nuclear"],
    "Nuclear": NORM["Spectral"],
    "Lp": lambda g: g.abs().pow(4 / 3).sum() ** (3 / 4),
    "Schatten": lambda g: torch.linalg.svdvals(g).pow(4 / 3).sum() ** (3 / 4),
    "KyFan": lambda g: max(torch.linalg.svdvals(g)[0], torch.linalg.svdvals(g).sum() / 2),
    "DualKyFan": NORM["KyFan"],
    "PerBlock": lambda g: NORM["Nuclear"](g) * (5 / 8) ** 0.5,
}
# (out, in) = (8, 2) and (2, 8)
FACTOR = {
    "Max": (1, 1),
    "Column": (8**0.5, 2**0.5),
    "Row": (2**-0.5, 8**-0.5),
    "Euclidean": (4, 4),
    "Spectral": (2, 0.5),
    "Nuclear": (2, 0.5),
    "Lp": (2, 2),
    "Schatten": (2, 0.5),
    "KyFan": (2, 0.5),
    "DualKyFan": (2, 0.5),
}


@pytest.mark.parametrize("name", NORM)
@given(w=matrices(shape=(5, 8)))
def test_definitions(name: str, w: Tensor) -> None:
    norm = getattr(normopt.norms, name)(scale="unit")
    assert_close(norm.norm(w), NORM[name](w))
    assert_close(norm.dual_norm(w), DUAL[name](w))


@pytest.mark.parametrize("name", FACTOR)
def test_scale_rms(name: str) -> None:
    norm = getattr(normopt.norms, name)()
    assert norm.scale == "rms"
    assert (norm.factor((8, 2)), norm.factor((5, 2, 8))) == pytest.approx(FACTOR[name])


@each
@pytest.mark.parametrize(
    ("scale", "factors"),
    [("unit", (1, 1)), ("max1", (2, 1)), ("adamw", (0.2 * 8**0.5,) * 2), ("fan_in", (1 / 2, 1 / 8)), (2.5, (2.5, 2.5))],
)
def test_scales_that_are_the_same_for_all(norm: Norm, scale: Scale, factors: tuple[float, float]) -> None:
    norm = replace(norm, scale=scale)
    assert (norm.factor((8, 2)), norm.factor((5, 2, 8))) == pytest.approx(factors)


@each
@given(scale=scales, w=matrices())
def test_scale_divides_the_norm_and_multiplies_the_rest(norm: Norm, scale: Scale, w: Tensor) -> None:
    norm = replace(norm, scale=scale)
    unit, f = replace(norm, scale="unit"), norm.factor(w.shape)
    assert_close(norm.norm(w), unit.norm(w) / f)
    assert_close(norm.dual_norm(w), unit.dual_norm(w) * f)
    assert_close(norm.dualize(w), unit.dualize(w) * f)
    assert_close(norm.project(w, 0.3), unit.project(w, 0.3 * f))


# Identities ----------------------------------------------------------------------------------------------------


@each
@given(scale=scales, g=matrices())
def test_duality_map_attains_the_dual_norm(norm: Norm, scale: Scale, g: Tensor) -> None:
    norm = replace(norm, scale=scale)
    t = norm.dualize(g)
    assert t.shape == g.shape and t.dtype == g.dtype
    assert_close(inner(g, t), norm.dual_norm(g))


@each
@given(scale=scales, g=matrices())
def test_duality_map_has_norm_one_or_is_zero(norm: Norm, scale: Scale, g: Tensor) -> None:
    norm = replace(norm, scale=scale)
    t = norm.dualize(g)
    zero = (g == 0).all(dim=-1).all(dim=-1)
    assert_close(norm.norm(t), (~zero).to(g.dtype))
    assert (t[zero] == 0).all()


@each
@given(scale=scales, pair=pairs())
def test_duality_inequality(norm: Norm, scale: Scale, pair: tuple[Tensor, Tensor]) -> None:
    norm = replace(norm, scale=scale)
    g, t = pair
    bound = norm.dual_norm(g) * norm.norm(t)
    assert (inner(g, t).abs() <= bound * (1 + 1e-12)).all()


@each
@given(scale=scales, pair=pairs(), c=st.sampled_from([-1e3, -1.0, 0.0, 0.1, 7.0]))
def test_norm_and_dual_norm_are_norms(norm: Norm, scale: Scale, pair: tuple[Tensor, Tensor], c: float) -> None:
    norm = replace(norm, scale=scale)
    a, b = pair
    nonzero = (a != 0).any(dim=-1).any(dim=-1)
    for size in (norm.norm, norm.dual_norm):
        assert size(a).shape == a.shape[:-2]
        assert torch.equal(size(a) > 0, nonzero)
        assert_close(size(c * a), abs(c) * size(a))
        assert (size(a + b) <= (size(a) + size(b)) * (1 + 1e-12)).all()


@each_with_memory
@given(scale=scales, g=matrices(WELL_CONDITIONED))
def test_whitening_by_its_own_second_moment_is_the_duality_map(norm: Norm, scale: Scale, g: Tensor) -> None:
    norm = replace(norm, scale=scale)
    # Condition number 10: eigenvalues of g g^T are known to 1e-14 of the smallest.
    assert_close(norm.whiten(g, norm.second_moment(g)), norm.dualize(g), tol=1e-11)


@each_with_memory
@given(scale=scales, pair=pairs(), c=st.sampled_from([-2.0, 0.5, 4.0]))
def test_second_moment_has_degree_two_and_whitening_is_linear(
    norm: Norm, scale: Scale, pair: tuple[Tensor, Tensor], c: float
) -> None:
    norm = replace(norm, scale=scale)
    g, m = pair
    stats = norm.second_moment(g)
    for stat, of_multiple in zip(stats, norm.second_moment(c * g), strict=True):
        assert_close(of_multiple, c**2 * stat)
    assert_close(norm.whiten(c * m, stats), c * norm.whiten(m, stats))


@each_with_memory
@pytest.mark.parametrize("eps", [1e-3, 1e3])
@given(scale=scales, g=matrices(WELL_CONDITIONED, scaled=False))
def test_eps_shortens_the_whitened_matrix(norm: Norm, scale: Scale, eps: float, g: Tensor) -> None:
    norm = replace(norm, scale=scale)
    stats = norm.second_moment(g)
    whitened = norm.whiten(g, stats, eps)
    # Every singular value, or slice, or entry, is s / (s + eps) or s / (s^2 + eps)^(1/2).
    sizes, bound = norm.norm(whitened), norm.norm(norm.dualize(g))
    assert ((sizes < bound) | (bound == 0)).all()
    assert (sizes <= replace(norm, scale="unit").norm(g) / min(eps, eps**0.5)).all()


@each_with_memory
@pytest.mark.parametrize("c", [1e-3, 9.0])
def test_degree_of_eps(norm: Norm, c: float) -> None:
    m, g = full_rank(4, 6), full_rank(4, 6)
    stats = norm.second_moment(g)
    eps = 0.1 * (c if norm.matrix_memory else c**0.5)
    multiplied = norm.whiten(m, tuple(c * stat for stat in stats), eps)
    assert_close(multiplied * c**0.5, norm.whiten(m, stats, 0.1))


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_what_whitening_divides_by(eps: float) -> None:
    m, g = full_rank(4, 6), full_rank(4, 6)
    for norm in (Max(scale=2.0), Row(scale=2.0), Column(scale=2.0), Euclidean(scale=2.0)):
        assert_close(norm.whiten(m, norm.second_moment(g), eps), 2 * m / (norm.second_moment(g)[0].sqrt() + eps))
    # Full rank on both sides, so that the roots are inverses in the ordinary sense.
    m, g = full_rank(5, 5), full_rank(5, 5)
    norm, eye = Spectral(scale=2.0), torch.eye(5, dtype=g.dtype)
    left, right = (torch.linalg.inv(stat + eps * eye) for stat in norm.second_moment(g))
    whitened = norm.whiten(m, norm.second_moment(g), eps)
    # The inverses' fourth roots, which are positive definite.
    (p, u), (q, v) = torch.linalg.eigh(left), torch.linalg.eigh(right)
    assert_close(whitened, 2 * (u * p**0.25) @ u.mT @ m @ (v * q**0.25) @ v.mT)


@pytest.mark.parametrize("norm", [n for n in UNIT if not n.has_memory], ids=label)
def test_norms_without_memory_say_so(norm: Norm) -> None:
    with pytest.raises(NotImplementedError, match=f"{type(norm).__name__} has no second moment"):
        norm.second_moment(torch.ones(2, 3))


# Projection ----------------------------------------------------------------------------------------------------

RADII = st.sampled_from([0.0, 0.01, 0.3, 0.9, 1.0, 2.0])


@each
@given(scale=scales, w=matrices(), fraction=RADII)
def test_projection_lands_in_the_ball_once_and_for_all(norm: Norm, scale: Scale, w: Tensor, fraction: float) -> None:
    norm = replace(norm, scale=scale)
    radius = fraction * float(norm.norm(w).max())
    p = norm.project(w, radius)
    assert p.shape == w.shape and p.dtype == w.dtype
    assert (norm.norm(p) <= radius * (1 + 1e-12)).all()
    assert_close(norm.project(p, radius), p)


@each
@given(scale=scales, w=matrices(), slack=st.sampled_from([1.0, 1.5, 1e6]))
def test_projection_leaves_points_of_the_ball_alone(norm: Norm, scale: Scale, w: Tensor, slack: float) -> None:
    norm = replace(norm, scale=scale)
    assert_close(norm.project(w, slack * float(norm.norm(w).max())), w)


@each
@given(scale=scales, w=matrices(), fraction=RADII)
def test_projection_is_the_nearest_point(norm: Norm, scale: Scale, w: Tensor, fraction: float) -> None:
    norm = replace(norm, scale=scale)
    radius = fraction * float(norm.norm(w).max())
    p = norm.project(w, radius)
    # p is nearest in a convex set if and only if <w - p, b - p> <= 0 for all its b, the worst of which is parallel to
    # dualize(w - p).
    rounding = 1e-12 * w.square().sum(dim=(-2, -1))
    assert (radius * norm.dual_norm(w - p) - inner(w - p, p) <= rounding).all()
    b = torch.randn(20, *w.shape, dtype=w.dtype)
    b *= torch.rand_like(norm.norm(b))[..., None, None] * radius / norm.norm(b)[..., None, None]
    b[:10] = norm.project(p + b[:10], radius)
    assert ((w - p).square().sum(dim=(-2, -1)) <= (w - b).square().sum(dim=(-2, -1)) + rounding).all()


@each
def test_projection_defaults_to_radius_one_and_refuses_negative_ones(norm: Norm) -> None:
    w = 100 * full_rank(3, 4)
    assert_close(norm.norm(norm.project(w)), torch.ones((), dtype=w.dtype))
    with pytest.raises(ValueError, match=rf"{type(norm).__name__}.project: radius must not be negative, got -0.5"):
        norm.project(w, -0.5)


# Initialization ------------------------------------------------------------------------------------------------


@each
@given(scale=scales, shape=shapes(), seed=st.integers(0, 2**16))
def test_initialization_has_norm_one(norm: Norm, scale: Scale, shape: tuple[int, ...], seed: int) -> None:
    norm = replace(norm, scale=scale)
    w = torch.full(shape, torch.nan, dtype=torch.float64)
    assert norm.initialize_(w, torch.Generator().manual_seed(seed)) is w
    assert_close(norm.norm(w), torch.ones(shape[:-2], dtype=w.dtype))


@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_initialization_is_reproducible_and_takes_parameters(norm: Norm, dtype: torch.dtype) -> None:
    a, b, c = (torch.nn.Parameter(torch.zeros(8, 6, dtype=dtype)) for _ in range(3))
    for w, seed in ((a, 1), (b, 1), (c, 2)):
        norm.initialize_(w, torch.Generator().manual_seed(seed))
    assert torch.equal(a, b) and not torch.equal(a, c)
    torch.manual_seed(3)
    assert not torch.equal(norm.initialize_(a), norm.initialize_(b)), "the global generator moves on"
    # Every entry is rounded to dtype, a relative error of at most eps / 2, which at most sqrt(6) enlarges.
    assert_close(norm.norm(a).double(), torch.ones((), dtype=torch.float64), tol=4 * torch.finfo(dtype).eps)


def test_spectral_initialization_is_semi_orthogonal_whatever_the_method() -> None:
    w = Spectral(method="newton-schulz", scale="unit").initialize_(torch.empty(4, 9, dtype=torch.float64))
    assert_close(w @ w.mT, torch.eye(4, dtype=torch.float64))


# Symmetries ----------------------------------------------------------------------------------------------------


def _permutation(n: int) -> Tensor:
    """A signed one."""
    signs = torch.randint(0, 2, (n,), dtype=torch.float64) * 2 - 1
    return torch.eye(n, dtype=torch.float64)[torch.randperm(n)] * signs


def _rotation(n: int) -> Tensor:
    return orthogonal(n, n)


#: Which (left, right) changes of basis leave the norm as it is.
SYMMETRIES = {
    "Max": (_permutation, _permutation),
    "Column": (_rotation, _permutation),
    "Row": (_permutation, _rotation),
    "Euclidean": (_rotation, _rotation),
    "Spectral": (_rotation, _rotation),
    "Nuclear": (_rotation, _rotation),
    "Lp": (_permutation, _permutation),
    "Schatten": (_rotation, _rotation),
    "KyFan": (_rotation, _rotation),
    "DualKyFan": (_rotation, _rotation),
}
#: Where the leading singular pair is unique, so that the nuclear norm has one duality map only.
UNIQUE = {kind: make for kind, make in WELL_CONDITIONED.items() if kind != "orthogonal"}

symmetric = pytest.mark.parametrize("norm", [n for n in RMS if type(n).__name__ in SYMMETRIES], ids=label)


# Condition number 10, neighbouring singular values 6% apart: rounding grows by less than 100.
TOL = 1e-13 * 100


@symmetric
@given(scale=scales, g=matrices(UNIQUE))
def test_equivariance_under_changes_of_basis(norm: Norm, scale: Scale, g: Tensor) -> None:
    norm = replace(norm, scale=scale)
    left, right = SYMMETRIES[type(norm).__name__]
    q, r = left(g.shape[-2]), right(g.shape[-1])
    turned = q @ g @ r
    assert_close(norm.norm(turned), norm.norm(g))
    assert_close(norm.dual_norm(turned), norm.dual_norm(g))
    assert_close(norm.dualize(turned), q @ norm.dualize(g) @ r, TOL)
    radius = 0.5 * float(norm.norm(g).max())
    assert_close(norm.project(turned, radius), q @ norm.project(g, radius) @ r)


@each
@given(scale=scales, g=matrices(UNIQUE), c=st.sampled_from([-1e5, -1.0, 1e-5, 3.0]))
def test_duality_map_ignores_the_length_and_keeps_the_sign(norm: Norm, scale: Scale, g: Tensor, c: float) -> None:
    norm = replace(norm, scale=scale)
    assert_close(norm.dualize(c * g), math.copysign(1, c) * norm.dualize(g), TOL)


@symmetric
@given(g=matrices(UNIQUE))
def test_transposes(norm: Norm, g: Tensor) -> None:
    norm = replace(norm, scale="unit")
    other = {"Column": Row(scale="unit"), "Row": Column(scale="unit")}.get(type(norm).__name__, norm)
    assert_close(norm.norm(g.mT), other.norm(g))
    assert_close(norm.dual_norm(g.mT), other.dual_norm(g))
    assert_close(norm.dualize(g.mT), other.dualize(g).mT, TOL)
    radius = 0.5 * float(other.norm(g).max())
    assert_close(norm.project(g.mT, radius), other.project(g, radius).mT)


@each_at_unit
@given(g=matrices(UNIQUE), rows=st.integers(0, 3), columns=st.integers(0, 3))
def test_zero_padding_changes_nothing(norm: Norm, g: Tensor, rows: int, columns: int) -> None:
    def padded(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, columns, 0, rows))

    assert_close(norm.norm(padded(g)), norm.norm(g))
    assert_close(norm.dual_norm(padded(g)), norm.dual_norm(g))
    assert_close(norm.dualize(padded(g)), padded(norm.dualize(g)), TOL)


@each
@given(scale=scales, g=matrices(UNIQUE))
def test_batches_are_independent_matrices(norm: Norm, scale: Scale, g: Tensor) -> None:
    norm = replace(norm, scale=scale)
    flat = g.reshape(-1, *g.shape[-2:])
    for name, method in methods(norm).items():
        alone = torch.stack([method(matrix) for matrix in flat])
        together = method(g)
        # A projection subtracts what is outside of the ball, of matrices up to a million times as large.
        tolerance = {"dualize": TOL, "project": 1e-9}.get(name, 1e-11)
        assert_close(together, alone.reshape(together.shape), tolerance)


@each
def test_strided_inputs(norm: Norm) -> None:
    g = full_rank(5, 8).mT[::2]
    assert not g.is_contiguous()
    for name, method in methods(norm).items():
        assert_close(method(g), method(g.contiguous()), 1e-11), name


@every
def test_entries_depend_on_no_more_than_declared(norm: Norm) -> None:
    assert norm.reduces in ("entry", "row", "column", "all", "matrix")
    g = full_rank(4, 5)
    elsewhere = torch.randn_like(g)
    if norm.reduces == "entry":
        elsewhere[1, 2] = g[1, 2]
    elif norm.reduces == "row":
        elsewhere[1] = g[1]
    elif norm.reduces == "column":
        elsewhere[:, 2] = g[:, 2]
    else:
        elsewhere = g
    for method in (norm.dualize, methods(norm).get("whiten", norm.dualize)):
        assert method(elsewhere)[1, 2] == method(g)[1, 2]


@pytest.mark.parametrize("norm", [n for n in NORMS if n.reduces == "entry"], ids=label)
def test_entrywise_norms_take_many_tensors_laid_end_to_end(norm: Norm) -> None:
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in ((4, 5), (2, 3, 6), (7,))]
    laid = norm.dualize(torch.cat([x.flatten() for x in tensors]))
    assert_close(laid, torch.cat([norm.dualize(x).flatten() for x in tensors]))


@every
def test_rms_of_an_update(norm: Norm) -> None:
    for shape in ((4, 7), (7, 4), (5, 5), (1, 6), (2, 3, 2)):
        update = norm.dualize(torch.randn(shape, dtype=torch.float64))
        if depends_on_the_spectrum(norm, min(shape[-2:])):
            assert math.isnan(norm.rms(shape))
        else:
            assert norm.rms(shape) == pytest.approx(float(update.square().mean().sqrt()))


def depends_on_the_spectrum(norm: Norm, rank: int) -> bool:
    """Whether full-rank gradients of one shape have updates of different lengths."""
    if isinstance(norm, KyFan):
        return 1 < norm.k < rank
    return isinstance(norm, (Schatten, Lp)) and norm.p not in (1, 2, math.inf)


@each
def test_a_norm_is_a_direction_without_state(norm: Norm) -> None:
    g = full_rank(3, 4)
    assert isinstance(norm, Stage) and norm.init_state(g) == {}
    context = Context(torch.zeros_like(g), g, step=1, rate=0.1, direction=norm, weights=lambda: g)
    assert torch.equal(norm(g, {}, context), norm.dualize(g))


# Vectors, scalars, nothing -------------------------------------------------------------------------------------


@of_vectors
@pytest.mark.parametrize("shape", [(), (1,), (9,)])
def test_vectors_and_scalars_count_as_one_row(norm: Norm, shape: tuple[int, ...]) -> None:
    g = torch.randn(shape, dtype=torch.float64)
    row = g.reshape(1, -1)
    for name, method in methods(norm).items():
        result = method(g)
        assert result.shape == (() if name.endswith("norm") else shape)
        assert_close(result.reshape(-1), method(row).reshape(-1))
    assert norm.rms(shape) == pytest.approx(norm.rms(tuple(row.shape)), nan_ok=True)
    assert_close(norm.norm(norm.initialize_(g)), torch.ones((), dtype=g.dtype))


@of_matrices
@pytest.mark.parametrize("method", ["norm", "dual_norm", "dualize", "project", "initialize_"])
def test_vectors_are_refused_where_a_matrix_is_needed(norm: Norm, method: str) -> None:
    with pytest.raises(ValueError, match=rf"{type(norm).__name__} is a norm of matrices .* got shape \(5,\)"):
        getattr(norm, method)(torch.ones(5))


EMPTY = [(0, 3), (3, 0), (0, 0), (2, 0, 3), (0, 2, 3)]


@every
def test_tensors_without_entries(norm: Norm) -> None:
    for shape in EMPTY:
        w = torch.zeros(shape)
        assert norm.initialize_(w) is w
        for name, method in methods(norm).items():
            expected = torch.zeros(shape[:-2] if name.endswith("norm") else shape)
            if name != "whiten":
                assert torch.equal(method(w), expected), (name, shape)


@each_with_memory
@pytest.mark.parametrize("shape", EMPTY)
def test_whitening_without_entries(norm: Norm, shape: tuple[int, ...]) -> None:
    w = torch.zeros(shape)
    assert torch.equal(norm.whiten(w, norm.second_moment(w)), w)


# Dtypes and ranges ---------------------------------------------------------------------------------------------


@with_and_without_factor
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
def test_inputs_are_never_modified_nor_returned(norm: Norm, dtype: torch.dtype) -> None:
    found = methods(norm) | {"project inside": lambda w: norm.project(w, 1e3)}
    if dtype in HALF:
        found.pop("whiten", None)
    for shape in ((3, 5), (5, 3), (2, 4, 4)):
        g = torch.randn(shape).to(dtype)
        before = g.clone()
        for name, method in found.items():
            result = method(g)
            assert torch.equal(g, before), name
            assert result.untyped_storage().data_ptr() != g.untyped_storage().data_ptr(), name


@each_with_memory
def test_statistics_are_never_modified_nor_aliases(norm: Norm) -> None:
    g = torch.randn(3, 5)
    stats = norm.second_moment(g)
    before = [stat.clone() for stat in stats]
    for eps in (0.0, 0.1):
        norm.whiten(g, stats, eps)
        assert all(map(torch.equal, stats, before))
    assert all(stat.untyped_storage().data_ptr() != g.untyped_storage().data_ptr() for stat in stats)


@each
@pytest.mark.parametrize("size", [1e-30, 1e30])
@pytest.mark.parametrize("shape", [(1, 1), (6, 9), (40, 70), (70, 40)])
def test_float32_far_from_one(norm: Norm, size: float, shape: tuple[int, int]) -> None:
    g = full_rank(*shape, dtype=torch.float32)
    radius = 0.5 * float(norm.norm(g))
    # 1e-5: a hundred roundings of float32, for condition number 10.
    for method in (norm.norm, norm.dual_norm):
        assert_close(method(g * size), method(g) * size, tol=1e-5)
    assert_close(norm.dualize(g * size), norm.dualize(g), tol=1e-5)
    assert_close(norm.project(g * size, radius * size), norm.project(g, radius) * size, tol=1e-5)
    assert_close(inner(g, norm.dualize(g * size)), norm.dual_norm(g), tol=1e-5)


@with_and_without_factor
@pytest.mark.parametrize("dtype", HALF)
def test_duality_map_and_projection_in_half_precision(norm: Norm, dtype: torch.dtype) -> None:
    g = full_rank(6, 9).to(dtype)
    radius = 0.5 * float(norm.norm(g.double()))
    # Computed in float32 and rounded once, or twice where a scale is multiplied.
    for method in (norm.dualize, lambda w: norm.project(w, radius)):
        result = method(g)
        assert result.dtype == dtype
        assert_close(result.double(), method(g.double()), torch.finfo(dtype).eps)


@each
@pytest.mark.parametrize("dtype", HALF)
def test_norms_of_half_precision_are_float32(norm: Norm, dtype: torch.dtype) -> None:
    # Whose sum of absolute values, 2.8e7, is beyond float16, and whose entries no power of two divides.
    g = torch.full((40, 70), 1e4 / 3).to(dtype)
    # The nuclear norm adds 39 singular values that are rounding errors, each a few eps of the only one that is not.
    tol = 4 * len(g) * torch.finfo(torch.float32).eps
    for method in (norm.norm, norm.dual_norm):
        assert method(g).dtype == torch.float32
        assert_close(method(g).double(), method(g.double()), tol)


@each_with_memory
@pytest.mark.parametrize("statistics", [torch.float32, *HALF])
@pytest.mark.parametrize("dtype", HALF)
def test_whitening_in_half_precision(norm: Norm, dtype: torch.dtype, statistics: torch.dtype) -> None:
    g = full_rank(6, 9).to(dtype)
    whitened = norm.whiten(g, norm.second_moment(g.to(statistics)))
    # Statistics rounded to half precision lose a factor of the condition number, 10, squared for matrices.
    tol = torch.finfo(dtype).eps + 100 * torch.finfo(statistics).eps
    assert_close(whitened.double(), norm.dualize(g.double()), tol)


# Names and errors ----------------------------------------------------------------------------------------------

EXTRA = [
    Spectral(scale=0.25, method="newton-schulz", steps=7, dtype="bfloat16"),
    Spectral(dtype=torch.float32),
    Spectral(method=JORDAN),
    Spectral(method=PolarCoefficients(coefficients=((2.0, -1.5, 0.5), (1.875, -1.25, 0.375)), steps=3, margin=1.01)),
    Schatten(math.inf),
    PerBlock(Schatten(3, scale="unit"), 64, scale=2.0),
]


@pytest.mark.parametrize("norm", [*NORMS, *EXTRA], ids=repr)
def test_repr_evaluates_back(norm: Norm) -> None:
    public = {name: getattr(normopt.norms, name) for name in normopt.norms.__all__} | {
        "PolarCoefficients": PolarCoefficients
    }
    for back in (eval(repr(norm), public | {"inf": math.inf}), parse(repr(norm)), normopt.norms.get(repr(norm))):
        assert back == norm and hash(back) == hash(norm) and repr(back) == repr(norm)
    assert parse(str(norm)) == norm


@each
def test_found_by_name(norm: Norm) -> None:
    name = type(norm).__name__
    dashed = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name).lower()
    assert dashed in normopt.norms.names()
    for spec in (dashed, name, f"{name}()"):
        assert normopt.norms.get(spec) == type(norm)()
    assert normopt.norms.get(norm) is norm


def test_names() -> None:
    built_in = {"max", "column", "row", "euclidean", "spectral", "nuclear", "schatten", "ky-fan"}
    built_in |= {"dual-ky-fan", "lp", "per-block"}
    assert built_in <= set(normopt.norms.names())
    assert normopt.norms.names() == sorted(normopt.norms.names())
    assert {"norm", "direction", "stage", "unitarily-invariant", "slices"}.isdisjoint(normopt.norms.names())


@pytest.mark.usefixtures("registry")
def test_a_users_norm_registers_itself() -> None:
    @dataclass(frozen=True)
    class TwiceMax(Norm):
        """Two times the largest entry."""

        needs_matrix: ClassVar[bool] = False
        has_memory: ClassVar[bool] = False

        def unit_rms(self, m: int, n: int) -> float:
            return 1.0

        def unit_norm(self, w: Tensor) -> Tensor:
            return 2 * w.abs().amax(dim=(-2, -1))

        def unit_dual_norm(self, g: Tensor) -> Tensor:
            return g.abs().sum(dim=(-2, -1)) / 2

        def unit_dualize(self, g: Tensor) -> Tensor:
            return g.sign() / 2

    assert "twice-max" in normopt.norms.names()
    norm = TwiceMax(scale=3.0)
    for spec in ("twice-max", "twice_max", "TwiceMax"):
        assert normopt.norms.get(spec) == TwiceMax()
    assert normopt.norms.get("TwiceMax(scale=3.0)") == norm
    assert normopt.norms.get(repr(norm)) == norm
    g = torch.randn(4, 3, 5)
    assert_close(inner(g, norm.dualize(g)), norm.dual_norm(g), 1e-6)
    assert_close(norm.norm(norm.dualize(g)), torch.ones(4), 1e-6)
    with pytest.raises(ValueError, match="did you mean 'twice-max'"):
        normopt.norms.get("twicemax")


@pytest.mark.usefixtures("registry")
def test_a_name_is_taken_once() -> None:
    with pytest.raises(TypeError, match=r"normopt\.norms\.spectral has an ingredient named Spectral already"):
        type("Spectral", (Norm,), {})
    assert Ingredient._classes["Spectral"] is Spectral


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: normopt.norms.get("spectrl"), ValueError, "unknown norm 'spectrl'; did you mean 'spectral'?"),
        (
            lambda: normopt.norms.get("l7"),
            ValueError,
            "unknown norm 'l7'; Known: column, dual-ky-fan, eucl",
        ),
        (lambda: normopt.norms.get("norm"), ValueError, "unknown norm 'norm'; "),
        (lambda: normopt.norms.get("Rowe()"), ValueError, "unknown ingredient 'Rowe'; did you mean 'Row'?"),
        (lambda: normopt.norms.get(3), TypeError, "expected a Norm or the name of one, got 3"),
        (
            lambda: normopt.norms.get(repr(JORDAN)),
            TypeError,
            "expected a Norm or the name of one, got PolarCoefficients(",
        ),
        (lambda: Max(scale="rsm"), ValueError, "Max: unknown scale 'rsm'; did you mean 'rms'?"),
        (lambda: Max(scale=0.0), ValueError, "Max: scale must be positive and finite, got 0.0"),
        (lambda: Row(scale=-1), ValueError, "Row: scale must be positive and finite, got -1"),
        (lambda: Row(scale=math.nan), ValueError, "Row: scale must be positive and finite, got nan"),
        (lambda: Schatten(0.5), ValueError, "Schatten: p must lie in [1, inf], got 0.5"),
        (lambda: Schatten(math.nan), ValueError, "Schatten: p must lie in [1, inf], got nan"),
        (lambda: Schatten("2"), TypeError, "Schatten: p must be a number, got '2'"),
        (lambda: KyFan(0), ValueError, "KyFan: k must be a whole number from 1 up, got 0"),
        (lambda: DualKyFan(0), ValueError, "DualKyFan: k must be a whole number from 1 up, got 0"),
        (lambda: DualKyFan(rank_fraction=0.0), ValueError, "DualKyFan: rank_fraction must be positive, got 0.0"),
        (lambda: DualKyFan(rank_fraction=1.5), ValueError, "DualKyFan: rank_fraction must lie in [0, 1], got 1.5"),
        (lambda: DualKyFan(2, 0.5), ValueError, "DualKyFan: k and rank_fraction are two ways to say one number"),
        (lambda: KyFan(1.5), ValueError, "KyFan: k must be a whole number from 1 up, got 1.5"),
        (lambda: PerBlock("spectrl"), ValueError, "unknown norm 'spectrl'; did you mean 'spectral'?"),
        (lambda: PerBlock(Max(), rows=0), ValueError, "PerBlock: rows must be a whole number from 1 up, got 0"),
        (lambda: PerBlock(Max(), columns=-2), ValueError, "PerBlock: columns must be a whole number from 1 up, got -2"),
        (lambda: Spectral(method="polarexpress"), ValueError, "'polarexpress'; did you mean 'polar-express'?"),
        (lambda: Spectral(steps=0), ValueError, "Spectral: steps must be a whole number from 1 up"),
        (lambda: Spectral(steps=-2), ValueError, "got -2"),
        (lambda: Spectral(method="exact", steps=5), ValueError, "steps must be None for method 'exact', got 5"),
        (lambda: Spectral(dtype="bf16"), ValueError, "like 'bfloat16', got 'bf16'"),
        (lambda: Spectral(dtype="Tensor"), ValueError, "like 'bfloat16', got 'Tensor'"),
        (lambda: Spectral(dtype="int32"), ValueError, "like 'bfloat16', got 'int32'"),
        (lambda: Spectral(dtype=16), ValueError, "like 'bfloat16', got 16"),
    ],
)
def test_errors(make: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        make()
    assert message in str(raised.value)


# All between the nuclear and the spectral norm ------------------------------------------------------------------

SPECTRAL = Spectral(scale="unit", method="exact")


@pytest.mark.parametrize(
    ("norm", "known"),
    [
        (Schatten(1, scale="unit"), Nuclear(scale="unit")),
        (Schatten(2, scale="unit"), Euclidean(scale="unit")),
        (Lp(2), Euclidean()),
        (Lp(math.inf), Max()),
        (Schatten(math.inf, scale="unit"), SPECTRAL),
        (KyFan(1, scale="unit"), SPECTRAL),
        (KyFan(70, scale="unit"), Nuclear(scale="unit")),
        (DualKyFan(1, scale="unit"), Nuclear(scale="unit")),
        (DualKyFan(70, scale="unit"), SPECTRAL),
        (DualKyFan(rank_fraction=1.0, scale="unit"), SPECTRAL),
        (PerBlock(SPECTRAL), SPECTRAL),
        (PerBlock(Max(scale="unit"), rows=1, columns=1), Max(scale="unit")),
        (PerBlock(Euclidean(scale="unit"), rows=1), Row(scale="unit")),
        (PerBlock(Euclidean(scale="unit"), columns=1), Column(scale="unit")),
    ],
    ids=str,
)
@settings(max_examples=8)
@given(g=matrices(UNIQUE), fraction=RADII)
def test_special_cases(norm: Norm, known: Norm, g: Tensor, fraction: float) -> None:
    radius = fraction * float(known.norm(g).max())
    assert_close(norm.norm(g), known.norm(g))
    assert_close(norm.dual_norm(g), known.dual_norm(g))
    assert_close(norm.dualize(g), known.dualize(g), TOL)
    assert_close(norm.project(g, radius), known.project(g, radius))
    assert norm.rms(g.shape) == pytest.approx(known.rms(g.shape))
    assert norm.rotation_invariant == known.rotation_invariant or isinstance(norm, PerBlock)


IDENTITIES = [*map(Schatten, (1.01, 1.5, 3, 300)), *map(Lp, (1.0, 1.5, 3))]
IDENTITIES += [*map(KyFan, (2, 7, 39)), *map(DualKyFan, (2, 7, 39))]


@pytest.mark.parametrize("norm", IDENTITIES, ids=str)
@settings(max_examples=8)
@given(g=matrices(), fraction=RADII)
def test_identities_for_all_powers_and_counts(norm: Norm, g: Tensor, fraction: float) -> None:
    d, radius = norm.dualize(g), fraction * float(norm.norm(g).max())
    assert_close(inner(g, d), norm.dual_norm(g))
    assert_close(norm.norm(d), (g != 0).any(dim=-1).any(dim=-1).to(g.dtype))
    p = norm.project(g, radius)
    assert (norm.norm(p) <= radius * (1 + 1e-12)).all()
    # The nearest point, see above.
    assert (radius * norm.dual_norm(g - p) - inner(g - p, p) <= 1e-12 * g.square().sum(dim=(-2, -1))).all()


@pytest.mark.parametrize("p", [1, 1.25, 2, 7, math.inf])
def test_the_dual_of_schatten_p_is_schatten_q(p: float) -> None:
    norm, g = Schatten(p, scale="unit"), torch.randn(2, 9, 6, dtype=torch.float64)
    assert_close(norm.dual_norm(g), Schatten(norm.q, scale="unit").norm(g))
    assert Schatten(norm.q).q == pytest.approx(p)


def test_schatten_flattens_the_spectrum_the_more_the_larger_p_is() -> None:
    g = full_rank(6, 9)
    s = torch.linalg.svdvals(g)
    for p in (1.5, 3, 30):
        t = torch.linalg.svdvals(Schatten(p).dualize(g))
        assert_close(t / t[0], (s / s[0]) ** (1 / (p - 1)), 1e-11)


@pytest.mark.parametrize("p", [3, 30, math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rounding_errors_are_no_directions(p: float, dtype: torch.dtype) -> None:
    # 1e-16 to a small power is not small: 1e-8 for p = 3, 0.3 for p = 30.
    g = from_spectrum(30, 20, spectrum(4)).to(dtype)
    t = torch.linalg.svdvals(Schatten(p).dualize(g))
    assert t[3] > 0.3 * t[0] and t[4] < 10 * torch.finfo(dtype).eps * t[0]


def test_equal_singular_values_share_at_p_one() -> None:
    g = torch.diag(torch.tensor([2.0, 2.0, 1.0], dtype=torch.float64))
    assert_close(Schatten(1, scale="unit").dualize(g), torch.diag(torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)))


def test_the_dual_of_the_dual_of_ky_fan_is_ky_fan() -> None:
    g = torch.randn(2, 9, 6, dtype=torch.float64)
    for k in (1, 2, 5, 6, 7):
        norm, dual = KyFan(k, scale="unit"), DualKyFan(k, scale="unit")
        assert_close(dual.dual_norm(g), norm.norm(g))
        assert_close(dual.norm(g), norm.dual_norm(g))


@pytest.mark.parametrize(("fraction", "k"), [(0.01, 1), (0.1, 3), (0.101, 4), (0.5, 15), (1.0, 30)])
def test_a_fraction_of_the_singular_pairs_is_rounded_up(fraction: float, k: int) -> None:
    norm, g = DualKyFan(rank_fraction=fraction, scale="unit"), full_rank(30, 40)
    s = torch.linalg.svdvals(norm.dualize(g))
    assert_close(s, (torch.arange(30) < k).double())
    assert norm.rms((30, 40)) == pytest.approx((k / 1200) ** 0.5)


def test_ky_fan_takes_the_polar_factor_or_the_leading_pair() -> None:
    norm = KyFan(2, scale="unit")
    # (1 + x + x) / 2 against 1.
    for x, expected in ((0.51, [0.5, 0.5, 0.5]), (0.49, [1.0, 0.0, 0.0])):
        d = norm.dualize(torch.diag(torch.tensor([1.0, x, x], dtype=torch.float64)))
        assert_close(d, torch.diag(torch.tensor(expected, dtype=torch.float64)))


# Blocks --------------------------------------------------------------------------------------------------------

INNER = [*RMS, Spectral()]
each_inner = pytest.mark.parametrize("inner_norm", INNER, ids=str)


def heads(x: Tensor) -> Tensor:
    """Four heads of three rows."""
    return x.reshape(*x.shape[:-2], 4, 3, x.shape[-1])


@each_inner
def test_blocks_are_what_a_view_makes_of_heads(inner_norm: Norm) -> None:
    norm, g = PerBlock(inner_norm, rows=3), torch.randn(2, 12, 7, dtype=torch.float64)
    assert_close(norm.norm(g), inner_norm.norm(heads(g)).amax(dim=-1))
    assert_close(norm.dual_norm(g), inner_norm.dual_norm(heads(g)).sum(dim=-1))
    assert_close(norm.steepness(g, {}), inner_norm.steepness(heads(g), {}).sum(dim=-1))
    assert_close(norm.dualize(g), inner_norm.dualize(heads(g)).reshape(g.shape))
    assert_close(norm.project(g, 0.2), inner_norm.project(heads(g), 0.2).reshape(g.shape))
    assert norm.rms(g.shape) == pytest.approx(inner_norm.rms((3, 7)), nan_ok=True)
    started = norm.initialize_(torch.empty_like(g))
    assert_close(inner_norm.norm(heads(started)), torch.ones(2, 4, dtype=g.dtype))
    assert (norm.has_memory, norm.matrix_memory) == (inner_norm.has_memory, inner_norm.matrix_memory)
    if norm.has_memory:
        stats, of_heads = norm.second_moment(g), inner_norm.second_moment(heads(g))
        assert_close(norm.whiten(g, stats, 0.1), inner_norm.whiten(heads(g), of_heads, 0.1).reshape(g.shape))


@pytest.mark.parametrize("direction", [lambda n: n, Smoothed], ids=["norm", "smoothed"])
@pytest.mark.parametrize("inner_norm", [Spectral(), Column(), Max()], ids=str)
def test_blocks_move_as_a_view_of_heads_does(direction: Callable[[Norm], Direction], inner_norm: Norm) -> None:
    start = torch.randn(12, 7)
    blocks, views = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optimizers = [
        SteepestDescent([blocks], 0.1, direction(PerBlock(inner_norm, rows=3)), 0.9),
        SteepestDescent([views], 0.1, direction(inner_norm), 0.9, view=View(split=4)),
    ]
    for _ in range(5):
        blocks.grad = views.grad = torch.randn(12, 7)
        for optimizer in optimizers:
            optimizer.step()
    assert_close(blocks.detach(), views.detach(), 1e-5)
    assert not torch.equal(blocks, start)


def test_the_last_block_is_smaller_and_a_small_matrix_is_one() -> None:
    norm, g = PerBlock(Euclidean(scale="unit"), rows=4, columns=3), torch.randn(6, 7, dtype=torch.float64)
    assert_close(norm.join(norm.cut(g), g.shape), g)
    assert norm.cut(g).shape == (6, 4, 3)
    corners = [g[a:b, c:d] for a, b in ((0, 4), (4, 6)) for c, d in ((0, 3), (3, 6), (6, 7))]
    assert_close(norm.dual_norm(g), torch.stack([corner.norm() for corner in corners]).sum())
    assert_close(norm.dual_norm(g[:2, :2]), g[:2, :2].norm())


def test_the_scale_of_a_block_is_its_own() -> None:
    assert PerBlock("spectral", rows=4) == PerBlock(Spectral(), rows=4, scale="unit")
    g = torch.randn(8, 4, dtype=torch.float64)
    for own, factor in (("rms", 1.0), ("unit", 1.0), (3.0, 3.0)):
        norm = PerBlock(Spectral(scale="rms", method="exact"), rows=2, scale=own)
        # Blocks of 2 x 4: sqrt(2 / 4).
        assert_close(norm.dualize(g)[:2], factor * 0.5**0.5 * polar(g[:2], "exact"))
        assert norm.rms(g.shape) == pytest.approx(factor * 0.5**0.5 / 2)


def test_blocks_of_a_norm_without_memory_have_none() -> None:
    with pytest.raises(NotImplementedError, match="Nuclear has no second moment"):
        PerBlock(Nuclear(), rows=2).second_moment(torch.ones(4, 3))
    with pytest.raises(ValueError, match="has no second moment to remember"):
        Smoothed(PerBlock(Nuclear(), rows=2))


def test_rotations_change_blocks() -> None:
    assert PerBlock(Spectral()).rotation_invariant and not PerBlock(Max()).rotation_invariant
    for norm in (PerBlock(Spectral(), rows=2), PerBlock(Euclidean(), columns=2)):
        assert not norm.rotation_invariant
        assert Rotated(Smoothed(norm), Eigenbasis()).cell == ("PerBlock", ROTATED)


# The spectral norm's methods -----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [None, 3])
@pytest.mark.parametrize("dtype", [None, "bfloat16", torch.float64])
@pytest.mark.parametrize("method", ["newton-schulz", "polar-express", JORDAN])
def test_spectral_passes_method_steps_and_dtype_on(
    method: str | PolarCoefficients, dtype: object, steps: int | None
) -> None:
    g = torch.randn(2, 6, 4)
    norm = Spectral(scale=3.0, method=method, steps=steps, dtype=dtype)
    as_torch = torch.bfloat16 if dtype == "bfloat16" else dtype
    assert torch.equal(norm.dualize(g), 3.0 * polar(g, method, steps, as_torch))


def test_spectral_defaults_to_polar_express_which_nearly_satisfies_the_identities() -> None:
    norm, g = Spectral(), full_rank(20, 30)
    assert (norm.method, norm.steps, norm.dtype) == ("polar-express", None, None)
    # Normalized singular values of at least 0.1 / sqrt(20) end in [0.9974, 1.0012].
    t = norm.dualize(g)
    assert float(norm.norm(t)) == pytest.approx(1, abs=1.3e-3)
    assert float(inner(g, t)) == pytest.approx(float(norm.dual_norm(g)), rel=3e-3)


def test_kinds_and_scales_are_all_covered() -> None:
    assert {n.scale for n in NORMS} == set(SCALES) and len(KINDS) == 9
    assert len(NORMS) == len(SCALES) * len(normopt.norms.names())
