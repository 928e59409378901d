"""Learnable scales with a learning rate of their own, and linear layers with a factor."""

import torch
from torch import Tensor, nn


class Scale(nn.Module):
    """A learnable vector `s = weight * (init / scale)` whose `weight` starts at `scale`, so that s starts at `init`.

    Under an optimizer whose steps do not depend on the gradient's size (Adam), the effective learning rate of s is
    init / scale times the optimizer's. Source: nGPT (arXiv 2410.01131, section 2.5).

    Args:
        size: number of entries.
        init: first value of every entry, positive.
        scale: first value of the stored parameter, positive.

    Raises:
        ValueError: init or scale is not positive.
    """

    def __init__(self, size: int, init: float = 1.0, scale: float = 1.0) -> None:
        super().__init__()
        require_positive(init=init, scale=scale)
        self.init, self.scale = init, scale
        self.weight = nn.Parameter(torch.empty(size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set s back to `init`."""
        nn.init.constant_(self.weight, self.scale)

    def forward(self) -> Tensor:
        """The vector s, shape (size,)."""
        return self.weight * (self.init / self.scale)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, init={self.init:.4g}, scale={self.scale:.4g}"


class ScaledLinear(nn.Linear):
    """`factor * (W x)` without bias; the factor is a number or a learnable vector with an entry for each output."""

    def __init__(self, in_features: int, out_features: int, factor: float | Scale) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        y = super().forward(x)
        return y * (self.factor().to(y.dtype) if isinstance(self.factor, Scale) else self.factor)

    def extra_repr(self) -> str:
        own = "" if isinstance(self.factor, Scale) else f", factor={self.factor:.4g}"
        return super().extra_repr() + own


def linear(in_features: int, out_features: int, factor: float | Scale = 1.0) -> nn.Linear:
    """A linear layer without bias whose result is multiplied by `factor`; a plain `nn.Linear` if that is 1."""
    if isinstance(factor, Scale) or factor != 1:
        return ScaledLinear(in_features, out_features, factor)
    return nn.Linear(in_features, out_features, bias=False)


def require_positive(**values: float) -> None:
    """Raise a `ValueError` that names the first value that is not positive."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
