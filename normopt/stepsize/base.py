"""What a step size is: the learning rate, and what multiplies it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from normopt.ingredient.base import Ingredient
from normopt.ingredient.stage import Context, Direction, Rate, Stage
from normopt.ingredient.traits import overrides
from normopt.numerics.lengths import euclidean

#: The state of the whole optimizer: 0-dimensional tensors by name.
Shared = dict[str, Tensor]

#: The same as ingredients read it: floats where reading a tensor's value is free, else the tensors themselves.
Numbers = Mapping[str, Any]


def double(device: torch.device) -> torch.dtype:
    """The dtype of numbers that belong to the whole optimizer: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


class Weighed(NamedTuple):
    """A gradient as momentum and as memory should see it, and what it was multiplied by, which an eps follows."""

    momentum: Tensor
    memory: Tensor
    scale: Rate = 1.0


class StepSize(Ingredient):
    """The length of a step, in units of the direction: ``w <- w - length * d``.

    At each step the loop asks every batch for its ``rate``. Step sizes that override ``survey`` then see all gradients,
    those that override ``measure`` all directions; ``conclude`` gets the sums over all batches before any weight moves.
    ``weigh`` changes what momentum and memory see of a gradient, ``length`` says how far to go.
    """

    #: As for stages; ``"entry"`` when one length serves all entries, ``"all"`` when it differs from matrix to matrix.
    reduces: ClassVar[str] = "matrix"
    #: What the length is proportional to, beside the learning rate, as ``describe`` and error messages say it.
    times: ClassVar[str] = ""
    #: Names of numbers that ``conclude`` returns for momenta to read, see ``Momentum.needs``.
    provides: ClassVar[frozenset[str]] = frozenset()

    @property
    def reach(self) -> float | None:
        """The length of a step over the learning rate, where that is one number for all steps and tensors."""
        return None

    def check_composes(self, direction: Direction) -> None:
        """Raise a ``ValueError`` for directions that this step size makes no sense with; without options in either."""

    def init_state(self, x: Tensor, weights: Callable[[], Tensor], direction: Stage) -> dict[str, Tensor]:
        """State for each parameter, like a stage's; ``weights`` returns the initial weights."""
        return {}

    def init_shared(self) -> dict[str, float]:
        """State of the whole optimizer; it is kept in the param groups under these names, as 0-dimensional tensors."""
        return {}

    def rate(self, lr: Rate, step: float, shared: Numbers) -> Rate:
        """The learning rate of this step, as the constraints see it too; ``shared`` is from before ``conclude``."""
        return lr

    def survey(self, state: dict[str, Tensor], context: Context, shared: Numbers) -> dict[str, Tensor]:
        """This batch's summands, by name, from its gradient, before momentum and memory see it.

        Args:
            state: the batch's tensors; this step size's own are updated in place.
            context: the gradient, the weights, the rate, the direction.
            shared: the state of the whole optimizer, floats where the host may look, else 0-dimensional tensors.
        """
        return {}

    def measure(self, x: Tensor, d: Tensor, context: Context) -> dict[str, Tensor]:
        """This batch's summands, by name, from the averaged gradient ``x`` and its direction ``d``."""
        return {}

    def conclude(self, sums: dict[str, Tensor], shared: Shared) -> Shared:
        """What the methods below get, from the sums over all batches and the state of the whole optimizer.

        Names of ``init_shared`` are kept for the next step.
        """
        return shared

    def weigh(self, g: Tensor, context: Context, shared: Numbers) -> Weighed:
        """The gradient as momentum and as memory should see it."""
        return Weighed(g, g)

    def length(self, x: Tensor, d: Tensor, context: Context, shared: Numbers) -> Rate:
        """What multiplies the direction: a number, or one for each matrix, shape ``(..., 1, 1)``."""
        return context.rate

    def overrides(self, method: str) -> bool:
        """Whether this step size does anything in ``method``."""
        return overrides(self, StepSize, method)


def _square(x: Tensor) -> Tensor:
    """The sum of all squares, as a number of the whole optimizer."""
    norm = euclidean(x, tuple(range(x.ndim)))
    return norm.to(double(norm.device)) ** 2
