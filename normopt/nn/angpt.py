"""anGPT: a transformer kept in a compact space by constants and bounded weights instead of normalization layers."""

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from normopt.nn.layers import Attention, SwiGLU, mlp_width
from normopt.nn.normalized import NormalizedTransformer, ResidualBlock
from normopt.nn.scaled import Scale, require_positive

BOUND = "RowBound(radius=1.0)"
SILU_FACTOR = 3.74


class Residual(nn.Module):
    """`h <- nu (h + alpha (u - h))` with `u = f / |f|`, alpha a learnable vector, on (..., d_model).

    nu = 1 / sqrt(alpha^2 + (1 - alpha)^2), entry by entry and with a gradient, keeps the length that independent h
    and u of length 1 have. Without interpolation it is `nu (h + u)`, where nu = 1 / sqrt(2) and there is no alpha.

    Args:
        d_model: width of the residual stream.
        alpha_init: first value of alpha.
        s_scale: see `Scale`.
        residual_factor: whether to multiply by nu; if not, nu = 1.
        lerp: whether to interpolate.
    """

    def __init__(self, d_model: int, alpha_init: float, s_scale: float, residual_factor: bool, lerp: bool) -> None:
        super().__init__()
        self.residual_factor = residual_factor
        self.alpha = Scale(d_model, alpha_init, s_scale) if lerp else None

    def forward(self, h: Tensor, f: Tensor) -> Tensor:
        """The new residual stream, from the old one and a sublayer's result."""
        u = F.normalize(f, dim=-1)
        if self.alpha is None:
            return (h + u) * (0.5**0.5 if self.residual_factor else 1.0)
        alpha = self.alpha()
        h = h + alpha * (u - h)
        return h * (alpha.square() + (1 - alpha).square()).rsqrt() if self.residual_factor else h


class Block(ResidualBlock):
    """One layer, with `Residual` for attention and MLP."""

    normopt_bounds: ClassVar[dict[str, str]] = dict.fromkeys(
        ("attention.qkv.weight", "attention.out.weight", "mlp.gate.weight", "mlp.up.weight", "mlp.down.weight"), BOUND
    )


class anGPT(NormalizedTransformer):
    """Approximately normalized decoder-only transformer: tokens (batch, time) to logits (batch, time, vocab_size).

    Franke et al. 2025 (arXiv 2505.22014). No pre-norms and no final norm: the L2 norm of queries, keys and the
    results of attention and MLP remains, see `Residual`. SwiGLU's gate is `silu(gate_scale sqrt(d / d_ff) W x)`,
    logits have a learnable scale each. `16 d^2 L + 2 V d + 2 d L + V` parameters when d_ff = 4 d, and one gain per
    head. All rows of all matrices start with length 1 and must stay within the unit ball (section 4.2): the modules
    declare this in `normopt_bounds`, which the optimizers of normopt read. Train it without weight decay and without
    warm-up.

    Args:
        vocab_size: number of tokens V.
        d_model: width d of the residual stream.
        n_layers: number of layers L.
        n_heads: heads per layer; must divide d_model.
        d_ff: width of the MLP, by default 4 * d_model.
        rope_fraction: fraction of each head's dimensions that carries rotary positions (table F.2).
        gate_scale: by default sqrt(d_model), from which the constant 3.74 of section 4.3 follows, and as in nGPT. 1 is
            the literal reading of table 1, with which the gate is nearly linear.
        alpha_init: first value of the residual streams' alpha (section 5.6, for models of 18 to 36 layers; with few
            layers 1 / n_layers trains better).
        s_scale: alpha and the logits' scale s are stored as `s_scale / init` times themselves, see `Scale`: 0.01 in
            section 5, 0.001 in table F.2.
        logit_init: first value of the logits' scale; the paper gives none, 1 is nGPT's.
        gain_init: first value of the gain on `<q, k>`; the paper gives none. By default sqrt(d_head).
        cancelling_factors: include the paper's other constants, on queries, keys and values, attention's result, `up`,
            the activation (3.74) and the MLP's result. A normalization follows each of them, so that they change
            nothing but rounding errors.
        residual_factor: the factor nu of `Residual`; False is the paper's ablation (table L.1).
        lerp: interpolate in `Residual`; False adds normalized results to the stream, which may differ from the ablation
            of table L.1, whose details the paper does not give.

    Raises:
        ValueError: if a size or number is not positive, n_heads does not divide d_model or rope_fraction does not fit
            the head.
    """

    normopt_bounds: ClassVar[dict[str, str]] = {"embed.weight": BOUND, "head.weight": BOUND}

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        n_layers: int,
        n_heads: int,
        *,
        d_ff: int | None = None,
        rope_fraction: float = 0.5,
        gate_scale: float | None = None,
        alpha_init: float = 0.05,
        s_scale: float = 0.01,
        logit_init: float = 1.0,
        gain_init: float | None = None,
        cancelling_factors: bool = False,
        residual_factor: bool = True,
        lerp: bool = True,
    ) -> None:
        d_ff = mlp_width(d_ff, vocab_size=vocab_size, d_model=d_model, n_layers=n_layers, n_heads=n_heads)
        require_positive(alpha_init=alpha_init, s_scale=s_scale, logit_init=logit_init)
        gate_scale = d_model**0.5 if gate_scale is None else gate_scale
        gain_init = (d_model / n_heads) ** 0.5 if gain_init is None else gain_init
        require_positive(gate_scale=gate_scale, gain_init=gain_init)
        residual = (d_model, alpha_init, s_scale, residual_factor, lerp)
        factors = _cancelling(d_model, n_heads, d_ff) if cancelling_factors else {"attention": {}, "mlp": {}}
        gate = gate_scale * (d_model / d_ff) ** 0.5
        blocks = [
            Block(
                Attention(d_model, n_heads, rope_fraction, gain_init=gain_init, **factors["attention"]),
                SwiGLU(d_model, d_ff, gate_factor=gate, **factors["mlp"]),
                [Residual(*residual), Residual(*residual)],
            )
            for _ in range(n_layers)
        ]
        super().__init__(vocab_size, d_model, blocks, Scale(vocab_size, logit_init, s_scale))


def _cancelling(d_model: int, n_heads: int, d_ff: int) -> dict[str, dict[str, Any]]:
    """The constants of section 4.3 that a normalization cancels, as arguments of `Attention` and `SwiGLU`."""
    return {
        "attention": {"qkv_factor": n_heads**0.5, "out_factor": n_heads**-0.5},
        "mlp": {"up_factor": (d_model / d_ff) ** 0.5, "down_factor": (d_ff / d_model) ** 0.5 * SILU_FACTOR},
    }
