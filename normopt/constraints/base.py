"""The base class of constraints."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from normopt.ingredient.base import Ingredient
from normopt.ingredient.stage import Context, Direction, Rate
from normopt.ingredient.traits import overrides
from normopt.ingredient.view import View


class Constraint(Ingredient):
    """A change of gradients, updates or weights, apart from the step itself.

    Methods that are not overridden cost nothing. In order: ``whole`` (whenever weights are read), ``gradient`` (before
    momentum), ``update``, ``shrink``, then the step ``w <- shrink w - length d``, then ``weight``. Tensors have the
    batch's layout ``(..., out, in)`` and are never modified in place; the constraint's own state is updated in place.
    """

    #: What one entry of the result depends on, as for stages: ``"entry"``, ``"row"`` ...
    reduces: ClassVar[str] = "matrix"
    #: Whether it asks for the weights, or changes them other than by ``shrink``. On sharded models they are then
    #: brought to where it runs; with False, asking for them is an error.
    sees_weights: ClassVar[bool] = True
    #: Whether the constraint holds only if the length of a step is the rate times a constant.
    needs_bounded_step: ClassVar[bool] = False
    #: Whether ``update`` may make an update longer than the direction's norm lets it be.
    lengthens: ClassVar[bool] = False
    #: Whether ``weight`` compares with the weights before the step, ``context.w``, which cost a copy.
    compares: ClassVar[bool] = False
    #: The order of bounds (those that a model or a geometry adds to an optimizer's constraints): the smallest first.
    #: At 2 it rounds weights, and a rule has one such constraint at most.
    place: ClassVar[int] = 0

    def whole(self, w: Tensor, state: dict[str, Tensor]) -> Tensor:
        """The full-precision ("master") weights: ``w`` plus what this constraint keeps of them in its state.

        ``w`` are the parameters, in float32 or better. Kahan summation adds its compensation.
        """
        return w

    def gradient(self, g: Tensor, context: Context) -> Tensor:
        """The gradient that all other ingredients get (L2 adds its part)."""
        return g

    def update(self, d: Tensor, context: Context) -> tuple[Tensor, Rate]:
        """The update ``d``, before it is multiplied by ``-length``, and one more factor of the weights.

        The factor, by which ``shrink`` is multiplied, is for decays that depend on the update: a number or a tensor
        that broadcasts to the weights; 1.0 is no decay. The context has the weights and the raw gradient.
        """
        return d, 1.0

    def shrink(self, rate: Rate) -> Rate:
        """The factor by which the weights are multiplied before the update is added."""
        return 1.0

    def init_state(self, x: Tensor, weights: Callable[[], Tensor]) -> dict[str, Tensor]:
        """The state of a batch ``x`` of shape ``(..., out, in)``; ``weights`` returns the initial weights."""
        return {}

    def weight(self, w: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        """The weights after the update, ``w`` in float32 or better, projected to where they may live.

        ``context.w`` are those before the step where the constraint ``compares`` with them.
        """
        return w

    def seen_through(self, view: View) -> Constraint:
        """The constraint to use where the optimizer sees the parameter through ``view``; this one is for the parameter
        as it is stored.
        """
        return self

    def check_composes(self, direction: Direction, reach: float | None) -> None:
        """Raise a ``ValueError`` if this constraint does not work with the direction or the step size's ``reach``."""

    def overrides(self, *methods: str) -> bool:
        """Whether this constraint does anything in one of ``methods``; if not, they are not called."""
        return overrides(self, Constraint, *methods)
