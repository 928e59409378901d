"""Semi-orthogonal updates whose rows have one length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from normopt.ingredient.registry import read
from normopt.ingredient.stage import Context, Direction
from normopt.ingredient.traits import like
from normopt.ingredient.validate import check_count
from normopt.norms.spectral import Spectral
from normopt.numerics.lengths import euclidean, normalize


@dataclass(frozen=True)
class EqualRows(Direction):
    """Aurora's polar factor: its rows are equally long, up to a few percent; of wide matrices, its columns.

    ``D_i = 1 / ||x_i||``; ``rounds`` times ``U = polar(D x)``, ``D_i <- D_i sqrt(in / out) / ||U_i||``; the result is
    the last ``U``, at the scale of ``norm``. Rows are within 4% of one length after 2 rounds, and within 1% after 3. A
    square matrix is left to its polar factor, whose rows have length 1; rows of 0 stay 0.
    Source: tilde-research/aurora-release.

    Args:
        norm: the spectral norm with its scale and the method of the polar factor.
        rounds: number of polar factors.
    """

    sees_weights = False
    needs_matrix = True
    degree = 0
    cell = like("norm")
    norm: Spectral = Spectral()
    rounds: int = 2

    def __post_init__(self) -> None:
        read(self, "norm", Spectral)
        check_count(self, "rounds", self.rounds)

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        m, n = x.shape[-2:]
        if m == n:
            return self.norm.dualize(x)
        rows = normalize(x if m > n else x.mT, -1)
        for i in range(self.rounds):
            u = self.norm.dualize(rows if m > n else rows.mT)
            if i + 1 < self.rounds:
                lengths = euclidean(u if m > n else u.mT, -1, keepdim=True)
                rows = rows * torch.where(lengths > 0, 1 / torch.where(lengths > 0, lengths, 1.0), 0.0)
        return u

    def rms(self, shape: tuple[int, ...]) -> float:
        """The norm's root mean square."""
        return self.norm.rms(shape)

    def steepness(self, g: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """The norm's, since the result has at most norm 1."""
        return self.norm.steepness(g, state)
