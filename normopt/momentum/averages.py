"""Momentum from averages and sums of gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normopt.ingredient.base import Option
from normopt.ingredient.stage import Context
from normopt.ingredient.validate import check_count, check_range
from normopt.momentum.base import Momentum


def check_nesterov(owner: object, value: Any) -> None:
    """Raise an error that names ``owner`` unless ``value`` is True, False or a weight in [0, 1]."""
    if not isinstance(value, (bool, float, Option)):
        raise TypeError(f"{type(owner).__name__}: nesterov must be True, False or a weight such as 0.9, got {value!r}")
    if isinstance(value, float):
        check_range(owner, "nesterov", value, 0, 1, closed=True)


def ahead(x: Tensor, m: Tensor, beta: float, nesterov: bool | float) -> Tensor:
    """The average ``m``, or what Nesterov momentum makes of it and the gradient ``x``."""
    return m if nesterov is False else x.lerp(m, beta if nesterov is True else nesterov)


@dataclass(frozen=True)
class EMA(Momentum):
    """Exponential moving average: ``m <- beta m + (1 - beta) g``.

    Returns ``m``; with ``nesterov``, ``beta m + (1 - beta) g`` of the new ``m`` (as in Muon), or with another weight in
    place of ``beta``; with ``bias_correction``, divided by ``1 - beta^step`` (Adam, arXiv 1412.6980). Under a duality
    map, which ignores the length of its input, it equals the heavy ball of the same beta.

    Args:
        beta: decay rate of the average, in [0, 1]. At 1, as in torch.optim.Muon, the average stays what it is: 0 from
            the start, so that weights only decay.
        nesterov: use Nesterov momentum; a ``float`` in [0, 1] is the weight of ``m`` beside the gradient (OLion).
        bias_correction: correct for the start from 0; needs ``beta < 1``.
    """

    sees_weights = False
    beta: float = 0.9
    nesterov: bool | float = False
    bias_correction: bool = False

    def __post_init__(self) -> None:
        check_range(self, "beta", self.beta, 0, 1, closed=self.bias_correction is False)
        check_nesterov(self, self.nesterov)

    def init_state(self, x: Tensor) -> dict[str, Tensor]:
        return {"momentum": torch.zeros_like(x)}

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        m = ahead(x, state["momentum"].lerp_(x, 1 - self.beta), self.beta, self.nesterov)
        return m / (1 - self.beta**context.step) if self.bias_correction else m


@dataclass(frozen=True)
class Nesterov(EMA):
    """Nesterov momentum as in Muon: :class:`EMA` with ``nesterov=True`` and ``beta=0.95``."""

    beta: float = 0.95
    nesterov: bool | float = True


@dataclass(frozen=True)
class LionMomentum(Momentum):
    """Lion's interpolation: returns ``beta1 m + (1 - beta1) g``, then ``m <- beta2 m + (1 - beta2) g``.

    Source: Chen et al., arXiv 2302.06675. It is not the Lookahead of Zhang et al. (arXiv 1907.08610), which averages
    weights.

    Args:
        beta1: weight of ``m`` in the result, in [0, 1).
        beta2: decay rate of ``m``, in [0, 1).
    """

    sees_weights = False
    beta1: float = 0.9
    beta2: float = 0.99

    def __post_init__(self) -> None:
        check_range(self, "beta1", self.beta1, 0, 1)
        check_range(self, "beta2", self.beta2, 0, 1)

    def init_state(self, x: Tensor) -> dict[str, Tensor]:
        return {"momentum": torch.zeros_like(x)}

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        m = state["momentum"]
        ahead = m.lerp(x, 1 - self.beta1)
        m.lerp_(x, 1 - self.beta2)
        return ahead


@dataclass(frozen=True)
class HeavyBall(Momentum):
    """Polyak's heavy ball as in torch.optim.SGD: ``b <- beta b + (1 - dampening) g``, and ``b = g`` at the first step.

    Returns ``b``; with ``nesterov``, ``g + beta b``. For equal gradients, ``b`` tends to ``1 / (1 - beta)`` times the
    average of :class:`EMA`.

    Args:
        beta: momentum coefficient (decay rate), not negative; 0 keeps no state, 1 sums up all gradients.
        dampening: each gradient but the first is multiplied by ``1 - dampening``; in [0, 1].
        nesterov: use Nesterov momentum; needs ``beta > 0`` and no dampening.
        damp_first: dampen the first gradient too.

    Raises:
        ValueError: a number is out of range, or ``nesterov`` without ``beta`` or with dampening.
    """

    sees_weights = False
    beta: float = 0.9
    dampening: float = 0.0
    nesterov: bool = False
    damp_first: bool = False

    def __post_init__(self) -> None:
        check_range(self, "beta", self.beta, 0, math.inf)
        check_range(self, "dampening", self.dampening, 0, 1, closed=True)
        if self.nesterov is True and not (self.beta and not self.dampening):
            raise ValueError("HeavyBall: nesterov needs beta > 0 and dampening = 0")

    @property
    def decides_on_host(self) -> bool:
        return bool(self.dampening) and not self.damp_first

    def init_state(self, x: Tensor) -> dict[str, Tensor]:
        return {"momentum": torch.zeros_like(x)} if self.beta else {}

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        if not self.beta:
            return x
        b = state["momentum"]
        whole = self.decides_on_host and context.step == 1
        b.mul_(self.beta).add_(x, alpha=1.0 if whole else 1 - self.dampening)
        return x.add(b, alpha=self.beta) if self.nesterov else b


@dataclass(frozen=True)
class WarmNesterov(Momentum):
    """NAdam's Nesterov momentum, with a weight ``mu`` that grows from ``beta / 2`` to ``beta`` (Dozat 2016).

    ``m <- beta m + (1 - beta) g``; with ``mu_t = beta (1 - 0.96^(t momentum_decay) / 2)`` and ``P_t = mu_1 ... mu_t``
    it returns ``(1 - mu_t) / (1 - P_t) g + mu_(t+1) / (1 - P_(t+1)) m``. ``P_t`` is that of today's ``beta``: where a
    schedule changes it, early updates differ by about a percent from torch's, which keeps the product.

    Args:
        beta: decay rate of the average, in [0, 1).
        momentum_decay: rate at which ``mu`` grows (torch.optim.NAdam's ``momentum_decay``), not negative.
    """

    sees_weights = False
    decides_on_host = True
    beta: float = 0.9
    momentum_decay: float = 4e-3

    def __post_init__(self) -> None:
        check_range(self, "beta", self.beta, 0, 1)
        check_range(self, "momentum_decay", self.momentum_decay, 0, float("inf"))

    def init_state(self, x: Tensor) -> dict[str, Tensor]:
        return {"momentum": torch.zeros_like(x)}

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        now, ahead, product = self._mu(context.step), self._mu(context.step + 1), self._product(context.step)
        m = state["momentum"].lerp_(x, 1 - self.beta)
        return (x * ((1 - now) / (1 - product))).add_(m, alpha=ahead / (1 - product * ahead))

    def _mu(self, step: float) -> float:
        return self.beta * (1 - 0.5 * 0.96 ** (step * self.momentum_decay))

    def _product(self, step: float) -> float:
        """``P_step``; once it is so small that ``1 - P_step`` rounds to 1, a product of fewer factors."""
        product, i = 1.0, 0
        while i < step and product > 1e-17:
            i += 1
            product *= self._mu(i)
        return product


@dataclass(frozen=True)
class TwoSpeed(Momentum):
    """AdEMAMix's momentum, a fast and a slow average: ``m1 / (1 - beta^step) + alpha m2`` (arXiv 2409.03137).

    ``m1 <- beta m1 + (1 - beta) g``, ``m2 <- slow m2 + (1 - slow) g``.

    Args:
        beta: decay rate of the fast average, in [0, 1).
        slow: decay rate of the slow average, in [0, 1).
        alpha: factor of the slow average, not negative.
        slow_warmup: number of steps in which the half-life of the slow average grows linearly from the half-life of the
            fast one; ``None``: no warm-up.
        alpha_warmup: number of steps in which ``alpha`` grows linearly from 0; ``None``: no warm-up.
    """

    sees_weights = False
    beta: float = 0.9
    slow: float = 0.9999
    alpha: float = 2.0
    slow_warmup: int | None = None
    alpha_warmup: int | None = None

    def __post_init__(self) -> None:
        check_range(self, "beta", self.beta, 0, 1)
        check_range(self, "slow", self.slow, 0, 1)
        check_range(self, "alpha", self.alpha, 0, float("inf"))
        for name in ("slow_warmup", "alpha_warmup"):
            if getattr(self, name) is not None:
                check_count(self, name, getattr(self, name))

    @property
    def decides_on_host(self) -> bool:
        return self.slow_warmup is not None or self.alpha_warmup is not None

    @property
    def averages(self) -> frozenset[str]:
        return frozenset({"momentum", "slow_momentum"})

    def init_state(self, x: Tensor) -> dict[str, Tensor]:
        return {"momentum": torch.zeros_like(x), "slow_momentum": torch.zeros_like(x)}

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        fast = state["momentum"].lerp_(x, 1 - self.beta)
        slow = state["slow_momentum"].lerp_(x, 1 - self._slow(context.step))
        alpha = self.alpha * _progress(context.step, self.alpha_warmup)
        return (fast / (1 - self.beta**context.step)).add_(slow, alpha=alpha)

    def _slow(self, step: float) -> float:
        done = _progress(step, self.slow_warmup)
        if done == 1:
            return self.slow
        return 0.5 ** (1 / ((1 - done) * _half_life(self.beta) + done * _half_life(self.slow)))


def _progress(step: float, warmup: int | None) -> float:
    """The fraction of a warm-up that is done, from 0 to 1."""
    return 1.0 if warmup is None else min(step / warmup, 1.0)


def _half_life(beta: float) -> float:
    """The number of steps in which a gradient's weight in the average halves; 1e-8 is for ``beta=0``."""
    return math.log(0.5) / math.log(beta + 1e-8)
