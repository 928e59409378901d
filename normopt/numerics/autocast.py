"""Where autocast is on, what is computed in the dtype of the tensors all the same."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch


def _without_autocast() -> AbstractContextManager[Any]:
    """Products and state in the working dtype, also where ``step`` is called under autocast; closures keep theirs."""
    if not torch._C._is_any_autocast_enabled():
        return nullcontext()
    stack = ExitStack()
    for kind in ("cpu", "cuda", "mps", "xpu"):
        if torch.is_autocast_enabled(kind):
            stack.enter_context(torch.autocast(kind, enabled=False))
    return stack
