"""How a parameter is seen as one or more (out x in) matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from normopt.ingredient.base import Ingredient


@dataclass(frozen=True)
class View(Ingredient):
    """How a parameter is seen as a stack of ``(out, in)`` matrices.

    By default a matrix is one matrix, and a vector or scalar is a matrix with one row.

    Args:
        flatten: whether a tensor with more than two dimensions becomes one matrix by joining all dimensions but the
            first: a convolution ``(out, in, k, k)`` becomes ``(out, in * k * k)``. ``False``: the leading dimensions
            number a stack of matrices (experts). ``None``, the default: flatten, but norms of matrices refuse tensors
            with three dimensions, for which either reading is common.
        transpose: swap the last two dimensions: an embedding stores ``(vocabulary, dim)``, one row a token, where the
            operator has one column a token.
        split: cut ``out`` into this many matrices, each with its own norm: ``split=3`` for a fused QKV matrix,
            ``split=n_heads`` for heads.

    Raises:
        ValueError: ``split`` is less than 1.
    """

    flatten: bool | None = None
    transpose: bool = False
    split: int = 1

    def __post_init__(self) -> None:
        if self.split < 1:
            raise ValueError(f"View: split must be at least 1, got {self.split!r}")

    def shape(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """The shape ``(matrices, out, in)`` of the stack that a parameter of ``shape`` is seen as.

        Raises:
            ValueError: ``out`` cannot be cut into ``split`` equal parts.
        """
        if len(shape) < 2:
            return (1, 1, math.prod(shape))
        stacked = self.flatten is False
        lead, m, n = (math.prod(shape[:-2]), *shape[-2:]) if stacked else (1, shape[0], math.prod(shape[1:]))
        m, n = (n, m) if self.transpose else (m, n)
        if m % self.split:
            raise ValueError(f"View: the {m} rows of shape {tuple(shape)} cannot be cut into split={self.split} parts")
        return (lead * self.split, m // self.split, n)

    def apply(self, x: Tensor) -> Tensor:
        """``x`` as a stack of shape ``(matrices, out, in)``; it shares memory where strides allow."""
        shape = self.shape(x.shape)
        if x.ndim < 2:
            return x.reshape(shape)
        x = x if self.flatten is False else x.flatten(1)
        return (x.mT if self.transpose else x).reshape(shape)

    def invert(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The inverse of ``apply``: a contiguous stack ``x`` as a parameter of ``shape``; it shares memory."""
        if len(shape) < 2:
            return x.view(shape)
        lead = tuple(shape[:-2]) if self.flatten is False else ()
        whole = x.view(*lead, x.shape[-2] * self.split, x.shape[-1])
        return (whole.mT if self.transpose else whole).view(shape)
