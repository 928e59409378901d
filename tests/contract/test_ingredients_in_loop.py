"""Momentum, directions, step sizes and constraints inside the loop, against recurrences written out by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normopt import (
    EMA,
    L2,
    Chain,
    Constraint,
    Direction,
    Dual,
    Euclidean,
    Grafted,
    HeavyBall,
    Max,
    Nesterov,
    NoMomentum,
    Norm,
    Row,
    Smoothed,
    Spectral,
    SteepestDescent,
    View,
    WeightDecay,
)
from normopt.ingredient import Context, get, parse
from tests.support.strategies import NORMS, RMS, assert_close, label

#: Under these the update is the averaged gradient itself.
IDENTITY: dict[str, Any] = {"norm": Euclidean(scale="unit"), "step_size": "sharp"}
EXACT = Spectral(method="exact")
MEMORY = [norm for norm in NORMS if norm.has_memory]
norms = pytest.mark.parametrize("norm", RMS, ids=label)


def weights(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    noise = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=noise, dtype=torch.float64)) for shape in shapes]


def stream(shape: tuple[int, ...], seed: int = 1) -> Iterator[Tensor]:
    noise = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(shape, generator=noise, dtype=torch.float64)


def step(optimizer: SteepestDescent, params: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    """Take one step and return the changes."""
    before = [p.detach().clone() for p in params]
    for p, g in zip(params, gradients, strict=True):
        p.grad = g.to(p.dtype, copy=True)
    optimizer.step()
    return [p.detach() - w for p, w in zip(params, before, strict=True)]


# Which gradient do we trust? -----------------------------------------------------------------------------------------


def ema(g: list[Tensor], beta: float, nesterov: bool = False, corrected: bool = False) -> Tensor:
    """The moving average as a sum: (1 - beta) sum_k beta^(t - k) g_k."""
    t = len(g)
    m = sum((1 - beta) * beta ** (t - k) * g[k - 1] for k in range(1, t + 1))
    m = beta * m + (1 - beta) * g[-1] if nesterov else m
    return m / (1 - beta**t) if corrected else m


def heavy_ball(g: list[Tensor], beta: float, dampening: float = 0.0, nesterov: bool = False) -> Tensor:
    """b_1 = g_1 in full, every later gradient dampened."""
    t = len(g)
    b = beta ** (t - 1) * g[0] + sum((1 - dampening) * beta ** (t - k) * g[k - 1] for k in range(2, t + 1))
    return g[-1] + beta * b if nesterov else b


MOMENTA: list[tuple[Any, Callable[[list[Tensor]], Tensor]]] = [
    (None, lambda g: g[-1]),
    (0.0, lambda g: g[-1]),
    (0.7, lambda g: ema(g, 0.7)),
    (EMA(0.7), lambda g: ema(g, 0.7)),
    (EMA(0.7, bias_correction=True), lambda g: ema(g, 0.7, corrected=True)),
    (EMA(0.7, nesterov=True, bias_correction=True), lambda g: ema(g, 0.7, nesterov=True, corrected=True)),
    ("nesterov", lambda g: ema(g, 0.95, nesterov=True)),
    ("heavy-ball", lambda g: heavy_ball(g, 0.9)),
    (HeavyBall(0.7, dampening=0.3), lambda g: heavy_ball(g, 0.7, dampening=0.3)),
    (HeavyBall(0.7, nesterov=True), lambda g: heavy_ball(g, 0.7, nesterov=True)),
    (HeavyBall(0.0), lambda g: g[-1]),
]


@pytest.mark.parametrize(("momentum", "expected"), MOMENTA, ids=[str(m) for m, _ in MOMENTA])
@pytest.mark.parametrize("shape", [(), (5,), (4, 3)], ids=str)
def test_momenta(momentum: Any, expected: Callable[[list[Tensor]], Tensor], shape: tuple[int, ...]) -> None:
    params, seen = weights(shape), []
    optimizer = SteepestDescent(params, lr=0.5, momentum=momentum, **IDENTITY)
    for _, g in zip(range(6), stream(shape), strict=False):
        seen.append(g)
        (change,) = step(optimizer, params, [g])
        assert_close(change, -0.5 * expected(seen))


@norms
def test_under_a_duality_map_the_average_and_the_heavy_ball_are_one(norm: Norm) -> None:
    a, b = weights((4, 6)), weights((4, 6))
    first = SteepestDescent(a, lr=0.5, norm=norm, momentum=EMA(0.8))
    second = SteepestDescent(b, lr=0.5, norm=norm, momentum=HeavyBall(0.8, dampening=0.8))
    third = SteepestDescent(c := weights((4, 6)), lr=0.5, norm=norm, momentum=EMA(0.8, bias_correction=True))
    for i, g in zip(range(4), stream((4, 6)), strict=False):
        changes = step(first, a, [g]) + step(third, c, [g]) + step(second, b, [g if i else 0.2 * g])
        assert_close(changes[1], changes[0], 1e-10)
        assert_close(changes[2], changes[0], 1e-10)


# Which direction is steepest? ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS, ids=label)
def test_norms_step_along_their_duality_maps(norm: Norm) -> None:
    """w - lr dualize(g): stacks of one shape at once, as each matrix by itself."""
    shapes = [(4, 6), (6, 4), (4, 6), (3, 4, 6)] + ([] if norm.needs_matrix else [(7,), ()])
    params, gradients = weights(*shapes), [next(stream(shape, i)) for i, shape in enumerate(shapes)]
    optimizer = SteepestDescent([{"params": params, "view": View(flatten=False)}], lr=0.5, norm=norm)
    for change, g in zip(step(optimizer, params, gradients), gradients, strict=True):
        assert_close(change, -0.5 * norm.dualize(g), 1e-13)


@pytest.mark.parametrize("norm", MEMORY, ids=label)
def test_without_memory_smoothed_is_the_norm(norm: Norm) -> None:
    shapes = [(4, 6), (6, 4), (4, 6)]
    a, b = weights(*shapes), weights(*shapes)
    bare = SteepestDescent(a, lr=0.5, norm=norm)
    entries = {"beta": 0.0, "maximum": norm.reduces != "matrix"}
    for options in {"beta": 0.0}, entries, {"accumulate": "sum"}:
        smoothed = SteepestDescent(b, lr=0.5, norm=Smoothed(norm, eps=0.0, **options))
        gradients = [next(stream(shape, i)) for i, shape in enumerate(shapes)]
        for change, expected in zip(step(smoothed, b, gradients), step(bare, a, gradients), strict=True):
            assert_close(change, expected, 1e-9)  # Shampoo's inverse roots square the condition number


STATISTICS = {
    "Smoothed(Max(), 0.8, 0.1)": lambda beta, t: 1 - beta**t,
    "Smoothed(Max(), 0.8, 0.1, bias_correction=False)": lambda beta, t: 1.0,
}


@pytest.mark.parametrize("spec", STATISTICS)
def test_smoothed_divides_by_averaged_statistics(spec: str) -> None:
    params, seen = weights((4, 3)), []
    optimizer = SteepestDescent(params, lr=0.5, norm=spec, momentum=0.6)
    for t, g in zip(range(1, 6), stream((4, 3)), strict=False):
        seen.append(g)
        (change,) = step(optimizer, params, [g])
        v = ema([g**2 for g in seen], 0.8) / STATISTICS[spec](0.8, t)
        assert_close(change, -0.5 * ema(seen, 0.6) / (v.sqrt() + 0.1), 1e-13)


@norms
def test_smoothed_statistics_are_those_of_each_gradient(norm: Norm) -> None:
    """Every norm's second moments, summed and averaged; momentum is whitened, statistics are of the raw gradient."""
    if not norm.has_memory:
        return
    for accumulate in "sum", "ema":
        params, seen = weights((4, 6)), []
        direction = Smoothed(norm, 0.8, 0.1, accumulate=accumulate)
        optimizer = SteepestDescent(params, lr=0.5, norm=direction, momentum=0.6)
        for t, g in zip(range(1, 5), stream((4, 6)), strict=False):
            seen.append(g)
            (change,) = step(optimizer, params, [g])
            moments = zip(*(norm.second_moment(g) for g in seen), strict=True)
            if accumulate == "sum":
                stats = tuple(map(sum, moments))
            else:
                stats = tuple(ema(list(m), 0.8) / (1 - 0.8**t) for m in moments)
            assert_close(change, -0.5 * norm.whiten(ema(seen, 0.6), stats, 0.1), 1e-10)


