"""AdamP and SGDP beside their package, and the projection that they share."""

from __future__ import annotations

import math
from typing import Any

import adamp
import pytest
import torch
from torch import Tensor, nn

import normopt
from normopt import TangentProjection, zoo
from tests.support.paths import assert_same_path

SHAPES: list[tuple[int, ...]] = [(6, 10), (10, 6), (8, 8), (7,), (1, 7), (4, 3, 2)]

#: Never, nearly never, sometimes the rows and sometimes the whole, always the rows.
DELTAS = [0.0, 0.1, 1.5, 5.0]
ADAMP = [
    {},
    {"weight_decay": 0.5},
    {"weight_decay": 0.5, "wd_ratio": 0.7, "nesterov": True},
    {"betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1, "nesterov": True},
]
SGDP = [
    {},
    {"momentum": 0.9, "weight_decay": 0.05, "nesterov": True},
    {"momentum": 0.8, "weight_decay": 0.05, "wd_ratio": 0.7, "nesterov": True},
]


@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("options", ADAMP, ids=str)
def test_adamp_is_the_packages(options: dict[str, Any], delta: float) -> None:
    options = {"lr": 0.02, "delta": delta, **options}
    assert_same_path(lambda p: zoo.AdamP(p, **options), lambda p: adamp.AdamP(p, **options), SHAPES, 2e-5)


@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("options", SGDP, ids=str)
def test_sgdp_is_the_packages(options: dict[str, Any], delta: float) -> None:
    options = {"lr": 0.02, "delta": delta, **options}
    assert_same_path(lambda p: zoo.SGDP(p, **options), lambda p: adamp.SGDP(p, **options), SHAPES, 2e-5)


class Copying(adamp.SGDP):
    """The reference without its defect: it projects a copy of the momentum."""

    def _projection(self, p: Tensor, grad: Tensor, perturb: Tensor, *numbers: Any) -> Any:
        return super()._projection(p, grad, perturb.clone(), *numbers)


HEAVY = [{"momentum": 0.9}, {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.05}]


@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("options", HEAVY, ids=str)
def test_sgdp_projects_the_step_and_not_the_momentum(options: dict[str, Any], delta: float) -> None:
    """Without nesterov the package subtracts the projection from its momentum, in place, so that the momentum forgets
    what was along the weights; in the paper the step alone is projected. Ours is the package's on a copy."""
    options = {"lr": 0.02, "delta": delta, **options}
    assert_same_path(lambda p: zoo.SGDP(p, **options), lambda p: Copying(p, **options), SHAPES, 2e-5)


def test_sgdps_momentum_in_the_package_is_not_the_sum_of_gradients() -> None:
    noise = torch.Generator().manual_seed(0)
    start = torch.randn(6, 10, generator=noise)
    gradients = torch.randn(3, 6, 10, generator=noise)
    momenta = []
    for make in (zoo.SGDP, adamp.SGDP):
        w = nn.Parameter(start.clone())
        optimizer = make([w], lr=0.1, momentum=0.9, delta=5.0)
        for g in gradients:
            w.grad = g.clone()
            optimizer.step()
        momenta.append(optimizer.state[w]["momentum"])
    total = 0.81 * gradients[0] + 0.9 * gradients[1] + gradients[2]
    torch.testing.assert_close(momenta[0], total)
    assert (momenta[1] - total).abs().max() > 0.1


@pytest.mark.parametrize("delta", [1.5, 5.0])
def test_tangent_projection_has_three_cases(delta: float) -> None:
    """By rows, as a whole, not at all: each leaves what it should of the update, and of the decay."""
    noise = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(60):
        w, g, d = torch.randn(3, 5, 8, generator=noise, dtype=torch.float64)
        rule = TangentProjection(delta, 1e-12, wd_ratio=0.5, weight_decay=0.2)
        context = normopt.ingredient.Context(g[None], g[None], 1, 0.1, None, lambda w=w: w[None])
        moved, factor = rule.update(d[None], context)
        new = moved[0]
        cosines = (w * g).sum(1) / w.norm(dim=1) / g.norm(dim=1)
        rows = bool((cosines.abs() < delta / math.sqrt(8)).all())
        whole = not rows and bool((w * g).sum().abs() / w.norm() / g.norm() < delta / math.sqrt(40))
        case = "rows" if rows else "whole" if whole else "none"
        seen.add(case)
        if case == "rows":
            torch.testing.assert_close((new * w).sum(1), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-10)
            expected = d - w * ((d * w).sum(1) / w.norm(dim=1) ** 2)[:, None]
        else:
            expected = d - w * (d * w).sum() / w.norm() ** 2 if case == "whole" else d
        torch.testing.assert_close(new, expected)
        assert float(factor) == pytest.approx(1 - 0.1 * 0.2 * (1.0 if case == "none" else 0.5))
    assert seen == ({"rows"} if delta == 5.0 else {"rows", "whole", "none"})


def test_sgdp_projects_each_matrix_of_a_batch_by_itself() -> None:
    """Two matrices of one shape, one at right angles to its gradient, and a vector as long as their rows."""
    w = torch.eye(4, dtype=torch.float64)
    across = torch.roll(w, 1, 1)
    params = [nn.Parameter(w.clone()), nn.Parameter(w.clone()), nn.Parameter(w[0].clone())]
    optimizer = zoo.SGDP(params, lr=0.1, momentum=0.5, weight_decay=0.5, wd_ratio=0.0)
    for p, g in zip(params, (across, w, across[0]), strict=True):
        p.grad = g.clone()
    optimizer.step()
    torch.testing.assert_close(params[0].detach(), w - 0.1 * across)  # no decay: wd_ratio is 0
    torch.testing.assert_close(params[1].detach(), (1 - 0.1 * 0.5 / 0.5) * w - 0.1 * w)
    torch.testing.assert_close(params[2].detach(), (1 - 0.1 * 0.5 / 0.5) * w[0] - 0.1 * across[0])


def test_adamp_projects_embeddings_token_by_token() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
    table = model[0].weight
    before = table.detach().clone()
    optimizer = zoo.AdamP(model, lr=0.1, delta=5.0)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    radial = ((table.detach() - before) * before).sum(dim=1)
    assert radial.abs().max() < 1e-6 < (table.detach() - before).abs().min()
