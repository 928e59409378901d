"""Stochastic rounding to bfloat16, which is unbiased."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

#: The number of bits of float32's fraction that bfloat16 lacks.
LOST = 16

#: Odd constants of integer hashes: Weyl's sequence of the golden ratio, and the multipliers of "lowbias32" (Wellons).
GOLDEN, FIRST, SECOND = 0x9E3779B1 - 2**32, 0x7FEB352D, 0x846CA68B - 2**32


def stochastically(x: Tensor, dtype: torch.dtype, step: Any, salt: int = 0, where: Tensor | None = None) -> Tensor:
    """``x`` in bfloat16, rounded up or down with probabilities that make the expected value ``x``.

    The random bits are a hash of place, step and salt: no random generator is used, and a step that is repeated rounds
    in the same way.

    Args:
        x: any tensor; ``inf`` and ``nan`` are kept.
        dtype: the dtype of the result; any other than bfloat16 is rounded to nearest.
        step: the number of the step, a number or a 0-dimensional tensor.
        salt: a number that differs between the tensors of one step.
        where: the place of each entry, see :func:`places`; or of each row, column or matrix of ``x``, whose entries are
            then counted from it. By default ``x`` is all there is.
    """
    if dtype != torch.bfloat16:
        return x.to(dtype)
    x = x.float().contiguous()
    bits = x.view(torch.int32)
    noise = _hash(_each(x, places(0, x.shape, device=x.device) if where is None else where), step, salt)
    rounded = ((bits + (noise & ((1 << LOST) - 1))) & -(1 << LOST)).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(dtype)


def places(
    number: int,
    shape: Sequence[int],
    part: Sequence[Sequence[tuple[int, int]]] | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """An integer for each entry of a tensor that is the same wherever, and with whatever else, it is computed.

    Args:
        number: of the tensor among all of them.
        shape: of the whole tensor.
        part: the runs of indices ``(begin, end)`` that are here, for each dimension; by default all.
        device: of the result.
    """
    found, stride = torch.zeros((), dtype=torch.int64, device=device), 1
    for dim in reversed(range(len(shape))):
        runs = [(0, shape[dim])] if part is None else part[dim]
        along = [torch.arange(begin, end, device=device) for begin, end in runs] or [found.new_empty(0)]
        found = found + (torch.cat(along) * stride).view(-1, *[1] * (len(shape) - 1 - dim))
        stride *= shape[dim]
    start = torch.tensor((number * GOLDEN + 2**31) % 2**32 - 2**31, dtype=torch.int32, device=device)
    return found.to(torch.int32) + _mixed(start)


def _each(x: Tensor, where: Tensor) -> Tensor:
    """A place for each entry of ``x``: those given, or the first that each entry stands for."""
    if where.shape == x.shape:
        return where
    if not where.numel():  # sums over no entries
        return torch.zeros(x.shape, dtype=torch.int32, device=x.device)
    if where.ndim == x.ndim and all(a in (1, b) for a, b in zip(x.shape, where.shape, strict=True)):
        for dim, size in enumerate(x.shape):
            where = where.narrow(dim, 0, min(size, where.shape[dim]))
        return where
    # State of another shape: the entries of each matrix are counted from a place of its own.
    first = where.reshape(x.shape[0], -1)[:, :1] if x.numel() else where.new_empty(x.shape[0], 1)
    count = torch.arange(math.prod(x.shape[1:]), device=x.device).to(torch.int32)
    return (_mixed(first) + count).view(x.shape)


def _hash(place: Tensor, step: Any, salt: int) -> Tensor:
    """Random bits for each position."""
    start = step.to(torch.int32) if isinstance(step, Tensor) else torch.tensor(int(step), dtype=torch.int32)
    return _mixed(_mixed(place * GOLDEN) + _mixed(start * GOLDEN + salt))


def _mixed(bits: Tensor) -> Tensor:
    """An integer hash in which each bit depends on all bits; int32 products wrap around."""
    for shift, factor in ((16, FIRST), (15, SECOND)):
        bits = (bits ^ ((bits >> shift) & ((1 << (32 - shift)) - 1))) * factor
    return bits ^ ((bits >> 16) & 0xFFFF)