def test_amsgrad_keeps_the_largest_statistics() -> None:
    params, seen = weights((4, 3)), []
    optimizer = SteepestDescent(params, lr=0.5, norm="Smoothed(Max(), 0.8, 0.1, maximum=True)")
    for t, g in zip(range(1, 6), stream((4, 3)), strict=False):
        seen.append(g / t**2)  # falling: the first statistics stay the largest for a while
        (change,) = step(optimizer, params, [seen[-1]])
        largest = torch.stack([ema([g**2 for g in seen[:k]], 0.8) for k in range(1, t + 1)]).amax(dim=0)
        assert_close(change, -0.5 * seen[-1] / ((largest / (1 - 0.8**t)).sqrt() + 0.1), 1e-13)


def test_chains_apply_one_stage_after_the_other() -> None:
    params, seen = weights((4, 6), (4, 6)), []
    row = Row(scale="unit")
    optimizer = SteepestDescent(params, lr=0.5, norm=Chain(row, EMA(0.8), Smoothed(Max(), 0.5, 0.1)), momentum=0.0)
    for t, g in zip(range(1, 5), stream((2, 4, 6)), strict=False):
        seen.append(row.dualize(g))
        x = [ema(seen[:k], 0.8) for k in range(1, t + 1)]
        v = ema([m**2 for m in x], 0.5) / (1 - 0.5**t)
        expected = -0.5 * x[-1] / (v.sqrt() + 0.1)
        for change, e in zip(step(optimizer, params, list(g)), expected, strict=True):
            assert_close(change, e, 1e-13)
    assert optimizer.state[params[0]].keys() == {"step", "momentum", "1.momentum", "2.second_moment"}


