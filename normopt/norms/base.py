"""What a norm is: a size for weights, its dual for gradients, and the duality map between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from normopt.ingredient.stage import Context, Direction
from normopt.ingredient.traits import overrides
from normopt.ingredient.validate import check_choice
from normopt.numerics.eigen import Eps
from normopt.numerics.lengths import _nonzero

Scale = str | float

N = TypeVar("N", bound="Norm")

#: Scales that mean the same for every norm, as functions of (out, in); "rms" is each norm's own.
SCALES: dict[str, Callable[[int, int], float]] = {
    "unit": lambda m, n: 1.0,
    "max1": lambda m, n: math.sqrt(max(1.0, m / max(n, 1))),
    "adamw": lambda m, n: 0.2 * math.sqrt(max(m, n)),
    "fan_in": lambda m, n: 1.0 / max(n, 1),
    "sqrt_in": lambda m, n: math.sqrt(n),
    "ratio": lambda m, n: math.sqrt(m / max(n, 1)),
    "mean_side": lambda m, n: 2.0 / max(m + n, 1),
}


@dataclass(frozen=True)
class Norm(Direction):
    """A norm of (out x in) matrices, with its dual norm and its duality map.

    All methods take tensors of shape ``(..., out, in)`` whose leading dimensions are a batch of independent matrices;
    ``norm`` and ``dual_norm`` return shape ``(...)``. Norms with ``needs_matrix = False`` also take vectors and
    scalars, as a whole.

    With f the scale's factor for the shape, ``norm`` is divided by f, ``dual_norm`` and ``dualize`` are multiplied by
    it, so that ``<g, dualize(g)> == dual_norm(g)`` and ``norm(dualize(g)) == 1`` hold under every scale.

    Args:
        scale: how the unit ball depends on the shape (m = out, n = in). ``"unit"``: 1. ``"rms"``: root-mean-square
            norms in place of Euclidean ones, which makes step sizes independent of width (each norm's docstring has its
            factor). ``"max1"``: Muon's sqrt(max(1, m/n)). ``"adamw"``: Moonlight's 0.2 sqrt(max(m, n)). ``"fan_in"``:
            1/n, Scion's for the sign of an output layer. ``"sqrt_in"``: sqrt(n), which gives rows a root mean square of
            1. ``"ratio"``: sqrt(m/n), the ``"rms"`` of the spectral norm, for any norm. ``"mean_side"``: 2/(m + n),
            SPlus' for signs in a rotated basis. Or a number.

    A new norm is a frozen dataclass with the ``unit_*`` methods, which are at scale 1; see docs/extending.md.

    Raises:
        ValueError: the scale is an unknown name, or not positive and finite.
    """

    sees_weights = False
    scale: Scale = "rms"
    _abstract = True
    degree = 0
    needs_matrix = True
    #: Whether the second moments are matrices, to whose diagonals ``whiten`` adds ``eps``.
    matrix_memory: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.scale, str):
            check_choice(self, "scale", self.scale, ("rms", *SCALES))
        elif not (isinstance(self.scale, Real) and 0 < self.scale < math.inf):
            raise ValueError(f"{type(self).__name__}: scale must be positive and finite, got {self.scale!r}")

    @property
    def has_memory(self) -> bool:
        """Whether the norm has a ``second_moment`` for ``Smoothed`` to average."""
        return overrides(self, Norm, "second_moment")

    @property
    def remembers_vectors(self) -> bool:
        """Whether ``Smoothed`` may average the second moments of vectors, seen as one row."""
        return self.takes_vectors

    # What a norm must say of itself, at scale 1 ---------------------------------------------------------------

    def unit_rms(self, m: int, n: int) -> float:
        """The factor of the scale ``"rms"`` for an (m x n) matrix."""
        raise NotImplementedError

    def unit_norm(self, w: Tensor) -> Tensor:
        """``norm`` at scale 1."""
        raise NotImplementedError

    def unit_dual_norm(self, g: Tensor) -> Tensor:
        """``dual_norm`` at scale 1."""
        raise NotImplementedError

    def unit_dualize(self, g: Tensor) -> Tensor:
        """``dualize`` at scale 1; a new tensor."""
        raise NotImplementedError

    def unit_project(self, w: Tensor, radius: float) -> Tensor:
        """``project`` at scale 1."""
        raise NotImplementedError

    def unit_roots(self, stats: tuple[Tensor, ...], eps: Eps) -> tuple[Tensor, ...]:
        """The divisors of ``whiten``: by default ``sqrt(stats[0]) + eps``; new tensors.

        A norm whose second moments are matrices returns inverse roots, by which ``unit_divide`` multiplies.
        """
        root = stats[0].sqrt()
        return (_nonzero(root) if is_zero(eps) else root.add_(eps),)

    def unit_divide(self, m: Tensor, roots: tuple[Tensor, ...], out: Tensor | None = None) -> Tensor:
        """``m`` divided by ``unit_roots``: a new tensor, or ``out`` if that has the result's shape and dtype."""
        (root,) = roots
        like = m.shape, torch.promote_types(m.dtype, root.dtype)
        # torch.compile does not trace an out= that has to be resized or is not contiguous
        fits = out is not None and out.is_contiguous() and (out.shape, out.dtype) == like
        return torch.div(m, root, out=out) if fits else m / root

    def unit_lengthening(self, g: Tensor, roots: tuple[Tensor, ...]) -> Tensor:
        """How long ``g`` divided by ``roots`` is, in Frobenius lengths of ``unit_dualize`` of a full-rank gradient.

        At most ``1 / sqrt(c)`` if the roots are those of statistics that are at least ``c`` times ``second_moment(g)``;
        ``inf`` where a ``g`` that is not 0 becomes 0. ``Smoothed`` asks it whether roots of earlier statistics still
        fit. For a norm whose second moments are matrices; shape ``(...)``, that of the roots without their matrices.
        """
        raise NotImplementedError(f"{type(self).__name__} has no roots that are kept")

    def unit_update_rms(self, m: int, n: int) -> float:
        """The root mean square of ``dualize`` at scale 1 for a full-rank (m x n) gradient."""
        return math.nan

    def second_moment(self, g: Tensor) -> tuple[Tensor, ...]:
        """The statistics that ``dualize`` divides by, each of degree 2 in ``g``, for ``Smoothed`` to average."""
        raise NotImplementedError(f"{type(self).__name__} has no second moment")

    def remember_(self, stats: Sequence[Tensor], g: Tensor, keep: float, add: float) -> None:
        """``stats <- keep stats + add second_moment(g)``, in place."""
        for old, new in zip(stats, self.second_moment(g), strict=True):
            old.mul_(keep).add_(new, alpha=add)

    # What follows, at any scale -------------------------------------------------------------------------------

    def factor(self, shape: tuple[int, ...]) -> float:
        """The scale's factor f for tensors of this shape; vectors count as one row."""
        m, n = (shape[-2], shape[-1]) if len(shape) > 1 else (1, math.prod(shape))
        m, n = max(m, 1), max(n, 1)  # a norm of no entries is 0, not 0 / 0
        if isinstance(self.scale, str):
            return self.unit_rms(m, n) if self.scale == "rms" else SCALES[self.scale](m, n)
        return float(self.scale)

    def fitted(self: N, shape: tuple[int, ...]) -> N:
        """This norm for parts of a matrix of ``shape``: the scale is the whole's factor, a number."""
        return replace(self, scale=self.factor(shape))

    def norm(self, w: Tensor) -> Tensor:
        """The primal norm of each matrix, shape ``(...)``."""
        return self.unit_norm(self._matrix(w)) / self.factor(w.shape)

    def dual_norm(self, g: Tensor) -> Tensor:
        """``max <g, t>`` over ``norm(t) <= 1``, the dual norm of each matrix, shape ``(...)``."""
        return self.unit_dual_norm(self._matrix(g)) * self.factor(g.shape)

    def dualize(self, g: Tensor) -> Tensor:
        """The duality map (LMO): a ``t`` with ``norm(t) = 1`` and ``<g, t> = dual_norm(g)``; 0 where ``g`` is 0."""
        return self._scaled(self.unit_dualize(self._matrix(g)), g.shape)

    def whiten(self, m: Tensor, stats: tuple[Tensor, ...], eps: Eps = 0.0) -> Tensor:
        """``m`` divided by the root of ``stats`` (plus ``eps``): ``whiten(g, second_moment(g)) == dualize(g)``.

        ``Smoothed`` calls its two halves, ``unit_roots`` and ``divide``, because it may keep the roots for some steps.
        """
        roots = self.unit_roots(stats, eps)
        return self.divide(self._matrix(m), roots, out=roots[0])

    def divide(self, m: Tensor, roots: tuple[Tensor, ...], out: Tensor | None = None) -> Tensor:
        """The second half of ``whiten``: ``m`` divided by ``unit_roots``; it may write to ``out``."""
        return self._scaled(self.unit_divide(m, roots, out), m.shape)

    def project(self, w: Tensor, radius: float = 1.0) -> Tensor:
        """The point of the ball ``norm <= radius`` nearest to ``w`` in Euclidean distance; a new tensor."""
        if radius < 0:
            raise ValueError(f"{type(self).__name__}.project: radius must not be negative, got {radius!r}")
        return self.unit_project(self._matrix(w), radius * self.factor(w.shape))

    @torch.no_grad()
    def initialize_(self, w: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Fill ``w`` with the duality map of a Gaussian tensor: random weights of norm 1. Returns ``w``."""
        noise = torch.empty_like(w, dtype=torch.promote_types(w.dtype, torch.float32))
        return w.copy_(self.dualize(noise.normal_(generator=generator)))

    def rms(self, shape: tuple[int, ...]) -> float:
        """The root mean square of ``dualize`` for a full-rank gradient of ``shape``."""
        m, n = (shape[-2], shape[-1]) if len(shape) > 1 else (1, math.prod(shape))
        return self.unit_update_rms(m, n) * self.factor(shape)

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        """The duality map: the direction of a norm without memory."""
        return self.dualize(x)

    def steepness(self, g: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """The dual norm itself."""
        return self.dual_norm(g)

    def _scaled(self, d: Tensor, shape: tuple[int, ...]) -> Tensor:
        factor = self.factor(shape)
        return d if factor == 1.0 else d.mul_(factor)

    def _matrix(self, x: Tensor) -> Tensor:
        if self.needs_matrix and x.ndim < 2:
            raise ValueError(f"{type(self).__name__} is a norm of matrices (..., out, in), got shape {tuple(x.shape)}")
        return x


def is_zero(eps: Eps) -> bool:
    """Whether ``eps`` is the number 0; false for every tensor, whose value is not read."""
    return not isinstance(eps, Tensor) and eps == 0
