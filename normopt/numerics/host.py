"""When a tensor's value can be read without a device synchronization."""

from __future__ import annotations

import torch
from torch import Tensor

#: For tests: treat the CPU like an accelerator.
DEFERRED = False


def can_read_values(x: Tensor) -> bool:
    """Whether ``x.item()`` is free: a plain CPU tensor, not in torch.compile and not in a functorch transform."""
    traced = torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None
    return type(x) is Tensor and x.device.type == "cpu" and not traced and not DEFERRED


def power_of_two(x: Tensor) -> Tensor:
    """The largest power of two up to each entry of positive ``x``, float32 or float64; no denormal number.

    Dividing by it does not round: a computation with the quotients gives the same bits as without the division, where
    that does not overflow or underflow.
    """
    kind, exponent = (torch.int64, 0x7FF0 << 48) if x.dtype == torch.float64 else (torch.int32, 0x7F80 << 16)
    return x.view(kind).bitwise_and(exponent).view(x.dtype).clamp(min=torch.finfo(x.dtype).tiny)


def are_exact(norms: Tensor) -> bool:
    """Whether Euclidean norms are so far inside their dtype's range that no square has overflowed or underflowed."""
    smallest, largest = (size.item() for size in torch.aminmax(norms))
    limits = torch.finfo(norms.dtype)
    return bool(smallest > limits.tiny**0.25 and largest < limits.max**0.25)
