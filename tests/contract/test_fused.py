"""torch's fused kernels inside the loop: when they are used, and that they take the same steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normopt
from normopt import (
    EMA,
    L2,
    Chain,
    Constant,
    Euclidean,
    HeavyBall,
    Identity,
    KahanSum,
    LionMomentum,
    Max,
    RowBound,
    Rule,
    Smoothed,
    SpectralCap,
    SteepestDescent,
    WeightDecay,
    zoo,
)
from normopt.engine import kernels as engine_kernels
from normopt.engine.kernels import Kernel, find
from tests.support.engine import batches
from tests.support.steps import give_gradients, tensors

SHAPES: list[tuple[int, ...]] = [(6, 4), (4, 6), (7,), (), (0, 3), (2, 3, 2, 2)]
CASES: list[tuple[str, dict[str, Any]]] = [
    ("adamw", {"weight_decay": 0.1, "betas": (0.8, 0.9), "eps": 1e-4}),
    ("adamw", {"amsgrad": True}),
    ("adam", {"weight_decay": 0.1}),
    ("adam", {"weight_decay": 0.1, "decoupled_weight_decay": True, "amsgrad": True}),
    ("adamw", {"maximize": True}),
    ("adamw", {"lr": torch.tensor(0.03, dtype=torch.float64)}),
    ("sgd", {}),
    ("sgd", {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
    ("sgd", {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1, "maximize": True}),
    ("sgd", {"momentum": 0.9, "lr": torch.tensor(0.03, dtype=torch.float64)}),
    ("rmsprop", {}),
    ("rmsprop", {"momentum": 0.9, "weight_decay": 0.1, "alpha": 0.9, "eps": 1e-4, "maximize": True}),
    ("signsgd", {"weight_decay": 0.1}),
    ("signum", {"weight_decay": 0.1}),
    ("signum", {"maximize": True}),
    ("lion", {"weight_decay": 1e-7}),
    ("lion", {"weight_decay": 0.1, "maximize": True, "betas": (0.8, 0.95)}),
]


def params(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    noise = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=noise, dtype=torch.float64).to(dtype)) for s in SHAPES]


def run(optimizer: SteepestDescent, weights: list[Tensor], steps: range) -> None:
    for i in steps:
        noise = torch.Generator().manual_seed(100 + i)
        for j, p in enumerate(weights):
            g = torch.randn(p.shape, generator=noise, dtype=torch.float64).to(p.dtype)
            p.grad = None if (i, j) == (3, 1) else g
        optimizer.step()


def kernels(optimizer: SteepestDescent) -> list[Any]:
    return [batch.kernel for batch in batches(optimizer)]


@pytest.fixture
def unfused(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Call ``unfused.undo()`` to have kernels again."""
    monkeypatch.setattr(Kernel, "takes", lambda *_: False)
    return monkeypatch


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_kernels_take_the_same_steps(
    name: str, options: dict[str, Any], dtype: torch.dtype, unfused: pytest.MonkeyPatch
) -> None:
    """With a parameter that is left out once, and with the kernel coming and going in the middle of a run."""
    options = {"lr": 0.03, **options}
    slow, fast, mixed = params(dtype), params(dtype), params(dtype)
    optimizers = [normopt.create(name, weights, **options) for weights in (slow, fast, mixed)]
    run(optimizers[0], slow, range(10))
    run(optimizers[2], mixed, range(5))
    assert kernels(optimizers[0]) and not any(kernels(optimizers[0]))
    unfused.undo()
    run(optimizers[1], fast, range(10))
    run(optimizers[2], mixed, range(5, 10))
    assert all(kernels(optimizers[1]))
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for a, b, c in zip(slow, fast, mixed, strict=True):
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(c, a, rtol=tolerance, atol=tolerance)
    for p, q in zip(slow, fast, strict=True):
        for entry, value in optimizers[0].state[p].items():
            torch.testing.assert_close(optimizers[1].state[q][entry], value, rtol=tolerance, atol=tolerance)


def test_bounds_that_do_more_have_no_kernel() -> None:
    class Watched(RowBound):
        def update(self, d: Tensor, context: Any) -> tuple[Tensor, float]:
            return 2 * d, 1.0

    assert find(ADAM.bounded(RowBound())) and not find(ADAM.bounded(Watched()))


