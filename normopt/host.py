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


def are_exact(norms: Tensor) -> bool:
    """Whether Euclidean norms are so far from the ends of their dtype's range that no square can have left it."""
    smallest, largest = (size.item() for size in torch.aminmax(norms))
    limits = torch.finfo(norms.dtype)
    return bool(smallest > limits.tiny**0.25 and largest < limits.max**0.25)
