"""Rounding to fewer bits that loses nothing on average."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: How many bits of float32's fraction bfloat16 does not have.
LOST = 16

#: Odd constants of integer hashes: Weyl's sequence of the golden ratio, and the multipliers of "lowbias32" (Wellons).
GOLDEN, FIRST, SECOND = 0x9E3779B1 - 2**32, 0x7FEB352D, 0x846CA68B - 2**32


def stochastically(x: Tensor, dtype: torch.dtype, step: Any, salt: int = 0, first: int = 0) -> Tensor:
    """``x`` in bfloat16, up or down with probabilities that make the expected value ``x``; other dtypes: to nearest.

    The random bits are a hash of place, step and salt: no generator is touched, on any device, and the same step
    rounds alike when it is taken again.

    Args:
        x: any tensor; ``inf`` and ``nan`` stay what they are.
        dtype: the dtype of the result.
        step: the number of the step, a number or a 0-dimensional tensor.
        salt: tells tensors of one step apart.
        first: the place of the first entry, for parts of a tensor.
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
    """Random bits for each place."""
    start = step.to(torch.int32) if isinstance(step, Tensor) else torch.tensor(int(step), dtype=torch.int32)
    return _mixed(_mixed(place * GOLDEN) + _mixed(start * GOLDEN + salt))


def _mixed(bits: Tensor) -> Tensor:
    """Each bit depends on all; int32 products wrap around."""
    for shift, factor in ((16, FIRST), (15, SECOND)):
        bits = (bits ^ ((bits >> shift) & ((1 << (32 - shift)) - 1))) * factor
    return bits ^ ((bits >> 16) & 0xFFFF)