@pytest.mark.parametrize("lr", [0.03, 0.0, torch.tensor(0.03).double(), torch.tensor(0.0)])
@pytest.mark.parametrize("bound", ["RowBound()", "Sphere(axis=-2)", "FrobeniusSphere()", "Ball(norm='row')"])
def test_bounds_follow_kernels(bound: str, lr: float | Tensor, unfused: pytest.MonkeyPatch) -> None:
    slow, fast = params(), params()
    optimizers = [zoo.AdamW([{"params": p, "bounds": bound}], lr=lr, weight_decay=0.1) for p in (slow, fast)]
    run(optimizers[0], slow, range(5))
    unfused.undo()
    run(optimizers[1], fast, range(5))
    assert all(kernels(optimizers[1]))
    for a, b, start in zip(slow, fast, params(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)
        assert torch.equal(a, start) == (lr == 0 or not a.numel())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("AdamW", {"weight_decay": 0.1}),
        ("SGD", {"weight_decay": 0.1}),
        ("SGD", {"momentum": 0.9, "dampening": 0.5}),
        ("SGD", {"momentum": 0.9, "nesterov": True}),
    ],
)
def test_a_step_is_torchs_fused_one_to_the_bit(name: str, options: dict[str, Any]) -> None:
    ours, theirs = params(torch.float32), params(torch.float32)
    run(getattr(zoo, name)(ours, lr=0.03, **options), ours, range(3))  # the step in which one is left out: not yet
    reference = getattr(torch.optim, name)(theirs, lr=0.03, fused=True, **options)
    run(reference, theirs, range(3))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


LION = Rule(Max(), LionMomentum(0.9, 0.99), Constant(), (WeightDecay(0.1),))
RMS = Rule(Chain(Smoothed(Max(), 0.9, 1e-8, bias_correction=False), HeavyBall(0.9)), constraint=(L2(0.1),))
BALL = Rule(Identity(), HeavyBall(0.9), Constant(), (L2(0.1),))
ADAM = Rule(Smoothed(Max(), 0.9, 1e-8), EMA(0.9, bias_correction=True), Constant(), (WeightDecay(0.1),))


@pytest.mark.parametrize(
    ("rule", "has"),
    [
        (BALL, True),
        (BALL.updated({"constraint": None}), True),
        (BALL.updated({"momentum": HeavyBall(0.0)}), True),
        (BALL.updated({"momentum": HeavyBall(0.9, damp_first=True, dampening=0.5)}), True),
        (BALL.updated({"constraint": WeightDecay(0.1)}), False),
        (BALL.updated({"norm": Euclidean()}), False),
        (BALL.updated({"step_size": "sharp"}), False),
        (BALL.bounded(RowBound()), True),
        (ADAM, True),
        (ADAM.updated({"constraint": None}), True),
        (ADAM.updated({"constraint": L2(0.1)}), True),
        (ADAM.updated({"norm": Smoothed(Max(), 0.9, 1e-8, maximum=True)}), True),
        (ADAM.updated({"norm": Smoothed(Max(), 0.9, 1e-8, bias_correction=False)}), False),
        (ADAM.updated({"norm": Smoothed(Max(), 0.9, 1e-8, accumulate="sum")}), False),
        (ADAM.updated({"norm": Smoothed(Max(2.0), 0.9, 1e-8)}), False),
        (ADAM.updated({"norm": Max()}), False),
        (ADAM.updated({"momentum": EMA(0.9)}), False),
        (ADAM.updated({"momentum": EMA(0.9, True, True)}), False),
        (ADAM.updated({"momentum": None}), False),
        (ADAM.updated({"step_size": Constant(2.0)}), False),
        (ADAM.updated({"step_size": "prodigy"}), False),
        (ADAM.updated({"constraint": WeightDecay(0.1, cautious=True)}), False),
        (ADAM.updated({"constraint": WeightDecay(0.1, after=True)}), False),
        (ADAM.bounded(RowBound()), True),
        (ADAM.bounded(SpectralCap()), False),
        (ADAM.bounded(KahanSum()), False),
        (LION, True),
        (LION.updated({"momentum": EMA(0.9)}), True),
        (LION.updated({"momentum": None, "constraint": None}), True),
        (LION.updated({"momentum": EMA(0.9, True)}), False),
        (LION.updated({"norm": Max(2.0)}), False),
        (LION.updated({"constraint": L2(0.1)}), False),
        (LION.updated({"constraint": WeightDecay(0.1, cautious=True)}), False),
        (RMS, True),
        (RMS.updated({"norm": Chain(Smoothed(Max(), 0.9, 1e-8, False, centered=True), HeavyBall(0.9))}), False),
        (RMS.updated({"norm": Chain(Smoothed(Max(), 0.9, 0.0, False), HeavyBall(0.9))}), False),
        (RMS.updated({"momentum": 0.9}), False),
    ],
    ids=str,
)
def test_which_rules_have_a_kernel(rule: Rule, has: bool) -> None:
    assert (find(rule) is not None) == has


@pytest.mark.parametrize("what", ["bfloat16", "strides", "gradient strides", "gradient dtype"])
def test_tensors_without_a_kernel_take_the_long_way(what: str) -> None:
    p = nn.Parameter(torch.randn(4, 6).to(torch.bfloat16 if what == "bfloat16" else torch.float32))
    p = nn.Parameter(p.detach().T) if what == "strides" else p
    optimizer = zoo.AdamW([p], lr=0.1)
    p.grad = torch.randn_like(p)
    if what == "gradient strides":
        p.grad = torch.randn(6, 4).T
    elif what == "gradient dtype":
        p.grad_dtype = None  # type: ignore[attr-defined]
        p.grad = torch.randn(4, 6, dtype=torch.float64)
    before = p.detach().clone()
    optimizer.step()
    assert kernels(optimizer) == [None] and not torch.equal(p, before)


