"""Adam and Adagrad with one second moment for a block of weights: a row, a part of a row, a head."""

from __future__ import annotations

from normopt.constraints import WeightDecay
from normopt.directions import Smoothed
from normopt.ingredient import check_count, option
from normopt.momentum import EMA
from normopt.norms import Column, Euclidean, Max, Norm, PerBlock, Row
from normopt.roles.options import Geometry
from normopt.rule import Rule
from normopt.zoo.base import DeclaredOptimizer, arg, beta2_of


def _adam(norm: Norm, betas: tuple[float, float] = (0.0, 0.0), eps_at: str = "corrected") -> Smoothed:
    """The norm with Adam's memory, or with a sum where the second of ``betas`` is 1; its numbers are options."""
    kind = "sum" if beta2_of(betas) == 1 else "ema"
    return Smoothed(norm, option("betas", 1), option("eps"), accumulate=kind, eps_at=eps_at)


class AdamMini(DeclaredOptimizer):
    """:class:`AdamW` with one second moment a row, or a head (arXiv 2406.16793).

    ``m <- beta1 m + (1 - beta1) g``, ``v <- beta2 v + (1 - beta2) mean(g^2)``, the mean over each row, or over each
    ``rows`` rows: name the head's size for queries and keys, ``overrides={"*.q_proj.weight": {"rows": 64}}``. Both are
    corrected for bias, and ``w <- (1 - lr weight_decay) w - lr m / (sqrt(v) + eps)``; ``eps`` is added to the root of a
    block's sum here, of its mean in zyushun/Adam-mini.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    rows: int = arg(default=1, doc="how many rows, one output each, have one second moment.")

    def table(self) -> Geometry:
        """Given a whole model, a token of an embedding has one second moment, and so has a vector, not decayed."""
        one = {"norm": _adam(Euclidean()), "weight_decay": 0.0}
        return {"embedding": {"norm": _adam(Column())}, "vector": one, "scalar": one}

    def rule(self) -> Rule:
        check_count(self, "rows", self.rows)
        adam = _adam(Row("sqrt_in") if self.rows == 1 else PerBlock(Euclidean(), rows=self.rows))
        decay = WeightDecay(option("weight_decay"))
        return Rule(adam, EMA(option("betas", 0), bias_correction=True), constraint=(decay,))


class SubsetNorm(DeclaredOptimizer):
    """:class:`AdamW` with one second moment for each ``subset_size`` entries of a row, their sum (arXiv 2411.07120).

    ``m <- beta1 m + (1 - beta1) g``, ``v <- beta2 v + (1 - beta2) sum(g^2)``, both corrected for bias, and ``w <- w -
    lr m / (sqrt(v) + eps)``, then ``w <- (1 - lr weight_decay) w``: pytorch_optimizer's AdamWSN with ``sn``, where
    ``subset_size`` divides the row. ``betas=(0, 1)`` sums ``v`` up: the paper's AdaGrad-Subset-Norm, without momentum.
    """

    betas: tuple[float, float] = arg(
        default=(0.9, 0.999), doc="decay rates of ``m`` and ``v``; 1 for the latter: the sum over all steps."
    )
    eps: float = arg(default=1e-8, doc="added to the root of ``v``, before the bias correction.")
    weight_decay: float = arg(default=0.0, doc="decoupled weight decay, of the weights after the update.")
    subset_size: int | None = arg(default=None, doc="entries of a subset; ``None``: a whole row.")

    def table(self) -> Geometry:
        """Given a whole model, vectors and scalars keep a second moment for every entry, and are not decayed."""
        whole = {"norm": _adam(Max(), self.betas, "raw"), "weight_decay": 0.0}
        return {"vector": whole, "scalar": whole}

    def rule(self) -> Rule:
        adam = _adam(PerBlock(Euclidean("unit"), rows=1, columns=self.subset_size), self.betas, "raw")
        decay = WeightDecay(option("weight_decay"), after=True)
        return Rule(adam, EMA(option("betas", 0), bias_correction=True), constraint=(decay,))
