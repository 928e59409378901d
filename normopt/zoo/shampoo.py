"""Optimizers that remember second moments as matrices: Shampoo and its relatives."""

from __future__ import annotations

from torch import Tensor

from normopt.constraints import WeightDecay
from normopt.directions import Blocked, Chain, Eigenbasis, Grafted, Identity, KLWhitened, Rotated, Smoothed
from normopt.ingredient import check_choice, check_range, option
from normopt.momentum import EMA
from normopt.norms import Column, Direction, Euclidean, Max, Spectral
from normopt.roles.options import Geometry
from normopt.rule import Rule
from normopt.stepsize import Constant
from normopt.zoo.base import DeclaredOptimizer, arg, beta2_of, check_beta1
from normopt.zoo.matrices import FixedStepMatrixOptimizer, MatrixOptimizer

#: Whose length an update of Shampoo can have.
GRAFTS: dict[str, Direction] = {
    "adam": Smoothed(Max(), option("graft_beta2"), option("graft_eps")),
    "rmsprop": Smoothed(Max(), option("graft_beta2"), option("graft_eps"), bias_correction=False),
    "sgd": Identity(),
}


class Shampoo(DeclaredOptimizer):
    """The spectral norm with memory: ``L^(-1/4) m R^(-1/4)``, where ``L`` and ``R`` sum up ``g g^T`` and ``g^T g``.

    ``m`` is the bias-corrected average of gradients; ``w <- (1 - lr weight_decay) w - lr L^(-1/4) m R^(-1/4)``. Vectors
    are multiplied by ``R^(-1/2)``, the full-matrix Adagrad. ``betas=(0, 1)`` without grafting is arXiv 1802.09568.
    Defaults are those of facebookresearch/optimizers' Distributed Shampoo (arXiv 2309.06497), which differs in this: it
    starts to precondition at step ``preconditioning_frequency``, and moves by the graft or the momentum before, where
    here roots are computed at the first step already; it cuts blocks of ``block_size`` and a rest, where here all
    blocks of a side are equally long; and it damps directions that no root has seen by ``eps`` alone, where here a
    gradient in such directions gets new roots at once, see :class:`~normopt.directions.Smoothed`, or waits for the next
    ones if ``eps`` is below rounding errors.

    Raises:
        ValueError: an unknown ``graft``, or a number out of range.
    """

    lr: float | Tensor = 1e-2
    betas: tuple[float, float] = arg(
        default=(0.9, 1.0),
        doc="decay rates of the averages of the gradient and of its second moments; 1 for the latter: their sum. "
        "Whether sum or average is the same for all param groups.",
    )
    eps: float = arg(default=1e-12, doc="added to the diagonals of the second moments.")
    weight_decay: float = 0.0
    graft: str | None = arg(
        default=None,
        doc='take each block\'s length from another update: ``"adam"``, ``"rmsprop"`` (without bias correction), both '
        'of the averaged gradient, ``"sgd"``, the averaged gradient itself, or ``None`` (arXiv 2002.11803).',
    )
    preconditioning_frequency: int = arg(
        default=1,
        doc="compute roots at the first step, at every multiple of this, and where the present gradient does not fit "
        "the last ones.",
    )
    block_size: int = arg(default=1024, doc="longer sides are cut into blocks, each with roots of its own.")
    exponent: float | None = arg(
        default=None, doc="the power of each inverse root; ``None``: 1/4 for matrices, 1/2 for vectors."
    )
    graft_beta2: float = arg(
        default=0.999, doc='decay rate of the second moment of ``"adam"`` and ``"rmsprop"``.', kw_only=True
    )
    graft_eps: float = arg(default=1e-10, doc="added to the root of that second moment.", kw_only=True)
    staggered: bool = arg(
        default=True,
        doc="give each block a step of its own for new roots, spread over ``preconditioning_frequency`` steps, so that "
        "no step is slow; ``False``: all at the multiples.",
        kw_only=True,
    )

    def rule(self) -> Rule:
        check_range(self, "graft_beta2", self.graft_beta2, 0, 1)
        check_range(self, "graft_eps", self.graft_eps, 0, float("inf"))
        direction = Blocked(self._grafted(), self.block_size)
        average = EMA(option("betas", 0), bias_correction=True)
        return Rule(direction, average, constraint=(WeightDecay(option("weight_decay")),))

    def _grafted(self) -> Direction:
        root, kind = Spectral("unit", exponent=self.exponent), "sum" if beta2_of(self.betas) == 1 else "ema"
        beta, often = option("betas", 1), self.preconditioning_frequency
        shampoo = Smoothed(root, beta, option("eps"), accumulate=kind, frequency=often, staggered=self.staggered)
        if self.graft is None:
            return shampoo
        check_choice(self, "graft", self.graft, GRAFTS)
        return Grafted(shampoo, GRAFTS[self.graft])


