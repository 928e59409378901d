"""Rules that torch has one kernel for: the same step, to rounding, in one pass over memory."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normopt.constraints.bounds import Ball, FrobeniusSphere, RowBound, Sphere
from normopt.constraints.decay import L2, WeightDecay
from normopt.directions.algebra import Identity
from normopt.directions.smoothed import Smoothed
from normopt.momentum.averages import EMA, HeavyBall
from normopt.norms.entrywise import Max
from normopt.rule import Rule
from normopt.stepsize.fixed import Constant

DEVICES = ("cpu", "cuda")

#: What may follow a kernel: bounds that look at nothing but the weights it has moved; classes that extend them may.
BOUNDS = (RowBound, Sphere, FrobeniusSphere, Ball)


class Kernel(ABC):
    """A step that torch takes in one pass over memory, for contiguous tensors of one dtype."""

    @property
    @abstractmethod
    def reads(self) -> list[str]:
        """The names of the state that it reads and writes."""

    def takes(self, params: Sequence[Tensor], gradients: Sequence[Tensor]) -> bool:
        """Whether the kernel can be had for these tensors."""
        device, dtype = params[0].device, params[0].dtype
        # A compiler fuses by itself, and would compile anew for each learning rate.
        if device.type not in DEVICES or torch.compiler.is_compiling():
            return False
        return (
            all([g.dtype == dtype for g in gradients])
            and all(map(Tensor.is_contiguous, gradients))
            and all(map(Tensor.is_contiguous, params))
        )

    @abstractmethod
    def __call__(
        self,
        params: list[Tensor],
        gradients: list[Tensor],
        state: Mapping[str, list[Tensor]],
        step: Any,
        lr: float | Tensor,
        maximize: bool,
    ) -> None:
        """Take a step; ``state`` has each parameter's entries by name, ``"step"`` with this step's number, from 1."""


@dataclass(frozen=True)
class AdamKernel(Kernel):
    """Adam with L2 regularization or decoupled decay, and AMSGrad: torch.optim's ``fused=True``."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool
    amsgrad: bool

    @property
    def reads(self) -> list[str]:
        return ["momentum", "second_moment", *(["max_second_moment"] if self.amsgrad else [])]

    def __call__(
        self,
        params: list[Tensor],
        gradients: list[Tensor],
        state: Mapping[str, list[Tensor]],
        step: Any,
        lr: float | Tensor,
        maximize: bool,
    ) -> None:
        steps = state["step"]
        if steps[0].device != params[0].device:  # the host counts for a device
            steps = [torch.as_tensor(step, dtype=torch.float32, device=params[0].device)] * len(params)
        run = torch._fused_adamw_ if self.decoupled else torch._fused_adam_
        run(
            params,
            gradients,
            state["momentum"],
            state["second_moment"],
            state["max_second_moment"] if self.amsgrad else [],
            steps,
            lr=lr,
            beta1=self.beta1,
            beta2=self.beta2,
            weight_decay=self.weight_decay,
            eps=self.eps,
            amsgrad=self.amsgrad,
            maximize=maximize,
        )


@dataclass(frozen=True)
class SGDKernel(Kernel):
    """Gradient descent with a heavy ball and L2 regularization: torch.optim's ``fused=True``."""

    beta: float
    dampening: float
    nesterov: bool
    damp_first: bool
    weight_decay: float

    @property
    def reads(self) -> list[str]:
        return ["momentum"] if self.beta else []

    def __call__(
        self,
        params: list[Tensor],
        gradients: list[Tensor],
        state: Mapping[str, list[Tensor]],
        step: Any,
        lr: float | Tensor,
        maximize: bool,
    ) -> None:
        torch._fused_sgd_(
            params,
            gradients,
            state["momentum"] if self.beta else [],
            weight_decay=self.weight_decay,
            momentum=self.beta,
            lr=lr,
            dampening=self.dampening,
            nesterov=self.nesterov,
            maximize=maximize,
            # From a momentum of 0 it differs in dampening alone; without, the step's number may be a tensor.
            is_first_step=bool(self.dampening and not self.damp_first and step == 1),
        )


def find(rule: Rule) -> Kernel | None:
    """The kernel that computes what a rule without options says, up to its bounds; ``None`` if there is none."""
    bare = dataclasses.replace(rule, constraint=tuple(x for x in rule.constraint if type(x) not in BOUNDS))
    return _adam(bare) or _sgd(bare)


def _adam(rule: Rule) -> Kernel | None:
    norm, momentum = rule.norm, rule.momentum
    if not (isinstance(norm, Smoothed) and isinstance(norm.norm, Max) and isinstance(momentum, EMA)):
        return None
    if norm.accumulate != "ema":  # a beta of 1, which sums take, is none of an average
        return None
    decay = rule.constraint[0] if rule.constraint else WeightDecay(0.0)
    if not isinstance(decay, (WeightDecay, L2)):
        return None
    plain = Rule(
        Smoothed(Max(), norm.beta, norm.eps, maximum=norm.maximum),
        EMA(momentum.beta, bias_correction=True),
        Constant(),
        (type(decay)(decay.weight_decay),) if rule.constraint else (),
        rule.view,
    )
    if rule != plain:
        return None
    decoupled = isinstance(decay, WeightDecay)
    return AdamKernel(momentum.beta, norm.beta, norm.eps, decay.weight_decay, decoupled, norm.maximum)


def _sgd(rule: Rule) -> Kernel | None:
    ball = rule.momentum
    decay = rule.constraint[0] if rule.constraint else L2(0.0)
    if not (isinstance(ball, HeavyBall) and isinstance(decay, L2)):
        return None
    plain = Rule(
        Identity(),
        HeavyBall(ball.beta, ball.dampening, ball.nesterov, ball.damp_first),
        Constant(),
        (L2(decay.weight_decay),) if rule.constraint else (),
        rule.view,
    )
    if rule != plain:
        return None
    return SGDKernel(ball.beta, ball.dampening, ball.nesterov, ball.damp_first, decay.weight_decay)
