"""What goes wrong with Newton-Schulz iterations elsewhere, beside what happens here.

Where torch.optim.Muon 2.13 has the hazard it is shown too; such a test fails once torch is mended.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim._muon import _zeropower_via_newtonschulz

from normopt import EMA, PolarCoefficients, Spectral, SteepestDescent, zoo
from normopt.polar import JORDAN, METHODS, POLAR_EXPRESS, SCHEDULES, polar
from tests.support.strategies import assert_close, from_spectrum, inner, orthogonal, spectrum

each_schedule = pytest.mark.parametrize("name", SCHEDULES)
each_method = pytest.mark.parametrize("method", METHODS)


def torchs(g: Tensor) -> Tensor:
    """The direction of torch.optim.Muon."""
    return _zeropower_via_newtonschulz(g, (3.4445, -4.7750, 2.0315), 5, 1e-7)


def nuclear(g: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(g.double(), "nuc")


def ascent(g: Tensor, d: Tensor) -> float:
    """``<g, d>`` over its largest value among all ``d`` of spectral norm 1."""
    return float(inner(g.double(), d.double()) / nuclear(g))


# The momentum buffer in place of a copy ------------------------------------------------------------------------

GRADIENTS = [100 * torch.randn(6, 9, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(4)]


def buffer_after(optimizer: torch.optim.Optimizer, w: nn.Parameter, name: str) -> Tensor:
    for g in GRADIENTS:
        w.grad = g.clone()
        optimizer.step()
        assert torch.equal(w.grad, g)
    return optimizer.state[w][name].double()


def bfloat16_weights() -> nn.Parameter:
    return nn.Parameter(torch.zeros(6, 9, dtype=torch.bfloat16))


MUONS: dict[str, Any] = {
    "Muon": lambda p: zoo.Muon(p, momentum=0.9, nesterov=False),
    "Muon, exact": lambda p: zoo.Muon(p, momentum=0.9, nesterov=False, orthogonalize="exact"),
    "Muon in float32": lambda p: zoo.Muon(p, momentum=0.9, nesterov=False, orthogonalize_dtype=torch.float32),
    "Scion": lambda p: zoo.Scion(p, momentum=0.9, norm=Spectral(dtype="bfloat16")),
    "SteepestDescent": lambda p: SteepestDescent(p, norm=Spectral(method="newton-schulz"), momentum=EMA(0.9)),
}


@pytest.mark.parametrize("make", MUONS.values(), ids=MUONS)
def test_the_momentum_buffer_keeps_its_length(make: Any) -> None:
    average = torch.zeros(6, 9, dtype=torch.float64)
    for g in GRADIENTS:
        average.lerp_(g.double(), 0.1)
    w = bfloat16_weights()
    assert_close(buffer_after(make([w]), w, "momentum"), average, 1e-6)


def test_torchs_momentum_buffer_is_normalized_in_place() -> None:
    """Without Nesterov the buffer itself is divided by its norm: the next gradient, 700 times as long, wins."""
    w = bfloat16_weights()
    optimizer = torch.optim.Muon([w], momentum=0.9, nesterov=False)
    assert float(buffer_after(optimizer, w, "momentum_buffer").norm()) == pytest.approx(1, abs=0.01)
    assert min(float(g.float().norm()) for g in GRADIENTS) > 600


# The sign of the update ----------------------------------------------------------------------------------------

MATRICES = {
    "gaussian": torch.randn(24, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    "square": torch.randn(30, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
    "rank one": torch.outer(torch.arange(1.0, 25.0), torch.arange(-20.0, 20.0)).double(),
    "one entry": torch.eye(24, 40, dtype=torch.float64)[:1] * torch.eye(24, dtype=torch.float64)[:, :1],
    "diagonal": torch.diag(torch.logspace(0, -6, 24, dtype=torch.float64)),
    "orthogonal": torch.eye(24, 40, dtype=torch.float64),
}


@each_schedule
@pytest.mark.parametrize("steps", range(1, 21))
def test_no_number_of_steps_turns_the_direction_around(name: str, steps: int) -> None:
    s = torch.linspace(0, 1.01, 20_001, dtype=torch.float64)[1:]
    assert (SCHEDULES[name].scalar(s, steps) > 0).all()
    # With fewer steps than its own a schedule is on its way, and singular values of 1 can be anywhere above 0.
    least = 0.65 if steps >= SCHEDULES[name].steps else 0.2
    for kind, g in MATRICES.items():
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            assert ascent(g, polar(g.to(dtype), name, steps)) > least, (kind, dtype)


#: A table whose first row is negative above 0.884, made for another normalizer, under which iterating it in a cycle
#: (NVIDIA-NeMo/Emerging-Optimizers fd77292, "aol" with the default of five steps) turns converged directions around.
UNSAFE = PolarCoefficients(
    coefficients=(
        (4.0098, -7.0585, 2.4635),
        (3.4585, -5.5479, 2.5959),
        (2.7573, -3.2939, 1.4254),
        (2.7215, -3.0494, 1.3169),
    ),
    steps=4,
)
IN_A_CYCLE = PolarCoefficients(coefficients=(*UNSAFE.coefficients, UNSAFE.coefficients[0]), steps=5)


def test_repeating_the_last_row_is_safe_where_a_cycle_is_not() -> None:
    g = torch.randn(64, 128, dtype=torch.float64)
    assert ascent(g, polar(g, IN_A_CYCLE)) < -0.5
    assert ascent(g, polar(g, UNSAFE, 5)) > 0.95
    assert UNSAFE.rows(5)[-2:] == [UNSAFE.coefficients[-1]] * 2


def test_the_scalar_map_tells_which_table_turns_gradients_around() -> None:
    """``PolarCoefficients.scalar`` near 1 is what happens to a gradient of rank one."""
    g = MATRICES["rank one"]
    for schedule, is_safe in ((UNSAFE, False), (JORDAN, True), (POLAR_EXPRESS, True)):
        one = schedule.scalar(torch.ones((), dtype=torch.float64) / schedule.margin)
        assert ascent(g, polar(g, schedule)) == pytest.approx(float(one), abs=1e-9)
        assert (float(one) > 0) == is_safe


# Lengths -------------------------------------------------------------------------------------------------------


@each_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_as_long_for_gradients_of_any_length(method: str, dtype: torch.dtype) -> None:
    g = torch.randn(12, 20) / 15

    def step(size: float) -> Tensor:
        w = nn.Parameter(torch.zeros(12, 20, dtype=dtype))
        optimizer = SteepestDescent([w], 1.0, Spectral(method=method), momentum=EMA(0.9, nesterov=True))
        w.grad = (g * size).to(dtype)
        optimizer.step()
        return w.detach()

    for size in (1e-30, 1e-20, 1e-9, 1e9, 1e20, 1e30):
        # A Gram matrix has the square of the condition number.
        assert_close(step(size), step(1.0), (500 if method == "gram" else 50) * torch.finfo(dtype).eps)


def test_torchs_step_depends_on_the_gradients_length() -> None:
    """Below 1e-9 its eps outweighs the norm, and above 1e19 the square of the norm is infinite."""
    g = torch.randn(12, 20)
    g /= g.norm()
    usual = float(torchs(g.clone()).float().norm())
    assert float(torchs(1e-7 * g).float().norm()) == pytest.approx(usual, rel=0.05)
    assert 0 < float(torchs(1e-11 * g).float().norm()) < 0.1 * usual
    assert 0 < float(torchs(1e-30 * g).float().norm()) < 1e-20
    assert float(torchs(1e20 * g).norm()) == 0


# Singular values slightly above 1 ------------------------------------------------------------------------------

#: Polar Express as its coefficients come out of the optimization, for [1e-3, 1] and nothing above.
RAW = PolarCoefficients(
    coefficients=(
        *((a * 1.01, b * 1.01**3, c * 1.01**5) for a, b, c in POLAR_EXPRESS.coefficients[:-1]),
        POLAR_EXPRESS.coefficients[-1],
    ),
    steps=6,
)


def test_rounding_above_one_explodes_without_a_margin_and_not_with_it() -> None:
    # Gradients of rank one, whose only singular value is 1 after normalization; bfloat16 rounds half of them up.
    g = torch.randn(200, 1, 7).bfloat16()
    assert not torch.isfinite(polar(g, RAW)).all()
    for schedule, (low, high) in ((POLAR_EXPRESS, (0.98, 1.02)), (JORDAN, (0.65, 0.75))):
        lengths = polar(g, schedule).double().norm(dim=(-2, -1))
        assert low < float(lengths.min()) and float(lengths.max()) < high


@each_schedule
@pytest.mark.parametrize("steps", [None, 8, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_near_one_stay_bounded(name: str, steps: int | None, dtype: torch.dtype) -> None:
    for rank in (1, 2, 3):
        g = from_spectrum(40, 60, spectrum(rank, 1e-3)).to(dtype)
        d = polar(g, name, steps)
        assert float(torch.linalg.matrix_norm(d.double(), 2)) < 1.22
        assert ascent(g, d) > 0.65


# Low rank ------------------------------------------------------------------------------------------------------


@each_schedule
@pytest.mark.parametrize("steps", [None, 8, 12])
def test_noise_in_the_null_space_is_bounded_and_at_right_angles(name: str, steps: int | None) -> None:
    """In bfloat16 a matrix of rank one becomes one of full rank, and the noise grows to full size. It does not matter
    for descent: what is added to the polar factor has next to nothing in common with the gradient."""
    g = torch.randn(128, 1) @ torch.randn(1, 256)
    exact = polar(g, "exact").double()
    noise = polar(g.bfloat16(), name, steps).double() - exact
    along = float(inner(noise, exact))
    assert float(noise.norm()) > 0.5
    assert abs(along) < 0.35
    # In float32 the noise is still small after the map's slope has enlarged it.
    slope = float(SCHEDULES[name].scalar(torch.tensor(1e-12, dtype=torch.float64), steps)) * 1e12
    in_float32 = polar(g, name, steps).double()
    across = in_float32 - inner(in_float32, exact) * exact
    assert float(across.norm()) < 2 * slope * torch.finfo(torch.float32).eps


def test_no_method_takes_rounding_errors_for_directions_in_float32() -> None:
    g = (orthogonal(40, 3) @ orthogonal(3, 60)).float()
    for method in METHODS:
        s = torch.linalg.svdvals(polar(g, method, dtype=torch.float32))  # "auto" may find bfloat16 faster
        assert float(s[3:].max()) < 1e-3 < 0.6 < float(s[2])
