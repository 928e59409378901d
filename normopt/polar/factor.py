"""The polar factor ``U V^T`` of a matrix, by any method."""

from __future__ import annotations

import torch
from torch import Tensor

from normopt.ingredient.registry import nearest
from normopt.numerics.lengths import normalized
from normopt.polar.choice import Choice, choose
from normopt.polar.coefficients import FOUR_STEPS, SCHEDULES, PolarCoefficients, Quintic
from normopt.polar.decompositions import exact
from normopt.polar.newton_schulz import direct, through_gram

METHODS = (*SCHEDULES, "gram", "exact", "auto")


def polar(
    g: Tensor,
    method: str | PolarCoefficients = "polar-express",
    steps: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The orthogonal polar factor ``U V^T`` of each matrix ``g = U diag(s) V^T`` (Bernstein & Newhouse, Prop. 5).

    It is the semi-orthogonal matrix nearest to ``g``, and the duality map of the spectral norm. Where ``g`` is rank
    deficient it is ``U_r V_r^T``; the polar factor of 0 is 0.

    Args:
        g: shape ``(..., m, n)``, tall or wide; never modified.
        method: one of

            * ``"newton-schulz"``: Jordan's five steps, values end near 1, see ``JORDAN``;
            * ``"polar-express"``: six steps, within 0.7% of 1 for singular values above 1e-3 of the Frobenius norm;
            * ``"gram"``: four steps after a tighter normalizer, see ``FOUR_STEPS``, on the small Gram matrix;
            * ``"exact"``: from eigenvalues of the Gram matrix in float64, or from a singular value decomposition where
              that is not accurate enough;
            * ``"auto"``: the four steps in whichever form and dtype is fastest, see :func:`choose`;
            * a :class:`PolarCoefficients`.
        steps: the number of iterations; ``None``: the method's default. Not for ``"exact"``.
        dtype: the dtype of the iteration's matrix products; ``None``: the dtype of ``g``, but float32 for float16
            (whose range is too small), or the choice of ``"auto"``. The normalizer is computed in float32 or better.

    Returns:
        A new tensor of the shape and dtype of ``g``.

    Cost: ``4 m^2 n + 2 m^3`` FLOPs a step, m the shorter side; for the Gram form see :func:`choose`. Only ``"exact"``
    synchronizes with the device. In bfloat16, singular vectors whose singular values are below about 1/250 of the
    largest are lost to rounding, which turns a rank-deficient matrix into one of full rank.

    Raises:
        ValueError: ``g`` has fewer than two dimensions, the method is unknown or ``steps`` is out of range.
    """
    if g.ndim < 2:
        raise ValueError(f"polar: needs matrices (..., m, n), got shape {tuple(g.shape)}")
    if not isinstance(method, PolarCoefficients) and method not in METHODS:
        raise ValueError(f"polar: unknown method {method!r}; {nearest(str(method), METHODS)}")
    if method == "exact" and steps is not None:
        raise ValueError("polar: method 'exact' takes no steps")
    schedule = method if isinstance(method, PolarCoefficients) else SCHEDULES.get(method, FOUR_STEPS)
    rows = schedule.rows(steps)
    if g.numel() == 0:
        return g.clone()
    form, working = _plan(g, method)
    if form == "exact":
        return exact(g, dtype)
    return _iterate(g, schedule, rows, form, dtype or working)


def _plan(g: Tensor, method: str | PolarCoefficients) -> Choice:
    """The form and the default dtype of a method."""
    if method == "auto":
        return choose(g.shape, g.dtype, g.device)
    form = method if method in ("gram", "exact") else "direct"
    return Choice(str(form), torch.float32 if g.dtype == torch.float16 else g.dtype)


def _iterate(g: Tensor, schedule: PolarCoefficients, rows: list[Quintic], form: str, dtype: torch.dtype) -> Tensor:
    """``U V^T`` by the iteration with those coefficients, after a division by the normalizer."""
    tight = schedule.margin if schedule.normalizer == "schatten8" else None
    # For "schatten8" this division only keeps the entries of A^2 inside the range of float16; the iteration divides by
    # the Schatten norm.
    margin = schedule.margin if tight is None else min(g.shape[-2:]) ** -0.25
    x = normalized(g, margin).to(dtype).reshape(-1, *g.shape[-2:])
    x = (through_gram if form == "gram" else direct)(x, rows, tight)
    return x.reshape(g.shape).to(g.dtype)
