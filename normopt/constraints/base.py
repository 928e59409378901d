"""What a constraint is: what happens to weights beside the update."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from normopt.ingredient.base import Ingredient
from normopt.ingredient.stage import Context, Direction, Rate
from normopt.ingredient.traits import overrides
from normopt.ingredient.view import View


class Constraint(Ingredient):
    """What happens to the weights beside the update. Override any of these methods; the others cost nothing.

    In order: ``whole`` (whenever weights are looked at), ``gradient`` (before momentum and memory), ``update``,
    ``shrink``, then the step ``w <- shrink w - length d``, then ``weight``. Tensors have the batch's layout
    ``(..., out, in)`` and are never modified in place; a constraint's own state is, as a stage's.
    """

    #: What one entry of the result depends on, as for stages: ``"entry"``, ``"row"`` ...
    reduces: ClassVar[str] = "matrix"
    #: Whether it holds only if the step's length is the rate times a constant.
    needs_bounded_step: ClassVar[bool] = False
    #: Bounds beside an optimizer's own constraints are applied in the order of this number.
    place: ClassVar[int] = 0

    def whole(self, w: Tensor, state: dict[str, Tensor]) -> Tensor:
        """The weights, of which ``w`` in float32 or better is what the parameters have room for."""
        return w

    def gradient(self, g: Tensor, context: Context) -> Tensor:
        """The gradient that the optimizer works with."""
        return g

    def update(self, d: Tensor, context: Context) -> tuple[Tensor, Rate]:
        """The update ``d``, to be multiplied by ``-length``, and a factor of the weights beside ``shrink``.

        The context has the weights and the raw gradient. A decay that depends on the update returns its factor here, a
        number or a tensor that broadcasts to the weights; 1.0 is no decay.
        """
        return d, 1.0

    def shrink(self, rate: Rate) -> Rate:
        """What the weights are multiplied by before the update is added."""
        return 1.0

    def init_state(self, x: Tensor, weights: Callable[[], Tensor]) -> dict[str, Tensor]:
        """State for each parameter, like a stage's; ``weights`` returns the initial weights."""
        return {}

    def weight(self, w: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        """The weights after the update ``w``, in float32 or better, brought to where they may live."""
        return w

    def seen_through(self, view: View) -> Constraint:
        """The same constraint of a parameter as it is stored, where the optimizer sees it through ``view``."""
        return self

    def check_composes(self, direction: Direction, reach: float | None) -> None:
        """Raise a ``ValueError`` for a direction and a step size's ``reach`` that this constraint cannot work with."""

    def overrides(self, *methods: str) -> bool:
        """Whether this constraint does anything in one of ``methods``."""
        return overrides(self, Constraint, *methods)
