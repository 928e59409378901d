"""The polar factor U V^T of a matrix: the methods, the coefficient schedules, and which one is fastest where."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from normopt.ingredient import Ingredient, check_choice, nearest
from normopt.iterations import Row, direct, exact, normalized, through_gram

NORMALIZERS = ("frobenius", "schatten8")


@dataclass(frozen=True)
class Schedule(Ingredient):
    """Coefficients of the odd quintics ``X <- a X + (b A + c A^2) X``, ``A = X X^T``, one row ``(a, b, c)`` a step.

    A schedule knows its own length, what comes after its last row, and how its input must be scaled.

    Args:
        coefficients: the rows. Asked for more steps, the last row is repeated: it must be one that converges.
        steps: how many steps are taken when the caller does not say.
        margin: the input is divided by ``margin`` times its norm, so that no singular value exceeds ``1 / margin``
            even after rounding.
        normalizer: the norm: ``"frobenius"``, or ``"schatten8"``, ``(sum s_i^8)^(1/8)``, the smaller one by up to
            ``m^(3/8)`` (so that singular values start higher), for which the first step's products suffice.
    """

    coefficients: tuple[Row, ...]
    steps: int = 5
    margin: float = 1.0
    normalizer: str = "frobenius"

    def __post_init__(self) -> None:
        if not self.coefficients or any(len(row) != 3 for row in self.coefficients):
            raise ValueError("Schedule: coefficients must be one or more rows (a, b, c)")
        if self.steps < 1:
            raise ValueError(f"Schedule: steps must be at least 1, got {self.steps}")
        check_choice(self, "normalizer", self.normalizer, NORMALIZERS)

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

#: Greedy minimax quintics as in arXiv 2505.16932, for [6e-3, 1] and without a cushion. Divided by their tighter norm,
#: singular values above 1e-2 of the largest rarely start below 5e-3, so that four steps bring them into [0.77, 1.06].
#: The safety factor, 1.048, makes the first coefficient a number of bfloat16: the Gram form adds it to a diagonal.
FOUR_STEPS = Schedule(
    coefficients=_with_safety(
        (
            (8.256836694444964, -24.26527511839081, 17.958902644938956),
            (3.854961330598048, -2.878411491256187, 0.5543566934598582),
            (3.0425030178098256, -2.2795250051221343, 0.4864455365971388),
            (2.1081305899352976, -1.4900497023788417, 0.3997032516754876),
            (1.878232533037387, -1.253587032054685, 0.37535888394692235),
            (1.875, -1.25, 0.375),
        ),
        safety=8.256836694444964 / 7.875,
    ),
    steps=4,
    normalizer="schatten8",
)

#: The schedules by name. ``"gram"`` and ``"auto"`` use ``FOUR_STEPS``, ``"exact"`` has none.
SCHEDULES = {"newton-schulz": JORDAN, "polar-express": POLAR_EXPRESS}
METHODS = (*SCHEDULES, "gram", "exact", "auto")

#: Where ``"auto"`` changes its mind: multiplications in a product of all matrices from which on bfloat16 pays on a CPU,
#: and aspect ratios from which on the Gram form does, in bfloat16 for shorter sides up to and above ``LARGE``.
BFLOAT16_FROM = 5_000_000
GRAM_FROM, GRAM_FROM_SMALL, LARGE = 2, 4, 256


class Choice(NamedTuple):
    """What ``"auto"`` does: the form, ``"direct"``, ``"gram"`` or ``"exact"``, and the dtype of the products."""

    form: str
    dtype: torch.dtype


def choose(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Choice:
    """The fastest way to polar factors at least as good as Jordan's, for matrices of shape ``(..., m, n)``, m <= n.

    * A single row or column: exactly, by dividing by its length.
    * Products in bfloat16 where the hardware multiplies in bfloat16: on GPUs that have it, and on CPUs with AMX or
      AVX512_BF16 if a product ``X X^T`` of all matrices is at least 5e6 multiplications (below, the calls take longer);
      otherwise in float32. float64 stays float64; float16 is never chosen.
    * The Gram form, ``4 m^2 n + 26 m^3`` FLOPs, or ``8 m^2 n + 20 m^3`` in bfloat16, which needs a restart, in place of
      ``16 m^2 n + 8 m^3``: where n >= 2 m, or n >= 4 m in bfloat16 if m <= 256.
    """
    short, long = sorted(shape[-2:])
    if short == 1:
        return Choice("exact", torch.promote_types(dtype, torch.float32))
    kind = torch.device(device).type
    pays = has_bfloat16(kind) and (kind != "cpu" or math.prod(shape) * short >= BFLOAT16_FROM)
    working = dtype if dtype == torch.float64 else torch.bfloat16 if pays else torch.float32
    ratio = GRAM_FROM_SMALL if working == torch.bfloat16 and short <= LARGE else GRAM_FROM
    return Choice("gram" if long >= ratio * short else "direct", working)


def has_bfloat16(kind: str) -> bool:
    """Whether devices of this kind multiply matrices in bfloat16 faster than in float32."""
    if kind not in _BFLOAT16:
        _BFLOAT16[kind] = _has_bfloat16(kind)
    return _BFLOAT16[kind]


def _has_bfloat16(kind: str) -> bool:
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported") if kind == "cpu" else ()
    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(has_onednn) and any(getattr(torch.cpu, name, bool)() for name in names)


#: The answers so far: a dict, since compilers do not see through functools.cache.
_BFLOAT16 = {"cpu": _has_bfloat16("cpu")}


def polar(
    g: Tensor, method: str | Schedule = "polar-express", steps: int | None = None, dtype: torch.dtype | None = None
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
            * a :class:`Schedule`.
        steps: the number of iterations; ``None`` is the schedule's own. Not for ``"exact"``.
        dtype: the dtype of the iteration's matrix products; ``None`` is that of ``g``, or float32 for float16 (whose
            range is too small), or what ``"auto"`` chooses. The normalizer is computed in float32 or better.

    Returns:
        A new tensor of the shape and dtype of ``g``.

    Cost: ``4 m^2 n + 2 m^3`` FLOPs a step, m the shorter side; of the Gram form see :func:`choose`. Only ``"exact"``
    makes the host wait for a device. In bfloat16 directions below about 1/250 of the
    largest singular value are lost to rounding, which turns a rank-deficient matrix into a full-rank one.

    Raises:
        ValueError: ``g`` has fewer than two dimensions, the method is unknown or ``steps`` is out of range.
    """
    if g.ndim < 2:
        raise ValueError(f"polar: needs matrices (..., m, n), got shape {tuple(g.shape)}")
    if not isinstance(method, Schedule) and method not in METHODS:
        raise ValueError(f"polar: unknown method {method!r}; {nearest(str(method), METHODS)}")
    if method == "exact" and steps is not None:
        raise ValueError("polar: method 'exact' takes no steps")
    schedule = method if isinstance(method, Schedule) else SCHEDULES.get(method, FOUR_STEPS)
    rows = schedule.rows(steps)
    if g.numel() == 0:
        return g.clone()
    form, working = _plan(g, method)
    if form == "exact":
        return exact(g, dtype)
    return _iterate(g, schedule, rows, form, dtype or working)


def _plan(g: Tensor, method: str | Schedule) -> Choice:
    if method == "auto":
        return choose(g.shape, g.dtype, g.device)
    form = method if method in ("gram", "exact") else "direct"
    return Choice(str(form), torch.float32 if g.dtype == torch.float16 else g.dtype)


def _iterate(g: Tensor, schedule: Schedule, rows: list[Row], form: str, dtype: torch.dtype) -> Tensor:
    """The schedule's steps."""
    tight = schedule.margin if schedule.normalizer == "schatten8" else None
    # A second norm follows where "tight"; the first one then keeps the entries of A^2 inside the range of float16.
    margin = schedule.margin if tight is None else min(g.shape[-2:]) ** -0.25
    x = normalized(g, margin).to(dtype).reshape(-1, *g.shape[-2:])
    x = (through_gram if form == "gram" else direct)(x, rows, tight)
    return x.reshape(g.shape).to(g.dtype)
