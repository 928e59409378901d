"""Which gradient do we trust? The gradient of this step, or an average over steps (momentum)."""

from normopt.momentum.averages import EMA, HeavyBall, LionMomentum, Nesterov, TwoSpeed, WarmNesterov
from normopt.momentum.base import Momentum, NoMomentum
from normopt.momentum.corrected import Corrected
from normopt.momentum.mixture import Mixture
from normopt.momentum.recursive import Recursive

__all__ = [
    "EMA",
    "Corrected",
    "HeavyBall",
    "LionMomentum",
    "Mixture",
    "Momentum",
    "Nesterov",
    "NoMomentum",
    "Recursive",
    "TwoSpeed",
    "WarmNesterov",
]
