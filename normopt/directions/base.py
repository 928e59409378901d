"""The base of directions whose result has a known size."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from normopt.ingredient.stage import Direction
from normopt.norms.entrywise import Euclidean


class UnitRMS(Direction):
    """A direction whose result has a root mean square of 1, for a gradient as large as those before it."""

    def rms(self, shape: tuple[int, ...]) -> float:
        """1."""
        return 1.0

    def steepness(self, g: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """``sqrt(numel) ||g||``, the dual of the root-mean-square norm."""
        return Euclidean().dual_norm(g)
