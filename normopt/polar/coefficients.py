"""Coefficients of the odd polynomials that Newton-Schulz iterations apply to singular values."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from normopt.ingredient.base import Ingredient
from normopt.ingredient.validate import check_choice

#: ``(a, b, c)`` of the odd quintic ``a x + b x^3 + c x^5``.
Quintic = tuple[float, float, float]

NORMALIZERS = ("frobenius", "schatten8")


@dataclass(frozen=True)
class PolarCoefficients(Ingredient):
    """Coefficients of the odd quintics ``X <- a X + (b A + c A^2) X``, ``A = X X^T``, one row ``(a, b, c)`` a step.

    Args:
        coefficients: the rows. Beyond their number the last row is repeated: it must be one that converges.
        steps: the default number of steps.
        margin: the input is divided by ``margin`` times its norm, so that no singular value exceeds ``1 / margin``
            even after rounding.
        normalizer: the norm: ``"frobenius"``, or ``"schatten8"``, ``(sum s_i^8)^(1/8)``, which is smaller by up to
            ``m^(3/8)`` (so that singular values start higher) and for which the first step's products suffice.

    Raises:
        ValueError: a row does not have three entries, ``steps`` is less than 1 or the normalizer is unknown.
    """

    coefficients: tuple[Quintic, ...]
    steps: int = 5
    margin: float = 1.0
    normalizer: str = "frobenius"

    def __post_init__(self) -> None:
        rows = self.coefficients
        if not rows or not isinstance(rows, tuple) or any(not isinstance(row, tuple) or len(row) != 3 for row in rows):
            raise ValueError("PolarCoefficients: coefficients must be one or more rows (a, b, c)")
        if self.steps < 1:
            raise ValueError(f"PolarCoefficients: steps must be at least 1, got {self.steps}")
        check_choice(self, "normalizer", self.normalizer, NORMALIZERS)

    def rows(self, steps: int | None = None) -> list[Quintic]:
        """The rows of ``steps`` steps (default: ``self.steps``); a ``ValueError`` if ``steps`` is less than 1."""
        steps = self.steps if steps is None else steps
        if steps < 1:
            raise ValueError(f"polar: steps must be at least 1, got {steps}")
        return [*self.coefficients[:steps], *self.coefficients[-1:] * (steps - len(self.coefficients))]

    def scalar(self, s: Tensor, steps: int | None = None) -> Tensor:
        """The value after all steps of a singular value ``s`` (already divided by the norm)."""
        for a, b, c in self.rows(steps):
            s = a * s + b * s**3 + c * s**5
        return s


def _with_safety(rows: tuple[Quintic, ...], safety: float) -> tuple[Quintic, ...]:
    """Evaluate all but the last polynomial at ``s / safety``, so that ``s`` up to ``safety`` stays in its interval."""
    shrunk = tuple((a / safety, b / safety**3, c / safety**5) for a, b, c in rows[:-1])
    return (*shrunk, rows[-1])


#: Jordan et al., "Muon" (2024), what Muon means by default. It never converges: after five steps singular values above
#: 1e-3 (1e-2) of the norm lie in [0.47, 1.20] ([0.68, 1.13]).
JORDAN = PolarCoefficients(coefficients=((3.4445, -4.7750, 2.0315),), steps=5)

#: Amsel et al., "The Polar Express", arXiv 2505.16932: greedy minimax quintics for [1e-3, 1] with a cushion of 0.024,
#: with a safety factor of 1.01 on every row but the last (their section 4.4). Six steps bring [1e-3, 1] to within 0.7%
#: of 1.
POLAR_EXPRESS = PolarCoefficients(
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
FOUR_STEPS = PolarCoefficients(
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