def test_grafted_has_one_direction_and_another_length() -> None:
    params = weights((4, 6), (4, 6))
    optimizer = SteepestDescent(params, lr=0.5, norm=Grafted(EXACT, Smoothed(Max(), 0.8, 0.1)))
    seen = []
    for t, g in zip(range(1, 4), stream((2, 4, 6)), strict=False):
        seen.append(g)
        v = ema([g**2 for g in seen], 0.8) / (1 - 0.8**t)
        length = torch.linalg.matrix_norm(g / (v.sqrt() + 0.1), keepdim=True)
        d = EXACT.dualize(g)
        expected = -0.5 * length * d / torch.linalg.matrix_norm(d, keepdim=True)
        for change, e in zip(step(optimizer, params, list(g)), expected, strict=True):
            assert_close(change, e, 1e-12)
    assert optimizer.state[params[0]].keys() == {"step", "magnitude.second_moment"}
    (change,) = step(SteepestDescent(w := weights((4, 6)), norm=Grafted(EXACT, Max())), w, [torch.zeros(4, 6)])
    assert not change.any()


DIRECTIONS: dict[str, tuple[Direction, str, bool]] = {
    "smoothed max": (Smoothed(Max()), "entry", False),
    "smoothed row": (Smoothed(Row()), "row", True),
    "smoothed spectral": (Smoothed(Spectral()), "matrix", True),
    "chain of entries": (Chain(Max(), EMA(0.5)), "entry", False),
    "chain of rows": (Chain(Max(), Row(), Smoothed(Row())), "row", True),
    "chain of two": (Chain(Row(), Spectral()), "matrix", True),
    "grafted": (Grafted(Max(), Smoothed(Max())), "all", False),
    "grafted rows": (Grafted(Row(), Max()), "matrix", True),
    "by shape": (Smoothed(Max(scale="fan_in")), "all", False),
    "nested": (Grafted(Chain(EXACT, Smoothed(Row(), 0.9)), EXACT), "matrix", True),
}


