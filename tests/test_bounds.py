"""Bounds that hold after every step, alone, under every optimizer, and as modules declare them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import normopt
from normopt import (
    Ball,
    Column,
    Constraint,
    FrobeniusSphere,
    Row,
    RowBound,
    SoftSpectralCap,
    Spectral,
    SpectralCap,
    SpectralNormalize,
    Sphere,
    SteepestDescent,
    zoo,
)
from normopt.constraints.bounds import Transposed
from normopt.constraints.spectrum import soft_coefficient
from normopt.ingredient import Context, choices, parse
from normopt.numerics.singular import singular_values
from tests.strategies import NORMS, from_spectrum, label

seeds = st.integers(0, 2**32 - 1)
sizes = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))


def context(w: Tensor, rate: float = 0.1, shrink: float = 1.0, is_vector: bool = False) -> Context:
    return Context(w, w, 1, rate, None, lambda: w, shrink=shrink, is_vector=is_vector)


def put(constraint: Constraint, w: Tensor, start: Tensor | None = None, **known: Any) -> Tensor:
    """Where ``constraint`` puts weights that began at ``start``."""
    return constraint.weight(w, constraint.init_state(w, lambda: w if start is None else start), context(w, **known))


def noise(size: tuple[int, ...], seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Each alone -----------------------------------------------------------------------------------------------------------


@given(sizes, seeds, st.sampled_from([-1, -2]), st.sampled_from([0.3, 1.0, 4.0]))
def test_rows_are_shortened_and_no_others(size: tuple[int, ...], seed: int, axis: int, radius: float) -> None:
    w = noise(size, seed)
    new, lengths = put(RowBound(radius, axis), w), w.norm(dim=axis, keepdim=True)
    assert (new.norm(dim=axis) <= radius * (1 + 1e-14)).all()
    inside = (lengths <= radius).expand_as(w)
    assert torch.equal(new[inside], w[inside])
    torch.testing.assert_close(new, w * (radius / lengths).clamp(max=1))
    assert torch.equal(put(RowBound(radius, axis), new), new)


@given(sizes, seeds, st.sampled_from([0.3, 1.0, 4.0]))
def test_a_bound_of_rows_is_the_ball_of_the_row_norm(size: tuple[int, ...], seed: int, radius: float) -> None:
    w = noise(size, seed)
    torch.testing.assert_close(put(RowBound(radius), w), put(Ball(Row("unit"), radius), w))
    torch.testing.assert_close(put(RowBound(radius, -2), w), put(Ball(Column("unit"), radius), w))


@given(sizes, seeds, st.sampled_from([-1, -2]), st.sampled_from([0.3, 1.0]))
def test_rows_on_the_sphere(size: tuple[int, ...], seed: int, axis: int, radius: float) -> None:
    w = noise(size, seed)
    new = put(Sphere(radius, axis), w)
    torch.testing.assert_close(new, w / w.norm(dim=axis, keepdim=True) * radius)
    assert torch.equal(put(Sphere(radius, axis), new), new)


@given(sizes, seeds)
def test_matrices_keep_the_length_that_they_start_with(size: tuple[int, ...], seed: int) -> None:
    start, w = noise(size, seed), noise(size, seed + 1)
    new = put(FrobeniusSphere(), w, start)
    torch.testing.assert_close(new.norm(dim=(-2, -1)), start.norm(dim=(-2, -1)))
    torch.testing.assert_close(new / new.norm(), w / w.norm() if len(w) == 1 else new / new.norm())
    assert torch.equal(put(FrobeniusSphere(), start, start), start)
    torch.testing.assert_close(put(FrobeniusSphere(2.5), w).norm(dim=(-2, -1)), torch.full(size[:1], 2.5).double())


def test_zeros_and_vectors() -> None:
    zero, w = torch.zeros(2, 3, 4), torch.randn(2, 3, 4)
    for constraint in (RowBound(), Sphere(), FrobeniusSphere(1.0), FrobeniusSphere(), SpectralCap(), SoftSpectralCap()):
        assert torch.equal(put(constraint, zero), zero)
    assert torch.equal(put(FrobeniusSphere(), w, zero), w), "there is no length to keep"
    for constraint in (FrobeniusSphere(1.0), SpectralCap(), SpectralNormalize()):
        vector = torch.randn(1, 1, 5)
        assert torch.equal(put(constraint, vector, is_vector=True), vector)


@pytest.mark.parametrize("size", [1e22, 1e-25])
@pytest.mark.parametrize("axis", [-1, -2])
def test_lengths_whose_squares_overflow_or_underflow(size: float, axis: int) -> None:
    """In float32, beside rows of ordinary length."""
    w = noise((2, 3, 4), 0).float()
    close = functools.partial(torch.testing.assert_close, rtol=1e-6, atol=0)
    close(put(Sphere(0.3, axis), w * size), put(Sphere(0.3, axis), w))
    close(put(FrobeniusSphere(0.3), w * size), put(FrobeniusSphere(0.3), w))
    close(put(FrobeniusSphere(), w, w * size), put(FrobeniusSphere(), w) * size)
    close(put(RowBound(0.3 * size, axis), w * size), put(RowBound(0.3, axis), w) * size)
    several = torch.cat([w, w * size], dim=-3)
    close(put(Sphere(0.3, axis), several), put(Sphere(0.3, axis), torch.cat([w, w], dim=-3)))
    tiny = torch.full((1, 2, 2), 1e-42)
    assert torch.equal(put(Sphere(), tiny), tiny), "nothing in float32 is large enough to make it longer"


@pytest.mark.parametrize("norm", NORMS, ids=label)
def test_balls_of_every_norm(norm: normopt.Norm) -> None:
    w = noise((2, 4, 5), 0)
    radius = 0.5 * norm.norm(w).min().item()
    new = put(Ball(norm, radius), w)
    assert (norm.norm(new) <= radius * (1 + 1e-6)).all()
    torch.testing.assert_close(new, norm.project(w, radius))
    torch.testing.assert_close(put(Ball(norm, 4 * radius), w / 4), w / 4)


@given(st.integers(2, 20), st.integers(2, 20), seeds, st.sampled_from(["unit", "rms"]), st.sampled_from([0.2, 1.0]))
def test_the_hard_cap_is_the_projection(m: int, n: int, seed: int, scale: str, radius: float) -> None:
    w = noise((2, m, n), seed)
    torch.testing.assert_close(
        put(SpectralCap(radius, scale), w), put(Ball(Spectral(scale), radius), w), rtol=0, atol=2e-3
    )


def test_the_hard_cap_cuts_and_leaves_the_rest() -> None:
    torch.manual_seed(0)
    values = torch.tensor([30.0, 3, 1.5, 1.1, 0.9, 0.5, 0.1, 1e-3, 1e-6], dtype=torch.float64)
    for m, n in [(9, 9), (30, 9), (9, 30)]:
        new = singular_values(put(SpectralCap(1.0, "unit"), from_spectrum(m, n, values)))
        torch.testing.assert_close(new.sort(descending=True).values, values.clamp(max=1), rtol=0, atol=1e-7)


@given(st.sampled_from([0.01, 0.1, 0.3]), st.sampled_from([0.5, 0.99, 1.0]), st.sampled_from([0.3, 1.0, 5.0]), seeds)
def test_the_soft_cap_keeps_what_starts_in_the_ball(reach: float, shrink: float, radius: float, seed: int) -> None:
    torch.manual_seed(seed % 2**31)
    rate = reach * radius
    w = from_spectrum(5, 7, torch.linspace(0.1, 1, 5, dtype=torch.float64)) * radius
    update = from_spectrum(5, 7, torch.ones(5, dtype=torch.float64))
    moved = shrink * w - rate * update
    new = put(SoftSpectralCap(radius, "unit", max_update=1.0), moved, w, rate=rate, shrink=shrink)
    assert singular_values(new).amax() <= radius * (1 + 1e-12)
    at_worst = from_spectrum(5, 7, torch.linspace(0.0, shrink * radius + rate, 5, dtype=torch.float64))
    values = singular_values(
        put(SoftSpectralCap(radius, "unit", max_update=1.0), at_worst, w, rate=rate, shrink=shrink)
    )
    assert abs(values.amax() - min(radius, shrink * radius + rate)) < 1e-12 * radius
    assert (values.diff() <= 0).all()


@given(st.floats(1, 1e6))
def test_the_soft_caps_coefficient(k: float) -> None:
    a = soft_coefficient(k)
    x = k - a * k**3
    assert a >= 0 and abs(x + a * x**3 - 1) < 1e-9
    torch.testing.assert_close(soft_coefficient(torch.tensor(k, dtype=torch.float64)), torch.tensor(a).double())


@given(st.integers(2, 9), st.integers(2, 9), seeds)
def test_spectral_normalization(m: int, n: int, seed: int) -> None:
    start = noise((2, m, n), seed)
    constraint = SpectralNormalize(1.0, "unit")
    state, w = constraint.init_state(start, lambda: start), 0.1 * start
    assert torch.equal(constraint.weight(w, state, context(w)), w), "inside the ball"
    w = 3 * start
    largest = singular_values(w).amax(dim=-1)[..., None, None]
    torch.testing.assert_close(constraint.weight(w, state, context(w)), w / largest.clamp(min=1), rtol=1e-6, atol=0)
    other = noise((2, m, n), seed + 1) * 5
    for _ in range(2000):
        new = constraint.weight(other, state, context(other))
    assert (singular_values(new).amax(dim=-1) <= 1 + 1e-3).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RowBound(0.0), "RowBound: radius must be positive"),
        (lambda: Sphere(-1.0), "Sphere: radius must lie in"),
        (lambda: RowBound(axis=0), "axis must be -1"),
        (lambda: FrobeniusSphere(float("inf")), "FrobeniusSphere: radius must lie in"),
        (lambda: Ball(radius="one"), "Ball: radius must be a number"),
        (lambda: SpectralCap(scale="big"), "unknown scale 'big'"),
        (lambda: SoftSpectralCap(max_update=0), "max_update must be positive"),
        (lambda: SpectralNormalize(iterations=0), "iterations must be a whole number"),
    ],
)
def test_bad_arguments(make: Callable[[], Constraint], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_the_soft_cap_refuses_what_it_cannot_press_into_the_ball() -> None:
    w = nn.Parameter(torch.eye(3))
    w.grad = torch.ones(3, 3)
    for lr, radius, message in [(0.1, 0.5, "starts with norm 1, outside the ball"), (0.5, 1.0, "must be 0.3 at most")]:
        optimizer = SteepestDescent([w], lr, Spectral("unit"), constraint=SoftSpectralCap(radius, "unit"))
        with pytest.raises(ValueError, match=message):
            optimizer.step()
        assert torch.equal(w, torch.eye(3)) and all(state["step"] == 0 for state in optimizer.state.values())
    for rule in ({"step_size": "dual"}, {"norm": "max"}, {"norm": "Spectral(scale='unit')"}):
        with pytest.raises(ValueError, match=r"needs (steps of bounded length|to know how large updates can be)"):
            SteepestDescent([w], **rule, constraint="soft-spectral-cap")
    row = nn.Parameter(torch.tensor([[5.0, 0.0]]))
    row.grad = torch.ones(1, 2)
    with pytest.raises(ValueError, match="starts with norm 5"):
        SteepestDescent([row], 0.1, Spectral("unit"), constraint=SoftSpectralCap(1.0, "unit")).step()


# Declared by modules --------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    normopt_bounds: ClassVar[dict[str, str]] = {"up.weight": "RowBound(radius=1.0)", "down.weight": "Sphere(axis=-2)"}

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 8)
        self.down = nn.Linear(8, 6, bias=False)


class Net(nn.Module):
    """Rows of the embedding and of the head are bounded, as they are stored; `free` and the biases are not."""

    normopt_bounds: ClassVar[dict[str, str]] = {"embed.weight": "RowBound()", "head.weight": "RowBound(0.5)"}

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.free = nn.Linear(6, 6)
        self.layer = Layer()
        self.head = nn.Linear(6, 11, bias=False)
        with torch.no_grad():
            for name, (axis, radius, _) in BOUNDS.items():
                w = self.get_parameter(name)
                w.mul_(radius / w.norm(dim=axis, keepdim=True))

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.free(self.embed(tokens))
        return self.head(h + self.layer.down(self.layer.up(h).relu()))

    def loss(self) -> Tensor:
        tokens = torch.arange(22).reshape(2, 11) % 11
        return nn.functional.cross_entropy(self(tokens).flatten(0, 1), tokens.flatten())


#: Axis of the stored tensor, radius, and whether shorter rows are allowed.
BOUNDS = {
    "embed.weight": (1, 1.0, True),
    "head.weight": (1, 0.5, True),
    "layer.up.weight": (1, 1.0, True),
    "layer.down.weight": (0, 1.0, False),
}
NAMES = normopt.list_optimizers()
every = pytest.mark.parametrize("name", NAMES)


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def closure(model: nn.Module, optimizer: SteepestDescent) -> Tensor:
    optimizer.zero_grad()
    loss = model.loss()  # type: ignore[operator]
    loss.backward()
    return loss  # type: ignore[no-any-return]


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


def test_tied_weights_keep_the_bounds_of_both() -> None:
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


def test_columns_of_a_split_view_are_refused_and_vectors_are_one_row() -> None:
    qkv = {"params": [nn.Parameter(torch.ones(6, 4))], "view": normopt.View(split=3), "bounds": "Sphere(axis=-2)"}
    with pytest.raises(ValueError, match="across the 3 matrices"):
        SteepestDescent([qkv], norm="max")
    v = nn.Parameter(torch.tensor([3.0, 4.0]))
    v.grad = torch.zeros(2)
    group = {"params": [v], "view": normopt.View(transpose=True), "bounds": "Sphere()"}
    SteepestDescent([group], 0.1, "max").step()
    torch.testing.assert_close(v.detach(), torch.tensor([0.6, 0.8]))


def test_views_of_rows() -> None:
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


@pytest.mark.parametrize("kind", [k for k in choices(Constraint).values() if k.__module__ == "normopt.bounds"])
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


@pytest.mark.parametrize("kind", [k for k in choices(Constraint).values() if k.__module__ == "normopt.bounds"])
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


# Kahan summation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["adamw", "sgd", "muon", "lion", "scion"])
def test_small_steps_of_half_precision_add_up(name: str, dtype: torch.dtype) -> None:
    """200 steps of a tenth of what rounding swallows: as far as in float32, to 5%; not at all without the sum."""

    def travelled(kind: torch.dtype, bounds: str | None) -> Tensor:
        start = 1 + noise((8, 8), 0, 0.2).to(dtype).to(kind).abs()
        w = nn.Parameter(start.clone())
        group = {"params": [w], **({} if bounds is None else {"bounds": bounds})}
        optimizer = normopt.create(name, [group], lr=0.1 * torch.finfo(dtype).eps / 2 / SIZES.get(name, 1))
        for _ in range(200):
            w.grad = direction.to(kind)
            optimizer.step()
        return (w.detach() - start).float()

    direction = noise((8, 8), 1).sign()
    expected, kept, lost = travelled(torch.float32, None), travelled(dtype, "KahanSum()"), travelled(dtype, None)
    assert (kept - expected).norm() < 0.05 * expected.norm()
    assert lost.norm() < 0.3 * expected.norm()


@pytest.mark.slow
@pytest.mark.parametrize("bound", ["KahanSum()", "StochasticRounding()"])
@pytest.mark.parametrize("name", ["adamw", "sgd", "muon", "lion", "scion", "prodigy", "prodigy-muon"])
def test_a_thousand_small_steps_in_bfloat16_go_nine_tenths_as_far(name: str, bound: str) -> None:
    """Each of a twentieth of what rounding swallows; rates that are found grow from less than that."""

    def travelled(kind: torch.dtype, bounds: tuple[str, ...]) -> Tensor:
        start = 1 + noise((8, 8), 0, 0.2).bfloat16().to(kind).abs()
        w = nn.Parameter(start.clone())
        w.grad = noise((8, 8), 1).sign().to(kind)
        group = {"params": [w], "bounds": bounds}
        options = RATE_FREE.get(name, {"lr": 0.05 * torch.finfo(torch.bfloat16).eps / 2 / SIZES.get(name, 1)})
        optimizer = normopt.create(name.removeprefix("prodigy-"), [group], **options)
        for _ in range(1000):
            optimizer.step()
        return (w.detach() - start).float()

    expected, kept = travelled(torch.float32, ()), travelled(torch.bfloat16, (bound,))
    assert 0.9 <= (kept * expected).sum() / (expected * expected).sum() <= 1.1
    # Rounding a step s up or down at random, to multiples of u, has variance |s| u or a little less: |way| u in all.
    noise_of_rounding = expected.abs().sum() * torch.finfo(torch.bfloat16).eps if bound == "StochasticRounding()" else 0
    assert kept.norm() ** 2 <= 1.1**2 * (expected.norm() ** 2 + noise_of_rounding)


#: The size of one entry of the update at rate 1, where it is not about 1.
SIZES = {"muon": 8**-0.5, "scion": 8**-0.5}

#: The first steps are a four-hundredth of what rounding swallows, the last a twentieth; float32 would lose slower ones.
RATE_FREE: dict[str, dict[str, Any]] = {
    "prodigy": {"d0": 1e-5, "growth_rate": 1.003},
    "prodigy-muon": {"lr": 1.0, "step_size": "Prodigy(d0=1e-5, growth_rate=1.003)"},
}


def test_kahan_summation_leaves_float32_alone_and_comes_after_bounds() -> None:
    plain, summed = (nn.Parameter(noise((4, 6), 0).float()) for _ in range(2))
    optimizers = [zoo.SGD([plain], 0.1), zoo.SGD([{"params": [summed], "bounds": "KahanSum()"}], 0.1)]
    for i in range(3):
        for p, optimizer in zip((plain, summed), optimizers, strict=True):
            p.grad = noise((4, 6), i).float()
            optimizer.step()
    assert torch.equal(plain, summed) and not optimizers[1].state[summed]["compensation"].any()
    w = nn.Parameter(noise((4, 60), 0).to(torch.bfloat16))
    optimizer = zoo.SGD([{"params": [w], "bounds": ["RowBound()", "KahanSum()"]}], 0.01)
    for i in range(20):
        w.grad = noise((4, 60), i).to(torch.bfloat16)
        optimizer.step()
        whole = w.float() + optimizer.state[w]["compensation"].float()
        assert (whole.norm(dim=1) <= 1 + 1e-5).all(), "to the last bit of the compensation"


# AdamH, MuonH, NaP ----------------------------------------------------------------------------------------------------


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


def test_rates_and_decays_for_another_width() -> None:
    """Four times as wide: a quarter of the rate, twice the decay, for hidden matrices alone."""
    optimizer = zoo.AdamW(net(), 0.01, weight_decay=0.3, geometry=normopt.width_scaled(512, 128, weight_decay=0.1))
    found = {name: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for name in g["param_names"]}
    assert found["free.weight"] == found["layer.up.weight"] == (0.0025, 0.2)
    assert found["embed.weight"] == found["head.weight"] == found["free.bias"] == (0.01, 0.0)
    with pytest.raises(ValueError, match="width_scaled: width must be positive"):
        normopt.width_scaled(0, 128, 0.1)
