"""The polar factor ``U V^T`` of a matrix, by any method."""

from __future__ import annotations

import torch
from torch import Tensor

from normopt.ingredient.registry import nearest
from normopt.numerics.lengths import normalized
from normopt.polar.choice import Choice, fastest, has_bfloat16
from normopt.polar.coefficients import FOUR_STEPS, SCHEDULES, PolarCoefficients, Quintic
from normopt.polar.decompositions import exact
from normopt.polar.newton_schulz import direct, through_gram

#: What ``method`` may be: a schedule's name, ``"gram"`` or ``"exact"``, or ``"auto"``, whichever is fastest.
METHODS = (*SCHEDULES, "gram", "exact", "auto")


def polar(
    g: Tensor,
    method: str | PolarCoefficients = "polar-express",
    steps: int | None = None,
    dtype: torch.dtype | str | None = None,
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
        dtype: the dtype of the iteration's matrix products; ``"auto"``: at least bfloat16's accuracy, in whichever
            dtype is fastest, see :func:`choose`; ``None``: the dtype of ``g``, but float32 for float16 (whose range is
            too small), or ``"auto"`` for the method ``"auto"``. The normalizer is computed in float32 or better.

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
    _check(method, steps, dtype)
    schedule = _schedule(method)
    rows = schedule.rows(steps)
    if g.numel() == 0:
        return g.clone()
    form, working = choose(g.shape, g.dtype, g.device, method, steps, dtype)
    if form == "exact":
        return exact(g, dtype if isinstance(dtype, torch.dtype) else None)
    return _iterate(g, schedule, rows, form, working)


def choose(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device | str,
    method: str | PolarCoefficients = "auto",
    steps: int | None = None,
    products: torch.dtype | str | None = None,
) -> Choice:
    """The form and dtype of products in which :func:`polar` runs, for matrices of this shape, dtype and device.

    A method and a dtype that are named are what they say. ``"auto"`` is the fastest of

    * method ``"auto"``: both forms of the four steps, each in float32 and, where the hardware has instructions for it,
      in bfloat16. All of them are at least as accurate as Jordan's five steps in bfloat16.
    * dtype ``"auto"`` with another method: its iteration in bfloat16, in float32, and in float32 in the Gram form.

    A single row or column is divided by its length. float64 stays float64, and float16 is never chosen. On a CPU the
    fastest is found by timing products when a shape is first seen, see :func:`normopt.polar.choice.fastest`.

    Args:
        shape: ``(..., m, n)``; the leading dimensions make no difference.
        dtype: that of the matrices.
        device: where they are.
        method, steps: those of :func:`polar`.
        products: the ``dtype`` of :func:`polar`.
    """
    _check(method, steps, products)
    form = method if method in ("gram", "exact") else "direct"
    is_open = products == "auto" or (products is None and method == "auto")
    if method == "auto" and min(shape[-2:]) == 1:
        return Choice("exact", torch.promote_types(dtype, torch.float32))
    if method == "exact" or not (is_open or method == "auto"):
        working = products if isinstance(products, torch.dtype) else torch.float32 if dtype == torch.float16 else dtype
        return Choice(str(form), working)
    candidates = _candidates(method, dtype, None if is_open else products, torch.device(device).type)
    rows = _schedule(method).rows(steps)
    return fastest(shape, device, key(shape, method, steps, products), rows, candidates)


def _check(method: object, steps: int | None, dtype: object) -> None:
    if not isinstance(method, PolarCoefficients) and method not in METHODS:
        raise ValueError(f"polar: unknown method {method!r}; {nearest(str(method), METHODS)}")
    if method == "exact" and steps is not None:
        raise ValueError("polar: method 'exact' takes no steps")
    if isinstance(dtype, str) and dtype != "auto":
        raise ValueError(f"polar: dtype must be a torch.dtype, 'auto' or None, got {dtype!r}")


def _schedule(method: str | PolarCoefficients) -> PolarCoefficients:
    return method if isinstance(method, PolarCoefficients) else SCHEDULES.get(method, FOUR_STEPS)


def _candidates(method: object, dtype: torch.dtype, given: object, kind: str) -> list[Choice]:
    """All choices that are accurate enough."""
    if isinstance(given, torch.dtype):
        dtypes = [given]
    elif dtype == torch.float64:
        dtypes = [torch.float64]
    else:
        dtypes = [torch.float32, *([torch.bfloat16] if has_bfloat16(kind) else [])]
    if method == "auto":
        return [Choice(form, each) for each in dtypes for form in ("direct", "gram")]
    if method == "gram":
        return [Choice("gram", each) for each in dtypes]
    # In bfloat16 the Gram form of other schedules is less accurate than the iteration itself.
    return [*(Choice("direct", each) for each in dtypes), Choice("gram", dtypes[0])]


def key(
    shape: tuple[int, ...],
    method: str | PolarCoefficients = "auto",
    steps: int | None = None,
    products: torch.dtype | str | None = None,
) -> str:
    """What a choice is kept under, like ``"96x384 newton-schulz"``: all that it depends on, the shorter side first."""
    short, long = sorted(int(size) for size in shape[-2:])
    schedule = _schedule(method)
    name = method if isinstance(method, str) else "coefficients"
    count = schedule.steps if steps is None else steps
    of_steps = f" {count}" if count != schedule.steps or name == "coefficients" else ""
    of_dtype = f" {str(products).removeprefix('torch.')}" if isinstance(products, torch.dtype) else ""
    return f"{short}x{long} {name}{of_steps}{of_dtype}"


def _iterate(g: Tensor, schedule: PolarCoefficients, rows: list[Quintic], form: str, dtype: torch.dtype) -> Tensor:
    """``U V^T`` by the iteration with those coefficients, after a division by the normalizer."""
    tight = schedule.margin if schedule.normalizer == "schatten8" else None
    # For "schatten8" this division only keeps the entries of A^2 inside the range of float16; the iteration divides by
    # the Schatten norm.
    margin = schedule.margin if tight is None else min(g.shape[-2:]) ** -0.25
    x = normalized(g, margin).to(dtype).reshape(-1, *g.shape[-2:])
    x = (through_gram if form == "gram" else direct)(x, rows, tight)
    return x.reshape(g.shape).to(g.dtype)