class SOAP(DeclaredOptimizer):
    """Adam in the eigenbasis of Shampoo's second moments (arXiv 2409.11321).

    The first call builds the bases and moves nothing. Then, with ``Q_L``, ``Q_R`` the bases, ``m`` Adam's average of
    gradients and ``v`` that of the squares of ``Q_L^T g Q_R``: ``d = Q_L (Q_L^T m Q_R / (sqrt(v) + eps)) Q_R^T``,
    ``w <- (1 - lr weight_decay) (w - lr d)``; then the second moments see ``g``, and the bases follow. Arguments and
    defaults are those of nikhilvyas/SOAP without ``merge_dims`` and ``data_format``: convolutions are seen as matrices.
    With ``staggered=False`` all bases change at the same steps, as there.
    """

    lr: float | Tensor = 3e-3
    betas: tuple[float, float] = arg(default=(0.95, 0.95), doc="decay rates of Adam's averages.")
    shampoo_beta: float = arg(
        default=-1, doc="decay rate of the averages of ``g g^T`` and ``g^T g``; negative: ``betas[1]``."
    )
    eps: float = arg(default=1e-8, doc="added to the root of ``v`` before the bias correction.")
    weight_decay: float = arg(default=0.01, doc="decoupled weight decay, of the weights after the update.")
    precondition_frequency: int = 10
    max_precond_dim: int = arg(default=10000, doc="longer sides are not rotated.")
    precondition_1d: bool = arg(
        default=False, doc="rotate vectors too, matrices with a single row or column among them."
    )
    normalize_grads: bool = arg(
        default=False,
        doc="give every update a root mean square of 1. (The authors' code then multiplies by Adam's bias correction; "
        "here it is a part of what is normalized.)",
    )
    correct_bias: bool = arg(default=True, doc="Adam's bias correction.")
    staggered: bool = arg(default=True, kw_only=True)

    def rule(self) -> Rule:
        check_range(self, "shampoo_beta", self.shampoo_beta, -float("inf"), 1)
        beta2, unbiased, often = option("betas", 1), option("correct_bias"), option("precondition_frequency")
        beta = option("shampoo_beta") if self.shampoo_beta >= 0 else beta2
        adam = Smoothed(Max(), beta2, option("eps"), unbiased, eps_at="raw")
        basis = Eigenbasis(beta, often, self.max_precond_dim, self.precondition_1d, staggered=self.staggered)
        soap = Rotated(adam, basis)
        direction = Chain(soap, Euclidean()) if self.normalize_grads else soap
        decay = WeightDecay(option("weight_decay"), after=True)
        return Rule(direction, EMA(option("betas", 0), bias_correction=unbiased), constraint=(decay,))


class SPlus(DeclaredOptimizer):
    """Signs in Shampoo's eigenbasis: ``w <- w - lr 2/(out + in) Q_L sign(Q_L^T m Q_R) Q_R^T`` (arXiv 2506.07254).

    ``m <- beta1 m + (1 - beta1) g``; ``Q_L`` and ``Q_R`` are the eigenvectors of averages of ``g g^T`` and ``g^T g``;
    then ``w <- (1 - lr weight_decay) w``. Arguments are those of pytorch_optimizer, which decays by ``2/(out + in)`` of
    that, starts from bases of the identity where here the first gradient only builds them, and averages the weights.
    """

    lr: float | Tensor = 0.1
    betas: tuple[float, float] = arg(default=(0.9, 0.999), doc="decay rates of ``m`` and of the averages of ``g g^T``.")
    weight_decay: float = arg(default=0.0, doc="decoupled weight decay, of the weights after the update.")
    inverse_steps: int = arg(default=100, doc="steps from one eigendecomposition to the next.")
    nonstandard_constant: float = arg(default=1e-3, doc="size of the entries of a vector's update over ``lr``.")
    max_dim: int = arg(default=10000, doc="longer sides are not rotated.")
    staggered: bool = arg(default=True, kw_only=True)

    def table(self) -> Geometry:
        """Given a whole model, vectors and scalars move by signs and are not decayed."""
        sign = {"norm": Max(self.nonstandard_constant), "weight_decay": 0.0}
        return {"vector": sign, "scalar": sign}

    def rule(self) -> Rule:
        check_beta1(self, self.betas)
        beta, often = option("betas", 1), option("inverse_steps")
        basis = Eigenbasis(beta, often, self.max_dim, exact=True, staggered=self.staggered)
        decay = WeightDecay(option("weight_decay"), after=True)
        return Rule(Rotated(Max("mean_side"), basis), EMA(option("betas", 0)), constraint=(decay,))