@pytest.mark.parametrize(("direction", "reduces", "needs_matrix"), DIRECTIONS.values(), ids=DIRECTIONS)
def test_directions_say_what_they_need_and_survive_the_param_group(
    direction: Direction, reduces: str, needs_matrix: bool
) -> None:
    assert (direction.reduces, direction.needs_matrix) == (reduces, needs_matrix)
    optimizer = SteepestDescent(weights((4, 3)), norm=direction)
    rule = parse(optimizer.param_groups[0]["rule"])
    assert rule.norm == direction and repr(rule.norm) == repr(direction) and hash(rule.norm) == hash(direction)
    if not needs_matrix:
        step(SteepestDescent(w := weights((3,), ()), norm=direction), w, [torch.ones(3), torch.ones(())])


@norms
@pytest.mark.parametrize("form", [lambda n: n, Smoothed, lambda n: Grafted(n, n), lambda n: Chain(n, EMA(0.5))])
def test_a_batch_is_as_good_as_one_by_one(norm: Norm, form: Callable[[Norm], Direction]) -> None:
    if form is Smoothed and not norm.has_memory:
        return
    shapes = [(4, 6), (6, 4), (4, 6), (4, 6), (6, 4)]
    a, b = weights(*shapes), weights(*shapes)
    together = SteepestDescent(a, lr=0.5, norm=form(norm), momentum=0.5, step_size="sharp")
    alone = [SteepestDescent([p], lr=0.5, norm=form(norm), momentum=0.5, step_size="sharp") for p in b]
    for i in range(3):
        gradients = [next(stream(shape, 10 * i + j)) for j, shape in enumerate(shapes)]
        gradients[1] = torch.zeros_like(gradients[1]) if i == 1 else gradients[1]
        changes = step(together, a, gradients)
        for p, g, optimizer, change in zip(b, gradients, alone, changes, strict=True):
            assert_close(change, step(optimizer, [p], [g])[0], 1e-10)


# How far do we go? ---------------------------------------------------------------------------------------------------


@norms
def test_sharp_goes_as_far_as_each_dual_norm(norm: Norm) -> None:
    shapes = [(4, 6), (4, 6), (6, 4)]
    params, gradients = weights(*shapes), [next(stream(shape, i)) for i, shape in enumerate(shapes)]
    optimizer = SteepestDescent(params, lr=0.5, norm=norm, step_size="sharp")
    for change, g in zip(step(optimizer, params, gradients), gradients, strict=True):
        assert_close(change, -0.5 * norm.dual_norm(g) * norm.dualize(g), 1e-12)


LAYERS: list[tuple[Norm, tuple[int, ...]]] = [(norm, (4, 6)) for norm in RMS] + [(EXACT, (6, 4)), (Max(), (5,))]


def modular() -> tuple[SteepestDescent, list[Tensor], list[Tensor]]:
    """A norm for each layer, in groups of their own."""
    params = weights(*(shape for _, shape in LAYERS))
    gradients = [next(stream(shape, i)) for i, (_, shape) in enumerate(LAYERS)]
    groups = [{"params": [p], "norm": norm} for p, (norm, _) in zip(params, LAYERS, strict=True)]
    return SteepestDescent(groups, lr=0.01, step_size="dual"), params, gradients


def test_dual_goes_as_far_as_all_dual_norms_together() -> None:
    """Proposition 7 of arXiv 2409.20325: every layer moves by lr times the sum over all layers of the dual norms."""
    optimizer, params, gradients = modular()
    total = sum(norm.dual_norm(g) for (norm, _), g in zip(LAYERS, gradients, strict=True))
    for change, g, (norm, _) in zip(step(optimizer, params, gradients), gradients, LAYERS, strict=True):
        assert_close(change, -0.01 * total * norm.dualize(g), 1e-12)


