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


#: The normalization layers by name: width -> layer with `reset_parameters`.
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "rmsnorm": nn.RMSNorm,
    "layernorm": nn.LayerNorm,
    "dyt": DyT,
    "seednorm": SeeDNorm,
}


def make_norm(name: str, width: int) -> nn.Module:
    """The normalization layer with that name; a `ValueError` with the nearest name if there is none."""
    if name not in NORMS:
        raise ValueError(f"norm: unknown normalization layer {name!r}; {nearest(str(name), NORMS)}")
    return NORMS[name](width)
