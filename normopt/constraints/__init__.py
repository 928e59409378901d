"""Where may the weights live? Weight decay, projections of updates, and bounds that hold after every step."""

from normopt.constraints.base import Constraint
from normopt.constraints.bounds import Ball, FrobeniusSphere, RowBound, Sphere, Transposed
from normopt.constraints.decay import L2, FrankWolfe, WeightDecay
from normopt.constraints.motion import RadialBrake, RowFloor
from normopt.constraints.precision import KahanSum, StochasticRounding
from normopt.constraints.spectrum import SoftSpectralCap, SpectralCap, SpectralNormalize, Stiefel
from normopt.constraints.tangent import TangentProjection

__all__ = [
    "L2",
    "Ball",
    "Constraint",
    "FrankWolfe",
    "FrobeniusSphere",
    "KahanSum",
    "RadialBrake",
    "RowBound",
    "RowFloor",
    "SoftSpectralCap",
    "SpectralCap",
    "SpectralNormalize",
    "Sphere",
    "Stiefel",
    "StochasticRounding",
    "TangentProjection",
    "Transposed",
    "WeightDecay",
]
