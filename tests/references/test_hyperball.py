"""AdamH, MuonH, SPEL and NaP: matrices that keep their length or their singular values."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normopt
from normopt import zoo
from tests.support.bounded import closure, net, noise
from tests.support.written import polar


def hyperball(start: Tensor, updates: Iterable[Tensor], lr: float) -> Tensor:
    """The published formula."""
    w, radius = start.clone(), start.norm()
    for u in updates:
        moved = w - lr * radius * u / u.norm()
        w = radius * moved / moved.norm()
    return w


def adam(gradients: list[Tensor], betas: tuple[float, float], eps: float) -> Iterator[Tensor]:
    m, v = torch.zeros_like(gradients[0]), torch.zeros_like(gradients[0])
    for t, g in enumerate(gradients, 1):
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g**2
        yield (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)


def muon(gradients: list[Tensor], beta: float) -> Iterator[Tensor]:
    m = torch.zeros_like(gradients[0])
    for g in gradients:
        m = beta * m + (1 - beta) * g
        u, _, vh = torch.linalg.svd(beta * m + (1 - beta) * g, full_matrices=False)
        yield u @ vh


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_hyperballs_are_their_recurrences(shape: tuple[int, ...]) -> None:
    gradients, start = [noise(shape, i) for i in range(20)], noise(shape, 99)
    expected = {
        "adamh": hyperball(start, adam(gradients, (0.8, 0.9), 1e-4), 0.03),
        "muonh": hyperball(start, muon(gradients, 0.9), 0.03),
    }
    made: dict[str, dict[str, Any]] = {
        "adamh": {"betas": (0.8, 0.9), "eps": 1e-4},
        "muonh": {"momentum": 0.9, "orthogonalize": "exact", "orthogonalize_dtype": None},
    }
    for name, options in made.items():
        w = nn.Parameter(start.clone())
        optimizer = normopt.create(name, [w], lr=0.03, **options)
        for g in gradients:
            w.grad = g
            optimizer.step()
        torch.testing.assert_close(w.detach(), expected[name], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (6, 6)])
@pytest.mark.parametrize("options", [{}, {"nesterov": True, "scale": "max1", "weight_decay": 0.0}], ids=str)
def test_spel_is_its_recurrence(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    w, tall = nn.Parameter(nn.init.orthogonal_(noise(shape, 99))), shape[0] >= shape[1]
    scale = max(1.0, shape[0] / shape[1]) ** 0.5 if options.get("scale") == "max1" else 1.0
    w.data.mul_(scale)
    expected, m = w.detach().clone(), torch.zeros_like(w)
    optimizer = zoo.SPEL([w], 0.05, momentum=0.9, orthogonalize="exact", orthogonalize_dtype=None, **options)
    for i in range(20):
        w.grad = noise(shape, i)
        optimizer.step()
        m = 0.9 * m + 0.1 * w.grad
        t, x = (0.9 * m + 0.1 * w.grad if options.get("nesterov") else m), expected
        t, x = (t, x) if tall else (t.mT, x.mT)
        t = t - x @ (x.mT @ t + t.mT @ x) / (2 * scale**2)
        moved = (1 - 0.05 * options.get("weight_decay", 0.1)) * x - 0.05 * scale * polar(t)
        expected = scale * (polar(moved) if tall else polar(moved).mT)
        torch.testing.assert_close(w.detach(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("base", ["adam", "adamw", "sgd"])
def test_nap_is_torchs_optimizer_and_a_projection(base: str) -> None:
    reference = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[base]
    ours, theirs = ([nn.Parameter(noise(shape, 9)) for shape in ((4, 6), (5, 4))] for _ in range(2))
    radii = [p.detach().norm() for p in ours]
    pair = zoo.NaP(ours, 0.05, base, weight_decay=0.1), reference(theirs, 0.05, weight_decay=0.1)
    for i in range(20):
        for params, optimizer in zip((ours, theirs), pair, strict=True):
            for j, p in enumerate(params):
                p.grad = noise(tuple(p.shape), 10 * i + j)
            optimizer.step()
        for p, radius in zip(theirs, radii, strict=True):
            p.data.mul_(radius / p.data.norm())
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "options", "kept"),
    [
        ("adamh", {}, {"free.weight", "layer.up.weight", "layer.down.weight", "head.weight"}),
        ("muonh", {}, {"free.weight", "layer.up.weight", "layer.down.weight", "head.weight"}),
        ("nap", {"base": "muon"}, {"free.weight", "layer.up.weight", "layer.down.weight"}),
        ("nap", {"base": "scion"}, {"free.weight", "layer.up.weight", "layer.down.weight"}),
    ],
)
def test_which_matrices_keep_their_length(name: str, options: dict[str, Any], kept: set[str]) -> None:
    model = net()
    before = {key: p.detach().norm() for key, p in model.named_parameters()}
    optimizer = normopt.create(name, model, lr=0.1, overrides={"*": {"bounds": ()}}, **options)
    for _ in range(3):
        optimizer.step(functools.partial(closure, model, optimizer))
    after = {key: p.detach().norm() for key, p in model.named_parameters()}
    assert {key for key in before if abs(after[key] / before[key] - 1) < 1e-6} == kept


def test_nap_projects_groups_that_come_later_and_names_unknown_bases() -> None:
    w, late = nn.Parameter(noise((3, 4), 0)), nn.Parameter(noise((4, 3), 1))
    optimizer = zoo.NaP([w], 0.1)
    optimizer.add_param_group({"params": [late]})
    for _ in range(2):
        w.grad, late.grad = noise((3, 4), 2), noise((4, 3), 3)
        optimizer.step()
    assert abs(late.norm() / noise((4, 3), 1).norm() - 1) < 1e-12
    with pytest.raises(ValueError, match="NaP: unknown base 'adamq'; did you mean 'adam"):
        zoo.NaP([w], 0.1, "adamq")
