"""What a momentum is: a gradient in, the gradient to be trusted out."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from normopt.ingredient.stage import Context, Stage


class Momentum(Stage):
    """A gradient in, the gradient to be trusted out, entry by entry; it also serves as a stage of a ``Chain``."""

    reduces = "entry"

    @property
    def needs(self) -> frozenset[str]:
        """Names of numbers of the whole optimizer that it reads: the step size must be one that ``provides`` them."""
        return frozenset()

    @property
    def averages(self) -> frozenset[str]:
        return frozenset({"momentum"})

    def apply(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        """The identity: an average of equal gradients is that gradient."""
        return x


@dataclass(frozen=True)
class NoMomentum(Momentum):
    """The gradient itself."""

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        return x
