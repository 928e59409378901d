"""Rules that torch has one kernel for: the same step, to rounding, in one pass over memory."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from normopt.constraints.bounds import Ball, FrobeniusSphere, RowBound, Sphere
from normopt.constraints.decay import L2, WeightDecay
from normopt.directions.algebra import Chain, Identity
from normopt.directions.smoothed import Smoothed
from normopt.momentum.averages import EMA, HeavyBall, LionMomentum
from normopt.momentum.base import Momentum, NoMomentum
from normopt.norms.entrywise import Max
from normopt.rule import Rule
from normopt.stepsize.fixed import Constant

DEVICES = ("cpu", "cuda")

#: Factors nearer to 1 are not multiplied by: 1 - 1e-8 is 1 in float32, but w - 1e-8 w need not be w.
NEAR_ONE = 1e-5

#: What may follow a kernel: bounds that look at nothing but the weights it has moved; classes that extend them may.
BOUNDS = (RowBound, Sphere, FrobeniusSphere, Ball)


#: How many tensors are few, and from how many entries on they are large, for foreach calls to be the faster way.
FEW_TENSORS, LARGE = 16, 4096

#: How many entries foreach calls work on at a time: what one of them has written is in the caches for the next one.
RUN = 1 << 20


class Given(NamedTuple):
    """What a kernel takes a step with: tensors in the parameters' order, and the step's numbers."""

    params: list[Tensor]
    gradients: list[Tensor]
    #: Each parameter's entries by name, ``"step"`` with this step's number among them.
    state: Mapping[str, list[Tensor]]
    #: This step's number, from 1; a tensor where the host does not read it.
    step: Any
    lr: float | Tensor
    maximize: bool

    def of(self, places: Sequence[int], entries: slice | None = None) -> Given:
        """The same with the tensors at these places, or with some of their entries, end to end."""

        def picked(tensors: list[Tensor]) -> list[Tensor]:
            return [tensors[i] if entries is None else tensors[i].detach().view(-1)[entries] for i in places]

        state = {name: x if name == "step" else picked(x) for name, x in self.state.items()}
        return self._replace(params=picked(self.params), gradients=picked(self.gradients), state=state)


class Kernel(ABC):
    """A step that torch takes in few passes over memory, for contiguous tensors of one dtype."""

    #: Whether the learning rate must be a number.
    needs_numbers: ClassVar[bool] = False

    @property
    @abstractmethod
    def reads(self) -> list[str]:
        """The names of the state that it reads and writes."""

    def suits(self, sizes: Sequence[int]) -> bool:
        """Whether the kernel is the fastest way for tensors with so many entries."""
        return True

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
    def __call__(self, given: Given) -> None:
        """Take a step."""


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

    def __call__(self, given: Given) -> None:
        params, gradients, state, step, lr, maximize = given
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

    def __call__(self, given: Given) -> None:
        params, gradients, state, step, lr, maximize = given
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


class ListKernel(Kernel):
    """A step of torch's foreach calls, where tensors are few, or large on average; else all are laid end to end."""

    needs_numbers = True

    def suits(self, sizes: Sequence[int]) -> bool:
        return len(sizes) <= FEW_TENSORS or sum(sizes) >= LARGE * len(sizes)

    def __call__(self, given: Given) -> None:
        for run in _runs(given):
            self.move(run)

    @abstractmethod
    def move(self, given: Given) -> None:
        """Take a step of a few entries."""


def _runs(given: Given) -> Iterator[Given]:
    """The tensors in runs of at most ``RUN`` entries; larger ones are cut."""
    sizes = [p.numel() for p in given.params]
    if sum(sizes) <= RUN:
        yield given
        return
    together, entries = list[int](), 0
    for i, size in enumerate(sizes):
        if together and entries + size > RUN:
            yield given.of(together)
            together, entries = [], 0
        if size <= RUN:
            together.append(i)
            entries += size
            continue
        for start in range(0, size, RUN):
            yield given.of([i], slice(start, start + RUN))
    if together:
        yield given.of(together)


