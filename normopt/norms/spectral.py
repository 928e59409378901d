"""The spectral norm, the largest singular value, whose duality map is the polar factor (Muon)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from normopt.ingredient.traits import trait
from normopt.ingredient.validate import check_choice, check_count, check_range
from normopt.norms.schatten import UnitarilyInvariant
from normopt.numerics.eigen import Eps, matrix_power
from normopt.numerics.lengths import euclidean
from normopt.numerics.singular import map_singular_values, singular_values
from normopt.polar.choice import Choice
from normopt.polar.coefficients import PolarCoefficients
from normopt.polar.decompositions import exact
from normopt.polar.factor import METHODS, choose, key, polar

SIDES = ("both", "smaller")


@dataclass(frozen=True)
class Spectral(UnitarilyInvariant):
    """The largest singular value: the l2 -> l2 operator norm (Bernstein & Newhouse, Prop. 5).

    Dual norm: the nuclear norm. Duality map: the polar factor ``U V^T``, by the chosen method (see
    :func:`normopt.polar.polar`; only ``"exact"`` satisfies the identities to rounding). Second moment: ``(G G^T, G^T
    G)`` with ``whiten(M, (L, R)) = L^(-1/4) M R^(-1/4)`` (Shampoo, arXiv 1802.09568); for vectors the side of size 1 is
    left out and the other has power -1/2. ``norm``, ``dual_norm`` and ``project`` use singular values; step sizes
    estimate the dual norm by ``<g, dualize(g)>``, one more polar factor. Scale ``"rms"``: sqrt(out/in), the RMS -> RMS
    norm.

    Args:
        scale: see :class:`~normopt.norms.Norm`.
        method: ``"newton-schulz"``, ``"polar-express"``, ``"gram"``, ``"exact"``, ``"auto"`` (the fastest one for the
            shape, dtype and device) or a :class:`~normopt.polar.PolarCoefficients`.
        steps: number of iterations; ``None``: the method's default.
        dtype: the dtype of the iteration, a ``torch.dtype`` or its name, such as ``"bfloat16"``; ``"auto"``: at least
            bfloat16's accuracy, in whichever dtype is fastest; ``None``: the tensor's own.
        sides: which matrices ``second_moment`` returns: ``"both"``, or only the ``"smaller"`` one, which is ``G^T G``
            for a square matrix, with ``whiten(M, (L,)) = L^(-1/2) M`` or ``M R^(-1/2)`` (ASGO, arXiv 2503.20762).
        exponent: the power of each inverse root in ``whiten``; ``None``: 1/4 for two sides, 1/2 for one.

    Raises:
        ValueError: an unknown method, dtype or side, ``steps`` less than 1 or with ``"exact"``, a negative exponent.
    """

    matrix_memory = True
    method: str | PolarCoefficients = "polar-express"
    steps: int | None = None
    dtype: str | torch.dtype | None = None
    sides: str = "both"
    exponent: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "dtype", _name_of_float(self.dtype))
        if isinstance(self.method, str):
            check_choice(self, "method", self.method, METHODS)
        elif not isinstance(self.method, PolarCoefficients):
            raise ValueError(f"Spectral: method must be a name or a PolarCoefficients, got {self.method!r}")
        if self.steps is not None:
            check_count(self, "steps", self.steps)
            if self.method == "exact":
                raise ValueError(f"Spectral: steps must be None for method 'exact', got {self.steps}")
        check_choice(self, "sides", self.sides, SIDES)
        if self.exponent is not None:
            check_range(self, "exponent", self.exponent, 0, math.inf)

    @trait
    def decides_on_host(self) -> bool:
        return self.method == "exact"

    @property
    def remembers_vectors(self) -> bool:
        """With both sides, of which a vector has one: full-matrix Adagrad."""
        return self.sides == "both"

    def unit_norm(self, w: Tensor) -> Tensor:
        return singular_values(w).amax(dim=-1) if w.numel() else w.sum(dim=(-2, -1))

    def unit_dual_norm(self, g: Tensor) -> Tensor:
        return singular_values(g).sum(dim=-1)

    def unit_dualize(self, g: Tensor) -> Tensor:
        return polar(g, self.method, self.steps, self._products())

    @trait
    def is_open(self) -> bool:
        """Whether the form or the dtype of products is chosen by shape and device."""
        return self.method != "exact" and "auto" in (self.method, self.dtype)

    def choose(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Choice:
        """The form and dtype of products for matrices of this shape, dtype and device."""
        return choose(shape, dtype, device, self.method, self.steps, self._products())

    def key(self, shape: tuple[int, ...]) -> str:
        """What that choice is kept under, in a param group's ``"products"``."""
        return key(shape, self.method, self.steps, self._products())

    def _products(self) -> torch.dtype | str | None:
        return "auto" if self.dtype == "auto" else getattr(torch, str(self.dtype)) if self.dtype else None

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
        """``(stats + eps) ** -exponent``; 1 for a side of size 1 whose other side is larger."""
        stats = tuple(s.to(torch.promote_types(s.dtype, torch.float32)) for s in stats)
        taken = _taken(stats)
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

    def unit_lengthening(self, g: Tensor, roots: tuple[Tensor, ...]) -> Tensor:
        """With an ``exponent`` of its own, the factor by which ``g`` grows to the power that makes it scale-free.

        Twice the exponent squares the factor or more, by the inequality of power means, so the result is not too small
        for exponents above the usual one.
        """
        before, after = (euclidean(x, (-2, -1)) for x in (g, self.unit_divide(g, roots)))
        usual = 1 / (2 * sum(_taken(roots)))
        if self.exponent is not None and self.exponent != usual:
            grown = torch.where(before > 0, after / before, 0.0)
            after = before * (grown ** (usual / self.exponent) if self.exponent else 1.0)
        lengths = after / math.sqrt(max(min(g.shape[-2:]), 1))
        return torch.where((after == 0) & (before > 0), torch.inf, lengths)

    def steepness(self, g: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """``<g, dualize(g)>``: the dual norm, as accurate as the method's polar factor."""
        return (g * self.dualize(g)).sum(dim=(-2, -1))

    @torch.no_grad()
    def initialize_(self, w: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A random semi-orthogonal matrix times the scale's factor, by the exact method. Returns ``w``."""
        noise = torch.empty_like(self._matrix(w), dtype=torch.promote_types(w.dtype, torch.float32))
        return w.copy_(exact(noise.normal_(generator=generator)) * self.factor(w.shape))


def _taken(sides: tuple[Tensor, ...]) -> list[bool]:
    """Which of the square matrices count: all but one of size 1 beside a larger one, as of a vector."""
    larger = [side.shape[-1] > 1 for side in sides]
    return larger if any(larger) else [True] * len(sides)


def _name_of_float(dtype: object) -> str | None:
    """A dtype for floats by its name, or ``"auto"``; a ``ValueError`` for anything else."""
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    if name is None or name == "auto":
        return name
    found = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(name, str) or not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"Spectral: dtype must be the name of a torch dtype for floats like 'bfloat16', got {dtype!r}")
    return name