def test_dual_minimizes_the_majorizer_of_the_modular_norm() -> None:
    """<g, d> + max_l norm_l(d_l)^2 / (2 lr) is nowhere smaller, and its minimum is -lr/2 (sum of dual norms)^2."""
    optimizer, params, gradients = modular()
    changes = step(optimizer, params, gradients)

    def majorizer(deltas: list[Tensor]) -> float:
        slope = sum((g * d).sum() for g, d in zip(gradients, deltas, strict=True))
        size = max(float(norm.norm(d)) for d, (norm, _) in zip(deltas, LAYERS, strict=True))
        return float(slope + size**2 / 0.02)

    least = majorizer(changes)
    total = sum(norm.dual_norm(g) for (norm, _), g in zip(LAYERS, gradients, strict=True))
    assert least == pytest.approx(-0.005 * float(total) ** 2, rel=1e-9)
    for i in range(300):
        size = 10.0 ** -(i % 6)
        deltas = [d + size * d.abs().mean() * next(stream(tuple(d.shape), i)) for d in changes]
        assert majorizer(deltas) >= least
    for factor in (0.0, 0.5, 0.99, 1.01, 2.0):
        assert majorizer([factor * d for d in changes]) > least


def test_dual_counts_no_group_of_another_step_size_and_no_absent_gradient() -> None:
    params = weights((4, 6), (4, 6), (4, 6))
    groups = [{"params": params[:2]}, {"params": params[2:], "step_size": "constant"}]
    optimizer = SteepestDescent(groups, lr=0.5, norm=EXACT, step_size=Dual())
    gradients = [next(stream((4, 6), i)) for i in range(3)]
    changes = step(optimizer, params, gradients)
    total = EXACT.dual_norm(gradients[0]) + EXACT.dual_norm(gradients[1])
    assert_close(changes[1], -0.5 * total * EXACT.dualize(gradients[1]))
    assert_close(changes[2], -0.5 * EXACT.dualize(gradients[2]))
    params[0].grad = None
    before = params[1].detach().clone()
    optimizer.step()
    assert_close(params[1].detach() - before, -0.5 * EXACT.dual_norm(gradients[1]) * EXACT.dualize(gradients[1]))


def test_prodigys_estimate_is_one_for_all_groups() -> None:
    params = weights((4, 6), (6, 4), (3,))
    groups = [{"params": [p]} for p in params]
    optimizer = SteepestDescent(groups, lr=1.0, norm="max", step_size="prodigy", momentum=0.9)
    for _ in range(8):
        step(optimizer, params, [p.detach().clone() for p in params])
        assert len({float(group["d"]) for group in optimizer.param_groups}) == 1
    d = float(optimizer.param_groups[0]["d"])
    assert 1e-6 < d <= max(float(p.detach().abs().max()) for p in weights((4, 6), (6, 4), (3,)))
    optimizer.add_param_group({"params": (late := weights((2, 2)))})
    assert float(optimizer.param_groups[-1]["d"]) == d
    step(optimizer, [*params, *late], [p.detach().clone() for p in [*params, *late]])


# Where may the weights live? -----------------------------------------------------------------------------------------


