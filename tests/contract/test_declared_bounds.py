"""Bounds as modules declare them, under every optimizer."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import normopt
from normopt import (
    Ball,
    Constraint,
    FrobeniusSphere,
    Row,
    RowBound,
    Spectral,
    SpectralCap,
    SpectralNormalize,
    Sphere,
    SteepestDescent,
)
from normopt.constraints.bounds import Transposed
from normopt.ingredient import choices, parse
from tests.support.bounded import BOUNDS, closure, net, noise

#: Constraints that hold for weights after every step.
KINDS = [
    kind
    for kind in choices(Constraint).values()
    if kind.__module__.removeprefix("normopt.constraints.") in ("bounds", "spectrum", "precision", "motion")
]
NAMES = normopt.list_optimizers()
every = pytest.mark.parametrize("name", NAMES)


def check_bounds(model: nn.Module) -> None:
    for name, (axis, radius, shorter) in BOUNDS.items():
        excess = model.get_parameter(name).norm(dim=axis) / radius - 1
        assert (excess if shorter else excess.abs()).max() <= 1e-6, name


@every
def test_every_optimizer_keeps_declared_bounds(name: str) -> None:
    """Long steps in float32, the embedding seen transposed by most: rows as they are stored."""
    model = net()
    optimizer = normopt.create(name, model, lr=0.3)
    for _ in range(4):
        optimizer.step(functools.partial(closure, model, optimizer))
        check_bounds(model)


@every
def test_bounds_change_nothing_else(name: str) -> None:
    """One step from given gradients: gradients, state and unbounded tensors are those of the model without bounds."""
    bounded, free = net(), net()
    makers = [
        normopt.create(name, bounded, lr=0.1),
        normopt.create(name, free, lr=0.1, overrides={"*": {"bounds": ()}}),
    ]
    for model, optimizer in zip((bounded, free), makers, strict=True):
        for i, p in enumerate(model.parameters()):
            p.grad = noise(tuple(p.shape), i).float()
        kept = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step(lambda: 0.0)
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), kept, strict=True))
    for (key, p), q in zip(bounded.named_parameters(), free.parameters(), strict=True):
        mine, theirs = (optimizer.state[x] for optimizer, x in zip(makers, (p, q), strict=True))
        assert mine.keys() == theirs.keys()
        for entry in mine:
            torch.testing.assert_close(mine[entry], theirs[entry], rtol=1e-6, atol=1e-9)
        if key not in BOUNDS:
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)


def test_declared_bounds_come_after_the_optimizers_own_and_can_be_overridden() -> None:
    optimizer = normopt.create("adamw", net())
    constraints = {
        parameter: parse(group["rule"]).constraint  # type: ignore[attr-defined]
        for group in optimizer.param_groups
        for parameter in group["param_names"]
    }
    decay = parse(optimizer.defaults["rule"]).constraint  # type: ignore[attr-defined]
    assert constraints["embed.weight"] == (*decay, RowBound(axis=-2)), "seen transposed, one column a token"
    assert constraints["layer.up.weight"] == (*decay, RowBound())
    assert constraints["layer.down.weight"] == (*decay, Sphere(axis=-2))
    assert constraints["free.weight"] == decay
    assert "RowBound(radius=0.5)" in normopt.describe(optimizer)
    for overrides in ({"head.weight": {"bounds": ()}}, {"head.weight": {"bounds": "RowBound(2.0)"}}):
        optimizer = normopt.create("adamw", net(), overrides=overrides)
        (group,) = (g for g in optimizer.param_groups if "head.weight" in g["param_names"])
        own = parse(group["rule"]).constraint[len(decay) :]  # type: ignore[attr-defined]
        assert own == (() if overrides["head.weight"]["bounds"] == () else (RowBound(0.5), RowBound(2.0)))


def test_bounds_add_up_and_kahan_summation_comes_last() -> None:
    """Geometry, declaration and override."""
    geometry = {"*": {"bounds": ["KahanSum()", "RowBound(3.0)"]}}
    optimizer = normopt.create("nap", net(), geometry=geometry, overrides={"*up.weight": {"bounds": "RowBound(2.0)"}})
    (group,) = (g for g in optimizer.param_groups if "layer.up.weight" in g["param_names"])
    found = parse(group["rule"]).constraint[1:]  # type: ignore[attr-defined]
    assert found == (FrobeniusSphere(), RowBound(3.0), RowBound(), RowBound(2.0), normopt.KahanSum())
    assert normopt.create("nap", net(), base="adamh")  # one sphere is enough


def test_bounds_of_tied_weights_are_those_of_both() -> None:
    model = net()
    model.head.weight = model.embed.weight
    optimizer = normopt.create("sgd", model)
    (group,) = (g for g in optimizer.param_groups if "embed.weight" in g["param_names"])
    assert parse(group["rule"]).constraint[-2:] == (RowBound(axis=-2), RowBound(0.5, axis=-2))  # type: ignore[attr-defined]


@pytest.mark.parametrize("bound", [Ball(Row("unit"), 0.5), SpectralCap(0.5), RowBound(0.5), FrobeniusSphere()])
def test_bounds_hold_for_weights_as_they_are_stored(bound: Constraint) -> None:
    torch.manual_seed(0)
    tables = [nn.Embedding(9, 4), nn.Embedding(9, 4)]
    tables[1].weight.data.copy_(tables[0].weight.data)
    seen = [normopt.View(transpose=True), normopt.View()]
    for table, view in zip(tables, seen, strict=True):
        optimizer = SteepestDescent([{"params": [table.weight], "bounds": bound, "view": view}], 0.1, "max")
        table.weight.grad = torch.ones(9, 4)
        optimizer.step()
    torch.testing.assert_close(tables[0].weight, tables[1].weight)


def test_bounds_refuse_columns_of_a_split_view_and_take_vectors_for_one_row() -> None:
    qkv = {"params": [nn.Parameter(torch.ones(6, 4))], "view": normopt.View(split=3), "bounds": "Sphere(axis=-2)"}
    with pytest.raises(ValueError, match="across the 3 matrices"):
        SteepestDescent([qkv], norm="max")
    v = nn.Parameter(torch.tensor([3.0, 4.0]))
    v.grad = torch.zeros(2)
    group = {"params": [v], "view": normopt.View(transpose=True), "bounds": "Sphere()"}
    SteepestDescent([group], 0.1, "max").step()
    torch.testing.assert_close(v.detach(), torch.tensor([0.6, 0.8]))


def test_bounds_of_adamps_view_of_rows() -> None:
    """AdamP sees embeddings as they are stored."""
    optimizer = normopt.create("adamp", net())
    (group,) = (g for g in optimizer.param_groups if "embed.weight" in g["param_names"])
    assert parse(group["rule"]).constraint[-1] == RowBound()  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bounds_of_low_precision_are_applied_before_rounding(dtype: torch.dtype) -> None:
    w = nn.Parameter(torch.randn(6, 40).to(dtype))
    w.grad = torch.randn_like(w)
    SteepestDescent([w], 0.1, "max", constraint=RowBound()).step()
    assert w.dtype == dtype and (w.float().norm(dim=1) - 1).abs().max() < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("kind", KINDS)
def test_bounds_resume_to_the_bit(kind: type[Constraint]) -> None:
    def run(params: list[Tensor], steps: range, state: Any = None) -> SteepestDescent:
        bound = Transposed(SpectralNormalize()) if kind is Transposed else kind()
        optimizer = SteepestDescent(params, 0.1, Spectral("rms", "exact"), 0.9, constraint=bound)
        if state is not None:
            optimizer.load_state_dict(state)
        for i in steps:
            for j, p in enumerate(params):
                p.grad = noise(tuple(p.shape), 10 * i + j).float()
            optimizer.step()
        return optimizer

    def params() -> list[Tensor]:
        return [nn.Parameter(noise(shape, 5, 0.1).float()) for shape in ((5, 4), (4, 6), (5, 4))]

    whole, parts = params(), params()
    run(whole, range(6))
    state = copy.deepcopy(run(parts, range(3)).state_dict())
    parts = [nn.Parameter(p.detach().clone()) for p in parts]
    run(parts, range(3, 6), state)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dry_steps_of_distributed_checkpoints_leave_weights_alone(kind: type[Constraint], dtype: torch.dtype) -> None:
    """Also those that a bound finds outside by rounding, or by a power iteration that has not converged."""
    bound = Transposed(SpectralNormalize()) if kind is Transposed else kind()

    def made(model: nn.Module) -> SteepestDescent:
        named = list(model.named_parameters())
        return SteepestDescent(named, 0.1, Spectral("rms", "exact"), 0.9, constraint=bound)

    def run(model: nn.Module, optimizer: SteepestDescent, steps: range) -> None:
        for i in steps:
            for j, p in enumerate(model.parameters()):
                p.grad = noise(tuple(p.shape), 10 * i + j).to(dtype)
            optimizer.step()

    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Linear(8, 6, bias=False)).to(dtype)
    for p in model.parameters():
        p.detach().div_(20)
    optimizer = made(model)
    run(model, optimizer, range(12))
    other = copy.deepcopy(model)
    twin = made(other)
    set_optimizer_state_dict(other, twin, copy.deepcopy(get_optimizer_state_dict(model, optimizer)))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    run(model, optimizer, range(12, 15))
    run(other, twin, range(12, 15))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
