"""The polar factor U V^T of a matrix: coefficients, iterations, decompositions, and which is fastest where."""

from normopt.polar.choice import Choice, has_bfloat16
from normopt.polar.coefficients import FOUR_STEPS, JORDAN, POLAR_EXPRESS, SCHEDULES, PolarCoefficients
from normopt.polar.decompositions import exact
from normopt.polar.factor import METHODS, choose, polar

__all__ = [
    "FOUR_STEPS",
    "JORDAN",
    "METHODS",
    "POLAR_EXPRESS",
    "SCHEDULES",
    "Choice",
    "PolarCoefficients",
    "choose",
    "exact",
    "has_bfloat16",
    "polar",
]
