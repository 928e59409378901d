"""torch's own database of optimizers, with which torch tests them: its arguments, schedulers and errors, on ours.

``torch.testing._internal.common_optimizers`` ships with torch. Its inputs are run on the optimizer of the same name
here, beside torch's; the tests that torch runs on them compare torch with itself and do not ship.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from normopt import zoo
from tests.support.paths import MATRICES, SHAPES, assert_same_path, gradients, largest

database = pytest.importorskip("torch.testing._internal.common_optimizers")
pytestmark = pytest.mark.slow

#: Those that are here too, by name.
INFOS = {info.optim_cls.__name__: info for info in database.optim_db if hasattr(zoo, info.optim_cls.__name__)}
CPU = torch.device("cpu")
#: The longest difference in parts of the way, which some learning rates keep so short that weights of 1 are rounded to
#: 1e-5 of it.
TOLERANCE = 1e-4
#: What torch refuses because of how it is written: learning rates and betas that are tensors, under foreach.
ONLY_TORCH = ("as a Tensor is not supported", "both floats or both Tensors")


@pytest.fixture(autouse=True)
def muon_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's Muon works in bfloat16; the cast is taken out."""
    monkeypatch.setattr(Tensor, "bfloat16", Tensor.clone)


def shapes(name: str) -> list[tuple[int, ...]]:
    return MATRICES if name == "Muon" else SHAPES


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The arguments, with tensors of their own, since each optimizer keeps its learning rate."""
    return copy.deepcopy(options)


def make(name: str, params: Any, options: dict[str, Any]) -> Optimizer:
    also = {"orthogonalize_dtype": torch.float32} if name == "Muon" else {}
    ours: Callable[..., Optimizer] = getattr(zoo, name)
    return ours(params, **given(options), **also)


def inputs() -> Iterator[Any]:
    """Every combination of arguments that torch tests, with and without foreach and fused."""
    for name, info in INFOS.items():
        for each in database._get_optim_inputs_including_global_cliquey_kwargs(CPU, torch.float32, info):
            if not each.kwargs.get("differentiable"):  # which no optimizer here has
                yield pytest.param(name, each.kwargs, id=f"{name}-{each.desc}".replace(" ", "-"))


def test_every_optimizer_of_torch_with_a_counterpart_is_here() -> None:
    assert {*INFOS} == {"Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "Muon", "NAdam", "RMSprop", "SGD"}


@pytest.mark.parametrize(("name", "options"), inputs())
def test_its_arguments_give_torchs_weights(name: str, options: dict[str, Any]) -> None:
    reference = INFOS[name].optim_cls
    assert_same_path(
        lambda p: make(name, p, options), lambda p: reference(p, **given(options)), shapes(name), TOLERANCE
    )


def with_schedulers() -> Iterator[Any]:
    for name, info in INFOS.items():
        for i, several in enumerate(info.scheduler_inputs):
            yield pytest.param(name, several, id=f"{name}-schedulers-{i}")


@pytest.mark.parametrize(("name", "schedulers"), with_schedulers())
def test_its_schedulers_give_torchs_weights(name: str, schedulers: Any) -> None:
    """Also where they write to a learning rate that is a tensor."""
    reference = INFOS[name].optim_cls
    for options in [{"lr": 0.01}, *([{"lr": torch.tensor(0.01)}] if name not in ("Adagrad", "Adafactor") else [])]:
        params = [[nn.Parameter(torch.ones(shape)) for shape in shapes(name)] for _ in range(2)]
        pair = make(name, params[0], options), reference(params[1], **given(options))
        both = [[scheduler(optimizer) for scheduler in schedulers] for optimizer in pair]
        stream, travelled, worst = gradients(params[1], 0), torch.zeros(len(shapes(name))), 0.0
        for _ in range(25):
            for ours, theirs, g in zip(*params, next(stream), strict=True):
                ours.grad, theirs.grad = g.clone(), g.clone()
            before = [p.detach().clone() for p in params[1]]
            for optimizer, several in zip(pair, both, strict=True):
                optimizer.step()
                for scheduler in several:
                    on_plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                    scheduler.step(1.0) if on_plateau else scheduler.step()
            travelled += largest(params[1], before)
            worst = max(worst, float((largest(*params) / travelled).max()))
            rates = [float(optimizer.param_groups[0]["lr"]) for optimizer in pair]
            assert rates[0] == pytest.approx(rates[1], rel=1e-6)
        assert worst < TOLERANCE


@pytest.mark.parametrize("name", INFOS)
def test_its_arguments_in_param_groups_give_torchs_weights(name: str) -> None:
    """Each combination as the entries of one group beside a group with the defaults; torch takes them in groups too."""
    reference = INFOS[name].optim_cls
    for each in INFOS[name].optim_inputs_func(CPU, torch.float32):
        if "initial_accumulator_value" in each.kwargs:  # in a group, where torch does not look at it
            continue

        def groups(params: list[Tensor], options: dict[str, Any] = each.kwargs) -> list[dict[str, Any]]:
            return [{"params": params[:1], **given(options)}, {"params": params[1:]}]

        assert_same_path(lambda p: make(name, groups(p), {}), lambda p: reference(groups(p)), shapes(name), TOLERANCE)


@pytest.mark.parametrize("name", INFOS)
def test_its_states_are_resumed(name: str) -> None:
    """After loading in the middle, into a copy that was made with other numbers, both end at the same weights."""
    for each in INFOS[name].optim_inputs_func(CPU, torch.float32):
        params = [[nn.Parameter(torch.ones(shape)) for shape in shapes(name)] for _ in range(2)]
        first, second = (make(name, several, each.kwargs) for several in params)
        noise = torch.Generator().manual_seed(0)
        for step in range(6):
            for a, b in zip(*params, strict=True):
                a.grad = torch.randn(a.shape, generator=noise)
                b.grad = a.grad.clone()
            first.step()
            if step > 2:
                second.step()
            if step == 2:
                second.load_state_dict(copy.deepcopy(first.state_dict()))
                for a, b in zip(*params, strict=True):
                    b.data.copy_(a.data)
        assert all(torch.equal(a, b) for a, b in zip(*params, strict=True)), each.desc


def errors() -> Iterator[Any]:
    for name, info in INFOS.items():
        for each in info.optim_error_inputs_func(CPU, torch.float32):
            yield pytest.param(name, each, id=f"{name}-{each.optimizer_error_input.desc}".replace(" ", "-"))


def as_floats(options: dict[str, Any]) -> dict[str, Any]:
    pairs = {key: tuple(map(float, value)) for key, value in options.items() if isinstance(value, tuple)}
    return {key: pairs.get(key, float(value) if isinstance(value, Tensor) else value) for key, value in options.items()}


@pytest.mark.parametrize(("name", "case"), errors())
def test_what_torch_refuses_is_refused(name: str, case: Any) -> None:
    """With an error of our own, as early as torch's or earlier; duplicates, of which torch warns, are refused too.

    Tensors among the numbers work here as floats do.
    """
    bad = case.optimizer_error_input
    params = bad.params if bad.params is not None else [nn.Parameter(torch.randn(1, 1))]
    before = [p.detach().clone() for p in params if isinstance(p, Tensor)] if isinstance(params, list) else []
    if any(words in case.error_regex for words in ONLY_TORCH):
        assert_same_path(lambda p: make(name, p, bad.kwargs), lambda p: make(name, p, as_floats(bad.kwargs)), SHAPES, 0)
        return
    with warnings.catch_warnings(), pytest.raises((ValueError, TypeError, RuntimeError)) as found:
        warnings.simplefilter("error")
        optimizer = getattr(zoo, name)(params, **given(bad.kwargs))
        if case.error_on == database.OptimizerErrorEnum.STEP_ERROR:
            optimizer.step()
    assert len(str(found.value)) > 20
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=False) if isinstance(p, Tensor))
