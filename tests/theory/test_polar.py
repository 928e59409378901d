from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim._muon import _zeropower_via_newtonschulz
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from normopt.ingredient import parse
from normopt.numerics import host
from normopt.numerics.lengths import normalized
from normopt.polar import (
    FOUR_STEPS,
    JORDAN,
    METHODS,
    POLAR_EXPRESS,
    SCHEDULES,
    Choice,
    PolarCoefficients,
    choice,
    choose,
    decompositions,
    factor,
    polar,
)
from normopt.polar import newton_schulz as iterations
from normopt.polar.choice import _has_bfloat16
from normopt.polar.decompositions import exact
from normopt.polar.newton_schulz import segments
from tests.support.strategies import (
    WELL_CONDITIONED,
    assert_close,
    from_spectrum,
    inner,
    matrices,
    orthogonal,
    spectrum,
)

each_schedule = pytest.mark.parametrize("name", SCHEDULES)
each_method = pytest.mark.parametrize("method", METHODS)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

#: A converging one, for what holds of any schedule.
PADE = PolarCoefficients(coefficients=((15 / 8, -10 / 8, 3 / 8),), steps=12, margin=1.0)


def nuclear(g: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(g.double(), "nuc")


# Schedules -----------------------------------------------------------------------------------------------------


@each_schedule
@pytest.mark.parametrize("steps", range(1, 13))
def test_scalar_map_is_positive_and_bounded(name: str, steps: int) -> None:
    fine = torch.linspace(0, 1.01, 200_001, dtype=torch.float64)[1:]
    s = SCHEDULES[name].scalar(torch.cat([torch.logspace(-20, -4, 1000, dtype=torch.float64), fine]), steps)
    assert (s > 0).all()
    # The first polynomial of Polar Express reaches 2, and no later one goes beyond.
    assert (s < 2).all()


@pytest.mark.parametrize(
    ("name", "steps", "slope", "above_a_thousandth", "above_a_hundredth"),
    [
        ("newton-schulz", 5, 485, (0.4705, 1.2024), (0.6818, 1.1344)),
        ("polar-express", 5, 976, (0.8462, 1.1236), (0.8703, 1.1236)),
        ("polar-express", 6, 1828, (0.9944, 1.0012), (0.9974, 1.0012)),
        ("polar-express", 7, 3394, (1.0000, 1.0000), (1.0000, 1.0000)),
        ("polar-express", 8, 6363, (1.0000, 1.0000), (1.0000, 1.0000)),
    ],
)
def test_scalar_map_ranges(
    name: str, steps: int, slope: float, above_a_thousandth: tuple[float, float], above_a_hundredth: tuple[float, float]
) -> None:
    schedule = SCHEDULES[name]
    for lowest, (low, high) in ((1e-3, above_a_thousandth), (1e-2, above_a_hundredth)):
        grid = torch.logspace(torch.log10(torch.tensor(lowest, dtype=torch.float64)), 0, 200_001, dtype=torch.float64)
        s = schedule.scalar(grid, steps)
        assert (float(s.min()), float(s.max())) == pytest.approx((low, high), abs=6e-5)
    tiny = torch.tensor(1e-12, dtype=torch.float64)
    assert float(schedule.scalar(tiny, steps) / tiny) == pytest.approx(slope, abs=0.5)


def test_jordan_never_converges() -> None:
    s = torch.linspace(1e-2, 1, 100_001, dtype=torch.float64)
    for steps in (8, 50):
        ends = JORDAN.scalar(s, steps)
        assert (float(ends.min()), float(ends.max())) == pytest.approx((0.682, 1.134), abs=5e-4)
    assert float(JORDAN.scalar(torch.ones((), dtype=torch.float64))) == pytest.approx(0.696, abs=5e-4)


def test_polar_express_is_safe_where_the_raw_polynomials_are_not() -> None:
    # Their first step sends 1.01 beyond the point where the second one turns down: an explosion within five steps.
    rows = [(a * 1.01, b * 1.01**3, c * 1.01**5) for a, b, c in POLAR_EXPRESS.coefficients[:-1]]
    raw = PolarCoefficients(coefficients=(*rows, POLAR_EXPRESS.coefficients[-1]))
    above_one = torch.tensor(1.01, dtype=torch.float64)
    assert float(raw.scalar(above_one, 5)) > 1e50
    assert 0.8 < float(POLAR_EXPRESS.scalar(above_one, 5)) < 1.2


def test_a_schedule_repeats_its_last_row() -> None:
    first, last = (3.0, -3.2, 1.2), (1.875, -1.25, 0.375)
    schedule = PolarCoefficients(coefficients=(first, last), steps=3)
    assert schedule.rows() == [first, last, last]
    assert schedule.rows(1) == [first]
    assert schedule.rows(5) == [first, last, last, last, last]
    assert [len(s.rows()) for s in (JORDAN, POLAR_EXPRESS)] == [5, 6]
    assert POLAR_EXPRESS.rows(20)[7:] == [last] * 13


@pytest.mark.parametrize("schedule", [*SCHEDULES.values(), PADE], ids=["newton-schulz", "polar-express", "pade"])
def test_schedules_read_back_from_their_repr(schedule: PolarCoefficients) -> None:
    assert parse(repr(schedule)) == schedule


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: PolarCoefficients(coefficients=()),
            r"PolarCoefficients: coefficients must be one or more rows \(a, b, c\)",
        ),
        (
            lambda: PolarCoefficients(coefficients=((1.5, -0.5),)),
            r"PolarCoefficients: coefficients must be one or more rows",
        ),
        (
            lambda: PolarCoefficients(coefficients=JORDAN.coefficients, steps=0),
            "PolarCoefficients: steps must be at least 1, got 0",
        ),
        (
            lambda: PolarCoefficients(JORDAN.coefficients, normalizer="shatten8"),
            "unknown normalizer .*mean 'schatten8'",
        ),
        (lambda: JORDAN.rows(0), "polar: steps must be at least 1, got 0"),
        (lambda: polar(torch.ones(2, 3), steps=-1), "polar: steps must be at least 1, got -1"),
        (lambda: polar(torch.ones(2, 3), "exact", steps=3), "polar: method 'exact' takes no steps"),
        (lambda: polar(torch.ones(2, 3), "exakt"), "polar: unknown method 'exakt'; did you mean 'exact'"),
        (lambda: polar(torch.ones(3)), r"polar: needs matrices \(\.\.\., m, n\), got shape \(3,\)"),
        (lambda: polar(torch.ones(())), r"polar: needs matrices \(\.\.\., m, n\), got shape \(\)"),
    ],
)
def test_errors(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# The map of the singular values --------------------------------------------------------------------------------

sides = st.one_of(st.integers(1, 3), st.integers(1, 70))
deficits = st.integers(0, 70)


@given(m=sides, n=sides, deficit=deficits, seed=st.integers(0, 2**16))
def test_exact_is_the_polar_factor(m: int, n: int, deficit: int, seed: int) -> None:
    torch.manual_seed(seed)
    r = max(1, min(m, n) - deficit)
    u, vh = orthogonal(m, r), orthogonal(r, n)
    # Condition number 1000 on the range: what rounding can turn is a thousand times larger than rounding itself.
    assert_close(polar((u * spectrum(r, 1e-3)) @ vh, "exact"), u @ vh, 1e-12)


@pytest.mark.parametrize("steps", [None, 1, 3, 9])
@pytest.mark.parametrize("method", [*SCHEDULES, PADE], ids=str)
@given(m=sides, n=sides, deficit=deficits, seed=st.integers(0, 2**16))
def test_iterations_map_the_singular_values(
    method: str | PolarCoefficients, steps: int | None, m: int, n: int, deficit: int, seed: int
) -> None:
    torch.manual_seed(seed)
    r = max(1, min(m, n) - deficit)
    u, vh, s = orthogonal(m, r), orthogonal(r, n), spectrum(r, 1e-4)
    schedule = SCHEDULES.get(method, method)
    mapped = schedule.scalar(s / s.norm() / schedule.margin, steps)
    # Rounding in the null space grows by the slope at 0: at most 68255, of Jordan's nine steps.
    assert_close(polar((u * s) @ vh, method, steps), (u * mapped) @ vh, 1e-10)


@each_method
@given(g=matrices(WELL_CONDITIONED))
def test_shape_transpose_and_batch(method: str, g: Tensor) -> None:
    p = polar(g, method)
    assert p.shape == g.shape and p.dtype == g.dtype
    # Of a rank-deficient matrix the null space holds rounding errors only, which iterations magnify: up to 1.3e-11 in
    # the Gram form, where the range agrees to 1e-12.
    assert_close(polar(g.mT, method), p.mT, 1e-10)
    flat = g.reshape(-1, *g.shape[-2:])
    assert_close(torch.stack([polar(matrix, method) for matrix in flat]).reshape(g.shape), p, 1e-10)
    # No eps: a power of two is divided out without any rounding.
    assert torch.equal(polar(2.0**-60 * g, method), p)


@each_method
def test_leading_dimensions_and_strides(method: str) -> None:
    g = torch.randn(7, 2, 3, 5, dtype=torch.float64).permute(1, 2, 0, 3)[..., ::2, :]
    assert not g.is_contiguous() and g.shape == (2, 3, 4, 5)
    assert_close(polar(g, method)[1, 2], polar(g[1, 2].contiguous(), method), 1e-11)


@pytest.mark.parametrize("method", ["exact", PADE, "polar-express"], ids=str)
@pytest.mark.parametrize("shape", [(30, 70), (70, 30), (40, 40)])
def test_accurate_methods_are_semi_orthogonal_and_nearest(
    method: str | PolarCoefficients, shape: tuple[int, int]
) -> None:
    g = from_spectrum(*shape, spectrum(30, 0.1) if shape != (40, 40) else spectrum(40, 0.1))
    p = polar(g, method)
    # Singular values above 0.1 / sqrt(40): Polar Express stays within 0.26% of 1, twelve Pade steps converge.
    tol = {"exact": 1e-13, PADE: 1e-12}.get(method, 0.0026)
    s = torch.linalg.svdvals(p)
    assert_close(s, torch.ones_like(s), tol)
    assert float(inner(g, p)) == pytest.approx(float(nuclear(g)), rel=tol)


# Dtypes --------------------------------------------------------------------------------------------------------


@each_method
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("working", [None, torch.bfloat16, torch.float32, torch.float64])
def test_the_input_is_never_modified(method: str, dtype: torch.dtype, working: torch.dtype | None) -> None:
    # torch.optim.Muon 2.13 divides bfloat16 momentum in place by its norm.
    for shape in ((4, 6), (6, 4), (5, 5), (2, 3, 6), (1, 1)):
        g = torch.randn(shape).mul(100).to(dtype)
        for x in (g, g.mT):
            before = x.clone()
            p = polar(x, method, dtype=working)
            assert p.dtype == dtype and p.shape == x.shape
            assert torch.equal(x, before)
            assert p.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


@each_method
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_stays_zero(method: str, dtype: torch.dtype) -> None:
    g = torch.randn(3, 4, 6).to(dtype)
    g[1] = 0
    p = polar(g, method)
    assert (p[1] == 0).all() and torch.isfinite(p).all() and (p[[0, 2]] != 0).any()


@each_method
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (2, 0, 3), (0, 2, 3)])
def test_without_entries(method: str, shape: tuple[int, ...]) -> None:
    g = torch.zeros(shape)
    p = polar(g, method)
    assert p.shape == shape and p is not g


