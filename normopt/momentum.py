"""Which gradient do we trust? The gradient of this step, or an average over steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from normopt.ingredient import Context, Stage, check_range


class Momentum(Stage):
    """A gradient in, the gradient to be trusted out, entry by entry; it also serves as a stage of a ``Chain``."""

    reduces: str = "entry"

    def apply(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        """The identity: an average of equal gradients is that gradient."""
        return x


@dataclass(frozen=True)
class NoMomentum(Momentum):
    """The gradient itself."""

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        return x


@dataclass(frozen=True)
class EMA(Momentum):
    """Exponential moving average: ``m <- beta m + (1 - beta) g``.

    Returns ``m``; with ``nesterov``, ``beta m + (1 - beta) g`` of the new ``m`` (Muon's look-ahead); with
    ``bias_correction``, divided by ``1 - beta^step`` (Adam, arXiv 1412.6980). Under a duality map, which ignores the
    length, it equals the heavy ball of the same beta.

    Args:
        beta: weight of the past, in [0, 1).
        nesterov: average the new average once more with the gradient.
        bias_correction: undo the pull of the zero that the average starts from.
    """

    beta: float = 0.9
    nesterov: bool = False
    bias_correction: bool = False

    def __post_init__(self) -> None:
        check_range(self, "beta", self.beta, 0, 1)

    def init_state(self, x: Tensor) -> dict[str, Tensor]:
        return {"momentum": torch.zeros_like(x)}

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        m = state["momentum"].lerp_(x, 1 - self.beta)
        if self.nesterov:
            m = x.lerp(m, self.beta)
        return m / (1 - self.beta**context.step) if self.bias_correction else m


@dataclass(frozen=True)
class Nesterov(EMA):
    """The moving average with look-ahead, :class:`EMA` with ``nesterov=True`` and Muon's ``beta=0.95``."""

    beta: float = 0.95
    nesterov: bool = True


@dataclass(frozen=True)
class LookAhead(Momentum):
    """Lion's interpolation: returns ``beta1 m + (1 - beta1) g``, then ``m <- beta2 m + (1 - beta2) g`` (2302.06675).

    Args:
        beta1: weight of the past in what is returned, in [0, 1).
        beta2: weight of the past in what is remembered, in [0, 1).
    """

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

    Returns ``b``; with ``nesterov``, ``g + beta b``. The sum is ``1 / (1 - beta)`` times as long as the average.

    Args:
        beta: weight of the past, in [0, 1); 0 keeps no state.
        dampening: how much of each later gradient is left out.
        nesterov: look ahead; needs ``beta > 0`` and no dampening.
    """

    beta: float = 0.9
    dampening: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        check_range(self, "beta", self.beta, 0, 1)
        if self.nesterov is True and not (self.beta and not self.dampening):
            raise ValueError("HeavyBall: nesterov needs beta > 0 and dampening = 0")

    def init_state(self, x: Tensor) -> dict[str, Tensor]:
        return {"momentum": torch.zeros_like(x)} if self.beta else {}

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        if not self.beta:
            return x
        b = state["momentum"]
        b.mul_(self.beta).add_(x, alpha=1.0 if context.step == 1 else 1 - self.dampening)
        return x.add(b, alpha=self.beta) if self.nesterov else b
