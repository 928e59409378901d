"""What the host may see of tensors: on a CPU looking at numbers costs nothing, elsewhere it would wait for a device."""

from __future__ import annotations

import torch
from torch import Tensor

#: Treats all devices like accelerators, for tests.
DEFERRED = False


def host_may_look(x: Tensor) -> bool:
    """Whether the host can read numbers of ``x`` without waiting for a device, and nothing is traced."""
    traced = torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None
    return type(x) is Tensor and x.device.type == "cpu" and not traced and not DEFERRED


def power_of_two(x: Tensor) -> Tensor:
    """The largest power of two up to each entry of ``x``, positive float32 or float64, and no denormal number.

    Dividing by it rounds nothing, so that what follows is the same to the bit as without, where that stays in range.
    """
    kind, exponent = (torch.int64, 0x7FF0 << 48) if x.dtype == torch.float64 else (torch.int32, 0x7F80 << 16)
    return x.view(kind).bitwise_and(exponent).view(x.dtype).clamp(min=torch.finfo(x.dtype).tiny)


def are_exact(norms: Tensor) -> bool:
    """Whether Euclidean norms are so far from the ends of their dtype's range that no square can have left it."""
    smallest, largest = (size.item() for size in torch.aminmax(norms))
    limits = torch.finfo(norms.dtype)
    return bool(smallest > limits.tiny**0.25 and largest < limits.max**0.25)
