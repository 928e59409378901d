"""normopt: optimizers as steepest descent under a norm chosen for each tensor's role."""

from normopt import constraints, directions, momentum, nn, norms, polar, stepsize, zoo
from normopt.constraints import L2, Constraint, FrankWolfe, WeightDecay
from normopt.directions import Chain, Grafted, Identity, Smoothed
from normopt.ingredient import Option
from normopt.momentum import EMA, HeavyBall, LookAhead, Momentum, Nesterov, NoMomentum
from normopt.norms import Column, Direction, Euclidean, Max, Norm, Nuclear, Row, Spectral
from normopt.optimizer import SteepestDescent
from normopt.polar import Schedule
from normopt.report import describe
from normopt.roles import GEOMETRIES, Role, param_groups, roles
from normopt.rule import Rule
from normopt.stepsize import Constant, Dual, Prodigy, Sharp, StepSize
from normopt.view import View
from normopt.zoo import create, list_optimizers

__version__ = "0.1.0"

__all__ = [
    "EMA",
    "GEOMETRIES",
    "L2",
    "Chain",
    "Column",
    "Constant",
    "Constraint",
    "Direction",
    "Dual",
    "Euclidean",
    "FrankWolfe",
    "Grafted",
    "HeavyBall",
    "Identity",
    "LookAhead",
    "Max",
    "Momentum",
    "Nesterov",
    "NoMomentum",
    "Norm",
    "Nuclear",
    "Option",
    "Prodigy",
    "Role",
    "Row",
    "Rule",
    "Schedule",
    "Sharp",
    "Smoothed",
    "Spectral",
    "SteepestDescent",
    "StepSize",
    "View",
    "WeightDecay",
    "constraints",
    "create",
    "describe",
    "directions",
    "list_optimizers",
    "momentum",
    "nn",
    "norms",
    "param_groups",
    "polar",
    "roles",
    "stepsize",
    "zoo",
]
