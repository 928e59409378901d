"""The largest row and the largest column of the (out x in) matrix as norms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from normopt.norms.base import Norm
from normopt.numerics.lengths import clip_norm, euclidean, normalize


@dataclass(frozen=True)
class _Slices(Norm):
    """The largest of the Euclidean norms of all slices along ``_dim``; the dual norm is the sum of these norms."""

    _abstract = True
    _dim: ClassVar[int]

    def unit_norm(self, w: Tensor) -> Tensor:
        sizes = euclidean(w, self._dim)
        return sizes.amax(dim=-1) if w.numel() else sizes.sum(dim=-1)

    def unit_dual_norm(self, g: Tensor) -> Tensor:
        return euclidean(g, self._dim).sum(dim=-1)

    def unit_dualize(self, g: Tensor) -> Tensor:
        return normalize(g, self._dim)

    def unit_project(self, w: Tensor, radius: float) -> Tensor:
        return clip_norm(w, self._dim, radius)

    def second_moment(self, g: Tensor) -> tuple[Tensor, ...]:
        """The sum of ``g^2`` over each slice, kept as a dimension of size 1."""
        return (torch.sum(g.square(), dim=self._dim, keepdim=True),)


@dataclass(frozen=True)
class Column(_Slices):
    """The largest column, ``max_j ||w_:j||``: the l1 -> l2 operator norm (Bernstein & Newhouse, Prop. 8).

    One column belongs to one input: for an embedding, seen as (dim x vocabulary), to one token. Dual norm: the sum of
    the columns' norms. Duality map: every column divided by its norm. Second moment: column sums of ``g^2``, shape
    (..., 1, in). Scale ``"rms"``: sqrt(out), the l1 -> RMS norm.
    """

    reduces = "column"
    _dim: ClassVar[int] = -2

    def unit_rms(self, m: int, n: int) -> float:
        return math.sqrt(m)

    def unit_update_rms(self, m: int, n: int) -> float:
        return 1.0 / math.sqrt(max(m, 1))


@dataclass(frozen=True)
class Row(_Slices):
    """The largest row, ``max_i ||w_i:||``: the l2 -> linf operator norm (Bernstein & Newhouse, Prop. 8).

    One row belongs to one output: for a language model's head, to one token's logit. Dual norm: the sum of the rows'
    norms. Duality map: every row divided by its norm. Second moment: row sums of ``g^2``, shape (..., out, 1). Scale
    ``"rms"``: 1/sqrt(in), the RMS -> linf norm.
    """

    reduces = "row"
    _dim: ClassVar[int] = -1

    def unit_rms(self, m: int, n: int) -> float:
        return 1.0 / math.sqrt(max(n, 1))

    def unit_update_rms(self, m: int, n: int) -> float:
        return 1.0 / math.sqrt(max(n, 1))
