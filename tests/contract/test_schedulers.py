"""torch's learning-rate schedulers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler

import normopt
from tests.support.models import Net
from tests.support.optimizers import Make, whole
from tests.support.steps import SHAPES, assert_equal, give_gradients, run, tensors

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda i: 0.5**i),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda i: 0.5),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.1),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3], 0.1),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 4, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3),
    "CyclicLR-fixed-momentum": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3, cycle_momentum=False),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, 6),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, 0.1, 1.0, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.03, 3),
}
#: Those that the fast tests ask of every optimizer.
QUICK = {"LambdaLR", "OneCycleLR", "SequentialLR"}
TWINS: dict[str, tuple[type, dict[str, Any], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9}, {}),
    "adam": (torch.optim.Adam, {}, {}),
    "adamw": (torch.optim.AdamW, {}, {}),
    "muon": (torch.optim.Muon, {}, {"orthogonalize_dtype": torch.float32}),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize("name", TWINS)
def test_schedulers_drive_ours_as_torchs(
    name: str, scheduler: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same path as the twin in torch.optim, whose learning rate, betas and momentum the same scheduler changes."""
    monkeypatch.setattr(Tensor, "bfloat16", Tensor.clone)  # what torch.optim.Muon casts with
    a, b = (tensors(SHAPES[:3], torch.float32) for _ in range(2))
    twin, options, ours = TWINS[name]
    first, second = normopt.create(name, a, lr=0.05, **options, **ours), twin(b, lr=0.05, **options)
    schedules = scheduler(first), scheduler(second)
    for i in range(5):
        run(first, a, 1, first=i)
        give_gradients(b, i)
        second.step()
        for schedule in schedules:
            schedule.step()
        for key in {"lr", "betas", "momentum"} & second.param_groups[0].keys():
            assert first.param_groups[0][key] == second.param_groups[0][key]
    assert_equal(a, b, 2e-6)


def test_every_scheduler_of_torch_is_here() -> None:
    theirs = {name for name, cls in vars(lr_scheduler).items() if isinstance(cls, type) and name[0] != "_"}
    theirs = {name for name in theirs if issubclass(getattr(lr_scheduler, name), lr_scheduler.LRScheduler)}
    assert theirs - {"LRScheduler", "ReduceLROnPlateau"} <= SCHEDULERS.keys()


@whole
@pytest.mark.parametrize(
    "scheduler",
    [s if name in QUICK else pytest.param(s, marks=pytest.mark.slow) for name, s in SCHEDULERS.items()],
    ids=SCHEDULERS,
)
def test_schedulers_reach_every_group(make: Make, scheduler: Callable[[Any], Any]) -> None:
    model = Net()
    optimizer = make(model, lr=0.05)
    if not {"momentum", "betas"} & optimizer.defaults.keys() and "fixed" not in str(scheduler):
        optimizer.defaults["momentum"] = 0.0  # what these two schedulers ask for
    schedule = scheduler(optimizer)
    for i in range(4):
        run(optimizer, list(model.parameters()), 1, first=i)
        schedule.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())


@whole
def test_plateau(make: Make) -> None:
    model = Net()
    optimizer = make(model, lr=0.1)
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    for _ in range(3):
        run(optimizer, list(model.parameters()), 1)
        schedule.step(1.0)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([rate / 100 for rate in rates])


# By hand -------------------------------------------------------------------------------------------------------------


@whole
def test_a_rate_set_by_hand_keeps_the_ratios(make: Make) -> None:
    """A loop over a schedule takes the steps of LambdaLR, goes on from a checkpoint, and reaches what is added."""
    model, twin, third = Net(), Net(), Net()
    twin.load_state_dict(model.state_dict())
    optimizer, other, resumed = (make(net, lr=0.05) for net in (model, twin, third))
    schedule = lr_scheduler.LambdaLR(other, lambda i: 0.5**i)
    for i in range(4):
        normopt.set_lr(optimizer, 0.05 * 0.5**i)
        run(optimizer, list(model.parameters()), 1, first=i)
        run(other, list(twin.parameters()), 1, first=i)
        schedule.step()
    assert_equal([*model.parameters()], [*twin.parameters()], 1e-6)
    saved = optimizer.state_dict()
    for group in saved["param_groups"][:1]:
        del group["lr_ratio"]  # as older versions saved it
    resumed.load_state_dict(saved)
    layer = torch.nn.Linear(3, 3)
    for each in (optimizer, resumed):
        each.add_param_group({"params": layer, "lr_ratio": 0.5})
        normopt.set_lr(each, 0.01)
    for each in (optimizer, resumed):
        expected = [group["lr_ratio"] * 0.01 for group in each.param_groups]
        assert [group["lr"] for group in each.param_groups] == pytest.approx(expected)
    assert [g["lr_ratio"] for g in resumed.param_groups] == [g["lr_ratio"] for g in optimizer.param_groups]


@whole
def test_one_cycle_keeps_the_ratios_with_a_list(make: Make) -> None:
    model = Net()
    optimizer = make(model, lr=0.05)
    peaks = [0.02 * group["lr_ratio"] for group in optimizer.param_groups]
    schedule = lr_scheduler.OneCycleLR(optimizer, max_lr=peaks, total_steps=10, cycle_momentum=False)
    for i in range(3):
        factors = [g["lr"] / g["lr_ratio"] for g in optimizer.param_groups if g["lr_ratio"]]
        assert max(factors) == pytest.approx(min(factors))
        run(optimizer, list(model.parameters()), 1, first=i)
        schedule.step()


def test_rates_that_are_tensors_are_set_in_place() -> None:
    optimizer = normopt.create("muon", Net(), lr=torch.tensor(0.05))
    rates = [group["lr"] for group in optimizer.param_groups]
    normopt.set_lr(optimizer, 0.01)
    assert all(group["lr"] is rate for group, rate in zip(optimizer.param_groups, rates, strict=True))
    assert {round(float(rate), 6) for rate in rates} == {0.01, 0.005}
    theirs = torch.optim.SGD(tensors(), lr=0.1)
    normopt.set_lr(theirs, 0.3)
    assert theirs.param_groups[0]["lr"] == 0.3


def test_rates_without_a_ratio_are_not_set() -> None:
    a, b = tensors()[:2]
    optimizer = normopt.create("adamw", [{"params": [a]}, {"params": [b], "lr": 0.1}], lr=0.0)
    with pytest.raises(ValueError, match=r"made with lr=0, so that the rate of param group 1 has no ratio"):
        normopt.set_lr(optimizer, 0.1)
    with pytest.raises(ValueError, match="lr must be a finite number"):
        normopt.set_lr(optimizer, -0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.1]


@whole
def test_plateau_multiplies_rates_that_are_tensors_once(make: Make) -> None:
    optimizer = make(Net(), lr=torch.tensor(0.1, dtype=torch.float64))
    before = [float(group["lr"]) for group in optimizer.param_groups]
    schedule = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    for _ in range(2):
        schedule.step(1.0)
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([rate / 10 for rate in before])
