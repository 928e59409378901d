"""Optimizers that normalize gradients and keep little of them: SCALE, SWAN, SinkGD; and their rotation, ARO."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normopt.constraints import WeightDecay
from normopt.directions import Aligned, Chain, Grafted, Identity, Sinkhorn
from normopt.ingredient import check_choice, option
from normopt.momentum import EMA
from normopt.norms import Direction, Euclidean, Max, Row, Spectral
from normopt.polar import PolarCoefficients
from normopt.roles.geometries import adam_options
from normopt.roles.options import Geometry
from normopt.rule import Rule
from normopt.stepsize import Constant
from normopt.zoo.base import DeclaredOptimizer, arg
from normopt.zoo.matrices import FixedStepMatrixOptimizer

#: What ARO does in rotated rows.
BASES: dict[str, Direction] = {"sinkhorn": Sinkhorn(), "max": Max(), "row": Row("sqrt_in")}


class SCALE(DeclaredOptimizer):
    """Rows of a root mean square of 1, and momentum for the head alone (arXiv 2506.16659).

    ``w <- (1 - lr weight_decay) w - lr g / rms(g)``, where each row of ``g``, one output, has its own rms (a column in
    the paper's layout). Given parameters, all are treated as hidden matrices: name the head's in a param group of its
    own with ``"momentum": 0.9``. The defaults are those of OptimAI-Lab/Minimalist_LLM_Pretraining, ``lr`` that of its
    scripts for up to 350M parameters; rows whose rms is below 1e-8 are shortened there, and not here.
    """

    weight_decay: float = 0.0
    momentum: float = arg(default=0.9, doc="decay rate of the average of the head's gradient.")
    aux_lr: float | None = arg(default=None, kw_only=True)
    aux_betas: tuple[float, float] = arg(default=(0.9, 0.999), kw_only=True)
    aux_eps: float = arg(default=1e-8, kw_only=True)
    aux_weight_decay: float = arg(default=0.0, kw_only=True)

    def table(self) -> Geometry:
        """Given a whole model, the head's gradient is averaged first, and vectors and scalars move by AdamW.

        An embedding, seen with one column a token, has one rms for each feature over the vocabulary, as in the authors'
        code.
        """
        aux: dict[str, Any] = {**adam_options(self.aux_betas, self.aux_eps), "weight_decay": self.aux_weight_decay}
        aux |= {} if self.aux_lr is None else {"lr": self.aux_lr}
        return {"unembedding": {"momentum": self.momentum}, "vector": aux, "scalar": aux}

    def rule(self) -> Rule:
        return Rule(Row("sqrt_in"), constraint=(WeightDecay(option("weight_decay")),))


class SWAN(FixedStepMatrixOptimizer):
    """Rows of one size, then the polar factor, without any state: the row norm and the spectral norm in a chain.

    ``h``: ``g`` with rows of a root mean square of 1; ``w <- (1 - lr weight_decay) w - lr scale polar(h)``, rescaled
    to the Frobenius norm of ``h``, by sqrt(max(m, n)) at full rank (arXiv 2412.13148). The paper has no weight decay,
    whitens by a Newton-Schulz iteration of its own, which ends at the same polar factor, and in its second version
    subtracts each row's mean first, which is not done here.
    """

    lr: float | Tensor = arg(default=0.02, doc="learning rate, of AdamW too.")
    weight_decay: float = 0.0
    scale: float = arg(default=0.05, doc="length of this rule's steps over ``lr``.")
    orthogonalize: str | PolarCoefficients = arg(default="auto", kw_only=True)
    orthogonalize_dtype: torch.dtype | str | None = arg(default=None, kw_only=True)

    def rule(self) -> Rule:
        polar = Spectral("unit", self.orthogonalize, None, self.orthogonalize_dtype)
        return Rule(Chain(Row("sqrt_in"), Grafted(polar, Identity())), step_size=Constant(self.scale))


class SinkGD(FixedStepMatrixOptimizer):
    """Rows and columns of a root mean square of 1 at once, without any state (arXiv 2502.06742).

    ``w <- (1 - lr weight_decay) w - lr scale sinkhorn(g)``, which divides each row by its root mean square, then
    each column, ``iterations`` times (:class:`~normopt.Sinkhorn`). Defaults are the paper's, which has no weight decay.
    """

    lr: float | Tensor = arg(default=0.02, doc="learning rate, of AdamW too.")
    weight_decay: float = 0.0
    iterations: int = arg(default=5, doc="how often rows and columns are normalized.")
    scale: float = arg(default=0.05, doc="length of this rule's steps over ``lr``.")

    def rule(self) -> Rule:
        return Rule(Sinkhorn(self.iterations), step_size=Constant(self.scale))


class ARO(FixedStepMatrixOptimizer):
    """Adaptively rotated: a stateless rule in rows that are turned to suit it (arXiv 2602.09006).

    ``m <- momentum m + (1 - momentum) g``; ``R`` the orthonormal factor of ``m f(R^T m)^T``; ``d = R f(R^T m)``, see
    :class:`~normopt.Aligned`; ``w <- (1 - lr weight_decay) w - lr scale d / rms(d)``. It is the shorter side that is
    rotated, where the authors' code rotates rows: of a tall matrix, with directions that the gradient lacks.
    ``lr`` and ``weight_decay`` are to be AdamW's.

    Raises:
        ValueError: an unknown ``base``.
    """

    weight_decay: float = 0.01
    momentum: float = 0.95
    base: str = arg(default="sinkhorn", doc='``f``: ``"sinkhorn"``, ``"max"`` (the sign) or ``"row"``.')
    scale: float = arg(default=0.2, doc="root mean square of an update.")

    def rule(self) -> Rule:
        check_choice(self, "base", self.base, BASES)
        return Rule(Chain(Aligned(BASES[self.base]), Euclidean()), EMA(option("momentum")), Constant(self.scale))