@dataclass(frozen=True)
class SignKernel(ListKernel):
    """Signs of gradients, of their average, or of Lion's interpolation, with decoupled decay, by foreach calls.

    ``beta`` is the decay rate of the average, ``None`` without one; ``ahead`` the weight of the old average in what
    signs are taken of, ``None`` where that is the new average.
    """

    beta: float | None
    ahead: float | None
    weight_decay: float

    @property
    def reads(self) -> list[str]:
        return [] if self.beta is None else ["momentum"]

    def move(self, given: Given) -> None:
        params, gradients, state, _, lr, maximize = given
        g = torch._foreach_neg(gradients) if maximize else gradients
        if self.beta is None:
            signs = torch._foreach_sign(g)
        elif self.ahead is None:
            torch._foreach_lerp_(state["momentum"], g, 1 - self.beta)
            signs = torch._foreach_sign(state["momentum"])
        else:
            signs = torch._foreach_lerp(state["momentum"], g, 1 - self.ahead)
            torch._foreach_lerp_(state["momentum"], g, 1 - self.beta)
            torch._foreach_sign_(signs)
        shrink_(params, 1 - float(lr) * self.weight_decay)
        torch._foreach_add_(params, signs, alpha=-float(lr))


@dataclass(frozen=True)
class RMSKernel(ListKernel):
    """Gradients over the root of their average square, then a heavy ball; L2 regularization before: RMSprop."""

    beta: float
    eps: float
    momentum: float
    weight_decay: float

    @property
    def reads(self) -> list[str]:
        return ["0.second_moment", *(["1.momentum"] if self.momentum else [])]

    def move(self, given: Given) -> None:
        params, gradients, state, _, lr, maximize = given
        g, squares = torch._foreach_neg(gradients) if maximize else gradients, state["0.second_moment"]
        if self.weight_decay:
            g = torch._foreach_add(g, params, alpha=self.weight_decay)
        torch._foreach_mul_(squares, self.beta)
        torch._foreach_addcmul_(squares, g, g, 1 - self.beta)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_add_(roots, self.eps)
        if self.momentum:
            torch._foreach_mul_(state["1.momentum"], self.momentum)
            torch._foreach_addcdiv_(state["1.momentum"], g, roots)
            torch._foreach_add_(params, state["1.momentum"], alpha=-float(lr))
        else:
            torch._foreach_addcdiv_(params, g, roots, -float(lr))


def shrink_(params: list[Tensor], factor: float | Tensor) -> None:
    """``w <- factor w``; ``factor`` is a number, or a tensor with one entry."""
    if isinstance(factor, Tensor):
        torch._foreach_add_(params, torch._foreach_mul(params, factor - 1))
    elif factor != 1.0 and abs(factor - 1) < NEAR_ONE:
        torch._foreach_add_(params, params, alpha=factor - 1)
    elif factor != 1.0:
        torch._foreach_mul_(params, factor)


def find(rule: Rule) -> Kernel | None:
    """The kernel that computes what a rule without options says, up to its bounds; ``None`` if there is none."""
    bare = dataclasses.replace(rule, constraint=tuple(x for x in rule.constraint if type(x) not in BOUNDS))
    return _adam(bare) or _sgd(bare) or _signs(bare) or _rms(bare)


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


def _signs(rule: Rule) -> Kernel | None:
    decay = rule.constraint[0] if rule.constraint else WeightDecay(0.0)
    if not isinstance(decay, WeightDecay):
        return None
    momentum = rule.momentum
    average: Momentum = NoMomentum()
    beta: float | None = None
    ahead: float | None = None
    if isinstance(momentum, EMA):
        average, beta = EMA(momentum.beta), momentum.beta
    elif isinstance(momentum, LionMomentum):
        average, beta, ahead = LionMomentum(momentum.beta1, momentum.beta2), momentum.beta2, momentum.beta1
    bounds = (WeightDecay(decay.weight_decay),) if rule.constraint else ()
    if rule != Rule(Max(), average, Constant(), bounds, rule.view):
        return None
    return SignKernel(beta, ahead, decay.weight_decay)


def _rms(rule: Rule) -> Kernel | None:
    stages = rule.norm.stages if isinstance(rule.norm, Chain) else ()
    decay = rule.constraint[0] if rule.constraint else L2(0.0)
    if len(stages) != 2 or not isinstance(decay, L2):
        return None
    norm, ball = stages
    if not (isinstance(norm, Smoothed) and norm.accumulate == "ema" and norm.eps and isinstance(ball, HeavyBall)):
        return None
    plain = Rule(
        Chain(Smoothed(Max(), norm.beta, norm.eps, bias_correction=False), HeavyBall(ball.beta)),
        NoMomentum(),
        Constant(),
        (L2(decay.weight_decay),) if rule.constraint else (),
        rule.view,
    )
    return RMSKernel(norm.beta, norm.eps, ball.beta, decay.weight_decay) if rule == plain else None
