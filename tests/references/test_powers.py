"""Powers of singular values and of entries: DynMuon, Freon, PowerStep."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from normopt import EMA, Lp, Max, Schatten, SingularPower, Spectral, SteepestDescent
from normopt.ingredient import option
from tests.support.paths import MATRICES, assert_same_path
from tests.support.strategies import assert_close, from_spectrum, spectrum
from tests.support.written import State, Written, average, rms


@pytest.mark.parametrize("power", [-0.25, 0.0, 0.25, 1.0])
def test_singular_values_to_a_power_by_the_recurrence(power: float) -> None:
    def update(g: Tensor, state: State, step: int) -> Tensor:
        u, s, vh = torch.linalg.svd(average(g, state, 0.9, nesterov=False), full_matrices=False)
        d = (u * s**power) @ vh
        return 0.02 * d / rms(d)

    assert_same_path(
        lambda p: SteepestDescent(p, 0.02, SingularPower(power), EMA(0.9)), lambda p: Written(p, update), MATRICES, 2e-4
    )


def directions_of(g: Tensor, *norms: object) -> list[Tensor]:
    found = []
    for norm in norms:
        w = nn.Parameter(torch.zeros_like(g))
        optimizer = SteepestDescent([w], 1.0, norm)
        w.grad = g.clone()
        optimizer.step()
        found.append(-w.detach() / w.detach().norm())
    return found


def test_powers_from_zero_up_are_duality_maps() -> None:
    g = from_spectrum(6, 9, spectrum(6))
    for power, norm in (0.0, Spectral(method="exact")), (0.125, Schatten(9.0)), (1.0, Schatten(2.0)):
        assert_close(*directions_of(g, SingularPower(power), norm), 1e-9)


def test_the_power_can_be_scheduled() -> None:
    g, w = from_spectrum(6, 9, spectrum(6)), nn.Parameter(torch.zeros(6, 9, dtype=torch.float64))
    direction = SingularPower(option("power"))
    optimizer = SteepestDescent([w], 1.0, direction, options={"power": 0.25})
    s = torch.linalg.svdvals(g)
    for power in (0.25, 0.0, -0.25):
        optimizer.param_groups[0]["power"] = power
        before = w.detach().clone()
        w.grad = g.clone()
        optimizer.step()
        t = torch.linalg.svdvals(w.detach() - before)
        assert_close(t / t.max(), (s**power / (s**power).max()).sort(descending=True).values, 1e-9)


@pytest.mark.parametrize("beta", [0.25, 0.5, 1.0])
def test_power_step_is_the_duality_map_of_an_lp_norm(beta: float) -> None:
    """sign(m) |m|^beta, at l_p norm 1 with p = 1 + 1 / beta."""

    def update(g: Tensor, state: State, step: int) -> Tensor:
        m = average(g, state, 0.9, nesterov=False)
        d = m.sign() * m.abs() ** beta
        return 0.02 * d / torch.linalg.vector_norm(d, ord=1 + 1 / beta)

    norm = Lp(1 + 1 / beta, scale="unit")
    assert_same_path(
        lambda p: SteepestDescent(p, 0.02, norm, EMA(0.9)), lambda p: Written(p, update), [*MATRICES, (7,)], 2e-5
    )
    assert Max() != norm


@pytest.mark.parametrize("power", [-1.5, 1.5, float("nan")])
def test_powers_out_of_range_are_refused(power: float) -> None:
    with pytest.raises(ValueError, match="SingularPower: power must lie in"):
        SingularPower(power)
