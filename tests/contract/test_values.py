"""What arguments and param groups may hold: flags are flags, NumPy's numbers are numbers, nothing is ignored."""

from __future__ import annotations

import dataclasses
import io
import warnings
from collections.abc import Iterator
from inspect import signature
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import normopt
from normopt import EMA, Mixture, Prodigy, SteepestDescent, zoo
from normopt.ingredient import Ingredient, parse
from normopt.rule import INGREDIENTS
from normopt.stepsize import LearningRateFree
from tests.support.optimizers import NAMES
from tests.support.steps import give_gradients, run, snapshot, tensors

CLASSES = {name: SteepestDescent.registry[name] for name in NAMES}
every_class = pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)


def of_numpy(value: Any) -> Any:
    """The same in numbers of NumPy, also in tuples."""
    if isinstance(value, tuple):
        return tuple(map(of_numpy, value))
    kinds = {bool: np.bool_, int: np.int64, float: np.float64}
    return kinds[type(value)](value) if type(value) in kinds else value


def ingredients() -> Iterator[Ingredient]:
    """All that can be made without arguments."""
    for cls in Ingredient._classes.values():
        fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) and "_abstract" not in vars(cls) else None
        if fields and cls.__module__.startswith("normopt.") and all(f.default is not f.default_factory for f in fields):
            yield cls()


@pytest.mark.parametrize("made", ingredients(), ids=lambda made: type(made).__name__)
def test_ingredients_are_made_of_plain_values(made: Any) -> None:
    for field in dataclasses.fields(made):
        value = getattr(made, field.name)
        if isinstance(value, bool) and field.type == "bool":
            for wrong in (1, "no", None):
                with pytest.raises(TypeError, match=f"^{type(made).__name__}: {field.name} must be True or False"):
                    dataclasses.replace(made, **{field.name: wrong})
        again = dataclasses.replace(made, **{field.name: of_numpy(value)})
        assert again == made and repr(again) == repr(made) and parse(repr(again)) == made


def test_tuples_of_numpy_numbers_stay_tuples() -> None:
    assert Mixture((0.85, 0.98), tuple(np.array([0.4, 0.6]))).weights == (0.4, 0.6)
    assert Mixture([0.85, 0.98], np.array([0.4, 0.6])) == Mixture((0.85, 0.98), (0.4, 0.6))  # type: ignore[arg-type]
    assert Prodigy(bias_correction=(np.float64(0.9), 0.99)).bias_correction == (0.9, 0.99)


@every_class
def test_flags_and_numbers_of_optimizers(cls: type[SteepestDescent]) -> None:
    declared = signature(cls).parameters
    for name, parameter in declared.items():
        if isinstance(parameter.default, bool) and str(parameter.annotation).split("'")[-2:][0] == "bool":
            for wrong in (1, "false"):
                with pytest.raises(TypeError, match=f"^{cls.__name__}: {name} must be True or False, got"):
                    cls(tensors(), **{name: wrong})
    plain = {n: p.default for n, p in declared.items() if type(p.default) in (bool, int, float, tuple)}
    plain |= {"eps": (1e-30, 1e-3)} if cls is zoo.Adafactor else {}
    made, numpys = cls(tensors(), **plain), cls(tensors(), **{name: of_numpy(x) for name, x in plain.items()})
    assert made.state_dict() == numpys.state_dict()
    buffer = io.BytesIO()
    torch.save(numpys.state_dict(), buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True)["param_groups"] == made.state_dict()["param_groups"]


def test_flags_and_numbers_of_param_groups() -> None:
    group = {"params": tensors(), "lr": np.float64(0.1), "betas": (np.float32(0.5), np.float64(0.9))}
    optimizer = zoo.AdamW([group])
    assert [type(x) for x in (optimizer.param_groups[0]["lr"], *optimizer.param_groups[0]["betas"])] == [float] * 3
    with pytest.raises(TypeError, match="maximize must be True or False, got 'no'"):
        zoo.AdamW([{"params": tensors(), "maximize": "no"}])
    params = tensors()
    optimizer = zoo.AdamW(params)
    run(optimizer, params, 2)
    before = snapshot(optimizer)
    optimizer.param_groups[0]["maximize"] = 1
    give_gradients(params, 9)
    with pytest.raises(TypeError, match="maximize must be True or False, got 1"):
        optimizer.step()
    optimizer.param_groups[0]["maximize"] = False
    assert str(snapshot(optimizer)) == str(before)
    momentum = SteepestDescent(tensors(), momentum=np.float32(0.5))  # type: ignore[arg-type]
    assert "EMA" in momentum.param_groups[0]["rule"] and momentum.param_groups[0]["momentum"] == 0.5


