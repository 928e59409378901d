"""The fastest form and dtype of the polar iteration for a shape and a device."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

#: On a CPU, bfloat16 is faster from this number of multiplications on, in one product of all matrices.
BFLOAT16_FROM = 5_000_000

#: The Gram form is faster from this aspect ratio on; in bfloat16, with a shorter side of at most ``LARGE``, from the
#: second one on.
GRAM_FROM, GRAM_FROM_SMALL, LARGE = 2, 4, 256


class Choice(NamedTuple):
    """A way to the polar factor: the form, ``"direct"``, ``"gram"`` or ``"exact"``, and the dtype of the products."""

    form: str
    dtype: torch.dtype


def choose(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Choice:
    """What method ``"auto"`` does: the fastest way to a polar factor at least as accurate as Jordan's.

    For matrices of shape ``(..., m, n)``; below, m is the shorter side:

    * A single row or column: exactly, by dividing by its length.
    * Products in bfloat16 where the hardware multiplies in bfloat16: on GPUs that have it, and on CPUs with AMX or
      AVX512_BF16 if a product ``X X^T`` of all matrices is at least 5e6 multiplications (below, the calls take longer);
      otherwise in float32. float64 stays float64; float16 is never chosen.
    * The Gram form, ``4 m^2 n + 26 m^3`` FLOPs, or ``8 m^2 n + 20 m^3`` in bfloat16, which needs a restart, in place of
      ``16 m^2 n + 8 m^3``: where n >= 2 m, or n >= 4 m in bfloat16 if m <= 256.
    """
    short, long = sorted(shape[-2:])
    if short == 1:
        return Choice("exact", torch.promote_types(dtype, torch.float32))
    kind = torch.device(device).type
    pays = has_bfloat16(kind) and (kind != "cpu" or math.prod(shape) * short >= BFLOAT16_FROM)
    working = dtype if dtype == torch.float64 else torch.bfloat16 if pays else torch.float32
    ratio = GRAM_FROM_SMALL if working == torch.bfloat16 and short <= LARGE else GRAM_FROM
    return Choice("gram" if long >= ratio * short else "direct", working)


def has_bfloat16(kind: str) -> bool:
    """Whether devices of this kind, ``"cpu"`` or ``"cuda"``, multiply matrices in bfloat16 faster than in float32."""
    if kind not in _BFLOAT16:
        _BFLOAT16[kind] = _has_bfloat16(kind)
    return _BFLOAT16[kind]


def _has_bfloat16(kind: str) -> bool:
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported") if kind == "cpu" else ()
    has_onednn: Callable[[], bool] = torch.backends.mkldnn.is_available
    return has_onednn() and any(getattr(torch.cpu, name, bool)() for name in names)


#: The answers so far, in a dict, because torch.compile does not trace functools.cache.
_BFLOAT16 = {"cpu": _has_bfloat16("cpu")}
