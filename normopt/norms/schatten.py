"""Norms of the singular values: the largest (spectral), their sum (nuclear), and all powers in between."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from normopt.ingredient import check_choice, check_range
from normopt.iterations import exact, normalized
from normopt.norms.base import Eps, Norm, Scale
from normopt.polar import METHODS, Schedule, polar

SIDES = ("both", "smaller")

#: Steps to the last bits of float64: of the Illinois method, and of Newton's within each.
SECANTS, NEWTON_STEPS = 14, 10


@dataclass(frozen=True)
class UnitarilyInvariant(Norm):
    """A norm of the singular values: the same in any orthonormal basis of rows and of columns."""

    _abstract: ClassVar[bool] = True
    rotation_invariant: ClassVar[bool] = True
    reduces: ClassVar[str] = "matrix"  # type: ignore[misc]
    decides_on_host: ClassVar[bool] = True

    def unit_rms(self, m: int, n: int) -> float:
        """sqrt(out/in), the RMS -> RMS norm."""
        return math.sqrt(m / max(n, 1))


@dataclass(frozen=True)
class Spectral(UnitarilyInvariant):
    """The largest singular value: the l2 -> l2 operator norm (Bernstein & Newhouse, Prop. 5).

    Dual norm: the nuclear norm. Duality map: the polar factor ``U V^T``, by the chosen method (see
    :func:`normopt.polar.polar`; only ``"exact"`` satisfies the identities to rounding). Second moment:
    ``(G G^T, G^T G)`` with ``whiten(M, (L, R)) = L^(-1/4) M R^(-1/4)`` (Shampoo, arXiv 1802.09568); a side of size 1 is
    left out and the other then has power -1/2, so that vectors can be whitened too. ``norm``, ``dual_norm`` and
    ``project`` use singular values; step sizes take ``<g, dualize(g)>`` for the dual norm, one more polar factor.
    Scale ``"rms"``: sqrt(out/in), the RMS -> RMS norm.

    Args:
        scale: see :class:`~normopt.norms.Norm`.
        method: ``"newton-schulz"``, ``"polar-express"``, ``"gram"``, ``"exact"``, ``"auto"`` (the fastest one for the
            shape, dtype and device) or a :class:`~normopt.polar.Schedule`.
        steps: iterations; ``None`` is the method's own number.
        dtype: the name of the dtype of the iteration, such as ``"bfloat16"``, or a ``torch.dtype``; ``None`` is the
            tensor's own.
        sides: what ``second_moment`` keeps: ``"both"``, or only the ``"smaller"`` of the two, the right one of a square
            matrix, with ``whiten(M, (L,)) = L^(-1/2) M`` or ``M R^(-1/2)`` (ASGO, arXiv 2503.20762).
        exponent: the power of each inverse root in ``whiten``; ``None``: 1/4 for two sides, 1/2 for one.
    """

    matrix_memory: ClassVar[bool] = True
    method: str | Schedule = "polar-express"
    steps: int | None = None
    dtype: str | torch.dtype | None = None
    sides: str = "both"
    exponent: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "dtype", _dtype_name(self.dtype))
        if isinstance(self.method, str):
            check_choice(self, "method", self.method, METHODS)
        elif not isinstance(self.method, Schedule):
            raise ValueError(f"Spectral: method must be a name or a Schedule, got {self.method!r}")
        if self.steps is not None and (self.method == "exact" or self.steps != int(self.steps) or self.steps < 1):
            raise ValueError(f"Spectral: steps must be positive (and None for method 'exact'), got {self.steps}")
        check_choice(self, "sides", self.sides, SIDES)
        if self.exponent is not None:
            check_range(self, "exponent", self.exponent, 0, math.inf)

    @property
    def decides_on_host(self) -> bool:  # type: ignore[override]
        return self.method == "exact"

    @property
    def remembers_vectors(self) -> bool:
        """With both sides: Adagrad's full matrix."""
        return self.sides == "both"

    def unit_norm(self, w: Tensor) -> Tensor:
        return singular_values(w).amax(dim=-1) if w.numel() else w.sum(dim=(-2, -1))

    def unit_dual_norm(self, g: Tensor) -> Tensor:
        return singular_values(g).sum(dim=-1)

    def unit_dualize(self, g: Tensor) -> Tensor:
        return polar(g, self.method, self.steps, getattr(torch, str(self.dtype)) if self.dtype else None)

    def unit_project(self, w: Tensor, radius: float) -> Tensor:
        return map_singular_values(w, lambda s: s.clamp(max=radius))

    def unit_update_rms(self, m: int, n: int) -> float:
        return 1.0 / math.sqrt(max(m, n, 1))

    def second_moment(self, g: Tensor) -> tuple[Tensor, ...]:
        """``(G G^T, G^T G)``, shapes ``(..., out, out)`` and ``(..., in, in)``, or only the smaller one."""
        if self.sides == "both":
            return g @ g.mT, g.mT @ g
        return (g @ g.mT if g.shape[-2] < g.shape[-1] else g.mT @ g,)

    def unit_roots(self, stats: tuple[Tensor, ...], eps: Eps) -> tuple[Tensor, ...]:
        """``(stats + eps) ** -exponent``, and 1 for a side of size 1 beside a larger one."""
        stats = tuple(s.to(torch.promote_types(s.dtype, torch.float32)) for s in stats)
        larger = [s.shape[-1] > 1 for s in stats]
        taken = larger if any(larger) else [True] * len(stats)
        exponent = 1 / (2 * sum(taken)) if self.exponent is None else self.exponent
        roots = zip(stats, taken, strict=True)
        return tuple(matrix_power(s, -exponent, eps) if is_taken else torch.ones_like(s) for s, is_taken in roots)

    def unit_divide(self, m: Tensor, roots: tuple[Tensor, ...], out: Tensor | None = None) -> Tensor:
        """``roots[0] @ m @ roots[1]``, or one of the two products."""
        dtype = torch.promote_types(m.dtype, roots[0].dtype)
        m, roots = m.to(dtype), tuple(root.to(dtype) for root in roots)
        if self.sides == "both":
            return roots[0] @ m @ roots[1]
        return roots[0] @ m if m.shape[-2] < m.shape[-1] else m @ roots[0]

    def steepness(self, g: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """``<g, dualize(g)>``: the dual norm as exactly as the method gives the polar factor."""
        return (g * self.dualize(g)).sum(dim=(-2, -1))

    @torch.no_grad()
    def initialize_(self, w: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A random semi-orthogonal matrix times the scale's factor, by the exact method. Returns ``w``."""
        noise = torch.empty_like(self._matrix(w), dtype=torch.promote_types(w.dtype, torch.float32))
        return w.copy_(exact(noise.normal_(generator=generator)) * self.factor(w.shape))


@dataclass(frozen=True)
class Nuclear(UnitarilyInvariant):
    """The sum of the singular values, the dual of the spectral norm.

    Dual norm: the largest singular value. Duality map: ``u_1 v_1^T``, the leading singular pair, from a singular value
    decomposition. No second moment. Scale ``"rms"``: sqrt(out/in).
    """

    def unit_norm(self, w: Tensor) -> Tensor:
        return singular_values(w).sum(dim=-1)

    def unit_dual_norm(self, g: Tensor) -> Tensor:
        return singular_values(g).amax(dim=-1) if g.numel() else g.sum(dim=(-2, -1))

    def unit_dualize(self, g: Tensor) -> Tensor:
        if g.numel() == 0:
            return g.clone()
        u, s, vh = torch.linalg.svd(normalized(g), full_matrices=False)
        return (u[..., :1] @ vh[..., :1, :] * (s[..., :1, None] > 0)).to(g.dtype)

    def unit_project(self, w: Tensor, radius: float) -> Tensor:
        return map_singular_values(w, lambda s: (s - simplex_shift(s, radius)).clamp_(min=0))

    def unit_update_rms(self, m: int, n: int) -> float:
        return 1.0 / math.sqrt(max(m * n, 1))

    @torch.no_grad()
    def initialize_(self, w: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A Gaussian matrix over its norm (the duality map would have rank one). Returns ``w``."""
        noise = torch.empty_like(w, dtype=torch.promote_types(w.dtype, torch.float32)).normal_(generator=generator)
        return w.copy_(noise / self.norm(noise)[..., None, None]) if w.numel() else w


@dataclass(frozen=True)
class Schatten(UnitarilyInvariant):
    """The l_p norm of the singular values, ``(sum s_i^p)^(1/p)``: p = 1 nuclear, 2 Frobenius, ``inf`` spectral.

    Dual norm: Schatten-q, ``1/p + 1/q = 1``. Duality map: ``U diag(s^(q-1)) V^T / ||s||_q^(q-1)``, by a singular value
    decomposition: the larger ``p``, the flatter the result's spectrum. Singular values that rounding may have made, up
    to max(out, in) times the dtype's epsilon times the largest, count as 0. ``project`` is exact, by iteration. No
    second moment. Scale ``"rms"``: sqrt(out/in), as for the spectral norm (``Euclidean``'s is the RMS of the entries).

    Args:
        p: from 1 to ``inf``. At 1, of several largest singular values that are exactly equal all count, each the less.
        scale: see :class:`~normopt.norms.Norm`; by keyword.
    """

    scale: Scale = field(default="rms", kw_only=True)
    p: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "p", self.p, 1, math.inf, closed=True)

    @property
    def q(self) -> float:
        """The dual norm's ``p``."""
        return 1.0 if self.p == math.inf else math.inf if self.p == 1 else self.p / (self.p - 1)

    def unit_norm(self, w: Tensor) -> Tensor:
        return _power_norm(singular_values(w), self.p)

    def unit_dual_norm(self, g: Tensor) -> Tensor:
        return _power_norm(singular_values(g), self.q)

    def unit_dualize(self, g: Tensor) -> Tensor:
        return map_spectrum(g, self._dual_values)

    def _dual_values(self, s: Tensor) -> Tensor:
        powers = s ** (self.q - 1) * (s > 0)
        total = (powers * s).sum(dim=-1, keepdim=True)
        return powers / torch.where(total == 0, 1.0, total) ** (1 / self.p)

    def unit_project(self, w: Tensor, radius: float) -> Tensor:
        return map_singular_values(w, lambda s: _project_power(s, self.p, radius))

    def unit_update_rms(self, m: int, n: int) -> float:
        """Known for ``p`` = 1, 2 and ``inf``; otherwise it depends on the gradient's spectrum."""
        rank = {1.0: 1, 2.0: 1, math.inf: min(m, n)}.get(self.p, math.nan)
        return math.sqrt(rank / max(m * n, 1))


def _dtype_name(dtype: object) -> str | None:
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    if name is None:
        return None
    found = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(name, str) or not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"Spectral: dtype must be the name of a torch dtype for floats like 'bfloat16', got {dtype!r}")
    return name


def singular_values(x: Tensor) -> Tensor:
    """The singular values of each matrix, shape ``(..., min(m, n))``, computed in float32 or better."""
    return torch.linalg.svdvals(x.to(torch.promote_types(x.dtype, torch.float32)))


def map_singular_values(x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    """``U diag(f(s)) V^T`` for each ``x = U diag(s) V^T``."""
    if x.numel() == 0:
        return x.clone()
    u, s, vh = torch.linalg.svd(x.to(torch.promote_types(x.dtype, torch.float32)), full_matrices=False)
    return ((u * f(s).unsqueeze(-2)) @ vh).to(x.dtype)


def map_spectrum(g: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    """``U diag(f(s)) V^T`` with the singular values ``s`` over the largest; those that may be rounding errors are 0."""
    if g.numel() == 0:
        return g.clone()
    u, s, vh = torch.linalg.svd(normalized(g), full_matrices=False)
    largest = s[..., :1]
    s = s / torch.where(largest == 0, 1.0, largest)
    s = s * (s > max(g.shape[-2:]) * torch.finfo(s.dtype).eps)
    return ((u * f(s).unsqueeze(-2)) @ vh).to(g.dtype)


def _power_norm(s: Tensor, p: float) -> Tensor:
    """The l_p norm of ``s >= 0``, sorted downwards, along the last dimension; powers of 1e-30 and of 1e30 are none."""
    if s.shape[-1] == 0:
        return s.sum(dim=-1)
    largest = s[..., :1]
    relative = s / torch.where(largest == 0, 1.0, largest)
    return torch.linalg.vector_norm(relative, ord=p, dim=-1) * largest.squeeze(-1)


def _project_power(s: Tensor, p: float, radius: float) -> Tensor:
    """The point of the l_p ball nearest to ``s >= 0``, sorted downwards.

    It solves ``t + mu t^(p-1) = s``. With ``t = shrink s_1 x``, ``x_1 = 1`` this is ``shrink x + (1 - shrink) x^(p-1) =
    s / s_1``, where all is within [0, 1], and ``shrink ||x||_p`` rises with ``shrink``.
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
    """Where in [0, high] a rising function crosses 0, from below, by the Illinois method (a safe secant method)."""
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
    """What to subtract from ``s >= 0``, sorted downwards, for the nearest point of ``{t >= 0, sum t <= radius}``."""
    counts = torch.arange(1, s.shape[-1] + 1, dtype=s.dtype, device=s.device)
    shifts = (s.cumsum(dim=-1) - radius) / counts
    active = (s > shifts).sum(dim=-1, keepdim=True).clamp_(min=1)
    return shifts.gather(-1, active - 1).clamp_(min=0)


def matrix_power(stats: Tensor, exponent: float, eps: Eps = 0.0) -> Tensor:
    """``(stats + eps)^exponent`` of symmetric positive semidefinite matrices, for negative exponents.

    Directions in which an eigenvalue plus ``eps`` is not above the rounding errors of the others, sqrt(n) times the
    dtype's epsilon times the largest, are left out (a pseudo-inverse): nothing is known about them, and a tiny ``eps``
    would magnify what a gradient has there. The result is 0 for a matrix that is 0 or has an entry that is not finite.
    """
    if stats.numel() == 0:
        return stats.clone()
    eigenvalues, vectors = eigh(stats)
    largest = eigenvalues.amax(dim=-1, keepdim=True)
    known = torch.isfinite(stats).all(dim=-1).all(dim=-1, keepdim=True) & (largest > 0)
    shifted = eigenvalues.clamp(min=0.0) + eps
    kept = known & (shifted > largest * (math.sqrt(stats.shape[-1]) * torch.finfo(stats.dtype).eps))
    powers = torch.where(kept, shifted, 1.0) ** exponent * kept
    return (vectors * powers.unsqueeze(-2)) @ vectors.mT


def eigh(stats: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, rising, and eigenvectors of symmetric matrices, in float32 or better; it does not fail.

    Matrices are divided by their largest entry first; entries and eigenvalues that are infinite count as the largest
    number, those that are no numbers as 0. If the decomposition does not converge, it is repeated in float64 with a
    jitter of 1e-7 on the diagonal, which is taken off the eigenvalues; and if that fails too, the diagonal stands for
    the matrix.
    """
    working = torch.promote_types(stats.dtype, torch.float32)
    a = torch.nan_to_num(stats.to(working))
    if a.numel() == 0:
        return a.diagonal(dim1=-2, dim2=-1).clone(), a
    largest = a.abs().amax(dim=(-2, -1), keepdim=True)
    a = a / torch.where(largest == 0, 1.0, largest)
    values, vectors = _eigh(a)
    return torch.nan_to_num(values * largest.squeeze(-1)), vectors


def _eigh(a: Tensor) -> tuple[Tensor, Tensor]:
    jitter = 1e-7
    found = _attempt(a)
    if found is None:
        found = _attempt(a.cpu().double() + jitter * torch.eye(a.shape[-1], dtype=torch.float64))
        if found is None:
            values, order = a.diagonal(dim1=-2, dim2=-1).sort(dim=-1)
            return values, torch.nn.functional.one_hot(order, a.shape[-1]).mT.to(a)
        found = found[0] - jitter, found[1]
    return found[0].to(a), found[1].to(a)


def _attempt(a: Tensor) -> tuple[Tensor, Tensor] | None:
    """``torch.linalg.eigh``, which can return NaNs in place of an error where rows are 0; ``None`` in either case."""
    try:
        values, vectors = torch.linalg.eigh(a)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return None
    return (values, vectors) if bool((values.isfinite() & vectors.isfinite().all(dim=-2)).all()) else None
