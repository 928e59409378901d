"""The registry."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
from torch import nn

import normopt
from normopt import SteepestDescent, zoo
from normopt.constraints.base import Constraint
from normopt.ingredient import Ingredient
from normopt.ingredient.stage import Stage
from normopt.stepsize.base import StepSize


def test_the_bases_of_the_zoo_are_no_optimizers() -> None:
    assert not {"hidden", "normdescent"} & set(normopt.list_optimizers())


def test_every_optimizer_with_memory_is_registered() -> None:
    for name in ("nadam", "adamax", "ademamix", "adafactor", "lars", "lamb", "novograd"):
        optimizer = normopt.create(name, nn.Linear(4, 3))
        assert isinstance(optimizer, SteepestDescent) and type(optimizer).__name__ in zoo.__all__


#: Ingredients that ask for the weights, or change them other than by a factor; with some of their arguments at least.
SEE_WEIGHTS = {"Complement", "Decayed", "Recursive", "WeightDecay", "L2", "TangentProjection", "Transposed"}
SEE_WEIGHTS |= {"Prodigy", "DAdaptation", "GradientTrust", "TrustRatio", "Relative"}
SEE_WEIGHTS |= {"RowBound", "Sphere", "FrobeniusSphere", "Ball", "StochasticRounding", "KahanSum"}
SEE_WEIGHTS |= {"SpectralCap", "SoftSpectralCap", "SpectralNormalize", "Stiefel", "Tangent", "RadialBrake", "RowFloor"}

OURS = [
    each
    for each in Ingredient._classes.values()
    if each.__module__.startswith("normopt.") and issubclass(each, (Stage, StepSize, Constraint))
]
CONCRETE = [each for each in OURS if dataclasses.is_dataclass(each) and not vars(each).get("_abstract")]


@pytest.mark.parametrize("ingredient", CONCRETE, ids=lambda each: each.__name__)
def test_ingredients_say_whether_they_see_weights(ingredient: type) -> None:
    """Those that do not, and do not say so, cost a transfer for nothing; that those who say so do not is checked."""
    assert (getattr(ingredient, "sees_weights", False) is not False) == (ingredient.__name__ in SEE_WEIGHTS)


@pytest.mark.parametrize("ingredient", CONCRETE, ids=lambda each: each.__name__)
def test_ingredients_are_not_taken_for_optimizers(ingredient: type) -> None:
    """Some have the name of an optimizer, as Prodigy has."""
    model = nn.Linear(3, 2)
    given = [model, model.parameters(), list(model.parameters()), [{"params": list(model.parameters())}]]
    for params in given:
        with pytest.raises(TypeError, match=rf"^{ingredient.__name__}: .*parameters or a model.*normopt.create"):
            ingredient(params, lr=0.1)
    with pytest.raises(TypeError, match="parameters or a model"):
        ingredient(params=model.parameters())


@pytest.mark.parametrize("ingredient", CONCRETE, ids=lambda each: each.__name__)
def test_ingredients_have_one_name_for_one_number(ingredient: type) -> None:
    """A decay rate is ``beta``, part of the rank ``rank_fraction``, a polar factor's ``method``."""
    names = {each.name for each in dataclasses.fields(ingredient)}
    assert not names & {"decay", "mu", "fraction", "orthogonalize", "lr_ratio"}


def test_no_argument_of_an_optimizer_is_called_as_the_ratio_of_a_group() -> None:
    for name in zoo.__all__:
        if name.lower() in normopt.list_optimizers():
            assert "lr_ratio" not in inspect.signature(getattr(zoo, name)).parameters, name


def test_one_name_is_one_thing() -> None:
    """But for the step size that makes any direction Prodigy's."""
    assert set(normopt.__all__) & set(zoo.__all__) == {"create", "list_optimizers", "Prodigy"}


@pytest.mark.parametrize(
    "step_size", [each for each in CONCRETE if issubclass(each, StepSize)], ids=lambda x: x.__name__
)
def test_step_sizes_say_which_sums_they_make(step_size: type[StepSize]) -> None:
    for method in ("survey", "measure"):
        is_overridden = getattr(step_size, method) is not getattr(StepSize, method)
        assert bool(getattr(step_size, f"{method}_sums")) == is_overridden