# Nothing that is said is ignored


@every_class
def test_what_is_read_once_is_not_said_afterwards(cls: type[SteepestDescent]) -> None:
    params = tensors()
    optimizer = cls(params)
    run(optimizer, params, 2)
    for name in sorted((INGREDIENTS | optimizer.arguments.keys()) - {"momentum"} - optimizer.param_groups[0].keys()):
        if name in ("params", "geometry", "foreach", "fused", "compile", "deterministic", "differentiable"):
            continue
        optimizer.param_groups[0][name] = "max"
        give_gradients(params, 9)
        before = [p.clone() for p in params]
        with pytest.raises(TypeError, match=f"param group: '{name}' is read when a group is added"):
            optimizer.step()
        assert all(map(torch.equal, params, before))
        del optimizer.param_groups[0][name]
    run(optimizer, params, 1)


def test_what_a_group_says_when_it_is_added_is_taken_out_of_it() -> None:
    optimizer = zoo.Muon([{"params": [nn.Parameter(torch.ones(3, 2))], "ns_steps": 3}])
    assert "steps=3" in optimizer.param_groups[0]["rule"] and "ns_steps" not in optimizer.param_groups[0]
    old = optimizer.state_dict()
    old["param_groups"][0]["ns_steps"] = 3  # as earlier versions left it there
    optimizer.load_state_dict(old)
    assert "ns_steps" not in optimizer.param_groups[0]


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"*.bias": {"aux_lr": 0.5}}, "'aux_lr' changes nothing for .*; say 'lr'"),
        ({"*.bias": {"aux_betas": (0.5, 0.5)}}, "'aux_betas' changes nothing for .*; say 'betas'"),
        ({"2.weight": {"aux_lr": 0.5}}, "'aux_lr' changes nothing for .*Spectral.*; say 'lr'"),
        ({"*.bias": {"ns_steps": 3}}, "'ns_steps' changes nothing for .*; give it to Muon itself"),
        ({"*": {"cautious": True}}, "'cautious' changes nothing for .*; give it to Muon itself"),
        ({"2.weight": {"LR": 0.5}}, "'LR'; did you mean 'lr'"),
        ({"2.weight": {"lr_mult": 0.5}}, "'lr_mult'; did you mean 'lr_ratio'"),
        ({"2.weight": {"use_muon": False}}, "'use_muon' is not read"),
    ],
)
def test_overrides_that_would_change_nothing(overrides: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        normopt.create("muon", model(), overrides=overrides)


def test_overrides_that_change_something() -> None:
    optimizer = normopt.create("muon", model(), overrides={"2.weight": {"cautious": True, "ns_steps": 3}})
    assert any("cautious=True" in group["rule"] and "steps=3" in group["rule"] for group in optimizer.param_groups)
    normopt.create("muon", model(), overrides={"*.bias": {"ns_steps": None}})  # as it is


@every_class
def test_a_step_size_that_finds_the_rate_starts_from_one(cls: type[SteepestDescent]) -> None:
    parameters = signature(cls).parameters
    if "step_size" not in parameters:
        pytest.skip("it has a step size of its own")
    default = parameters["lr"].default
    for step_size in ("prodigy", normopt.DAdaptation()):
        try:
            optimizer = cls(tensors(), step_size=step_size)
        except ValueError as error:
            assert "dual norm" in str(error) or "use Prodigy" in str(error)
            continue
        assert optimizer.defaults["lr"] == 1.0
        assert cls(tensors(), step_size=step_size, lr=0.5).defaults["lr"] == 0.5
    assert cls(tensors()).defaults["lr"] == default


def test_the_rate_of_bare_rules() -> None:
    assert SteepestDescent(tensors()).defaults["lr"] == 1e-3
    assert SteepestDescent(tensors(), norm="max", momentum=EMA(0.9), step_size="prodigy").defaults["lr"] == 1.0
    assert isinstance(Prodigy(), LearningRateFree)


# What cannot be read says what to write


@pytest.mark.parametrize(
    ("norm", "error", "message"),
    [
        ("smoothed", ValueError, r"'smoothed' needs norm: give Smoothed\(norm=...\)"),
        ("Smoothed(max)", ValueError, "cannot read 'max' .* a name inside of a call needs quotes, \"max\""),
        (normopt.Max, TypeError, r"did you mean Max\(\)\?"),
    ],
)
def test_ingredients_that_cannot_be_read(norm: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SteepestDescent(tensors(), norm=norm)


def test_decay_without_a_number_is_no_decay() -> None:
    with pytest.raises(ValueError, match=r"'l2' needs weight_decay: give L2\(weight_decay=...\)"):
        SteepestDescent(tensors(), constraint="l2")


@pytest.mark.parametrize("name", [model(), zoo.Muon, None], ids=lambda x: type(x).__name__)
def test_create_takes_the_name_first(name: Any) -> None:
    with pytest.raises(TypeError, match=r"create\(name, model\): name must be"):
        normopt.create(name, "muon")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"for_trainer\(name\): name must be"):
        normopt.integrations.for_trainer(name)
    assert normopt.list_optimizers("Muon*") == normopt.list_optimizers("muon*") != []


def test_a_norm_in_the_place_of_a_role() -> None:
    with pytest.raises(ValueError, match=r"unknown role 'max'; for the norm give \{'norm': 'max'\}"):
        normopt.create("muon", model(), overrides={"2.weight": "max"})


def test_wrapped_optimizers_are_described() -> None:
    inner = normopt.create("muon", model())
    assert normopt.summary(normopt.Averaged(inner)) == normopt.summary(inner)
    assert normopt.describe(normopt.Averaged(inner)).startswith("Averaged Muon: 6 tensors")
    for wrong in (torch.optim.AdamW(model().parameters()), model()):
        with pytest.raises(TypeError, match=f"optimizer must be one of normopt, got {type(wrong).__name__}"):
            normopt.describe(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: normopt.create("muon", model(), overrides=["0.weight"]), "overrides must be a dict of patterns"),
        (lambda: normopt.create("muon", model(), overrides={"0.weight": None}), r"overrides\['0.weight'\]: expected"),
        (lambda: normopt.create("muon", model(), geometry={"linear": None}), r"geometry\['linear'\]: expected a norm"),
        (lambda: normopt.create("muon", model(), geometry=[]), "geometry must be the name of one or a dict"),
        (lambda: normopt.param_groups(model(), 3), "geometry must be the name of one or a dict"),
        (lambda: normopt.param_groups(model().parameters()), "expected a model"),
        (lambda: normopt.infer_roles([nn.Linear(2, 2)]), "expected a model"),
        (lambda: normopt.Averaged(zoo.SGD(tensors()), rise=5), r"rise must be None or two numbers \(T0, rho\), got 5"),
        (lambda: normopt.Averaged(zoo.SGD(tensors()), rise=(5,)), "rise must be None or two numbers"),
        (lambda: normopt.PolarCoefficients((3.4, -4.8, 2.0)), "one or more rows"),
    ],
)
def test_a_table_is_a_table(make: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_a_role_that_is_nearly_one_is_asked_about() -> None:
    with pytest.warns(UserWarning, match="the role 'liner' is none that the geometry names.*did you mean 'linear'"):
        normopt.create("muon", model(), overrides={"2.weight": {"role": "liner"}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        normopt.create("muon", model(), overrides={"2.weight": {"role": "expert"}})
        geometry = {"liner": normopt.Spectral()}
        normopt.create("muon", model(), overrides={"2.weight": {"role": "liner"}}, geometry=geometry)
