"""Turns: which matrices of a batch compute again what is kept of them, at this step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from normopt.ingredient.stage import Context


def due(context: Context, shape: Sequence[int], frequency: int, staggered: bool) -> Tensor:
    """Which matrices of a batch of ``shape`` (..., m, n) have their turn, a mask of shape ``(...)`` on the host.

    All of them at the multiples of ``frequency``; with ``staggered`` each as many steps later as its number, modulo
    ``frequency``, says, wherever it is computed. So about as many have their turn at every step.
    """
    step, leading = int(context.step), tuple(shape[:-2])
    if not staggered or context.turns is None or not leading:
        return torch.full(leading, step % frequency == 0, device="cpu")
    first = torch.tensor(context.turns(), device="cpu").view(-1, *[1] * (len(leading) - 1))
    inside = torch.arange(math.prod(leading[1:]), device="cpu").view(leading[1:])
    return (step - first - inside) % frequency == 0


def in_turn(mask: Tensor, refresh: Callable[..., None], *tensors: Tensor) -> None:
    """Call ``refresh``, which changes tensors in place, with those matrices of ``tensors`` that ``mask`` names."""
    if bool(mask.all()):
        refresh(*tensors)
    elif bool(mask.any()):
        parts = [x[mask] for x in tensors]
        refresh(*parts)
        for x, part in zip(tensors, parts, strict=True):
            x[mask] = part
