"""normopt: optimizers as steepest descent under a norm chosen for each tensor's role."""

from normopt import (
    balanced,
    bases,
    bounds,
    complement,
    constraints,
    directions,
    momentum,
    nn,
    norms,
    polar,
    stepsize,
    subspace,
    whitening,
    zoo,
)
from normopt.balanced import CoshScaled, Sinkhorn
from normopt.bases import Basis, Eigenbasis
from normopt.bounds import (
    Ball,
    FrobeniusSphere,
    RowBound,
    SoftSpectralCap,
    SpectralCap,
    SpectralNormalize,
    Sphere,
)
from normopt.complement import Complement
from normopt.constraints import L2, Constraint, FrankWolfe, TangentProjection, WeightDecay
from normopt.directions import Blocked, Chain, Clipped, Decayed, Factored, Grafted, Identity, Rotated, Smoothed
from normopt.ingredient import Option
from normopt.momentum import (
    EMA,
    HeavyBall,
    LookAhead,
    Momentum,
    Nesterov,
    NoMomentum,
    Recursive,
    TwoSpeed,
    WarmNesterov,
)
from normopt.norms import Column, Direction, Euclidean, KyFan, Max, Norm, Nuclear, PerBlock, Row, Schatten, Spectral
from normopt.optimizer import SteepestDescent
from normopt.polar import Schedule
from normopt.report import describe, periodic_table
from normopt.roles import GEOMETRIES, Role, param_groups, roles, width_scaled
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
    Storm,
    TrustRatio,
)
from normopt.subspace import Aligned, LowRank
from normopt.torch_state import from_torch_state
from normopt.view import View
from normopt.whitening import KLWhitened
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
    "KyFan",
    "LearningRateFree",
    "LookAhead",
    "LowRank",
    "Max",
    "Momentum",
    "Nesterov",
    "NoMomentum",
    "Norm",
    "Nuclear",
    "Option",
    "PerBlock",
    "Prodigy",
    "Recursive",
    "Relative",
    "Role",
    "Rotated",
    "Row",
    "RowBound",
    "Rule",
    "Schatten",
    "Schedule",
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
    "Storm",
    "TangentProjection",
    "TrustRatio",
    "TwoSpeed",
    "View",
    "WarmNesterov",
    "WeightDecay",
    "balanced",
    "bases",
    "bounds",
    "complement",
    "constraints",
    "create",
    "describe",
    "directions",
    "from_torch_state",
    "list_optimizers",
    "momentum",
    "nn",
    "norms",
    "param_groups",
    "periodic_table",
    "polar",
    "roles",
    "stepsize",
    "subspace",
    "whitening",
    "width_scaled",
    "zoo",
]
