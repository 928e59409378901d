"""normopt: optimizers as steepest descent under a norm chosen for each tensor's role."""

from normopt import bases, constraints, directions, momentum, nn, norms, polar, stepsize, whitening, zoo
from normopt.bases import Basis, Eigenbasis
from normopt.constraints import L2, Constraint, FrankWolfe, WeightDecay
from normopt.directions import Blocked, Chain, Clipped, Decayed, Factored, Grafted, Identity, Rotated, Smoothed
from normopt.ingredient import Option
from normopt.momentum import EMA, HeavyBall, LookAhead, Momentum, Nesterov, NoMomentum, TwoSpeed, WarmNesterov
from normopt.norms import Column, Direction, Euclidean, Max, Norm, Nuclear, Row, Spectral
from normopt.optimizer import SteepestDescent
from normopt.polar import Schedule
from normopt.report import describe, periodic_table
from normopt.roles import GEOMETRIES, Role, param_groups, roles
from normopt.rule import Rule
from normopt.stepsize import (
    Constant,
    DAdaptation,
    Dual,
    GradientTrust,
    InverseTime,
    LearningRateFree,
    Prodigy,
    Relative,
    Sharp,
    StepSize,
    TrustRatio,
)
from normopt.view import View
from normopt.whitening import KLWhitened
from normopt.zoo import create, list_optimizers

__version__ = "0.1.0"

__all__ = [
    "EMA",
    "GEOMETRIES",
    "L2",
    "Basis",
    "Blocked",
    "Chain",
    "Clipped",
    "Column",
    "Constant",
    "Constraint",
    "DAdaptation",
    "Decayed",
    "Direction",
    "Dual",
    "Eigenbasis",
    "Euclidean",
    "Factored",
    "FrankWolfe",
    "GradientTrust",
    "Grafted",
    "HeavyBall",
    "Identity",
    "InverseTime",
    "KLWhitened",
    "LearningRateFree",
    "LookAhead",
    "Max",
    "Momentum",
    "Nesterov",
    "NoMomentum",
    "Norm",
    "Nuclear",
    "Option",
    "Prodigy",
    "Relative",
    "Role",
    "Rotated",
    "Row",
    "Rule",
    "Schedule",
    "Sharp",
    "Smoothed",
    "Spectral",
    "SteepestDescent",
    "StepSize",
    "TrustRatio",
    "TwoSpeed",
    "View",
    "WarmNesterov",
    "WeightDecay",
    "bases",
    "constraints",
    "create",
    "describe",
    "directions",
    "list_optimizers",
    "momentum",
    "nn",
    "norms",
    "param_groups",
    "periodic_table",
    "polar",
    "roles",
    "stepsize",
    "whitening",
    "zoo",
]
