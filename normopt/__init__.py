"""normopt: optimizers as steepest descent under a norm chosen for each tensor's role."""

from normopt import constraints, directions, momentum, nn, norms, polar, roles, stepsize, zoo
from normopt.constraints.base import Constraint
from normopt.constraints.bounds import Ball, FrobeniusSphere, RowBound, Sphere
from normopt.constraints.decay import L2, FrankWolfe, WeightDecay
from normopt.constraints.precision import KahanSum, StochasticRounding
from normopt.constraints.spectrum import SoftSpectralCap, SpectralCap, SpectralNormalize
from normopt.constraints.tangent import TangentProjection
from normopt.directions.algebra import Chain, Clipped, Decayed, Grafted, Identity
from normopt.directions.balanced import CoshScaled, Sinkhorn
from normopt.directions.bases import Basis, Eigenbasis
from normopt.directions.complement import Complement
from normopt.directions.coordinates import Blocked, Rotated
from normopt.directions.factored import Factored
from normopt.directions.smoothed import Smoothed
from normopt.directions.subspace import Aligned, LowRank
from normopt.directions.whitening import KLWhitened
from normopt.ingredient import Option
from normopt.ingredient.view import View
from normopt.momentum.averages import EMA, HeavyBall, LionMomentum, Nesterov, TwoSpeed, WarmNesterov
from normopt.momentum.base import Momentum, NoMomentum
from normopt.momentum.recursive import Recursive
from normopt.norms import Column, Direction, Euclidean, KyFan, Max, Norm, Nuclear, PerBlock, Row, Schatten, Spectral
from normopt.optimizer import SteepestDescent
from normopt.polar import PolarCoefficients
from normopt.report import describe, periodic_table
from normopt.roles.geometries import GEOMETRIES, width_scaled
from normopt.roles.groups import param_groups
from normopt.roles.infer import Role, infer_roles
from normopt.rule import Rule
from normopt.stepsize.base import StepSize
from normopt.stepsize.fixed import Constant, Dual, InverseTime, Sharp, Storm
from normopt.stepsize.free import DAdaptation, LearningRateFree, Prodigy
from normopt.stepsize.trust import GradientTrust, Relative, TrustRatio
from normopt.torch_state import from_torch_state
from normopt.zoo import create, list_optimizers

__version__ = "0.1.0"

__all__ = [
    "EMA",
    "GEOMETRIES",
    "L2",
    "Aligned",
    "Ball",
    "Basis",
    "Blocked",
    "Chain",
    "Clipped",
    "Column",
    "Complement",
    "Constant",
    "Constraint",
    "CoshScaled",
    "DAdaptation",
    "Decayed",
    "Direction",
    "Dual",
    "Eigenbasis",
    "Euclidean",
    "Factored",
    "FrankWolfe",
    "FrobeniusSphere",
    "GradientTrust",
    "Grafted",
    "HeavyBall",
    "Identity",
    "InverseTime",
    "KLWhitened",
    "KahanSum",
    "KyFan",
    "LearningRateFree",
    "LionMomentum",
    "LowRank",
    "Max",
    "Momentum",
    "Nesterov",
    "NoMomentum",
    "Norm",
    "Nuclear",
    "Option",
    "PerBlock",
    "PolarCoefficients",
    "Prodigy",
    "Recursive",
    "Relative",
    "Role",
    "Rotated",
    "Row",
    "RowBound",
    "Rule",
    "Schatten",
    "Sharp",
    "Sinkhorn",
    "Smoothed",
    "SoftSpectralCap",
    "Spectral",
    "SpectralCap",
    "SpectralNormalize",
    "Sphere",
    "SteepestDescent",
    "StepSize",
    "StochasticRounding",
    "Storm",
    "TangentProjection",
    "TrustRatio",
    "TwoSpeed",
    "View",
    "WarmNesterov",
    "WeightDecay",
    "constraints",
    "create",
    "describe",
    "directions",
    "from_torch_state",
    "infer_roles",
    "list_optimizers",
    "momentum",
    "nn",
    "norms",
    "param_groups",
    "periodic_table",
    "polar",
    "roles",
    "stepsize",
    "width_scaled",
    "zoo",
]
