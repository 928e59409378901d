"""Bounds that hold for the singular values of the weights after every step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from normopt.constraints.base import Constraint
from normopt.constraints.bounds import Transposed
from normopt.ingredient.stage import Context, Direction, Rate
from normopt.ingredient.validate import check_choice, check_count, check_positive
from normopt.ingredient.view import View
from normopt.norms.base import Scale
from normopt.norms.spectral import Spectral
from normopt.numerics.lengths import euclidean, normalize
from normopt.polar.factor import polar

#: Steps of the Polar Express that reach the last bits of float32 for singular values above 1e-3 of the Frobenius norm.
POLAR_STEPS = 10

#: The largest singular value that the soft cap can reduce to 1 without raising smaller ones above 1.
SOFT_LIMIT = 1.3

#: Newton steps with which ``soft_coefficient`` reaches the last bits of float64 from its starting point.
NEWTON_STEPS = 8


@dataclass(frozen=True)
class _OfSpectrum(Constraint):
    """A bound of the singular values of each matrix. Vectors and scalars are left alone.

    Args:
        radius: the largest spectral norm, in units of ``Spectral(scale)``; positive.
        scale: see :class:`~normopt.norms.Norm`; the default is the RMS -> RMS norm, whose factor is sqrt(out/in).
    """

    _abstract = True
    radius: float = 1.0
    scale: Scale = "rms"

    def __post_init__(self) -> None:
        check_positive(self, "radius", self.radius)
        Spectral(self.scale)  # raises if the scale is unknown

    def seen_through(self, view: View) -> Constraint:
        return Transposed(self) if view.transpose else self

    def weight(self, w: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        if context.is_vector or not w.numel():
            return w
        unit = self.radius * Spectral(self.scale).factor(w.shape)
        return self.into_unit_ball(w / unit, state, context) * unit

    def into_unit_ball(self, w: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        """``weight`` for radius 1 at scale 1."""
        raise NotImplementedError


@dataclass(frozen=True)
class SpectralCap(_OfSpectrum):
    """Singular values clipped at ``radius``, ``min(s, radius)``, by two polar factors: the hard cap of 2507.13338.

    In units of the radius, with ``O = polar(w)`` and ``S = polar(w^T w - I)``, whose eigenvalues are the signs of
    ``s - 1``: ``w <- w + (O - w) P``, ``P = (I + S) / 2`` (arXiv 2507.13338). This is the projection onto the spectral
    norm's ball, by matrix products alone. Singular values within about 1e-3 of ``||w^T w - I||_F`` of the radius, for
    which ``S`` has not converged, end between the radius and their old values; all others are exact to rounding.
    ``Ball(Spectral())`` is exact, by a singular value decomposition.

    Args:
        radius: the largest spectral norm, in units of ``Spectral(scale)``; positive.
        scale: see :class:`~normopt.norms.Norm`; the default is the RMS -> RMS norm, whose factor is sqrt(out/in).
    """

    def into_unit_ball(self, w: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        wide = w.shape[-2] < w.shape[-1]
        x = w.mT if wide else w
        gram = x.mT @ x
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        above = (eye + polar(gram - eye, "polar-express", POLAR_STEPS)) / 2
        capped = x + (polar(x, "polar-express", POLAR_STEPS) - x) @ above
        return capped.mT if wide else capped


@dataclass(frozen=True)
class SoftSpectralCap(_OfSpectrum):
    """Singular values reduced below ``radius`` by two odd cubics: the soft cap of arXiv 2507.13338, section 3.

    In units of the radius ``x <- w - a w w^T w``, ``w <- x + a x x^T x``: four matrix products. ``a`` maps the largest
    value that a step from inside the ball can reach, ``k = shrink + rate max_update / radius``, to exactly 1, so that
    weights that start in the ball stay there. All smaller values shrink, by at most ``3 a^2 s^5``.

    Args:
        radius: the largest spectral norm, in units of ``Spectral(scale)``; positive.
        scale: the scale of the direction, which must be ``Spectral(scale)``; the step size must be ``Constant()``.
        max_update: the largest spectral norm of an update at rate 1, in units of ``Spectral(scale)``: 1.2 for Jordan's
            Newton-Schulz steps, the default, and 1.01 for other methods.

    Raises:
        ValueError: another direction or step size, whose updates have no such bound; ``rate max_update`` is more than
            0.3 of the radius, or a matrix starts outside the ball: a cubic for so large a ``k`` raises other values.
            The error comes before any weight has changed.
    """

    needs_bounded_step = True
    decides_on_host = True
    max_update: float = 1.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "max_update", self.max_update)

    def check_composes(self, direction: Direction, reach: float | None) -> None:
        if not isinstance(direction, Spectral) or direction.scale != self.scale or reach != 1.0:
            raise ValueError(
                f"{self} needs to know how large updates can be: steps of Constant() along Spectral(scale="
                f"{self.scale!r}), not of {f'{reach} times the rate' if reach else 'any length'} along "
                f"{direction}; see SpectralCap"
            )

    def init_state(self, x: Tensor, weights: Callable[[], Tensor]) -> dict[str, Tensor]:
        if x.device.type != "meta" and x.numel():
            largest = Spectral(self.scale).norm(weights()).amax().item()
            if not largest <= self.radius * 1.01:
                raise ValueError(
                    f"SoftSpectralCap: a matrix starts with norm {largest:.3g}, outside the ball of radius "
                    f"{self.radius:.3g}; initialize it inside, or use SpectralCap"
                )
        return {}

    def shrink(self, rate: Rate) -> Rate:
        reach = rate * (self.max_update / self.radius)
        if (not isinstance(reach, Tensor) or reach.device.type == "cpu") and reach > SOFT_LIMIT - 1:
            raise ValueError(
                f"SoftSpectralCap: a learning rate of {float(rate):.3g} moves weights by {float(reach):.3g} of the "
                f"radius; it must be {SOFT_LIMIT - 1:.3g} at most, see SpectralCap for longer steps"
            )
        return 1.0

    def into_unit_ball(self, w: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        shrink = context.shrink
        kept: Rate = 1.0 if isinstance(shrink, Tensor) and shrink.ndim else shrink
        a = soft_coefficient(kept + context.rate * (self.max_update / self.radius))
        x = _with_cube(w, -a)
        return _with_cube(x, a)


def soft_coefficient(k: Rate) -> Rate:
    """The ``a >= 0`` with which ``x = k - a k^3``, ``x + a x^3`` is 1; 0 for ``k <= 1``.

    ``b = a k^2`` solves ``b^4 - 3 b^3 + 3 b^2 = 1 - 1/k``, whose left side rises from 0 to 1 on [0, 1].
    """
    k = k.clamp(min=1.0) if isinstance(k, Tensor) else max(k, 1.0)
    gap = 1 - 1 / k
    b = (gap / 3) ** 0.5 + 1e-15
    for _ in range(NEWTON_STEPS):
        b = b - (b**4 - 3 * b**3 + 3 * b**2 - gap) / (4 * b**3 - 9 * b**2 + 6 * b)
    return b / k**2


def _with_cube(w: Tensor, a: Rate) -> Tensor:
    """``w + a w w^T w``."""
    cube = w @ (w.mT @ w) if w.shape[-2] > w.shape[-1] else (w @ w.mT) @ w
    return w + cube * a


@dataclass(frozen=True)
class Stiefel(_OfSpectrum):
    """All singular values exactly ``radius``: ``w <- radius polar(w)`` after every step, the polar retraction.

    With ``scale="unit"`` and radius 1 the shorter side's vectors are orthonormal, a point of the Stiefel manifold, to
    which the polar factor is nearest. SPEL's constraint (see ``normopt.zoo.SPEL``). Matrices far from it are brought
    there by their first step; zeros stay zeros, and vectors and scalars are left alone.

    Args:
        radius: the singular values, in units of ``Spectral(scale)``; positive.
        scale: see :class:`~normopt.norms.Norm`; ``"unit"`` by default.
        method: ``"polar-express"``, ten steps of it, which reach the last bits of float32 for singular values
            above 1e-3 of the Frobenius norm; or ``"exact"``, see :func:`normopt.polar.polar`.
    """

    scale: Scale = "unit"
    method: str = "polar-express"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "method", self.method, ("polar-express", "exact"))

    @property
    def decides_on_host(self) -> bool:
        return self.method == "exact"

    def into_unit_ball(self, w: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        return polar(w, self.method, POLAR_STEPS if self.method == "polar-express" else None)


@dataclass(frozen=True)
class SpectralNormalize(_OfSpectrum):
    """Each matrix divided by ``max(1, sigma / radius)``, ``sigma`` its largest singular value (arXiv 2507.13338).

    ``sigma`` comes from a power iteration that starts from the last step's vector, and before the first step from a
    singular value decomposition. It is never too large, but may be too small before it has converged: the norm then
    exceeds the radius.

    Args:
        radius: the largest spectral norm, in units of ``Spectral(scale)``; positive.
        scale: see :class:`~normopt.norms.Norm`.
        iterations: number of power iterations a step, ``4 out in`` FLOPs each.
    """

    iterations: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "iterations", self.iterations)

    def init_state(self, x: Tensor, weights: Callable[[], Tensor]) -> dict[str, Tensor]:
        w = weights()
        return {"leading": torch.linalg.svd(w, full_matrices=False).Vh[..., :1, :].mT.clone()} if w.numel() else {}

    def into_unit_ball(self, w: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        v = state["leading"]
        for _ in range(self.iterations):
            following = normalize(w.mT @ (w @ v), (-2, -1))
            v = torch.where(following.any(dim=-2, keepdim=True), following, v)
        state["leading"].copy_(v)
        return w / euclidean(w @ v, (-2, -1), keepdim=True).clamp_(min=1.0)
