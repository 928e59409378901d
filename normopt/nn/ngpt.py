"""nGPT: the normalized transformer, whose residual stream and matrices stay on the unit sphere."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normopt.nn.layers import Attention, SwiGLU, mlp_width
from normopt.nn.normalized import NormalizedTransformer, ResidualBlock
from normopt.nn.scaled import Scale, require_positive

ROWS, COLUMNS = "Sphere(axis=-1)", "Sphere(axis=-2)"


class SphereAttention(Attention):
    """`Attention` with a learnable scale for each dimension, which queries and keys share, in place of the gain.

    `logits = sqrt(d_head) <s q/|q|, s k/|k|>`, s of size d_model. Input and output: (batch, time, d_model).

    Args:
        d_model: width of the residual stream.
        n_heads: number of heads; must divide d_model.
        rope_fraction: see `Attention`.
        qk_scale: the scale s, of size d_model.
    """

    def __init__(self, d_model: int, n_heads: int, rope_fraction: float, qk_scale: Scale) -> None:
        super().__init__(d_model, n_heads, rope_fraction)
        self.gain = None
        self.qk_scale = qk_scale

    def logit_factors(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys (batch, heads, time, d_head) whose inner products are the logits."""
        scale = self.qk_scale().view(-1, 1, self.d_head).to(query.dtype)
        return query * (scale * self.d_head**0.5), key * scale

    @torch.no_grad()
    def scale_logits_(self, factors: Tensor) -> None:
        """Multiply each head's logits by one of `factors` (heads,), not negative, through the scale."""
        self.qk_scale.weight.view(-1, self.d_head).mul_(factors.sqrt()[:, None])


class SphereResidual(nn.Module):
    """`h <- N(N(h) + |alpha| (N(f) - N(h)))`, N(x) = x / |x|, alpha a learnable vector, on (..., d_model).

    Args:
        alpha: the interpolation weights, of size d_model.
    """

    def __init__(self, alpha: Scale) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, h: Tensor, f: Tensor) -> Tensor:
        """The new residual stream, from the old one and a sublayer's result."""
        h, f = F.normalize(h, dim=-1), F.normalize(f, dim=-1)
        return F.normalize(h + self.alpha().abs() * (f - h), dim=-1)


class Block(ResidualBlock):
    """One layer, with `SphereResidual` for attention and MLP."""

    normopt_bounds: ClassVar[dict[str, str]] = {
        "attention.qkv.weight": ROWS,
        "attention.out.weight": COLUMNS,
        "mlp.gate.weight": ROWS,
        "mlp.up.weight": ROWS,
        "mlp.down.weight": COLUMNS,
    }


class nGPT(NormalizedTransformer):
    """Normalized decoder-only transformer: tokens (batch, time) to logits (batch, time, vocab_size).

    Loshchilov et al. 2024 (arXiv 2410.01131), with the choices of NVIDIA/ngpt. The residual stream has length 1
    after every sublayer, see `SphereResidual`; queries and keys share a learnable scale, see `SphereAttention`; the
    MLP is `W_down (s_u sqrt(d) W_up x * silu(s_v sqrt(d) W_gate x))`, logits have a learnable scale each. No norms
    otherwise. `16 d^2 L + 2 V d + 11 d L + V` parameters when d_ff = 4 d. All matrices must have length 1 along the
    dimension of the residual stream: the modules declare this in `normopt_bounds`, which the optimizers of normopt
    read. Train it without weight decay and without warm-up.

    Args:
        vocab_size: number of tokens V.
        d_model: width d of the residual stream.
        n_layers: number of layers L.
        n_heads: heads per layer; must divide d_model.
        d_ff: width of the MLP, by default 4 * d_model.
        rope_fraction: fraction of each head's dimensions that carries rotary positions; 0.5, as for the other models
            here, where NVIDIA/ngpt has 1.
        base_scale: the alphas and the scales of queries and keys and of logits are stored as `base_scale / init`
            times themselves, see `Scale`. By default 1 / sqrt(d_model).
        alpha_init: first value of the residual streams' alphas ("of the order of 1 / n_layers", which
            is better than the default if there are few layers).
        qk_init: first value of the scale of queries and keys.
        uv_init: first value of s_u and s_v, which are stored divided by uv_init.
        logit_init: first value of the logits' scale.

    Raises:
        ValueError: if a size or number is not positive, n_heads does not divide d_model or rope_fraction does not fit
            the head.
    """

    normopt_bounds: ClassVar[dict[str, str]] = {"embed.weight": ROWS, "head.weight": ROWS}
    unit_columns = ("attention.out", "mlp.down")

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        n_layers: int,
        n_heads: int,
        *,
        d_ff: int | None = None,
        rope_fraction: float = 0.5,
        base_scale: float | None = None,
        alpha_init: float = 0.05,
        qk_init: float = 1.0,
        uv_init: float = 1.0,
        logit_init: float = 1.0,
    ) -> None:
        d_ff = mlp_width(d_ff, vocab_size=vocab_size, d_model=d_model, n_layers=n_layers, n_heads=n_heads)
        base = d_model**-0.5 if base_scale is None else base_scale
        require_positive(
            base_scale=base, alpha_init=alpha_init, qk_init=qk_init, uv_init=uv_init, logit_init=logit_init
        )
        inside = uv_init * d_model**0.5
        blocks = [
            Block(
                SphereAttention(d_model, n_heads, rope_fraction, Scale(d_model, qk_init, base)),
                SwiGLU(d_model, d_ff, gate_factor=Scale(d_ff, inside), up_factor=Scale(d_ff, inside)),
                [SphereResidual(Scale(d_model, alpha_init, base)) for _ in range(2)],
            )
            for _ in range(n_layers)
        ]
        super().__init__(vocab_size, d_model, blocks, Scale(vocab_size, logit_init, base))
