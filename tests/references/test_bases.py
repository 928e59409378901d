"""Bases of one side, and of the momentum: Conda and MOSO."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normopt import EMA, Eigenbasis, Max, Rotated, Smoothed, SteepestDescent
from tests.support.strategies import assert_close

SHAPES = [(4, 7), (7, 4), (5, 5)]


def run(basis: Eigenbasis, gradients: list[Tensor]) -> Tensor:
    w = nn.Parameter(torch.zeros_like(gradients[0]))
    direction = Rotated(Smoothed(Max(), 0.9, 1e-8), basis)
    optimizer = SteepestDescent([w], 0.1, direction, EMA(0.8, bias_correction=True))
    for g in gradients:
        w.grad = g.clone()
        optimizer.step()
    return w.detach()


@pytest.mark.parametrize("frequency", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_conda_by_its_recurrence(shape: tuple[int, int], frequency: int) -> None:
    """Adam in the singular vectors of the momentum on the shorter side; the first gradient only builds them."""
    gradients = [torch.randn(shape, dtype=torch.float64) for _ in range(12)]
    m, v, w = (torch.zeros_like(gradients[0]) for _ in range(3))
    left = shape[0] < shape[1]

    def basis_of(x: Tensor) -> Tensor:
        u, _, vh = torch.linalg.svd(x, full_matrices=False)
        return u if left else vh.mT

    q = basis_of(gradients[0])
    for step, g in enumerate(gradients[1:], 1):
        m = 0.8 * m + 0.2 * g
        turned, seen = (q.mT @ x if left else x @ q for x in (g, m / (1 - 0.8**step)))
        v = 0.9 * v + 0.1 * turned.square()
        d = seen / ((v / (1 - 0.9**step)).sqrt() + 1e-8)
        w = w - 0.1 * (q @ d if left else d @ q.mT)
        if step % frequency == 0:
            q = basis_of(m)
    conda = Eigenbasis(0.0, frequency, exact=True, sides="smaller", of="momentum")
    assert_close(run(conda, gradients), w, 1e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_one_side_is_both_with_the_longer_one_left_out(shape: tuple[int, int]) -> None:
    gradients = [torch.randn(shape, dtype=torch.float64) for _ in range(8)]
    one = run(Eigenbasis(0.5, 2, sides="smaller"), gradients)
    if shape[0] == shape[1]:
        assert not torch.equal(one, run(Eigenbasis(0.5, 2), gradients))
    else:
        assert torch.equal(one, run(Eigenbasis(0.5, 2, max_dim=min(shape)), gradients))


@pytest.mark.parametrize(
    ("options", "message"), [({"sides": "left"}, "sides 'left'"), ({"of": "weights"}, "unknown of")]
)
def test_bases_refuse_what_is_none(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Eigenbasis(**options)
