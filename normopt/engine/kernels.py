"""Rules that torch has one kernel for: the same step, to rounding, in one pass over memory."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from normopt.constraints.bounds import Ball, FrobeniusSphere, RowBound, Sphere
from normopt.constraints.decay import L2, WeightDecay
from normopt.directions.smoothed import Smoothed
from normopt.momentum.averages import EMA
from normopt.norms.entrywise import Max
from normopt.rule import Rule
from normopt.stepsize.fixed import Constant

if TYPE_CHECKING:
    from normopt.engine.batch import Batch

DEVICES = ("cpu", "cuda")

#: What may follow a kernel: bounds that look at nothing but the weights it has moved; classes that extend them may.
BOUNDS = (RowBound, Sphere, FrobeniusSphere, Ball)


@dataclass(frozen=True)
class AdamKernel:
    """Adam with L2 regularization or decoupled decay, and AMSGrad: torch.optim's ``fused=True``."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool
    amsgrad: bool

    def __call__(self, batch: Batch) -> None:
        """Take the step; the batch has counted it already."""
        step = torch.as_tensor(batch.number, dtype=torch.float32, device=batch.params[0].device)
        run = torch._fused_adamw_ if self.decoupled else torch._fused_adam_
        run(
            batch.params,
            batch.gradients,
            batch.views("momentum"),
            batch.views("second_moment"),
            batch.views("max_second_moment") if self.amsgrad else [],
            [step] * len(batch.params),
            lr=batch.rate,
            beta1=self.beta1,
            beta2=self.beta2,
            weight_decay=self.weight_decay,
            eps=self.eps,
            amsgrad=self.amsgrad,
            maximize=batch.group["maximize"],
        )


def kernel_of(batch: Batch) -> AdamKernel | None:
    """The kernel for a batch with its numbers, if torch has one for its rule and its tensors."""
    if torch.compiler.is_compiling():  # a compiler fuses by itself, and would compile anew for each learning rate
        return None
    if batch.known is None or batch.known[0] is not batch.rule:
        batch.known = batch.rule, find(batch.rule)
    kernel, device, dtype = batch.known[1], batch.params[0].device, batch.params[0].dtype
    if kernel is None or device.type not in DEVICES or batch.dtype != dtype or batch.rounded:
        return None
    gradients = batch.gradients
    plain = all(g.dtype == dtype for g in gradients)
    plain = plain and all(map(Tensor.is_contiguous, (*gradients, *batch.params, *batch.views("momentum"))))
    return kernel if plain else None


def find(rule: Rule) -> AdamKernel | None:
    """The kernel that computes what a rule without options says, up to its bounds; ``None`` if there is none."""
    norm, momentum = rule.norm, rule.momentum
    constraint = tuple(x for x in rule.constraint if type(x) not in BOUNDS)
    if not (isinstance(norm, Smoothed) and isinstance(norm.norm, Max) and isinstance(momentum, EMA)):
        return None
    decay = constraint[0] if constraint else WeightDecay(0.0)
    if not isinstance(decay, (WeightDecay, L2)):
        return None
    plain = Rule(
        Smoothed(Max(), norm.beta, norm.eps, maximum=norm.maximum),
        EMA(momentum.beta, bias_correction=True),
        Constant(),
        (type(decay)(decay.weight_decay),) if constraint else (),
        rule.view,
    )
    if dataclasses.replace(rule, constraint=constraint) != plain:
        return None
    decoupled = isinstance(decay, WeightDecay)
    return AdamKernel(momentum.beta, norm.beta, norm.eps, decay.weight_decay, decoupled, norm.maximum)
