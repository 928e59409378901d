"""1-Lipschitz layers, and orthogonal first weights, dense or sparse."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def gram_sums(a: Tensor, q: Tensor | None = None) -> Tensor:
    """`t_i = sum_j |a a^T|_ij q_j / q_i` of a matrix (rows, columns), q positive and by default 1; shape (rows,).

    `diag(t)` is at least `a a^T`, by Gershgorin's theorem for `diag(q)^-1 (a a^T) diag(q)`, so that the spectral norm
    of `diag(t)^-1/2 a` is at most 1. It is the preconditioner of both layers below, and of polar iterations
    (arXiv 2512.04632).
    """
    gram = (a @ a.mT).abs()
    return gram.sum(dim=-1) if q is None else (gram @ q) / q


def _inverse(t: Tensor) -> Tensor:
    """`1 / t`, and 0 where t is 0: rows of zeros stay zeros."""
    return torch.where(t > 0, 1 / torch.where(t > 0, t, 1.0), 0.0)


class AOLLinear(nn.Linear):
    """A linear layer of spectral norm at most 1: `(W diag(t)^-1/2) x + b`, `t = gram_sums(W^T)`.

    Almost-orthogonal layers of Prach & Lampert 2022 (arXiv 2208.03160). The norm is 1 where the columns of W are
    orthogonal. Arguments: those of `torch.nn.Linear`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return F.linear(x, self.weight * _inverse(gram_sums(self.weight.mT)).sqrt(), self.bias)


class SLL(nn.Module):
    """A 1-Lipschitz residual layer: `x - 2 A^T diag(t)^-1 relu(A x + b)`, `t = gram_sums(A, exp(p))`.

    The SDP-based Lipschitz layer of Araujo et al. 2023 (arXiv 2303.03169). A is the weight of the linear layer `inner`,
    b its bias; p starts at 0.

    Args:
        width: size of the last dimension of x.
        hidden: rows of A, by default `width`.
    """

    def __init__(self, width: int, hidden: int | None = None) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width if hidden is None else hidden)
        self.p = nn.Parameter(torch.zeros(self.inner.out_features))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to the same shape."""
        a = self.inner.weight
        scaled = torch.relu(self.inner(x)) * _inverse(gram_sums(a, self.p.exp()))
        return x - 2 * scaled @ a


@torch.no_grad()
def orthogonal_(
    weight: Tensor, gain: float = 1.0, density: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Fill a matrix with `gain` times a semi-orthogonal one, exactly: all its singular values are `gain`.

    A sparse one is the identity times random rotations of two rows, by angles uniform in [0, 2 pi), until the share of
    entries that are not 0 reaches `density`: exact orthogonal initialization, EOI. At density 1 it is
    `torch.nn.init.orthogonal_`.

    Args:
        weight: shape (out, in); changed in place.
        gain: the singular values, not negative.
        density: in (0, 1]; at least `1 / max(out, in)` of the entries are not 0 in any case.
        generator: where random numbers come from, on the CPU.

    Returns:
        `weight`.

    Raises:
        ValueError: `weight` is no matrix, or a number is out of range.
    """
    if weight.ndim != 2:
        raise ValueError(f"orthogonal_: needs a matrix (out, in), got shape {tuple(weight.shape)}")
    if not 0 < density <= 1:
        raise ValueError(f"orthogonal_: density must lie in (0, 1], got {density!r}")
    if not 0 <= gain < float("inf"):
        raise ValueError(f"orthogonal_: gain must not be negative, got {gain!r}")
    tall, wide = sorted(weight.shape, reverse=True)
    if density == 1 or tall < 2:
        full = torch.empty(tall, wide, dtype=torch.float64)
        nn.init.orthogonal_(full, generator=generator)
    else:
        full = _rotated(tall, wide, density, generator)
    full = full if weight.shape[0] == tall else full.mT
    weight.copy_(gain * full)
    return weight


def _rotated(rows: int, columns: int, density: float, generator: torch.Generator | None) -> Tensor:
    """The identity (rows, columns) after random rotations of pairs of rows, in float64."""
    x = torch.eye(rows, columns, dtype=torch.float64)
    count, wanted = columns, density * rows * columns
    while count < wanted:
        i, j = torch.randperm(rows, generator=generator)[:2].tolist()
        angle = 2 * torch.pi * torch.rand((), dtype=torch.float64, generator=generator)
        pair = x[[i, j]]
        c, s = angle.cos(), angle.sin()
        turned = torch.stack([c * pair[0] - s * pair[1], s * pair[0] + c * pair[1]])
        count += int(turned.count_nonzero()) - int(pair.count_nonzero())
        x[[i, j]] = turned
    return x
