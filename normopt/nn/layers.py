"""Transformer layers shared by the models of `normopt.nn`: rotary positions, attention with QK-norm, SwiGLU."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normopt.nn.clip import largest_logits
from normopt.nn.scaled import Scale, linear, require_positive

ROPE_BASE = 10000.0


def rope_tables(time: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles `position * ROPE_BASE ** (-2 i / width)`, i = 0 .. width/2 - 1.

    Two tensors of shape (time, width/2) on the device and in the dtype of `like`; the angles are computed in float32
    or better, so that long sequences stay exact in bfloat16. Source: Su et al. 2021, RoFormer (arXiv 2104.09864).
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    exponent = torch.arange(0, width, 2, device=like.device, dtype=dtype) / max(width, 1)
    angle = torch.outer(torch.arange(time, device=like.device, dtype=dtype), ROPE_BASE**-exponent)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first `width` entries of the last dimension of `x` (..., time, d_head) by the angles of the tables.

    Entry i is paired with entry i + width/2; the entries after `width` pass unchanged. Lengths are preserved, and the
    inner product of a rotated query and key depends on their positions only through the difference.
    """
    half = cos.shape[-1]
    first, second, rest = torch.split(x, [half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos, rest), dim=-1)


class Attention(nn.Module):
    """Causal self-attention whose queries and keys are L2-normalized per head, so |logit| <= |gain|.

    `logits = gain_h <q/|q|, k/|k|>` after rotary positions, softmax over the past, heads concatenated through `out`.
    Input and output: (batch, time, d_model). `gain` is one learnable scalar per head, initially sqrt(d_head).
    `qkv` stacks the query, key and value matrices along its rows; `normopt_views` tells optimizers to treat them as
    three. Source: Henry et al. 2020, Query-Key Normalization (arXiv 2010.04245). Without QK-norm there is no gain:
    `logits = <q, k> / sqrt(d_head)`. A subclass may override `logit_factors`, which scales the rotated queries and
    keys, together with `scale_logits_`.

    Args:
        d_model: width of the residual stream.
        n_heads: number of heads; must divide d_model.
        rope_fraction: fraction of each head's dimensions that is rotated; must give an even number of them.
        qk_norm: normalize queries and keys.
        gain_init: first value of the gain, by default sqrt(d_head).
        qkv_factor: the factor of queries, keys and values, a constant.
        out_factor: the factor of the result, a constant.

    Raises:
        ValueError: if n_heads does not divide d_model, or rope_fraction is out of range or gives an odd number.
    """

    normopt_views: ClassVar[dict[str, dict[str, int]]] = {"qkv.weight": {"split": 3}}
    gain: nn.Parameter | None
    #: Whether `max_logits` is kept in training, see `normopt.nn.record_logits`.
    records_logits: bool = False
    #: The largest logit of each head since it was last reset, or `None`.
    max_logits: Tensor | None = None

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        rope_fraction: float = 0.5,
        *,
        qk_norm: bool = True,
        gain_init: float | None = None,
        qkv_factor: float = 1.0,
        out_factor: float = 1.0,
    ) -> None:
        super().__init__()
        if d_model % n_heads:
            raise ValueError(f"n_heads must divide d_model, got d_model={d_model} and n_heads={n_heads}")
        self.d_head = d_model // n_heads
        self.rope_width = _rope_width(self.d_head, rope_fraction)
        self.qk_norm = qk_norm
        self.qkv = linear(d_model, 3 * d_model, qkv_factor)
        self.out = linear(d_model, d_model, out_factor)
        self.gain_init = self.d_head**0.5 if gain_init is None else gain_init
        self.gain = nn.Parameter(torch.empty(n_heads)) if qk_norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the gain back to `gain_init`; the matrices are unchanged."""
        if self.gain is not None:
            nn.init.constant_(self.gain, self.gain_init)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, time, d_model) to the same shape; position t sees positions up to t."""
        query_key, value = self._heads(x)
        query_key = F.normalize(query_key, dim=-1) if self.qk_norm else query_key
        query, key = self.logit_factors(*rotate(query_key, *rope_tables(x.shape[1], self.rope_width, query_key)))
        if self.records_logits and self.training:
            largest = largest_logits(query.detach(), key.detach())
            self.max_logits = largest if self.max_logits is None else torch.maximum(self.max_logits, largest)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=1.0)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def logit_factors(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys (batch, heads, time, d_head) whose inner products are the logits."""
        return query * (self.d_head**-0.5 if self.gain is None else self.gain[:, None, None].to(query.dtype)), key

    @torch.no_grad()
    def scale_logits_(self, factors: Tensor) -> None:
        """Multiply each head's logits by one of `factors` (heads,), not negative, through the gain if there is one."""
        if self.gain is not None:
            self.gain.mul_(factors)
            return
        weight = self.qkv.weight
        weight.view(3, -1, self.d_head, self.qkv.in_features)[:2].mul_(factors.sqrt()[:, None, None])
        if parametrize.is_parametrized(self.qkv, "weight"):  # the weight is not stored, but computed
            self.qkv.weight = weight

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys (2, batch, heads, time, d_head), and values (batch, heads, time, d_head)."""
        heads = self.qkv(x).unflatten(-1, (3, -1, self.d_head)).permute(2, 0, 3, 1, 4)
        return heads[:2], heads[2]


class SwiGLU(nn.Module):
    """Gated MLP `down(silu(gate x) * up x)` with three matrices of width d_ff, without biases.

    Input and output: (batch, time, d_model). Source: Shazeer 2020, GLU Variants (arXiv 2002.05202).

    Args:
        d_model: width of the residual stream.
        d_ff: width inside.
        gate_factor: the factor of `gate x`, a constant or a learnable vector of size d_ff.
        up_factor: the factor of `up x`, a constant or a learnable vector of size d_ff.
        down_factor: the factor of the result, a constant.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        *,
        gate_factor: float | Scale = 1.0,
        up_factor: float | Scale = 1.0,
        down_factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.gate = linear(d_model, d_ff, gate_factor)
        self.up = linear(d_model, d_ff, up_factor)
        self.down = linear(d_ff, d_model, down_factor)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_model) to the same shape."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


def mlp_width(d_ff: int | None, **sizes: int) -> int:
    """The width of a model's MLP, by default `4 * d_model`; a `ValueError` unless it and all sizes are positive."""
    width = 4 * sizes["d_model"] if d_ff is None else d_ff
    require_positive(**sizes, d_ff=width)
    return width


def _rope_width(d_head: int, fraction: float) -> int:
    """Number of rotated dimensions of a head."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"rope_fraction must lie between 0 and 1, got {fraction}")
    width = d_head * fraction
    if width % 2:
        raise ValueError(f"rope_fraction must rotate an even number of dimensions, got {fraction} of d_head={d_head}")
    return int(width)
