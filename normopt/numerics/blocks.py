"""Matrices cut into blocks, and joined again."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Parts(NamedTuple):
    """How one side of a matrix is cut: into ``number`` parts of ``length`` entries, the last one padded with zeros."""

    number: int
    length: int


def of_length(n: int, length: int | None) -> Parts:
    """Parts of a side of ``n`` with that length, or one part if the side is shorter or ``length`` is ``None``."""
    length = max(1, n if length is None else min(length, n))
    return Parts(max(1, -(-n // length)), length)


def of_equal_length(n: int, longest: int) -> Parts:
    """The fewest parts of a side of ``n`` that are no longer than ``longest``, all of one length."""
    number = max(1, -(-n // longest))
    return Parts(number, -(-n // number))


def cut_blocks(x: Tensor, rows: Parts, columns: Parts) -> Tensor:
    """``x`` of shape ``(..., out, in)`` as blocks ``(..., blocks, rows.length, columns.length)``, row by row."""
    right, below = columns.number * columns.length - x.shape[-1], rows.number * rows.length - x.shape[-2]
    x = torch.nn.functional.pad(x, (0, right, 0, below))
    return x.reshape(*x.shape[:-2], *rows, *columns).transpose(-3, -2).flatten(-4, -3)


def join_blocks(blocks: Tensor, shape: tuple[int, ...], rows: Parts, columns: Parts) -> Tensor:
    """The inverse of :func:`cut_blocks`; ``shape`` ends in ``(out, in)``."""
    grid = blocks.reshape(*blocks.shape[:-3], rows.number, columns.number, *blocks.shape[-2:])
    return grid.transpose(-3, -2).flatten(-4, -3).flatten(-2)[..., : shape[-2], : shape[-1]]
