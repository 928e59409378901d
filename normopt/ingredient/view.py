"""How a parameter is seen as one or more (out x in) matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from normopt.ingredient.base import Ingredient
from normopt.ingredient.registry import get, nearest


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
        split: cut ``out`` into this many matrices of equal size, each with its own norm: ``split=3`` for a fused QKV
            matrix, ``split=n_heads`` for heads. A tuple of numbers of rows cuts into parts of these heights, such as
            query, key and value of grouped-query attention, ``split=(64, 16, 16)``: the direction is found for each
            part by itself, while momentum, step size and constraints see one matrix.
        groups: cut the first dimension, as it is stored, into this many matrices: the groups of a convolution, which
            is a block-diagonal operator, also where it is transposed.

    Raises:
        TypeError: ``flatten`` or ``transpose`` is no bool, ``groups`` no whole number, or ``split`` neither a whole
            number nor several.
        ValueError: a number is less than 1, ``split`` is empty, or ``groups`` are wanted of a stack, ``flatten=False``.
    """

    flatten: bool | None = None
    transpose: bool = False
    split: int | tuple[int, ...] = 1
    groups: int = 1

    def __post_init__(self) -> None:
        for name, kinds, wanted in (
            ("flatten", (bool, type(None)), "True, False or None"),
            ("transpose", (bool,), "True or False"),
        ):
            if not isinstance(getattr(self, name), kinds):
                raise TypeError(f"View: {name} must be {wanted}, got {getattr(self, name)!r}")
        given: Any = self.split
        if isinstance(given, (tuple, list)):
            if not given:
                raise ValueError("View: split must name the rows of one part at least, got ()")
            object.__setattr__(self, "split", tuple(given))
        numbers = [("split", number) for number in (given if isinstance(given, (tuple, list)) else (given,))]
        for name, number in (*numbers, ("groups", self.groups)):
            if isinstance(number, bool) or not isinstance(number, int):
                several = ", or a tuple with the rows of each part" if name == "split" else ""
                raise TypeError(f"View: {name} must be a whole number{several}, got {getattr(self, name)!r}")
            if number < 1:
                raise ValueError(f"View: {name} must be at least 1, got {getattr(self, name)!r}")
        if self.groups > 1 and self.flatten is False:
            raise ValueError(f"View: groups={self.groups} cut one matrix, not the stack that flatten=False says")

    @property
    def keeps_order(self) -> bool:
        """Whether a contiguous stack can be seen in the parameter's own shape without copying."""
        return self.groups == 1 or not self.transpose

    @property
    def equal_parts(self) -> int:
        """How many matrices of the stack one matrix becomes; parts of unequal height stay together."""
        return self.split if isinstance(self.split, int) else 1

    @property
    def heights(self) -> tuple[int, ...]:
        """The rows of the parts of each matrix of the stack, where they are unequal; empty where it has no parts."""
        return () if isinstance(self.split, int) else self.split

    def cut(self, stack: Tensor) -> tuple[Tensor, ...]:
        """A stack of shape ``(..., out, in)`` by parts, one stack for each height; they share its memory."""
        return torch.split(stack, [*self.heights], dim=-2) if sum(self.heights) == stack.shape[-2] else (stack,)

    def shape(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """The shape ``(matrices, out, in)`` of the stack that a parameter of ``shape`` is seen as.

        Raises:
            ValueError: ``out`` cannot be cut as ``split`` says, or the first dimension into ``groups``.
        """
        if len(shape) < 2:
            return (1, 1, math.prod(shape))
        stacked = self.flatten is False
        if shape[0] % self.groups:
            raise ValueError(
                f"View: the {shape[0]} rows of shape {tuple(shape)} cannot be cut into {self.groups} groups"
            )
        lead, m, n = (self.groups, shape[0] // self.groups, math.prod(shape[1:]))
        lead, m, n = (math.prod(shape[:-2]), *shape[-2:]) if stacked else (lead, m, n)
        m, n = (n, m) if self.transpose else (m, n)
        if m != sum(self.heights or (m,)) or m % self.equal_parts:
            raise ValueError(f"View: the {m} rows of shape {tuple(shape)} cannot be cut into split={self.split} parts")
        return (lead * self.equal_parts, m // self.equal_parts, n)

    def apply(self, x: Tensor) -> Tensor:
        """``x`` as a stack of shape ``(matrices, out, in)``; it shares memory where strides allow."""
        shape = self.shape(x.shape)
        if x.ndim < 2:
            return x.reshape(shape)
        if self.flatten is not False:
            x = x.reshape(self.groups, x.shape[0] // self.groups, math.prod(x.shape[1:]))
        return (x.mT if self.transpose else x).reshape(shape)

    def invert(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The inverse of ``apply``: a contiguous stack ``x`` as a parameter of ``shape``; it shares memory, if
        ``keeps_order``.
        """
        if len(shape) < 2:
            return x.view(shape)
        lead = tuple(shape[:-2]) if self.flatten is False else (self.groups,) if self.groups > 1 else ()
        whole = x.view(*lead, x.shape[-2] * self.equal_parts, x.shape[-1])
        whole = whole.mT if self.transpose else whole
        return whole.view(shape) if self.keeps_order else whole.reshape(shape)


def is_small(shape: tuple[int, ...], role: str = "") -> bool:
    """Whether a parameter is a vector or a scalar: by its dimensions, or by its role, as the gains of weight_norm."""
    return len(shape) < 2 or role in ("vector", "scalar")


def view_of(given: Any, base: View = View()) -> View:
    """A view from itself, from its text, or from a table of fields, which is laid over ``base``.

    Raises:
        TypeError, ValueError: it is none of these, or has a field that no view has or a value that no view takes.
    """
    if not isinstance(given, Mapping):
        return get(View, given)
    known = [field.name for field in fields(View)]
    for name in given.keys() - known:
        raise TypeError(f"View: no field {name!r}; {nearest(str(name), known)}")
    return replace(base, **given)
