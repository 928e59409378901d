"""A rule: the answers to the four questions, and how the parameter is seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import Any

from torch import Tensor

from normopt.constraints.base import Constraint
from normopt.directions.coordinates import InParts
from normopt.ingredient.base import Ingredient, option
from normopt.ingredient.registry import get, parse
from normopt.ingredient.stage import Direction
from normopt.ingredient.view import View, is_small, view_of
from normopt.momentum.averages import EMA
from normopt.momentum.base import Momentum, NoMomentum
from normopt.norms.spectral import Spectral
from normopt.stepsize.base import StepSize
from normopt.stepsize.fixed import Constant

#: How many settings of its options a rule keeps in mind.
REMEMBERED = 256


@dataclass(frozen=True)
class Rule(Ingredient):
    """Everything that tells how a parameter moves. Its repr is what a param group and a checkpoint hold.

    Args:
        norm: which direction is steepest.
        momentum: which gradient we trust.
        step_size: how far we go.
        constraint: where the weights may live; several are applied in order.
        view: how a parameter is seen as (out x in) matrices.
    """

    norm: Direction = Spectral()
    momentum: Momentum = NoMomentum()
    step_size: StepSize = Constant()
    constraint: tuple[Constraint, ...] = ()
    view: View = View()

    def options(self) -> frozenset[str]:
        """The names of the param-group options that the ingredients read."""
        return self._names

    @cached_property
    def _names(self) -> frozenset[str]:
        return super().options()

    @cached_property
    def _resolved(self) -> dict[tuple[Any, ...], Rule]:
        return {}

    @cached_property
    def open_parts(self) -> tuple[Spectral, ...]:
        """The spectral norms whose products have a form or a dtype that is chosen by shape and device."""
        return tuple(part for part in self.every_part() if isinstance(part, Spectral) and part.is_open)

    def at(self, group: Mapping[str, Any]) -> Rule:
        """``resolve`` for a param group; the same object for the same numbers, as long as there are not many."""
        values, known = tuple([group.get(name) for name in self._names]), self._resolved
        if not all(map(is_plain, values)):
            return self.resolve(group)
        key = values, tuple(map(type, values))  # True is equal to 1.0, and another Nesterov
        if key not in known:
            if len(known) >= REMEMBERED:
                known.clear()
            known[key] = self.resolve(group)
        return known[key]

    def bounded(self, bounds: Any) -> Rule:
        """This rule with more constraints, given as those of ``updated`` but for parameters as they are stored."""
        seen = (bound.seen_through(self.view) for bound in _constraints(bounds))
        several = sorted((*self.constraint, *seen), key=lambda constraint: constraint.place)
        return replace(self, constraint=tuple(several))

    def updated(self, given: Mapping[str, Any]) -> Rule:
        """This rule with the ingredients that ``given`` names, each a string, a number, ``None`` or an object."""
        return replace(self, **{name: _READERS[name](given[name]) for name in INGREDIENTS & given.keys()})

    def __post_init__(self) -> None:
        rounding = [constraint for constraint in self.constraint if constraint.place == 2]
        if len(rounding) > 1:
            raise ValueError(f"{rounding[0]} and {rounding[1]} both round the weights: leave one of them out")
        for constraint in self.constraint:
            if constraint.needs_bounded_step and self.step_size.times:
                raise ValueError(f"{constraint} needs steps of bounded length; those of {self.step_size} are not")
            longer = [other for other in self.constraint if other.lengthens]
            if constraint.needs_bounded_step and longer:
                raise ValueError(
                    f"{constraint} needs steps of bounded length; {longer[0]} can make them longer: leave one out"
                )
            constraint.check_composes(self.direction, self.step_size.reach)
        if self.momentum.looks_back and self.step_size.overrides("weigh"):
            raise ValueError(f"{self.momentum} compares two gradients, of which {self.step_size} would weigh only one")
        if not self.momentum.needs <= self.step_size.provides:
            raise ValueError(
                f"{self.momentum} takes its decay rate from the step size Storm, which {self.step_size} is not; "
                "give a beta"
            )
        # Not a functools.cached_property, which compilers do not see through.
        acting = {m: tuple(c for c in self.constraint if c.overrides(m)) for m in ("gradient", "update", "weight")}
        object.__setattr__(self, "_acting", acting)

    @property
    def direction(self) -> Direction:
        """``norm``, part by part where the view says that a matrix has parts."""
        by_part = self.view.heights and self.norm.reduces != "entry"
        return InParts(self.norm, self.view) if by_part else self.norm

    def acting(self, method: str) -> tuple[Constraint, ...]:
        """The constraints that do anything in ``gradient``, ``update`` or ``weight``."""
        return self._acting[method]  # type: ignore[attr-defined]

    @property
    def elementwise(self) -> bool:
        """Whether every entry moves by itself, so that tensors of any shape can be laid end to end."""
        levels = [self.norm.reduces, self.momentum.reduces, self.step_size.reduces]
        return {*levels, *(constraint.reduces for constraint in self.constraint)} == {"entry"}

    @cached_property
    def sees_weights(self) -> bool:
        """Whether an ingredient asks for the weights, or changes them other than by a factor."""
        return any(getattr(part, "sees_weights", False) for part in self.every_part())

    @cached_property
    def reads_inputs(self) -> bool:
        """Whether an ingredient reads statistics of the inputs of a layer."""
        return any(getattr(part, "reads_inputs", False) for part in self.every_part())

    def of_rows(self, shape: tuple[int, ...]) -> Rule | None:
        """What moves some of the first dimension of a parameter of ``shape``; ``None`` if it takes all of it."""
        view = self.view
        if len(shape) < 2 or (view.flatten is False and len(shape) > 2) or view.groups > 1 or view.heights:
            return None
        fitted = self.fitted(view.shape(shape)[1:])
        levels = {fitted.norm.reduces, fitted.momentum.reduces, fitted.step_size.reduces}
        levels |= {constraint.reduces for constraint in fitted.constraint}
        if levels - {"entry", "column" if view.transpose else "row"}:
            return None
        return replace(fitted, view=replace(view, split=view.split if view.transpose else 1))

    def init_state(self, x: Tensor, weights: Callable[[], Tensor]) -> dict[str, Tensor]:
        """The state of all ingredients for a batch ``x``, zero steps old.

        Raises:
            ValueError: two ingredients use one name, or one is called ``step``.
        """
        of_step = self.step_size.init_state(x, weights, self.direction)
        of_bounds = (constraint.init_state(x, weights) for constraint in self.constraint)
        parts = (self.momentum.init_state(x), self.direction.init_state(x), of_step, *of_bounds)
        names = ["step", *(name for part in parts for name in part)]
        if len(names) != len(set(names)):
            raise ValueError(f"{self}: two ingredients keep their state under one name, of {sorted(names)}")
        return {name: tensor for part in parts for name, tensor in part.items()}

    def whole(self, w: Tensor, state: dict[str, Tensor]) -> Tensor:
        """The full-precision ("master") weights: ``w``, the stored ones, plus what constraints keep of them."""
        for constraint in self.constraint:
            w = constraint.whole(w, state)
        return w

    @property
    def squares(self) -> bool:
        """Whether some ingredient keeps squares of gradients."""
        return any(getattr(part, "squares", False) for part in self.every_part())

    def averages(self, state: Mapping[str, Tensor]) -> list[str]:
        """The names of ``state`` that may be kept in fewer bits, see :attr:`normopt.ingredient.Stage.averages`."""
        known = self.momentum.averages | self.direction.averages
        return [name for name in state if name.rstrip("0123456789") in known]

    def check_fits(self, name: str, shape: tuple[int, ...], role: str = "") -> None:
        """Raise a ``ValueError`` unless a parameter of this shape can be seen and measured as the rule says.

        ``role`` is what it plays in a model; empty where parameters were given.
        """
        if is_small(shape, role) and not self.norm.takes_vectors and role:
            raise ValueError(
                f"{name} has shape {shape}, but {self.norm}, which its role {role!r} has been given, is a norm of "
                f"matrices. Give the role a norm of vectors, geometry={{{role!r}: 'max'}}, or the parameter, "
                "overrides={name: {'norm': 'max'}}."
            )
        if len(shape) < 2 and not self.norm.takes_vectors:
            raise ValueError(
                f"{name} has shape {shape}, but {self.norm} is a norm of matrices. Give vectors and scalars a norm of "
                "their own (a param group with norm='max' or 'euclidean'), or pass the model instead of its parameters."
            )
        if self.norm.needs_matrix and len(shape) > 2 and self.view.flatten is None and role:
            raise ValueError(
                f"{name} has shape {shape}, which {self.norm} could see in two ways. Say which, "
                "overrides={name: {'view': {'flatten': False}}} for a stack of matrices (experts), {'flatten': True} "
                "for one matrix with all dimensions but the first joined."
            )
        if self.norm.needs_matrix and len(shape) == 3 and self.view.flatten is None:
            raise ValueError(
                f"{name} has three dimensions {shape}, which {self.norm} could see in two ways. Say "
                "view=View(flatten=True) for a convolution, (out, in * k), or View(flatten=False) for a stack of "
                "matrices, or pass the model instead of its parameters."
            )
        self.view.shape(shape)


def is_plain(value: Any) -> bool:
    """Whether it can be told by its value whether it has changed."""
    return (
        value is None
        or isinstance(value, (int, float, str))
        or (isinstance(value, tuple) and all(map(is_plain, value)))
    )


INGREDIENTS = {field.name for field in fields(Rule)}


def _momentum(value: Any) -> Momentum:
    if value is None:
        return NoMomentum()
    if isinstance(value, (int, float)):
        return EMA(beta=option("momentum"))
    return get(Momentum, value)


def _constraints(value: Any) -> tuple[Constraint, ...]:
    if value is None:
        return ()
    several = value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    return tuple(get(Constraint, item) for item in several)


_READERS: dict[str, Callable[[Any], Any]] = {
    "norm": partial(get, Direction),
    "momentum": _momentum,
    "step_size": partial(get, StepSize),
    "constraint": _constraints,
    "view": view_of,
}


def rule_of(group: Mapping[str, Any]) -> Rule:
    """The rule that a param group holds as text."""
    rule = parse(group["rule"])
    assert isinstance(rule, Rule)
    return rule