@norms
@pytest.mark.parametrize("momentum", [None, 0.9])
def test_frank_wolfe_never_leaves_the_ball(norm: Norm, momentum: float | None) -> None:
    """From any start inside, for any gradients (zero, aligned, opposed) and any learning rates up to 1."""
    shapes = [(4, 6), (6, 4), (4, 6)]
    params = weights(*shapes)
    for p, radius in zip(params, (0.3, 3.0, 1.0), strict=True):
        p.detach().copy_(norm.project(10 * p.detach(), 0.999 * radius))
    groups = [{"params": [p], "step_size": f"Constant({r})"} for p, r in zip(params, (0.3, 3.0, 1.0), strict=True)]
    optimizer = SteepestDescent(groups, norm=norm, momentum=momentum, constraint="frank-wolfe")
    for i in range(24):
        for group in optimizer.param_groups:
            group["lr"] = (1.0, 0.5, 0.01, 0.9)[i % 4]
        kinds = [lambda p: p.detach(), lambda p: -p.detach(), torch.zeros_like, torch.randn_like]
        step(optimizer, params, [kinds[i // 3 % 4](p).detach() for p in params])
        for p, radius in zip(params, (0.3, 3.0, 1.0), strict=True):
            assert norm.norm(p.detach()) <= radius * (1 + 1e-12)


@norms
def test_frank_wolfe_is_decoupled_decay_of_one_over_the_radius(norm: Norm) -> None:
    a, b = weights((4, 6), (6, 4)), weights((4, 6), (6, 4))
    first = SteepestDescent(a, lr=0.1, norm=norm, constraint="frank-wolfe", step_size="Constant(5.0)")
    second = SteepestDescent(b, lr=0.1 * 5, norm=norm, constraint=WeightDecay(1 / 5))
    for i in range(4):
        gradients = [next(stream((4, 6), i)), next(stream((6, 4), i))]
        for x, y in zip(step(first, a, gradients), step(second, b, gradients), strict=True):
            assert_close(x, y, 1e-13)


@pytest.mark.parametrize("lr", [1.5, 2, torch.tensor(1.5)], ids=str)
def test_frank_wolfe_refuses_rates_above_one_before_anything_moves(lr: Any) -> None:
    params = weights((4, 6), (6, 4))
    optimizer = SteepestDescent([{"params": [p]} for p in params], lr=0.5, constraint="frank-wolfe", momentum=0.9)
    step(optimizer, params, [torch.ones(4, 6), torch.ones(6, 4)])
    optimizer.param_groups[1]["lr"] = lr
    before = [p.detach().clone() for p in params]
    buffers = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in params]
    with pytest.raises(ValueError, match="learning rate must not exceed 1"):
        optimizer.step()
    for p, w, state in zip(params, before, buffers, strict=True):
        assert torch.equal(p, w)
        assert all(torch.equal(optimizer.state[p][k], v) for k, v in state.items())


@pytest.mark.parametrize("constraint", [[L2(0.3), WeightDecay(0.2)], [WeightDecay(0.2), L2(0.3)]], ids=str)
def test_l2_comes_before_momentum_and_memory_and_decay_after(constraint: list[Constraint]) -> None:
    params, gs, ws = weights((4, 3), (5,)), [], []
    optimizer = SteepestDescent(params, lr=0.5, norm="Smoothed(Max(), 0.8, 0.1)", momentum=0.6, constraint=constraint)
    for i in range(4):
        ws.append([p.detach().clone() for p in params])
        gs.append([next(stream((4, 3), i)), next(stream((5,), i))])
        changes = step(optimizer, params, gs[-1])
        for j, change in enumerate(changes):
            seen = [g[j] + 0.3 * w[j] for g, w in zip(gs, ws, strict=True)]
            v = ema([g**2 for g in seen], 0.8) / (1 - 0.8 ** (i + 1))
            expected = -0.5 * 0.2 * ws[-1][j] - 0.5 * ema(seen, 0.6) / (v.sqrt() + 0.1)
            assert_close(change, expected, 1e-13)


def test_decay_ignores_the_length_of_the_step() -> None:
    """Decoupled decay shrinks by lr * weight_decay, whatever radius or dual norm multiplies the update."""
    for step_size in "Constant(7.0)", "sharp", "dual":
        (a,), (b,) = weights((4, 6)), weights((4, 6))
        g = next(stream((4, 6)))
        (plain,) = step(SteepestDescent([a], lr=0.1, step_size=step_size), [a], [g])
        (decayed,) = step(SteepestDescent([b], lr=0.1, step_size=step_size, constraint=WeightDecay(0.2)), [b], [g])
        assert_close(decayed - plain, -0.02 * weights((4, 6))[0].detach(), 1e-12)


def test_constraints_see_the_weights_the_raw_gradient_and_the_update(registry: None) -> None:
    calls: list[Any] = []

    @dataclass(frozen=True)
    class Witness(Constraint):
        def gradient(self, g: Tensor, context: Context) -> Tensor:
            calls.append(("gradient", g.clone(), context.w.clone()))
            return 2 * g

        def update(self, d: Tensor, context: Context) -> tuple[Tensor, float]:
            calls.append(("update", d.clone(), context.w.clone(), context.raw.clone(), context.rate, context.g.clone()))
            return d + 1, 0.5

        def shrink(self, rate: Any) -> Any:
            assert rate == 0.1
            return 0.8

        def weight(self, w: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
            calls.append(("weight", w.clone(), context.rate))
            return w.clamp(max=0.25)

    (w,), g = weights((4, 6)), next(stream((4, 6)))
    start = w.detach().clone()
    step(SteepestDescent([w], lr=0.1, norm="max", momentum=0.5, constraint=[Witness()]), [w], [g])
    assert [call[0] for call in calls] == ["gradient", "update", "weight"]
    flat = start.flatten()
    assert_close(calls[0][1].flatten(), g.flatten())
    assert_close(calls[0][2].flatten(), flat)
    assert_close(calls[1][1].flatten(), g.flatten().sign())
    assert_close(calls[1][2].flatten(), flat)
    assert_close(calls[1][3].flatten(), g.flatten())
    assert_close(calls[1][5].flatten(), 2 * g.flatten())
    assert calls[1][4] == calls[2][2] == 0.1
    moved = 0.4 * start - 0.1 * (g.sign() + 1)
    assert_close(calls[2][1].flatten(), moved.flatten())
    assert_close(w.detach(), moved.clamp(max=0.25))


# How ingredients are given -------------------------------------------------------------------------------------------

GIVEN: list[tuple[str, list[Any]]] = [
    ("norm", ["max", "Max()", "Max(scale='rms')", Max(), repr(Max())]),
    ("norm", ["spectral", Spectral(), str(Spectral()), repr(Spectral())]),
    ("norm", [Smoothed(Max(), eps=0.1), "Smoothed(Max(), eps=0.1)", repr(Smoothed(Max(), eps=0.1))]),
    ("norm", [Chain(Row(), EXACT), "Chain(Row(), Spectral(method='exact'))", repr(Chain(Row(), EXACT))]),
    ("norm", [Spectral(dtype=torch.float32), Spectral(dtype="float32"), repr(Spectral(dtype=torch.float32))]),
    ("momentum", [None, "no-momentum", NoMomentum(), "NoMomentum()"]),
    ("momentum", ["nesterov", "Nesterov()", Nesterov(), repr(Nesterov()), "Nesterov(0.95)"]),
    ("momentum", ["heavy-ball", "heavy_ball", "HeavyBall", HeavyBall(), repr(HeavyBall(0.9))]),
    ("step_size", ["dual", "Dual()", Dual()]),
    ("constraint", [None, (), []]),
    ("constraint", ["L2(0.1)", L2(0.1), [L2(0.1)], (L2(0.1),), ["L2(0.1)"]]),
    ("constraint", [["L2(0.5)", "weight-decay"], [L2(0.5), WeightDecay()], (repr(L2(0.5)), repr(WeightDecay()))]),
]


@pytest.mark.parametrize(("ingredient", "ways"), GIVEN, ids=str)
def test_names_reprs_and_objects_are_the_same(ingredient: str, ways: list[Any]) -> None:
    rules = {SteepestDescent(weights((4, 3)), **{ingredient: way}).param_groups[0]["rule"] for way in ways}
    groups = [{"params": weights((4, 3)), ingredient: way} for way in ways]
    rules |= {SteepestDescent([group]).param_groups[0]["rule"] for group in groups}
    assert len(rules) == 1
    rule = parse(rules.pop())
    assert repr(rule) == repr(parse(repr(rule))) and parse(str(rule)) == rule


def test_options_are_written_as_themselves() -> None:
    norm = "Smoothed(Max(), Option('b', 1))"
    optimizer = SteepestDescent(weights((4, 3)), norm=norm, momentum=0.5, options={"b": (0, 0.5)})
    (group,) = optimizer.param_groups
    assert "beta=Option(name='b', index=1)" in group["rule"] and "beta=Option(name='momentum'" in group["rule"]
    assert parse(group["rule"]).options() == {"b", "momentum"}
    assert get(Direction, "max") == Max()
