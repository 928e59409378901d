"""Functions of singular values, and the equations that projections onto their norm balls solve."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from normopt.numerics.lengths import euclidean, normalized

#: Iterations that reach the last bits of float64: of the Illinois method, and of Newton's method inside each.
SECANTS, NEWTON_STEPS = 14, 10

#: How often a Gram matrix is squared where the host must not wait: its 4096th power has a trace whose root is too large
#: by n^(1/8192) at most, 0.1% for n = 4096.
SQUARINGS = 12


def singular_values(x: Tensor) -> Tensor:
    """The singular values of each matrix, shape ``(..., min(m, n))``, computed in float32 or better."""
    return torch.linalg.svdvals(x.to(torch.promote_types(x.dtype, torch.float32)))


def largest_singular_value(x: Tensor) -> Tensor:
    """The largest singular value of each matrix, shape ``(...)``, in float32 or better.

    Exact on the CPU. Elsewhere a decomposition would wait for the device: there it is ``trace((x^T x)^4096)^(1/8192)``.
    """
    if x.numel() == 0:
        return x.sum(dim=(-2, -1))
    if x.is_cpu:
        return singular_values(x).amax(dim=-1)
    size = euclidean(x, (-2, -1), keepdim=True)
    x = x.to(size.dtype) / torch.where(size == 0, 1.0, size)
    return _largest_of_unit(x) * size[..., 0, 0]


def _largest_of_unit(x: Tensor) -> Tensor:
    """The same for matrices whose Frobenius norm is 1 or 0, from products alone."""
    power = x @ x.mT if x.shape[-2] < x.shape[-1] else x.mT @ x
    log = torch.zeros_like(power[..., 0, 0])
    for _ in range(SQUARINGS):  # x^T x to the power of 2^i is exp(2^i log) times power
        trace = power.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
        trace = torch.where(trace == 0, 1.0, trace)
        log = 2 * (log + trace.log())
        power = power / trace[..., None, None]
        power = power @ power
    log = log + power.diagonal(dim1=-2, dim2=-1).sum(dim=-1).log()
    return (log / 2 ** (SQUARINGS + 1)).exp()


def map_singular_values(x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    """``U diag(f(s)) V^T`` for each ``x = U diag(s) V^T``."""
    if x.numel() == 0:
        return x.clone()
    u, s, vh = torch.linalg.svd(x.to(torch.promote_types(x.dtype, torch.float32)), full_matrices=False)
    return ((u * f(s).unsqueeze(-2)) @ vh).to(x.dtype)


def map_spectrum(g: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    """``U diag(f(s)) V^T``, ``s`` the singular values divided by the largest, 0 where they may be rounding errors."""
    if g.numel() == 0:
        return g.clone()
    u, s, vh = torch.linalg.svd(normalized(g), full_matrices=False)
    largest = s[..., :1]
    s = s / torch.where(largest == 0, 1.0, largest)
    s = s * (s > max(g.shape[-2:]) * torch.finfo(s.dtype).eps)
    return ((u * f(s).unsqueeze(-2)) @ vh).to(g.dtype)


def _power_norm(s: Tensor, p: float) -> Tensor:
    """The l_p norm of ``s >= 0``, in descending order, along the last dimension, without overflow or underflow."""
    if s.shape[-1] == 0:
        return s.sum(dim=-1)
    largest = s[..., :1]
    relative = s / torch.where(largest == 0, 1.0, largest)
    return torch.linalg.vector_norm(relative, ord=p, dim=-1) * largest.squeeze(-1)


def _project_power(s: Tensor, p: float, radius: float) -> Tensor:
    """The point of the l_p ball nearest to ``s >= 0``, in descending order.

    It solves ``t + mu t^(p-1) = s``. With ``t = shrink s_1 x``, ``x_1 = 1`` this is ``shrink x + (1 - shrink) x^(p-1) =
    s / s_1``, in which all numbers lie in [0, 1], and ``shrink ||x||_p`` rises with ``shrink``.
    """
    if p in (1, math.inf):
        return s.clamp(max=radius) if p > 1 else (s - simplex_shift(s, radius)).clamp_(min=0)
    largest = torch.where(s[..., :1] == 0, 1.0, s[..., :1])
    relative, bound = s / largest, radius / largest

    def x_of(shrink: Tensor) -> Tensor:
        if p >= 2:
            return _root(relative, shrink, p - 1)
        return _root(relative, 1 - shrink, 1 / (p - 1)) ** (1 / (p - 1))

    def excess(shrink: Tensor) -> Tensor:
        return shrink * torch.linalg.vector_norm(x_of(shrink), ord=p, dim=-1, keepdim=True) - bound

    shrink = _crossing(excess, bound.clamp(max=1.0))
    return torch.where(_power_norm(s, p).unsqueeze(-1) <= radius, s, largest * shrink * x_of(shrink))


def _crossing(rising: Callable[[Tensor], Tensor], high: Tensor) -> Tensor:
    """The zero in [0, high] of a rising function, from below, by the Illinois method (a bracketing secant method)."""
    low = torch.zeros_like(high)
    below, above = rising(low), rising(high)
    was_below = torch.zeros_like(high, dtype=torch.bool)
    for _ in range(SECANTS):
        steep = above > below
        middle = torch.where(steep, high - above * (high - low) / torch.where(steep, above - below, 1.0), low)
        value = rising(middle)
        is_below = value <= 0
        again = is_below == was_below
        low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
        below = torch.where(is_below, value, torch.where(again, below / 2, below))
        above = torch.where(is_below, torch.where(again, above / 2, above), value)
        was_below = is_below
    return low


def _root(s: Tensor, linear: Tensor, power: float) -> Tensor:
    """The ``x`` in [0, 1] with ``linear x + (1 - linear) x^power = s``, power >= 1: Newton's method from above."""
    tiny = torch.finfo(s.dtype).tiny
    x = torch.minimum(s / linear.clamp(min=tiny), (s / (1 - linear).clamp(min=tiny)) ** (1 / power)).clamp_(max=1.0)
    for _ in range(NEWTON_STEPS):
        below = (1 - linear) * x ** (power - 1)
        x = x - ((linear + below) * x - s) / (linear + power * below).clamp(min=tiny)
    return x.clamp_(min=0.0)


def simplex_shift(s: Tensor, radius: float) -> Tensor:
    """The shift for which ``max(s - shift, 0)`` is the point of ``{t >= 0, sum t <= radius}`` nearest to ``s``.

    ``s`` is not negative and in descending order.
    """
    counts = torch.arange(1, s.shape[-1] + 1, dtype=s.dtype, device=s.device)
    shifts = (s.cumsum(dim=-1) - radius) / counts
    active = (s > shifts).sum(dim=-1, keepdim=True).clamp_(min=1)
    return shifts.gather(-1, active - 1).clamp_(min=0)
