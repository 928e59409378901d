"""Where may the weights live? Weight decay, projections of updates, and bounds that hold after every step."""

from normopt.constraints.base import Constraint
from normopt.constraints.bounds import Ball, FrobeniusSphere, RowBound, Sphere, Transposed
from normopt.constraints.decay import L2, FrankWolfe, WeightDecay
from normopt.constraints.precision import KahanSum, StochasticRounding
from normopt.constraints.spectrum import SoftSpectralCap, SpectralCap, SpectralNormalize
from normopt.constraints.tangent import TangentProjection

__all__ = [
    "L2",
    "Ball",
    "Constraint",
    "FrankWolfe",
    "FrobeniusSphere",
    "KahanSum",
    "RowBound",
    "SoftSpectralCap",
    "SpectralCap",
    "SpectralNormalize",
    "Sphere",
    "StochasticRounding",
    "TangentProjection",
    "Transposed",
    "WeightDecay",
]
