"""Which direction is steepest? Combinations of norms: with memory, in chains, rotated, grafted, in blocks."""

from normopt.directions.algebra import Chain, Clipped, Decayed, Identity, Tangent
from normopt.directions.balanced import CoshScaled, SingularPower, Sinkhorn
from normopt.directions.bases import Basis, Eigenbasis
from normopt.directions.complement import Complement
from normopt.directions.coordinates import Blocked, Rotated
from normopt.directions.equal_rows import EqualRows
from normopt.directions.factored import Factored
from normopt.directions.innovation import Innovated, NoiseScaled
from normopt.directions.inputs import InputWhitened
from normopt.directions.pairs import Conjugated, Grafted, Normalized, Sum
from normopt.directions.scaled import AdaScaled
from normopt.directions.smoothed import Smoothed
from normopt.directions.subspace import Aligned, LeadingSubspace, LowRank
from normopt.directions.whitening import KLWhitened
from normopt.ingredient.stage import Direction

__all__ = [
    "AdaScaled",
    "Aligned",
    "Basis",
    "Blocked",
    "Chain",
    "Clipped",
    "Complement",
    "Conjugated",
    "CoshScaled",
    "Decayed",
    "Direction",
    "Eigenbasis",
    "EqualRows",
    "Factored",
    "Grafted",
    "Identity",
    "Innovated",
    "InputWhitened",
    "KLWhitened",
    "LeadingSubspace",
    "LowRank",
    "NoiseScaled",
    "Normalized",
    "Rotated",
    "SingularPower",
    "Sinkhorn",
    "Smoothed",
    "Sum",
    "Tangent",
]