class KLShampoo(MatrixOptimizer):
    """Shampoo with factors that are learnt from gradients whitened by each other, and exponents 1/2 (arXiv 2509.03378).

    The first call builds the bases and moves nothing. Then ``m <- beta1 m + (1 - beta1) g`` and ``w <- (1 - lr
    weight_decay) (w - lr L^(-1/2) m R^(-1/2))``, see :class:`~normopt.KLWhitened`; there is no bias correction.
    Arguments and defaults are those of yorkerlin/KL-Methods, which computes in bfloat16; this is float32.
    """

    lr: float | Tensor = 1e-4
    betas: tuple[float, float] = arg(
        default=(0.9, 0.98), doc="decay rates of the averages of the gradient and of the factors."
    )
    eps: float = arg(default=1e-8, doc="added to the roots of the products of the factors' eigenvalues.")
    weight_decay: float = arg(default=0.01, doc="decoupled weight decay, of the weights after the update.")
    precondition_frequency: int = 10
    init_factor: float = arg(default=0.1, doc="what all eigenvalues start from.")
    staggered: bool = arg(default=True, kw_only=True)

    def rule(self) -> Rule:
        check_beta1(self, self.betas)
        numbers = option("betas", 1), option("eps"), option("precondition_frequency"), self.init_factor
        decay = WeightDecay(option("weight_decay"), True, self.cautious)
        return Rule(KLWhitened(*numbers, self.staggered), EMA(option("betas", 0)), constraint=(decay,))


class _HeadToo(FixedStepMatrixOptimizer):
    def table(self) -> Geometry:
        """Given a whole model, hidden matrices and the head move by this rule, embeddings and vectors by AdamW."""
        return {"linear": {}, "conv": {}, "unembedding": {}}


class ASGO(_HeadToo):
    """One-sided Shampoo with a fixed length: ``m`` over the root of averaged ``g g^T`` (arXiv 2503.20762).

    ``m <- momentum m + (1 - momentum) g``; ``V <- beta2 V + (1 - beta2) g g^T`` for wide matrices, ``g^T g`` for tall
    and square ones; ``u = V^(-1/2) m`` or ``m V^(-1/2)``; ``w <- (1 - lr weight_decay) w - lr 0.2 u / rms(u)``.
    Arguments and defaults are those of infinity-stars/ASGO; roots are exact, by eigendecomposition.
    """

    lr: float | Tensor = 1e-2
    momentum: float = 0.9
    beta2: float = arg(default=0.8, doc="decay rate of ``V``.")
    weight_decay: float = 0.1
    eps: float = arg(default=1e-10, doc="added to the diagonal of ``V``.")

    def rule(self) -> Rule:
        spectral = Spectral("unit", sides="smaller")
        whitened = Smoothed(spectral, option("beta2"), option("eps"), bias_correction=False)
        return Rule(Chain(whitened, Euclidean()), EMA(option("momentum")), Constant(0.2))


class DASGO(_HeadToo):
    """:class:`ASGO` with diagonals only: the column norm with memory, with a fixed length (arXiv 2503.20762).

    ``m <- momentum m + (1 - momentum) g``; ``v``, one number for each column, averages the sums of ``g^2``;
    ``u = m / sqrt(v + eps)``; ``w <- (1 - lr weight_decay) w - lr 0.2 u / rms(u)``. Arguments and defaults are those of
    infinity-stars/ASGO.
    """

    momentum: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    eps: float = arg(default=1e-8, doc="added to ``v``.")

    def rule(self) -> Rule:
        columns = Smoothed(Column("unit"), option("beta2"), option("eps"), bias_correction=False, eps_at="moment")
        return Rule(Chain(columns, Euclidean()), EMA(option("momentum")), Constant(0.2))
