"""How far do we go? The learning rate, and the factors that multiply it."""

from normopt.stepsize.base import StepSize
from normopt.stepsize.fixed import Constant, Dual, InverseTime, Sharp, Storm
from normopt.stepsize.free import DAdaptation, LearningRateFree, Prodigy
from normopt.stepsize.trust import GradientTrust, Relative, TrustRatio

__all__ = [
    "Constant",
    "DAdaptation",
    "Dual",
    "GradientTrust",
    "InverseTime",
    "LearningRateFree",
    "Prodigy",
    "Relative",
    "Sharp",
    "StepSize",
    "Storm",
    "TrustRatio",
]
