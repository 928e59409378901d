"""Rules that torch has one kernel for: the same step, to rounding, in one pass over memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normopt.constraints.bounds import Ball, FrobeniusSphere, RowBound, Sphere
from normopt.constraints.decay import L2, WeightDecay
from normopt.directions.smoothed import Smoothed
from normopt.momentum.averages import EMA
from normopt.norms.entrywise import Max
from normopt.rule import Rule
from normopt.stepsize.fixed import Constant

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

    def takes(self, params: Sequence[Tensor], gradients: Sequence[Tensor], momentum: Sequence[Tensor]) -> bool:
        """Whether the kernel can be had for these tensors."""
        device, dtype = params[0].device, params[0].dtype
        # A compiler fuses by itself, and would compile anew for each learning rate.
        if device.type not in DEVICES or torch.compiler.is_compiling():
            return False
        alike = all(g.dtype == dtype for g in gradients)
        return alike and all(map(Tensor.is_contiguous, (*gradients, *params, *momentum)))

    def __call__(
        self,
        params: list[Tensor],
        gradients: list[Tensor],
        state: dict[str, list[Tensor]],
        step: Any,
        lr: float | Tensor,
        maximize: bool,
    ) -> None:
        """Take the step with this number, from 1; ``state`` has each parameter's entries by name."""
        number = torch.as_tensor(step, dtype=torch.float32, device=params[0].device)
        run = torch._fused_adamw_ if self.decoupled else torch._fused_adam_
        run(
            params,
            gradients,
            state["momentum"],
            state["second_moment"],
            state["max_second_moment"] if self.amsgrad else [],
            [number] * len(params),
            lr=lr,
            beta1=self.beta1,
            beta2=self.beta2,
            weight_decay=self.weight_decay,
            eps=self.eps,
            amsgrad=self.amsgrad,
            maximize=maximize,
        )


def find(rule: Rule) -> AdamKernel | None:
    """The kernel that computes what a rule without options says, up to its bounds; ``None`` if there is none."""
    norm, momentum = rule.norm, rule.momentum
    constraint = tuple(x for x in rule.constraint if type(x) not in BOUNDS)
    if not (isinstance(norm, Smoothed) and isinstance(norm.norm, Max) and isinstance(momentum, EMA)):
        return None
    if norm.accumulate != "ema":  # a beta of 1, which sums take, is none of an average
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
