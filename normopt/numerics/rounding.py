"""Stochastic rounding to bfloat16, which is unbiased."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: The number of bits of float32's fraction that bfloat16 lacks.
LOST = 16

#: Odd constants of integer hashes: Weyl's sequence of the golden ratio, and the multipliers of "lowbias32" (Wellons).
GOLDEN, FIRST, SECOND = 0x9E3779B1 - 2**32, 0x7FEB352D, 0x846CA68B - 2**32


def stochastically(x: Tensor, dtype: torch.dtype, step: Any, salt: int = 0, first: int = 0) -> Tensor:
    """``x`` in bfloat16, rounded up or down with probabilities that make the expected value ``x``.

    The random bits are a hash of position, step and salt: no random generator is used, and a step that is repeated
    rounds in the same way.

    Args:
        x: any tensor; ``inf`` and ``nan`` are kept.
        dtype: the dtype of the result; any other than bfloat16 is rounded to nearest.
        step: the number of the step, a number or a 0-dimensional tensor.
        salt: a number that differs between the tensors of one step.
        first: the position of the first entry, where ``x`` is a part of a tensor.
    """
    if dtype != torch.bfloat16:
        return x.to(dtype)
    x = x.float().contiguous()
    bits = x.view(torch.int32)
    place = torch.arange(first, first + x.numel(), device=x.device).to(torch.int32).view(x.shape)
    noise = _hash(place, step, salt)
    rounded = ((bits + (noise & ((1 << LOST) - 1))) & -(1 << LOST)).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(dtype)


def _hash(place: Tensor, step: Any, salt: int) -> Tensor:
    """Random bits for each position."""
    start = step.to(torch.int32) if isinstance(step, Tensor) else torch.tensor(int(step), dtype=torch.int32)
    return _mixed(_mixed(place * GOLDEN) + _mixed(start * GOLDEN + salt))


def _mixed(bits: Tensor) -> Tensor:
    """An integer hash in which each bit depends on all bits; int32 products wrap around."""
    for shift, factor in ((16, FIRST), (15, SECOND)):
        bits = (bits ^ ((bits >> shift) & ((1 << (32 - shift)) - 1))) * factor
    return bits ^ ((bits >> 16) & 0xFFFF)
