"""The polar factor U V^T of a matrix: Newton-Schulz iterations with their coefficient schedules, and the exact one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from normopt.ingredient import Ingredient, nearest

Row = tuple[float, float, float]


@dataclass(frozen=True)
class Schedule(Ingredient):
    """Coefficients of the odd quintics ``X <- a X + (b A + c A^2) X``, ``A = X X^T``, one row ``(a, b, c)`` a step.

    A schedule knows its own length, what comes after its last row, and how its input must be scaled.

    Args:
        coefficients: the rows. Asked for more steps, the last row is repeated: it must be one that converges.
        steps: how many steps are taken when the caller does not say.
        margin: the input is divided by ``margin`` times its Frobenius norm, so that no singular value exceeds
            ``1 / margin`` even after rounding.
    """

    coefficients: tuple[Row, ...]
    steps: int = 5
    margin: float = 1.0

    def __post_init__(self) -> None:
        if not self.coefficients or any(len(row) != 3 for row in self.coefficients):
            raise ValueError("Schedule: coefficients must be one or more rows (a, b, c)")
        if self.steps < 1:
            raise ValueError(f"Schedule: steps must be at least 1, got {self.steps}")

    def rows(self, steps: int | None = None) -> list[Row]:
        """The rows of ``steps`` steps (default: ``self.steps``)."""
        steps = self.steps if steps is None else steps
        if steps < 1:
            raise ValueError(f"polar: steps must be at least 1, got {steps}")
        return [self.coefficients[min(i, len(self.coefficients) - 1)] for i in range(steps)]

    def scalar(self, s: Tensor, steps: int | None = None) -> Tensor:
        """What happens to a singular value ``s`` (already divided by the norm)."""
        for a, b, c in self.rows(steps):
            s = a * s + b * s**3 + c * s**5
        return s


def _with_safety(rows: tuple[Row, ...], safety: float) -> tuple[Row, ...]:
    """Evaluate all but the last polynomial at ``s / safety``, so that ``s`` up to ``safety`` stays in its interval."""
    shrunk = tuple((a / safety, b / safety**3, c / safety**5) for a, b, c in rows[:-1])
    return (*shrunk, rows[-1])


#: Jordan et al., "Muon" (2024), what Muon means by default. It never converges: after five steps singular values above
#: 1e-3 (1e-2) of the norm lie in [0.47, 1.20] ([0.68, 1.13]).
JORDAN = Schedule(coefficients=((3.4445, -4.7750, 2.0315),), steps=5)

#: Amsel et al., "The Polar Express", arXiv 2505.16932: greedy minimax quintics for [1e-3, 1] with a cushion of 0.024,
#: with a safety factor of 1.01 on every row but the last (their section 4.4). Six steps bring [1e-3, 1] to within 0.7%
#: of 1.
POLAR_EXPRESS = Schedule(
    coefficients=_with_safety(
        (
            (8.28721201814563, -23.595886519098837, 17.300387312530933),
            (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
            (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
            (3.3184196573706015, -2.488488024314874, 0.51004894012372),
            (2.300652019954817, -1.6689039845749493, 0.4188073119525673),
            (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
            (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
            (1.875, -1.25, 0.375),
        ),
        safety=1.01,
    ),
    steps=6,
    margin=1.01,
)

#: The schedules by name. ``"exact"``, the third method of :func:`polar`, has none.
SCHEDULES = {"newton-schulz": JORDAN, "polar-express": POLAR_EXPRESS}
METHODS = (*SCHEDULES, "exact")


def polar(
    g: Tensor, method: str | Schedule = "polar-express", steps: int | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """The orthogonal polar factor ``U V^T`` of each matrix ``g = U diag(s) V^T`` (Bernstein & Newhouse, Prop. 5).

    It is the semi-orthogonal matrix nearest to ``g``, and the duality map of the spectral norm. Where ``g`` is rank
    deficient it is ``U_r V_r^T``; the polar factor of 0 is 0.

    Args:
        g: shape ``(..., m, n)``, tall or wide; never modified.
        method: ``"newton-schulz"`` (Jordan's five steps: values end near 1, see ``JORDAN``), ``"polar-express"``
            (six steps: within 0.7% of 1 for singular values above 1e-3 of the Frobenius norm), ``"exact"`` (a singular
            value decomposition) or a :class:`Schedule`.
        steps: the number of iterations; ``None`` is the schedule's own. Not for ``"exact"``.
        dtype: the dtype of the iteration's matrix products; ``None`` is that of ``g``, or float32 for float16 (whose
            range is too small). The normalizer is computed in float32 or better whatever the dtype.

    Returns:
        A new tensor of the shape and dtype of ``g``.

    Cost: ``4 m^2 n + 2 m^3`` FLOPs a step, m the shorter side. In bfloat16 directions below about 1/250 of the largest
    singular value are lost to rounding, which turns a rank-deficient matrix into a full-rank one.

    Raises:
        ValueError: ``g`` has fewer than two dimensions, the method is unknown or ``steps`` is out of range.
    """
    if g.ndim < 2:
        raise ValueError(f"polar: needs matrices (..., m, n), got shape {tuple(g.shape)}")
    if not isinstance(method, Schedule) and method not in METHODS:
        raise ValueError(f"polar: unknown method {method!r}; {nearest(str(method), METHODS)}")
    if method == "exact":
        if steps is not None:
            raise ValueError("polar: method 'exact' takes no steps")
        return exact(g, dtype)
    schedule = SCHEDULES[method] if isinstance(method, str) else method
    if g.numel() == 0:
        return g.clone()
    tall = g.shape[-2] > g.shape[-1]
    x = normalized(g.mT if tall else g, schedule.margin)
    x = _iterate(x.to(dtype or _working(g.dtype)), schedule.rows(steps)).to(g.dtype)
    return x.mT if tall else x


def _working(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float16 else dtype


def normalized(g: Tensor, margin: float = 1.0) -> Tensor:
    """``g`` over ``margin`` times its Frobenius norm, a new tensor in float32 or better; 0 stays 0.

    Dividing by the largest entry first keeps the squares of 1e-30 and of 1e30 inside the range of float32.
    """
    g = g.to(torch.promote_types(g.dtype, torch.float32))
    tiny = torch.finfo(g.dtype).tiny
    g = g / g.abs().amax(dim=(-2, -1), keepdim=True).clamp_(min=tiny)
    return g.div_(torch.linalg.vector_norm(g, dim=(-2, -1), keepdim=True).mul_(margin).clamp_(min=tiny))


def _iterate(x: Tensor, rows: list[Row]) -> Tensor:
    """The Newton-Schulz steps on wide matrices ``x`` of shape ``(..., m, n)``, m <= n."""
    shape = x.shape
    x = x.reshape(-1, *shape[-2:])
    for a, b, c in rows:
        gram = x @ x.mT
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, poly, x, beta=a)
    return x.reshape(shape)


def exact(g: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``U_r V_r^T`` from a singular value decomposition in ``dtype``, float32 or better; see :func:`polar`."""
    x = g.to(torch.promote_types(dtype or g.dtype, torch.float32))
    if x.numel() == 0:
        return g.clone()
    u, s, vh = torch.linalg.svd(normalized(x), full_matrices=False)
    kept = s > s.amax(dim=-1, keepdim=True) * max(x.shape[-2:]) * torch.finfo(x.dtype).eps
    return ((u * kept.unsqueeze(-2)) @ vh).to(g.dtype)
