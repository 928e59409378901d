"""Learning-rate-free step sizes: beside their references, and in norms that have none."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normopt
from normopt import (
    EMA,
    DAdaptation,
    LearningRateFree,
    Norm,
    Prodigy,
    Smoothed,
    SteepestDescent,
    zoo,
)
from tests.support.paths import assert_same_path
from tests.support.strategies import RMS, label

SHAPES = [(6, 10), (10, 6), (8, 8), (7,)]
PRODIGY: list[dict[str, Any]] = [
    {},
    {"d_coef": 2.0, "slice_p": 3},
    {"growth_rate": 1.5, "d0": 1e-3},
    {"growth_rate": 1.02},
    {"growth_rate": 1.0},
    {"beta3": 0.9, "eps": 1e-4},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "decouple": False},
    {"weight_decay": 0.1, "use_bias_correction": True, "safeguard_warmup": True, "d0": 1e-3},
    {"lr": 0.5, "betas": (0.8, 0.9)},
]


@pytest.mark.parametrize("scale", [1.0, 1e-3], ids="gradients of {}".format)
@pytest.mark.parametrize("options", PRODIGY, ids=str)
def test_prodigy_is_prodigyopts(options: dict[str, Any], scale: float) -> None:
    from prodigyopt import Prodigy as Reference

    with contextlib.redirect_stdout(io.StringIO()):  # it prints what kind of decay it uses
        assert_same_path(
            lambda p: zoo.Prodigy(p, **options), lambda p: Reference(p, **options), SHAPES, 2e-5, steps=60, scale=scale
        )


def test_prodigy_without_momentum_does_not_jump() -> None:
    """prodigyopt multiplies the raw gradient by the next step's d but its second moment by this one's.

    At betas[0] = 0 its steps are therefore too long by the factor that d has grown by, a thousandfold at the first
    estimate. Ours are those of a momentum that tends to 0.
    """
    from prodigyopt import Prodigy as Reference

    def reference(betas: tuple[float, float]) -> Any:
        return lambda p: Reference(p, betas=betas)

    with pytest.raises(AssertionError, match="distance travelled"):
        assert_same_path(lambda p: zoo.Prodigy(p, betas=(0.0, 0.9)), reference((0.0, 0.9)), SHAPES, 2e-5, steps=60)
    assert_same_path(lambda p: zoo.Prodigy(p, betas=(0.0, 0.9)), reference((1e-12, 0.9)), SHAPES, 2e-5, steps=60)


D_ADAPTATION: list[dict[str, Any]] = [
    {},
    {"growth_rate": 1.5, "d0": 1e-3},
    {"growth_rate": 1.0, "d0": 1e-3},
    {"weight_decay": 0.1, "use_bias_correction": True},
    {"weight_decay": 0.1, "decouple": True},
    {"lr": 0.5, "betas": (0.8, 0.9), "eps": 1e-4},
    {"betas": (0.0, 0.9)},
]


@pytest.mark.parametrize("scale", [1.0, 1e-3], ids="gradients of {}".format)
@pytest.mark.parametrize("options", D_ADAPTATION, ids=str)
def test_dadaptadam_is_dadaptations(options: dict[str, Any], scale: float) -> None:
    from dadaptation import DAdaptAdam as Reference

    with contextlib.redirect_stdout(io.StringIO()):
        assert_same_path(
            lambda p: zoo.DAdaptAdam(p, **options),
            lambda p: Reference(p, **options),
            SHAPES,
            2e-5,
            steps=60,
            scale=scale,
        )


def test_radius_is_dadaptations_layer_scale() -> None:
    from dadaptation import DAdaptAdam as Reference

    def groups(p: list[Tensor], name: str) -> list[dict[str, Any]]:
        return [{"params": p[:2], name: 0.5}, {"params": p[2:], name: 2.0}]

    assert_same_path(
        lambda p: zoo.DAdaptAdam(groups(p, "radius")),
        lambda p: Reference(groups(p, "layer_scale")),
        SHAPES,
        2e-5,
        steps=60,
    )


@pytest.mark.parametrize("make", [zoo.Prodigy, zoo.DAdaptAdam])
def test_a_group_of_rate_0_stays_where_it_is(make: type[SteepestDescent]) -> None:
    """It does not count for d either; prodigyopt and dadaptation leave it out of d but go on decaying its weights."""
    weights = [nn.Parameter(torch.full((3, 4), 2.0)) for _ in range(2)]
    optimizer = make([{"params": weights[:1]}, {"params": weights[1:], "lr": 0.0}], weight_decay=0.1, decouple=True)
    alone = make([nn.Parameter(torch.full((3, 4), 2.0))], weight_decay=0.1, decouple=True)
    for _ in range(30):
        for w in weights:
            w.grad = w.detach() - 1
        alone.param_groups[0]["params"][0].grad = alone.param_groups[0]["params"][0].detach() - 1
        optimizer.step()
        alone.step()
    assert torch.equal(weights[1], torch.full((3, 4), 2.0))
    assert torch.equal(weights[0], alone.param_groups[0]["params"][0])
    assert optimizer.param_groups[0]["d"] > 1e-3


# Any norm ------------------------------------------------------------------------------------------------------------

KINDS = [Prodigy, DAdaptation]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def quadratic(
    norm: Norm | list[Norm], step_size: LearningRateFree, distance: float, steps: int = 200, memory: bool = False
) -> tuple[list[float], float]:
    """The losses of 0.5 ||w - target||^2 from a given distance, a norm for each matrix, and the last d."""
    noise = torch.Generator().manual_seed(0)
    norms = norm if isinstance(norm, list) else [norm, norm]
    shapes = [(6, 10), (8, 5)]
    targets = [
        n.dualize(torch.randn(shape, generator=noise)) * distance for n, shape in zip(norms, shapes, strict=True)
    ]
    weights = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    groups = [{"params": [w], "norm": Smoothed(n, 0.9) if memory else n} for w, n in zip(weights, norms, strict=True)]
    optimizer = SteepestDescent(groups, 1.0, momentum=EMA(0.9), step_size=step_size)
    losses = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = min(1.0, 2 * (1 - step / steps))
        losses.append(0.0)
        for w, target in zip(weights, targets, strict=True):
            w.grad = w.detach() - target
            losses[-1] += 0.5 * float(w.grad.square().sum())
        optimizer.step()
    return losses, float(optimizer.param_groups[0]["d"])


@pytest.mark.slow
@kinds
@pytest.mark.parametrize("norm", RMS, ids=label)
def test_d_finds_the_scale_of_the_distance(norm: Norm, kind: type[LearningRateFree]) -> None:
    """From 1e-6 it rises to the order of the distance in this norm, and never above it; a thousandfold further, too."""
    for distance in 1.0, 1000.0:
        losses, d = quadratic(norm, kind(), distance)
        assert 1e-3 * distance < d < 1.5 * distance
        assert losses[-1] < 0.05 * losses[0]


@pytest.mark.slow
@kinds
@pytest.mark.parametrize("norm", [norm for norm in RMS if norm.has_memory], ids=label)
def test_d_finds_the_scale_with_memory(norm: Norm, kind: type[LearningRateFree]) -> None:
    losses, d = quadratic(norm, kind(), 1.0, memory=True)
    assert 1e-3 < d < 1.5
    assert losses[-1] < 0.05 * losses[0]


@kinds
@pytest.mark.parametrize("name", ["muon", "scion", "scale", "soap"])
def test_optimizers_of_whole_models_find_their_rate(name: str, kind: type[LearningRateFree]) -> None:
    """With a norm for each role: one d for all of them, from 1e-6, and the loss falls by it."""
    torch.manual_seed(0)
    model = normopt.nn.GPT(vocab_size=256, d_model=32, n_layers=1, n_heads=2)
    tokens = torch.tensor(list((Path(__file__).parents[2] / "README.md").read_bytes()[:257]))
    optimizer = normopt.create(name, model, lr=1.0, step_size=kind(growth_rate=1.5))
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(tokens[None, :-1])[0], tokens[1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    (d,) = {float(group["d"]) for group in optimizer.param_groups}
    assert 1e-4 < d < 1
    assert losses[-1] < losses[0] - 1
