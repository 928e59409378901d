"""Any norm, block by block."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from normopt.ingredient.registry import read
from normopt.ingredient.traits import like, trait
from normopt.ingredient.validate import check_count
from normopt.norms.base import Norm, Scale
from normopt.norms.spectral import Spectral
from normopt.numerics.blocks import Parts, cut_blocks, join_blocks, of_length
from normopt.numerics.eigen import Eps


@dataclass(frozen=True)
class PerBlock(Norm):
    """The largest of a norm over the blocks of a matrix: ``PerBlock(Spectral(), rows=64)`` for heads of 64 rows.

    Dual norm: the sum over all blocks. Duality map, projection and second moment: block by block, the second moments
    with shapes ``(..., blocks, ...)``. A last block that is smaller is padded with zeros, and a matrix that is smaller
    than a block is one block.

    Args:
        inner: the norm of a block, or its name. Its own scale is for the block's shape.
        rows: the number of rows of a block; ``None``: all.
        columns: the number of columns of a block; ``None``: all.
        scale: a further factor for the shape of the whole matrix: ``"unit"`` or ``"rms"`` for none; by keyword. See
            :class:`~normopt.norms.Norm`.
    """

    has_memory = like("inner")
    matrix_memory = like("inner")
    remembers_vectors = like("inner")
    scale: Scale = field(default="unit", kw_only=True)
    inner: Norm = Spectral()
    rows: int | None = None
    columns: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        read(self, "inner", Norm)
        for name in ("rows", "columns"):
            if getattr(self, name) is not None:
                check_count(self, name, getattr(self, name))

    @trait
    def rotation_invariant(self) -> bool:
        """False if the matrix is cut: blocks change with the basis."""
        return self.inner.rotation_invariant and self.rows is None and self.columns is None

    def cut(self, x: Tensor) -> Tensor:
        """``x`` of shape ``(..., out, in)`` as blocks ``(..., blocks, rows, columns)``."""
        return cut_blocks(x, *self._parts(x.shape))

    def join(self, blocks: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The inverse of ``cut`` for a matrix whose ``shape`` ends in ``(out, in)``."""
        return join_blocks(blocks, shape, *self._parts(shape))

    def _parts(self, shape: tuple[int, ...]) -> tuple[Parts, Parts]:
        return of_length(shape[-2], self.rows), of_length(shape[-1], self.columns)

    def unit_rms(self, m: int, n: int) -> float:
        return 1.0

    def unit_norm(self, w: Tensor) -> Tensor:
        return self.inner.norm(self.cut(w)).amax(dim=-1)

    def unit_dual_norm(self, g: Tensor) -> Tensor:
        return self.inner.dual_norm(self.cut(g)).sum(dim=-1)

    def unit_dualize(self, g: Tensor) -> Tensor:
        return self.join(self.inner.dualize(self.cut(g)), g.shape)

    def unit_project(self, w: Tensor, radius: float) -> Tensor:
        return self.join(self.inner.project(self.cut(w), radius), w.shape)

    def second_moment(self, g: Tensor) -> tuple[Tensor, ...]:
        """The second moments of all blocks, shapes ``(..., blocks, ...)``."""
        return self.inner.second_moment(self.cut(g))

    def unit_roots(self, stats: tuple[Tensor, ...], eps: Eps) -> tuple[Tensor, ...]:
        """The roots of all blocks."""
        return self.inner.unit_roots(stats, eps)

    def unit_divide(self, m: Tensor, roots: tuple[Tensor, ...], out: Tensor | None = None) -> Tensor:
        return self.join(self.inner.divide(self.cut(m), roots, out), m.shape)

    def unit_lengthening(self, g: Tensor, roots: tuple[Tensor, ...]) -> Tensor:
        """How much the inner norm lengthens each block, shape ``(..., blocks)``."""
        return self.inner.unit_lengthening(self.cut(g), roots)

    def unit_update_rms(self, m: int, n: int) -> float:
        """The root of the mean square over all blocks, of which the last may be smaller."""
        (high, height), (wide, width) = self._parts((m, n))
        heights = [height] * (high - 1) + [m - (high - 1) * height]
        widths = [width] * (wide - 1) + [n - (wide - 1) * width]
        squares = sum(self.inner.unit_update_rms(a, b) ** 2 * a * b for a in heights for b in widths)
        return math.sqrt(squares / max(m * n, 1)) * self.inner.factor((height, width))

    def steepness(self, g: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """The sum of the steepness of all blocks."""
        return self.inner.steepness(self.cut(g), state).sum(dim=-1) * self.factor(g.shape)

    @torch.no_grad()
    def initialize_(self, w: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Initialize every block by its norm. Returns ``w``."""
        each = self.cut(torch.empty_like(self._matrix(w), dtype=torch.promote_types(w.dtype, torch.float32)))
        return w.copy_(self.join(self.inner.initialize_(each, generator), w.shape) * self.factor(w.shape))
