"""Sharded tensors, told from others without importing torch.distributed, which takes a while."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def is_sharded(x: Tensor) -> bool:
    """Whether a tensor is a ``torch.distributed.tensor.DTensor``."""
    return hasattr(x, "full_tensor")


def here(x: Any) -> Any:
    """What this rank has of a tensor, all of it unless it is a ``DTensor``."""
    return x.to_local() if is_sharded(x) else x


def whole(x: Any) -> Any:
    """All of a tensor. Of a ``DTensor`` every rank gets it, and all must call together."""
    return x.full_tensor() if is_sharded(x) else x