@each_method
@pytest.mark.parametrize("size", [1e-30, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_far_from_one(method: str, size: float, dtype: torch.dtype) -> None:
    g = from_spectrum(9, 6, spectrum(6)).to(dtype)
    # The input and every product are rounded anew; the maps' slopes enlarge that, by less than 20 for condition 10, and
    # twice over on a Gram matrix, which has the square of the condition number.
    enlarged = 20**2 if method == "gram" and dtype == torch.float32 else 20
    assert_close(polar(g * size, method), polar(g, method), enlarged * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_normalizer_is_float32_or_better(dtype: torch.dtype) -> None:
    g = torch.randn(300, 300).to(dtype)
    x = normalized(g)
    assert x.dtype == torch.float32 and normalized(g.double()).dtype == torch.float64
    # 90000 squares, summed in float32; the norm itself rounded to half precision would be off by up to 4e-3 or 5e-4.
    assert float(x.double().norm()) == pytest.approx(1, abs=1e-5)
    assert float(normalized(g, 1.01).double().norm()) == pytest.approx(1 / 1.01, abs=1e-5)
    # Only the products are in the working dtype.
    assert torch.equal(polar(g, dtype=torch.float32), polar(g.float()).to(dtype))
    assert torch.equal(polar(g, dtype=torch.bfloat16), polar(g.float(), dtype=torch.bfloat16).to(dtype))


def test_the_margin_outweighs_rounding_to_bfloat16() -> None:
    vectors = torch.randn(200, 1, 3)
    lengths = {
        margin: normalized(vectors, margin).bfloat16().double().norm(dim=(-2, -1)).amax()
        for margin in (1.0, POLAR_EXPRESS.margin)
    }
    assert lengths[POLAR_EXPRESS.margin] < 1 < lengths[1.0]


def test_sizes_in_float16_are_beyond_its_products() -> None:
    g = torch.randn(6, 9).mul(1e4).half()
    for size in (1.0, 1e-7):
        small = (g.float() * size).half()
        assert_close(polar(small).float(), polar(small.float()), torch.finfo(torch.float16).eps)


@each_schedule
def test_dtype_is_that_of_the_products(name: str) -> None:
    g = from_spectrum(20, 30, spectrum(20)).float()
    reference = polar(g.double(), name)
    error = {
        dtype: float((polar(g, name, dtype=dtype).double() - reference).norm() / reference.norm())
        for dtype in (torch.bfloat16, torch.float32, torch.float64)
    }
    # Rounding of the input's normalized entries, and of every product after it, times a slope that is gentle here.
    assert 1e-3 < error[torch.bfloat16] < 3e-2
    assert error[torch.float32] < 1e-5
    assert error[torch.float64] < error[torch.float32]


@each_schedule
@pytest.mark.parametrize("steps", [None, 8, 12])
@pytest.mark.parametrize("rank", [1, 2, 16])
def test_low_rank_in_bfloat16_is_still_ascent(name: str, steps: int | None, rank: int) -> None:
    # Rounding makes the matrix full rank and the iteration blows the noise up, but not beyond the range of its map,
    # and the part along g keeps at least the map's smallest value, 0.68, for all but a few small singular values.
    g = (torch.randn(128, rank) @ torch.randn(rank, 256)).bfloat16()
    d = polar(g, name, steps).double()
    assert float(inner(g.double(), d)) > 0.68 * float(nuclear(g))
    assert float(torch.linalg.matrix_norm(d, 2)) < 1.21


# Four steps, in two forms --------------------------------------------------------------------------------------

UNIT = torch.ones((), dtype=torch.float64)


def schatten8(s: Tensor) -> Tensor:
    return torch.linalg.vector_norm(s, 8, dim=-1, keepdim=True)


@pytest.mark.parametrize("steps", [None, 1, 2, 6, 9])
@pytest.mark.parametrize("method", ["gram", FOUR_STEPS], ids=["gram", "direct"])
@given(m=sides, n=sides, deficit=deficits, seed=st.integers(0, 2**16))
def test_four_steps_map_the_singular_values(
    method: str | PolarCoefficients, steps: int | None, m: int, n: int, deficit: int, seed: int
) -> None:
    torch.manual_seed(seed)
    r = max(1, min(m, n) - deficit)
    u, vh, s = orthogonal(m, r), orthogonal(r, n), spectrum(r, 1e-2)
    mapped = FOUR_STEPS.scalar(s / schatten8(s), steps)
    assert_close(polar((u * s) @ vh, method, steps), (u * mapped) @ vh, 1e-9)


def test_four_steps_end_inside_jordans_range() -> None:
    hundredth = torch.logspace(-2, 0, 100_001, dtype=torch.float64)
    jordan, ours = JORDAN.scalar(hundredth), FOUR_STEPS.scalar(hundredth)
    assert jordan.min() < ours.min() and ours.max() < jordan.max()
    # What the normalizer leaves of a hundredth of the largest value in a Gaussian matrix of 4096 x 4096, whose squared
    # singular values have the moments 14 n^4 (Catalan's numbers): 2 / 14^(1/8) n^(-1/8).
    lowest = 1e-2 * 2 / (14 * 4096) ** (1 / 8) * UNIT
    assert jordan.min() < FOUR_STEPS.scalar(lowest)
    assert FOUR_STEPS.coefficients[0][0] == 7.875
    # More steps converge.
    assert float((FOUR_STEPS.scalar(hundredth, 7) - 1).abs().max()) < 1e-6


@pytest.mark.parametrize("steps", range(1, 13))
def test_four_steps_are_safe_around_one(steps: int) -> None:
    s = FOUR_STEPS.scalar(torch.linspace(0, 1.04, 200_001, dtype=torch.float64)[1:], steps)
    assert s.min() > 0 and s.max() < 2.1


def test_the_margin_of_a_tight_schedule() -> None:
    wide = PolarCoefficients(FOUR_STEPS.coefficients, 4, margin=1.5, normalizer="schatten8")
    u, vh, s = orthogonal(20, 20), orthogonal(20, 30), spectrum(20)
    assert_close(polar((u * s) @ vh, wide), (u * wide.scalar(s / schatten8(s) / 1.5)) @ vh, 1e-9)


def test_the_gram_form_restarts_as_precision_demands() -> None:
    def lengths(steps: int, dtype: torch.dtype, schedule: PolarCoefficients = FOUR_STEPS) -> list[int]:
        return [len(part) for part in segments(schedule.rows(steps), dtype)]

    assert lengths(4, torch.bfloat16) == [2, 2] and lengths(4, torch.float16) == [3, 1]
    assert lengths(4, torch.float32) == lengths(4, torch.float64) == [4]
    assert lengths(6, torch.bfloat16, POLAR_EXPRESS) == [2, 2, 2]
    rows = POLAR_EXPRESS.rows(12)
    assert [row for part in segments(rows, torch.float32) for row in part] == rows and lengths(12, torch.float32) > [1]


def test_without_restarts_the_gram_form_explodes_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.stack([from_spectrum(64, 192, spectrum(64, 1e-3)) for _ in range(8)]).float()
    for dtype in (torch.bfloat16, torch.float16):
        assert float(torch.linalg.matrix_norm(polar(g, "gram", dtype=dtype), 2).max()) < 1.13
    monkeypatch.setattr(iterations, "segments", lambda rows, dtype: [rows])
    assert not float(torch.linalg.matrix_norm(polar(g, "gram", dtype=torch.bfloat16), 2).max()) < 2


def test_the_gram_form_in_float16_keeps_to_its_range() -> None:
    one_row = torch.eye(128, 1) @ torch.ones(1, 256)
    for g in (torch.randn(64, 128), torch.ones(64, 4096), torch.eye(128, 256), one_row):
        d = polar(g, "gram", dtype=torch.float16)
        assert 0.9 < float(inner(g, d) / nuclear(g)) < 1.1 and float(torch.linalg.matrix_norm(d, 2)) < 1.1


class Watching(TorchDispatchMode):
    """Fails where a value of a tensor decides what happens next, which makes the host wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", [name for name in METHODS if name != "exact"])
def test_iterations_never_wait_for_the_device(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "DEFERRED", True)
    with Watching():
        for dtype in (torch.float32, torch.bfloat16):
            polar(torch.randn(3, 20, 50), method, dtype=dtype)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), Watching():
        polar(torch.randn(3, 20, 50), "exact")


# The quality of the fast methods -------------------------------------------------------------------------------

SPECTRA = {
    "gaussian": lambda m, n: torch.randn(m, n, dtype=torch.float64),
    "1/k": lambda m, n: from_spectrum(m, n, 1 / torch.arange(1, min(m, n) + 1, dtype=torch.float64)),
    "log-uniform": lambda m, n: from_spectrum(m, n, 10 ** -(3 * torch.rand(min(m, n), dtype=torch.float64))),
}


def jordans_range() -> tuple[float, float]:
    """Where Jordan's five steps end for singular values above 1e-2 of the norm."""
    s = torch.logspace(-2, 0, 100_001, dtype=torch.float64)
    ends = polar(torch.diag_embed(torch.stack([s, (1 - s**2).clamp(min=0).sqrt()], -1)), "newton-schulz")[:, 0, 0]
    return float(ends.min()), float(ends.max())


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("shape", [(96, 96), (64, 192), (48, 192), (192, 64)], ids=str)
def test_at_least_as_good_as_jordans(shape: tuple[int, int], kind: str) -> None:
    low, high = jordans_range()
    g = torch.stack([SPECTRA[kind](*shape) for _ in range(3)]).float()
    u, s, vh = torch.linalg.svd(g.double(), full_matrices=False)
    above = s >= 1e-2 * s[:, :1]
    for method in ("auto", "gram", "polar-express", FOUR_STEPS):
        for dtype in (None, torch.bfloat16):
            d = polar(g, method, dtype=dtype).double()
            turned = u.mT @ d @ vh.mT
            for i, kept in enumerate(above):
                ends = torch.linalg.svdvals(turned[i, kept][:, kept])
                assert low < float(ends.min()) and float(ends.max()) < high, (method, dtype)
            assert (inner(g.double(), d) >= 0.95 * s.sum(dim=-1)).all(), (method, dtype)


# The choice of form and dtype -----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def nothing_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test finds a process that has measured nothing."""
    monkeypatch.setattr(choice, "_measured", {})
    monkeypatch.setattr(choice, "_timed", {})


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> dict[torch.dtype, float]:
    """Seconds of a multiplication in each dtype, to be set, in place of timings; every shape that is timed is noted."""
    found: dict[Any, Any] = {torch.float32: 1.0, torch.bfloat16: 1.0, "timed": []}

    def seconds(short: int, long: int, dtypes: set[torch.dtype]) -> dict[torch.dtype, list[float]]:
        found["timed"].append((short, long))
        return {d: [found[d] * n for n in (short**2 * long, short**3, short**2 * long)] for d in dtypes}

    monkeypatch.setattr(choice, "_seconds", seconds)
    monkeypatch.setattr(factor, "has_bfloat16", lambda kind: True)
    return found


@pytest.mark.parametrize("bfloat16", [True, False])
@pytest.mark.parametrize(
    ("shape", "small", "form", "form_in_bfloat16"),
    [
        ((512, 512), False, "direct", "direct"),
        ((1023, 512), False, "direct", "direct"),
        ((1024, 512), False, "gram", "gram"),
        ((512, 2048), False, "gram", "gram"),
        ((256, 512), False, "gram", "direct"),
        ((1024, 256), False, "gram", "gram"),
        ((64, 64), True, "direct", "direct"),
        ((96, 384), True, "gram", "gram"),
        ((16, 64, 256), True, "gram", "gram"),
        ((4, 64, 256), True, "gram", "gram"),
    ],
)
def test_the_rule_goes_by_shape_dtype_and_hardware(
    shape: tuple[int, ...],
    small: bool,
    form: str,
    form_in_bfloat16: str,
    bfloat16: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(factor, "has_bfloat16", lambda kind: bfloat16)
    with choice.using({}, by_rule=True):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            on_cpu = bfloat16 and not small
            assert choose(shape, dtype, "cpu") == (
                form_in_bfloat16 if on_cpu else form,
                torch.bfloat16 if on_cpu else torch.float32,
            )
            jordans = choose(shape, dtype, "cpu", "newton-schulz", None, "auto")
            assert jordans == (("direct", torch.bfloat16) if on_cpu else (form, torch.float32))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert choose(shape, dtype, "cuda:0").dtype == (torch.bfloat16 if bfloat16 else torch.float32)
    assert choose(shape, torch.float64, "cpu") == (form, torch.float64)
    assert choose((*shape[:-1], 1), torch.bfloat16, "cpu") == ("exact", torch.float32)
    assert choice._measured == {}


@pytest.mark.parametrize("shape", [(96, 96), (96, 384), (384, 96), (5, 96, 384)], ids=str)
@pytest.mark.parametrize("method", ["auto", "newton-schulz", "polar-express", "gram"])
def test_the_fastest_is_taken(method: str, shape: tuple[int, ...], rates: dict[Any, Any]) -> None:
    """By counts: the Gram form has fewer multiplications from an aspect ratio of about 2 on; restarts cost some."""
    wide = shape != (96, 96)
    rates[torch.bfloat16] = 3.0  # as on CPUs whose instructions for bfloat16 are slow
    form = "gram" if wide or method == "gram" else "direct"
    assert choose(shape, torch.float32, "cpu", method, None, "auto") == (form, torch.float32)
    assert rates["timed"] == [(96, 384 if wide else 96)]
    choice._measured.clear()
    rates[torch.bfloat16] = 0.1
    form = "gram" if (wide and method == "auto") or method == "gram" else "direct"
    assert choose(shape, torch.bfloat16, "cpu", method, None, "auto") == (form, torch.bfloat16)


def test_a_shape_is_measured_once_whatever_the_number_of_matrices(rates: dict[Any, Any]) -> None:
    first = choose((96, 384), torch.float32, "cpu")
    rates[torch.bfloat16] = 1e-3
    assert {choose(s, torch.float32, "cpu") for s in ((96, 384), (384, 96), (7, 96, 384))} == {first}
    assert rates["timed"] == [(96, 384)]
    assert choose((96, 96), torch.float32, "cpu").dtype == torch.bfloat16 and len(rates["timed"]) == 2


def test_what_is_never_measured(rates: dict[Any, Any]) -> None:
    rates[torch.bfloat16] = 1e-3
    assert choose((40, 40), torch.float32, "cpu").dtype == torch.float32
    assert choose((96, 96), torch.float64, "cpu") == ("direct", torch.float64)
    assert choose((96, 96), torch.float32, "meta") == choose((96, 96), torch.float32, "cuda")
    assert choose((96, 96), torch.float32, "cpu", "newton-schulz", None, torch.bfloat16) == ("direct", torch.bfloat16)
    assert choose((96, 96), torch.float32, "cpu", "newton-schulz") == ("direct", torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        assert choose((96, 96), torch.float32, "cpu").dtype == torch.float32
    finally:
        torch.use_deterministic_algorithms(False)
    assert rates["timed"] == []
    assert choose((96, 96), torch.float32, "cpu", "auto", None, torch.bfloat16).dtype == torch.bfloat16
    assert rates["timed"] == [(96, 96)]


def test_what_the_rule_takes_is_kept_unless_another_choice_pays(rates: dict[Any, Any]) -> None:
    rates[torch.bfloat16] = 0.9
    assert choose((96, 96), torch.float32, "cpu").dtype == torch.float32
    choice._measured.clear()
    rates[torch.bfloat16] = 0.8
    assert choose((96, 96), torch.float32, "cpu").dtype == torch.bfloat16


def test_own_choices_go_first_and_all_are_written_down(rates: dict[Any, Any]) -> None:
    choose((96, 96), torch.float32, "cpu")
    own = {factor.key((96, 96)): Choice("gram", torch.bfloat16), "96x384 auto": Choice("direct", torch.float64)}
    with choice.using(own):
        assert choose((96, 96), torch.float32, "cpu") == ("gram", torch.bfloat16)
        assert choose((64, 64), torch.float32, "cpu") == choose((64, 64), torch.float32, "cpu")
        assert choose((96, 384), torch.float32, "cpu").dtype != torch.float64  # which is no candidate
        with choice.using({}, by_rule=True):
            assert choose((96, 96), torch.float32, "cpu") == ("direct", torch.float32)
        assert choose((96, 96), torch.float32, "cpu") == ("gram", torch.bfloat16)
    assert own.keys() == {"96x96 auto", "64x64 auto", "96x384 auto"}
    assert choose((96, 96), torch.float32, "cpu") == ("direct", torch.float32)


def test_keys_say_all_that_a_choice_depends_on() -> None:
    assert factor.key((7, 384, 96)) == "96x384 auto" == factor.key((96, 384), "auto", 4, "auto")
    assert factor.key((96, 96), "newton-schulz", 3, "auto") == "96x96 newton-schulz 3"
    assert factor.key((96, 96), "auto", None, torch.bfloat16) == "96x96 auto bfloat16"
    assert factor.key((96, 96), PADE, 12) == "96x96 coefficients 12"


def test_choices_as_text() -> None:
    found = {"96x96 auto": Choice("gram", torch.bfloat16), "64x96 newton-schulz 7": Choice("direct", torch.float32)}
    text = "64x96 newton-schulz 7: direct float32; 96x96 auto: gram bfloat16"
    assert choice.to_text(found) == text and choice.from_text(text) == found
    assert choice.to_text({}) == "" and choice.from_text("") == {}
    for bad in ("fast", "96x96 auto: gram int8", "96x96 auto: exact float32", 3):
        with pytest.raises(ValueError, match=r"products must be text like .*got"):
            choice.from_text(bad)


def test_measuring_takes_a_few_milliseconds_and_no_random_numbers() -> None:
    before = torch.get_rng_state()
    for shape in ((64, 64), (256, 1024), (4096, 16384)):
        start = time.process_time()
        seconds = choice._seconds(*shape, {torch.float32})
        # Of products of at most 2^23 multiplications, where one of the largest shape has 2^38.
        assert time.process_time() - start < 2
        assert seconds is not None and all(0 < each < 1 for each in seconds[torch.float32])
    assert torch.equal(torch.get_rng_state(), before)
    with FakeTensorMode():
        assert choice._seconds(48, 48, {torch.float32}) is None


def test_counts_of_products_are_those_that_are_made() -> None:
    g = torch.randn(32, 80)
    for rows in (JORDAN.rows(), JORDAN.rows(8)):
        for form, run in (("direct", iterations.direct), ("gram", iterations.through_gram)):
            for dtype in (torch.float32, torch.bfloat16):
                with FlopCounterMode(display=False) as counter:
                    run(g[None].to(dtype), rows)
                grams, squares, applied = iterations.products_of(form, rows, dtype)
                made = 2 * 32**2 * (80 * (grams + applied) + 32 * squares)
                assert counter.get_total_flops() == made, (form, dtype, len(rows))


@pytest.mark.parametrize("shape", [(40, 40), (41, 90), (90, 41)], ids=str)
@pytest.mark.parametrize("method", ["newton-schulz", "gram", FOUR_STEPS], ids=["jordan", "gram", "direct"])
def test_symmetric_products_leave_out_a_quarter(
    method: str | PolarCoefficients, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    g = from_spectrum(*shape, spectrum(min(shape), 0.1)).float().expand(2, *shape)
    found = []
    for size in (384, 8):
        monkeypatch.setattr(iterations, "HALVED_FROM", size)
        with FlopCounterMode(display=False) as counter:
            found.append((polar(g, method), counter.get_total_flops()))
    (whole, all_of_them), (halved, fewer) = found
    assert_close(halved, whole, 1e-4)
    assert 0.75 * all_of_them - 1 < fewer < 0.93 * all_of_them
    a = torch.randn(2, 9, 9)
    product = iterations._symmetric(a, a.mT)
    assert not iterations.is_halved(9, torch.bfloat16, a.device)
    assert_close(product, a @ a.mT, 1e-5)


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("shape", [(96, 96), (64, 192), (192, 64)], ids=str)
def test_every_candidate_is_as_accurate_as_jordans_in_bfloat16(shape: tuple[int, int], kind: str) -> None:
    """What torch.optim.Muon computes differs from Jordan's map by bfloat16's rounding; no candidate differs more."""
    for seed in range(3):
        torch.manual_seed(seed)
        g = SPECTRA[kind](*shape)
        exact = polar(g, "newton-schulz")
        torchs = _zeropower_via_newtonschulz(g.float(), (3.4445, -4.7750, 2.0315), 5, 1e-7)
        allowed = 1.1 * (torchs.double() - exact).norm()
        candidates = factor._candidates("newton-schulz", torch.float32, None, "cpu")
        assert ("gram", torch.float32) in candidates and ("direct", torch.float32) in candidates
        for form, dtype in {*candidates, Choice("direct", torch.bfloat16)}:
            found = factor._iterate(g.float(), JORDAN, JORDAN.rows(), form, dtype)
            assert (found.double() - exact).norm() < allowed, (form, dtype)


def test_polar_does_what_is_chosen(rates: dict[Any, Any]) -> None:
    for shape in ((96, 96), (48, 192), (192, 48), (2, 48, 192)):
        g = torch.randn(shape)
        for rate in (0.1, 3.0):
            rates[torch.bfloat16] = rate
            choice._measured.clear()
            chosen = choose(g.shape, g.dtype, g.device)
            assert chosen.dtype == (torch.bfloat16 if rate < 1 else torch.float32)
            same = polar(g, "gram" if chosen.form == "gram" else FOUR_STEPS, dtype=chosen.dtype)
            assert torch.equal(polar(g, "auto"), same) and torch.equal(polar(g, "auto", dtype="auto"), same)
            form, dtype = choose(g.shape, g.dtype, g.device, "newton-schulz", None, "auto")
            same = factor._iterate(g, JORDAN, JORDAN.rows(), form, dtype)
            assert torch.equal(polar(g, "newton-schulz", dtype="auto"), same)
    g = torch.randn(48, 192)
    assert_close(polar(g[:1], "auto"), g[:1] / g[:1].norm(), 1e-6)
    with pytest.raises(ValueError, match=r"dtype must be a torch\.dtype, 'auto' or None, got 'fast'"):
        polar(g, dtype="fast")


def test_which_hardware_multiplies_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = _has_bfloat16
    assert not answer("mps") and not answer("meta")
    for amx, avx in ((True, False), (False, True), (False, False)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx, raising=False)
        assert answer("cpu") == ((amx or avx) and torch.backends.mkldnn.is_available())


# The exact one -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "condition", "falls_back"),
    [
        (torch.float64, 10, False),
        (torch.float64, 100, True),
        (torch.float32, 1e3, False),
        (torch.float32, 1e4, False),
        (torch.float32, 1e5, True),
        (torch.bfloat16, 3, False),
    ],
)
def test_exact_decomposes_ill_conditioned_matrices_only(
    dtype: torch.dtype, condition: float, falls_back: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    decomposed: list[int] = []
    by_singular_values = decompositions._by_singular_values
    monkeypatch.setattr(
        decompositions, "_by_singular_values", lambda x: decomposed.append(len(x)) or by_singular_values(x)
    )
    g = torch.stack([from_spectrum(9, 14, spectrum(9, 1 / c)) for c in (1, condition, 1)]).to(dtype)
    p = polar(g, "exact").double()
    assert decomposed == [1] * falls_back
    reference = by_singular_values(g.double())
    rounding = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    # The polar factor's own condition number is that of the matrix, when that takes the road of singular values.
    error = condition * rounding if falls_back else max(4 * rounding, 1000 * torch.finfo(torch.float64).eps)
    assert_close(p, reference, max(error, torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0))


# torch.optim.Muon ----------------------------------------------------------------------------------------------

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SHAPES = [(64, 128), (128, 64), (64, 64), (16, 200), (1, 5)]


def newton_schulz(g: Tensor, steps: int = 5) -> Tensor:
    """Muon's iteration as Jordan writes it, in the dtype of ``g``."""
    if g.shape[0] > g.shape[1]:
        return newton_schulz(g.T, steps).T
    a, b, c = COEFFICIENTS
    x = g / g.norm()
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@pytest.mark.parametrize("steps", [1, 5, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_newton_schulz_is_jordans(shape: tuple[int, int], steps: int) -> None:
    g = torch.randn(shape)
    assert_close(polar(g, "newton-schulz", steps), newton_schulz(g, steps), 1e-5)
    assert_close(polar(g.double(), "newton-schulz", steps), newton_schulz(g.double(), steps), 1e-11)


@pytest.mark.parametrize("shape", SHAPES[:-1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_newton_schulz_is_torch_optim_muons(shape: tuple[int, int], dtype: torch.dtype) -> None:
    g = torch.randn(shape).to(dtype)
    ours = polar(g, "newton-schulz", dtype=torch.bfloat16).float()
    theirs = _zeropower_via_newtonschulz(g.clone(), COEFFICIENTS, 5, 1e-7).float()
    reference = newton_schulz(g.float())

    def distance(a: Tensor, b: Tensor) -> float:
        return float((a - b).norm() / reference.norm())

    # By rounding to bfloat16 each strays up to 2% from the iteration in float32, in its own direction since torch
    # rounds the normalizer too; we stray no further.
    assert distance(ours, reference) < 1.2 * distance(theirs, reference)
    assert distance(ours, theirs) < 3e-2


def test_methods_agree_with_each_other() -> None:
    g = from_spectrum(20, 30, spectrum(20))
    reference = exact(g)
    far = {method: float((polar(g, method) - reference).norm() / reference.norm()) for method in METHODS}
    assert far["exact"] == 0 and far["polar-express"] < 0.003 and 0.05 < far["newton-schulz"] < 0.32
    assert far["gram"] < 0.06 and far["auto"] < 0.06
    assert float((polar(g, "polar-express", 8) - reference).norm()) < 1e-9
    assert all(torch.equal(polar(g, SCHEDULES[name]), polar(g, name)) for name in SCHEDULES)
    assert torch.equal(polar(g), polar(g, "polar-express", 6))
    assert (*SCHEDULES, "gram", "exact", "auto") == METHODS
