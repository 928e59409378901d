"""Normalization layers for `GPT(norm=...)`: a table by name, and the layers that torch does not have."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normopt.ingredient import nearest


class DyT(nn.Module):
    """Dynamic Tanh: `weight * tanh(alpha * x) + bias`, entry by entry, with one learnable alpha; no statistics of x.

    Source: Zhu et al. 2025, Dynamic Tanh (arXiv 2503.10622; jiachenzhu/DyT).

    Args:
        width: size of the last dimension.
        alpha_init: first value of alpha. In the paper, for LLaMA: 0.8 before attention and 0.2 elsewhere at 7B,
            smaller for wider models.
    """

    def __init__(self, width: int, alpha_init: float = 0.5) -> None:
        super().__init__()
        self.alpha_init = alpha_init
        self.alpha = nn.Parameter(torch.empty(()))
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set alpha to `alpha_init`, weight to 1, bias to 0."""
        nn.init.constant_(self.alpha, self.alpha_init)
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to the same shape."""
        return self.weight * torch.tanh(self.alpha * x) + self.bias


class SeeDNorm(nn.Module):
    """`(tanh(<x, beta>) * alpha + weight) * x / RMS(x)`: an RMSNorm whose gain depends on the size of x.

    alpha starts at `alpha_init`, beta at 0, weight at 1, which is RMSNorm. Computed in float32 or better, with the
    epsilon of `torch.nn.RMSNorm`. Source: Cai et al. 2025, SeeDNorm (arXiv 2510.22777), with one head.

    Args:
        width: size of the last dimension.
        alpha_init: first value of alpha; the paper finds 10 worse by 0.25 nats, 0.1 by 0.012.
    """

    def __init__(self, width: int, alpha_init: float = 1.0) -> None:
        super().__init__()
        self.alpha_init = alpha_init
        self.alpha, self.beta, self.weight = (nn.Parameter(torch.empty(width)) for _ in range(3))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set alpha to `alpha_init`, beta to 0, weight to 1."""
        nn.init.constant_(self.alpha, self.alpha_init)
        nn.init.zeros_(self.beta)
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to the same shape and dtype."""
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        alpha, beta, weight = (parameter.to(exact.dtype) for parameter in (self.alpha, self.beta, self.weight))
        gain = torch.tanh((exact * beta).sum(dim=-1, keepdim=True)) * alpha + weight
        return (gain * F.rms_norm(exact, exact.shape[-1:])).to(x.dtype)


class PowerNorm(nn.Module):
    """`weight * x / sqrt(phi + eps) + bias`, phi each channel's mean square in past batches; no statistics of x itself.

    phi starts at 1, is set by the first batch in training, and is then an exponential average of mean squares over all
    positions. It is taken from x after the forward pass and is a constant to the gradient, so that no position sees a
    later one, and training and evaluation compute the same function. Source: Shen et al. 2020, PowerNorm (arXiv
    2003.07845) after its warm-up, without its correction of the gradient.

    Args:
        width: size of the last dimension.
        momentum: share of a new batch in phi.
        eps: added to phi.
    """

    phi: Tensor
    batches: Tensor

    def __init__(self, width: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight, self.bias = (nn.Parameter(torch.empty(width)) for _ in range(2))
        self.register_buffer("phi", torch.empty(width))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set weight to 1, bias to 0, and forget all batches."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        nn.init.ones_(self.phi)
        self.batches.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to the same shape and dtype; in training, then take the batch into phi."""
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = self.weight.to(exact.dtype) * (self.mean_square().to(exact.dtype) + self.eps).rsqrt()
        y = (exact * scale + self.bias.to(exact.dtype)).to(x.dtype)
        if self.training:
            with torch.no_grad():
                self.take(exact.square().flatten(0, -2).mean(dim=0))
                self.batches.add_(1)
        return y

    def mean_square(self) -> Tensor:
        """phi, a copy, since `take` writes to it before the gradient is computed."""
        return self.phi.clone()

    def take(self, square: Tensor) -> None:
        """Take one batch's mean square of each channel into phi."""
        share = torch.where(self.batches == 0, 1.0, self.momentum).to(square.dtype)
        self.phi.copy_(self.phi.to(square.dtype).lerp(square, share))


class UnifiedNorm(PowerNorm):
    """`PowerNorm` whose phi is the geometric mean of the mean squares of the last batches, 4 of them.

    Source: Yang et al. 2022, Unified Normalization (arXiv 2208.01313), with past batches only and without its clamps
    and its filter of outliers.

    Args:
        width: size of the last dimension.
        window: number of batches.
        eps: added to phi.
    """

    past: Tensor

    def __init__(self, width: int, window: int = 4, eps: float = 1e-5) -> None:
        super().__init__(width, eps=eps)
        self.register_buffer("past", torch.ones(window, width))

    def reset_parameters(self) -> None:
        """Set weight to 1, bias to 0, and forget all batches."""
        super().reset_parameters()
        if hasattr(self, "past"):
            nn.init.ones_(self.past)

    def take(self, square: Tensor) -> None:
        """Put one batch's mean squares in the place of the oldest ones; of the first batch, in all places."""
        square = square.clamp(min=self.eps)
        places = torch.arange(len(self.past), device=square.device)[:, None]
        newest = (places == self.batches % len(self.past)) | (self.batches == 0)
        self.past.copy_(torch.where(newest, square, self.past.to(square.dtype)))
        self.phi.copy_(self.past.to(square.dtype).log().mean(dim=0).exp())


class GatedNorm(nn.Module):
    """`y * sigmoid(up silu(down y))` with `y = weight * x / RMS(x)`: an RMSNorm with a gate of low rank.

    The gate can shrink what outliers would otherwise rescale. Source: 2026, outlier-driven rescaling (arXiv
    2601.22966), which takes ranks from 16 to 128.

    Args:
        width: size of the last dimension.
        rank: rank of the gate, at most 16 by default.
    """

    def __init__(self, width: int, rank: int | None = None) -> None:
        super().__init__()
        rank = min(16, width) if rank is None else rank
        self.rms = nn.RMSNorm(width)
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)

    def reset_parameters(self) -> None:
        """Set weight to 1; draw the gate's matrices from N(0, 1/fan_in)."""
        self.rms.reset_parameters()
        for layer in (self.down, self.up):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to the same shape."""
        y = self.rms(x)
        return y * torch.sigmoid(self.up(F.silu(self.down(y))))


#: The normalization layers by name: width -> layer with `reset_parameters`.
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "rmsnorm": nn.RMSNorm,
    "layernorm": nn.LayerNorm,
    "dyt": DyT,
    "seednorm": SeeDNorm,
    "power": PowerNorm,
    "unified": UnifiedNorm,
    "gated": GatedNorm,
}
#: Names of layers whose statistics run over the positions of the batch that they normalize.
OF_BATCHES = ("batchnorm", "batch")


def make_norm(name: str, width: int) -> nn.Module:
    """The normalization layer with that name; a `ValueError` with the nearest name if there is none."""
    if name in OF_BATCHES:
        raise ValueError(
            f"norm: statistics over the positions of a batch, as those of {name!r}, let a causal model see future "
            "tokens; 'power' and 'unified' have those of past batches"
        )
    if name not in NORMS:
        raise ValueError(f"norm: unknown normalization layer {name!r}; {nearest(str(name), NORMS)}")
    return NORMS[name](width)