@pytest.mark.parametrize("rule", [LION, RMS], ids=["signs", "rms"])
def test_lists_of_tensors_are_few_or_large(rule: Rule) -> None:
    """And moved at a rate that is a number."""

    def has(params: list[Tensor], lr: float | Tensor = 0.1) -> bool:
        for p in params:
            p.grad = torch.ones_like(p)
        return all(kernels(SteepestDescent(params, lr, rule.norm, rule.momentum, constraint=rule.constraint)))

    few, many, large = ([nn.Parameter(torch.zeros(n)) for _ in range(k)] for n, k in ((5, 3), (5, 40), (5000, 20)))
    assert has(few) and not has(many) and has(large)
    assert not has(few, torch.tensor(0.1))


@pytest.mark.parametrize("run", [1, 7, 24, 30])
@pytest.mark.parametrize("rule", [LION, RMS], ids=["signs", "rms"])
def test_lists_are_worked_through_in_runs(rule: Rule, run: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which make no difference: tensors that are larger are cut, others go together while they fit."""
    whole, cut = (tensors([(5,), (0,), (4, 6), (3,), (2, 2, 2), (1,), (7, 7)]) for _ in range(2))
    kinds = [SteepestDescent(p, 0.1, rule.norm, rule.momentum, constraint=rule.constraint) for p in (whole, cut)]
    for step in range(3):
        for p, optimizer, size in zip((whole, cut), kinds, (engine_kernels.RUN, run), strict=True):
            give_gradients(p, step)
            with monkeypatch.context() as patch:
                patch.setattr(engine_kernels, "RUN", size)
                optimizer.step()
    assert all(kernels(kinds[1]))
    for p, q in zip(whole, cut, strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(x, kinds[1].state[q][name]) for name, x in kinds[0].state[p].items())


def test_state_in_another_order_than_the_parameters_has_no_kernel() -> None:
    """Of transposed groups state is kept as the rule sees the parameter."""
    p = nn.Parameter(torch.randn(6, 4, 3))
    view = {"transpose": True, "groups": 2}
    optimizer = SteepestDescent([p], 0.1, ADAM.norm, ADAM.momentum, "constant", RowBound(), view=view)
    for _ in range(2):
        p.grad = torch.randn(6, 4, 3)
        optimizer.step()
    assert kernels(optimizer) == [None] and optimizer.state[p]["momentum"].shape != p.shape


def test_muons_other_parameters_move_by_a_kernel() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5))
    optimizer = zoo.Muon(model, lr=0.1)
    model(torch.arange(5)).square().sum().backward()
    optimizer.step()
    found: dict[bool, set[str]] = {True: set(), False: set()}
    for group in optimizer.param_groups:
        own = [batch for batch in batches(optimizer) if batch.group is group]
        found[all(batch.kernel for batch in own)] |= {group["role"]}
    assert found == {True: {"embedding", "vector", "unembedding"}, False: {"linear"}}


def test_data_of_another_size_is_refused_before_anything_moves() -> None:
    """A kernel would write beyond the state."""
    for make in (zoo.AdamW, zoo.Lion):
        p = nn.Parameter(torch.randn(6))
        optimizer = make([p], lr=0.1)
        p.grad = torch.randn(6)
        optimizer.step()
        p.data, p.grad = torch.ones(4096), None
        p.grad = torch.randn(4096)
        with pytest.raises(ValueError, match="the state of another parameter"):
            optimizer.step()
        assert torch.equal(p, torch.ones(4096)) and optimizer.state[p]["step"] == 1


def test_step_counts_are_float32_whatever_the_default() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        p = nn.Parameter(torch.zeros(3, dtype=torch.float32))
        optimizer = zoo.AdamW([p], lr=0.1)
        for _ in range(300):
            p.grad = torch.ones(3, dtype=torch.float32)
            optimizer.step()
        assert optimizer.state[p]["step"] == 300
    finally:
        torch.set_default_dtype(torch.float32)


def test_numbers_in_tensors_in_tuples_are_read_anew() -> None:
    p, beta = nn.Parameter(torch.zeros(3)), torch.tensor(0.9)
    optimizer = zoo.Lion([p], lr=0.1, betas=(beta, 0.9))
    optimizer.param_groups[0]["betas"] = (beta, 0.9)
    for value in (0.9, 0.1):
        beta.fill_(value)
        p.grad = torch.ones(3)
        optimizer.step()
        (batch,) = batches(optimizer)
        assert float(batch.rule.momentum.beta1) == pytest.approx(value)  # type: ignore[attr-defined]
