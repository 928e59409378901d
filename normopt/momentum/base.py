"""The base class of momenta: a gradient in, an average of gradients out."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from normopt.ingredient.stage import Context, Stage


class Momentum(Stage):
    """A gradient in, an average of gradients out, entry by entry; it can also be a stage of a ``Chain``."""

    reduces = "entry"

    @property
    def needs(self) -> frozenset[str]:
        """Names of the numbers in ``context.shared`` that it reads; the step size must ``provide`` them."""
        return frozenset()

    @property
    def averages(self) -> frozenset[str]:
        return frozenset({"momentum"})

    def apply(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        """The identity: the average of equal gradients is that gradient."""
        return x


@dataclass(frozen=True)
class NoMomentum(Momentum):
    """No momentum: the gradient itself."""

    sees_weights = False

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        return x
