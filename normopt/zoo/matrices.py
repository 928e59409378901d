"""Optimizers of hidden matrices: their own rule for these, and AdamW for all the rest of a model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from normopt.constraints import WeightDecay
from normopt.ingredient import get, option
from normopt.roles.geometries import adam_options
from normopt.roles.options import Geometry
from normopt.rule import Rule
from normopt.stepsize import Constant, LearningRateFree, StepSize
from normopt.zoo.base import FixedStepOptimizer, arg, with_radius

__all__ = ["FixedStepMatrixOptimizer", "MatrixOptimizer"]

#: What ``aux_lr`` means where ``aux_ratio`` is not 1.
HALF_LR = "learning rate of AdamW for all other tensors; ``None``: ``lr / 2``, as for Muon."


class FixedStepMatrixOptimizer(FixedStepOptimizer):
    """A declared optimizer of hidden matrices with a step size of its own; everything else moves by AdamW.

    A class that declares ``weight_decay`` gets it, decoupled, unless its rule has another constraint; ``table()`` says
    which roles its rule is for.
    """

    #: AdamW's learning rate over ``lr``, where ``aux_lr`` is ``None``.
    aux_ratio = 1.0

    cautious: bool = arg(
        default=False,
        doc="decay only entries that the update does not move away from 0 (arXiv 2510.12402), AdamW's too.",
        kw_only=True,
    )
    aux_lr: float | None = arg(default=None, kw_only=True)
    aux_betas: tuple[float, float] = arg(default=(0.9, 0.95), kw_only=True)
    aux_eps: float = arg(default=1e-8, kw_only=True)
    aux_weight_decay: float = arg(default=0.0, kw_only=True)

    def table(self) -> Geometry:
        """Given a whole model, linear layers and convolutions move by this rule, everything else by AdamW."""
        return {"linear": {}, "conv": {}}

    def rest(self) -> dict[str, Any]:
        """AdamW."""
        decay = WeightDecay(option("weight_decay"), cautious=self.cautious)
        options = {"weight_decay": self.aux_weight_decay, "constraint": decay, **self.rates()}
        return {**adam_options(self.aux_betas, self.aux_eps), **options}

    def rates(self) -> dict[str, Any]:
        """How far AdamW goes."""
        ratio = {} if self.aux_ratio == 1 else {"lr_ratio": self.aux_ratio}
        return {"step_size": Constant(), **(ratio if self.aux_lr is None else {"lr": self.aux_lr})}

    def completed_rule(self) -> Rule:
        """The rule, with decoupled weight decay."""
        rule = super().completed_rule()
        decays = "weight_decay" in self._arguments and not rule.constraint
        return (
            replace(rule, constraint=(WeightDecay(option("weight_decay"), cautious=self.cautious),)) if decays else rule
        )


class MatrixOptimizer(FixedStepMatrixOptimizer):
    """A declared optimizer of hidden matrices; everything else moves by AdamW, with the same step size.

    Under a step size that finds the learning rate, ``aux_lr / lr`` is the ``radius`` of what AdamW moves.
    """

    step_size: str | StepSize | None = arg(default=None, kw_only=True)

    def rates(self) -> dict[str, Any]:
        """How far AdamW goes."""
        step_size = self._free_step_size()
        if step_size is None:
            return {name: value for name, value in super().rates().items() if name != "step_size"}
        if self.aux_lr is not None and not float(self.lr) > 0:
            raise ValueError(f"aux_lr counts beside lr under {step_size}, so that lr must be positive, got {self.lr!r}")
        return {"radius": self.aux_ratio if self.aux_lr is None else self.aux_lr / float(self.lr)}

    def completed_rule(self) -> Rule:
        """The rule, whose learning rate may have to be found."""
        found = self._free_step_size()
        if found is not None:
            self.step_size, self.radius = found, 1.0
        return super().completed_rule()

    def _free_step_size(self) -> LearningRateFree | None:
        """The user's step size if it finds the learning rate."""
        found = with_radius(get(StepSize, "constant" if self.step_size is None else self.step_size))
        return found if isinstance(found, LearningRateFree) else None
