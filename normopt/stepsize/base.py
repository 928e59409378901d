"""The base class of step sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from normopt.ingredient.base import Ingredient
from normopt.ingredient.stage import Context, Direction, Rate, Stage
from normopt.numerics.lengths import euclidean

#: The state of the whole optimizer: 0-dimensional tensors by name.
Shared = dict[str, Tensor]

#: The same as ingredients read it: floats where reading a tensor's value is free, else the tensors themselves.
Numbers = Mapping[str, Any]


def double(device: torch.device) -> torch.dtype:
    """The dtype of numbers of the whole optimizer: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


class Weighed(NamedTuple):
    """The result of ``weigh``: the gradients for momentum and for second moments, and the factor of an ``eps``."""

    momentum: Tensor
    memory: Tensor
    scale: Rate = 1.0


class StepSize(Ingredient):
    """The length of a step, in units of the direction: ``w <- w - length * d``.

    At each step every batch first gets its ``rate``. Two reductions over all tensors may follow: ``survey`` returns a
    batch's summands from the gradients, before momentum; ``measure`` from the directions, before any weight moves.
    After each of them ``conclude`` turns the sums over all batches into the numbers ``shared`` that the other methods
    get. ``weigh`` rescales a gradient for momentum and second moments, ``length`` is the factor of the direction.
    Methods that are not overridden cost nothing.
    """

    #: As for stages; ``"entry"`` if one length serves all entries, ``"all"`` if each matrix has its own.
    reduces: ClassVar[str] = "matrix"
    #: Whether it asks for the weights. On sharded models they are then brought to where it runs; with False, asking for
    #: them is an error.
    sees_weights: ClassVar[bool] = True
    #: What the length is proportional to, apart from the learning rate, as ``describe`` shows it; ``""``: nothing.
    times: ClassVar[str] = ""
    #: Names of the numbers from ``conclude`` that a momentum may read, see ``Momentum.needs``.
    provides: ClassVar[frozenset[str]] = frozenset()
    #: The names of the summands that ``survey`` returns, and those of ``measure``: on sharded models they are added up
    #: over all processes, also those that have nothing to add.
    survey_sums: ClassVar[tuple[str, ...]] = ()
    measure_sums: ClassVar[tuple[str, ...]] = ()

    @property
    def reach(self) -> float | None:
        """The length of a step divided by the learning rate, if that is one number for all steps and tensors."""
        return None

    def check_composes(self, direction: Direction) -> None:
        """Raise a ``ValueError`` for a direction that this step size does not work with; options are resolved."""

    def init_state(self, x: Tensor, weights: Callable[[], Tensor], direction: Stage) -> dict[str, Tensor]:
        """The state of a batch ``x`` of shape ``(..., out, in)``; ``weights`` returns the initial weights."""
        return {}

    def init_shared(self) -> dict[str, float]:
        """The state of the whole optimizer, kept in every param group under these names as 0-dimensional tensors."""
        return {}

    def rate(self, lr: Rate, step: float, shared: Numbers) -> Rate:
        """The learning rate of this step, for constraints too; ``shared`` is the state before ``conclude``."""
        return lr

    def survey(self, state: dict[str, Tensor], context: Context, shared: Numbers) -> dict[str, Tensor]:
        """The first reduction: this batch's summands, by name, from its gradient, before momentum.

        Args:
            state: the batch's tensors; those of this step size are updated in place.
            context: the gradient, the weights, the rate, the direction.
            shared: the state of the whole optimizer: floats where reading a tensor's value is free, else 0-dimensional
                tensors.
        """
        return {}

    def measure(self, x: Tensor, d: Tensor, context: Context) -> dict[str, Tensor]:
        """The second reduction: summands, by name, from momentum's output ``x`` and its direction ``d``."""
        return {}

    def conclude(self, sums: dict[str, Tensor], shared: Shared) -> Shared:
        """The result of a reduction: numbers for ``weigh`` and ``length``, and new state of the whole optimizer.

        Called after ``survey`` and after ``measure``, if overridden, before any weight moves.

        Args:
            sums: the sums over all batches, 0-dimensional tensors by name.
            shared: the state of the whole optimizer, and after ``measure`` also the result of the first call.

        Returns:
            0-dimensional tensors by name; names of ``init_shared`` are kept for the next step.
        """
        return shared

    def weigh(self, g: Tensor, context: Context, shared: Numbers) -> Weighed:
        """The gradient, rescaled, for momentum and for second moments."""
        return Weighed(g, g)

    def length(self, x: Tensor, d: Tensor, context: Context, shared: Numbers) -> Rate:
        """The factor of the direction: a number, or one number for each matrix, shape ``(..., 1, 1)``."""
        return context.rate

    def overrides(self, method: str) -> bool:
        """Whether this step size does anything in ``method``; if not, the method is not called."""
        return getattr(type(self), method) is not getattr(StepSize, method)


def _sum_of_squares(x: Tensor) -> Tensor:
    """The sum of all squares, in the dtype of numbers of the whole optimizer."""
    norm = euclidean(x, tuple(range(x.ndim)))
    return norm.to(double(norm.device)) ** 2
