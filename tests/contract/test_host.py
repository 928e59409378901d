"""What the host sees of numbers makes steps faster and changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from normopt import SteepestDescent
from normopt.numerics import host
from normopt.numerics.host import are_exact, can_read_values, power_of_two
from normopt.numerics.lengths import euclidean
from tests.support.optimizers import EVERY
from tests.support.steps import run, tensors


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
def test_steps_are_the_same_where_the_host_may_not_look(
    make: Callable[..., SteepestDescent], monkeypatch: pytest.MonkeyPatch
) -> None:
    def path() -> list[Tensor]:
        params = tensors()
        run(make(params), params, 3)
        return params

    seen = path()
    monkeypatch.setattr(host, "DEFERRED", True)
    for p, q in zip(seen, path(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dim", [-1, -2, (-2, -1)], ids=str)
@pytest.mark.parametrize("scale", [0.0, 1e-40, 1e-25, 1e-8, 1.0, 1e15, 1e25, 1e36])
def test_norms_are_right_whether_or_not_squares_leave_the_range(scale: float, dim: int | tuple[int, int]) -> None:
    x = torch.randn(3, 20, 30) * scale
    expected = torch.linalg.vector_norm(x.double(), dim=dim, keepdim=True)
    torch.testing.assert_close(euclidean(x, dim, keepdim=True).double(), expected, rtol=2e-6, atol=1e-44)


def test_the_host_looks_at_nothing_that_is_traced_or_elsewhere() -> None:
    x = torch.ones(4)
    assert can_read_values(x) and not can_read_values(torch.ones(4, device="meta"))
    looked: list[bool] = []
    torch.func.vmap(lambda y: looked.append(can_read_values(y)) or y)(torch.ones(2, 2))
    assert looked == [False]


def test_powers_of_two() -> None:
    for dtype, tiny in (torch.float32, 2.0**-126), (torch.float64, 2.0**-1022):
        x = torch.tensor([0.0, tiny / 8, 0.75, 1.0, 1.99, 2.0**90 * 1.5], dtype=dtype)
        assert power_of_two(x).tolist() == [tiny, tiny, 0.5, 1.0, 1.0, 2.0**90]


def test_norms_near_the_ends_of_the_range_are_not_trusted() -> None:
    assert are_exact(torch.tensor([1e-8, 1.0, 1e8]))
    for end in (0.0, 1e-12, 1e12, float("inf"), float("nan")):
        assert not are_exact(torch.tensor([1.0, end]))
