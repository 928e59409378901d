"""Directions that see the gradient beside its average: what the average did not foresee counts as noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from normopt.ingredient.registry import read
from normopt.ingredient.stage import SECOND_MOMENT, Context, Direction
from normopt.ingredient.traits import like
from normopt.ingredient.validate import check_range
from normopt.norms.spectral import Spectral


@dataclass(frozen=True)
class Innovated(Direction):
    """PRISM's polar factor, damped where the gradient changes: ``m (m^T m + gamma^2 d^T d)^(-1/2)``, ``d = g - m``.

    ``m`` is what comes in, an average of gradients, and ``d`` the innovation, the part of the gradient ``g`` that ``m``
    did not foresee. It is the upper half of the polar factor of ``m`` above ``gamma d``, at the scale of ``norm``, and
    costs that polar factor of a (2 out x in) matrix. It has no state, and comes first in a chain: later stages see no
    gradient. Source: PRISM, arXiv 2602.03096; ``gamma`` has no published default that we know of.

    Args:
        norm: the spectral norm with its scale and the method of the polar factor.
        gamma: weight of the innovation, not negative; at 0 the direction is the norm's.
    """

    sees_weights = False
    needs_matrix = True
    degree = None
    cell = like("norm")
    norm: Spectral = Spectral()
    gamma: float = 1.0

    def __post_init__(self) -> None:
        read(self, "norm", Spectral)
        check_range(self, "gamma", self.gamma, 0, float("inf"))

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        both = torch.cat((x, (context.g - x).mul_(self.gamma)), dim=-2)
        return self.norm.unit_dualize(both)[..., : x.shape[-2], :] * self.norm.factor(x.shape)

    def rms(self, shape: tuple[int, ...]) -> float:
        """The norm's root mean square, which an innovation of 0 has, and others come short of."""
        return self.norm.rms(shape)

    def steepness(self, g: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """The norm's, since the result has at most norm 1."""
        return self.norm.steepness(g, state)


@dataclass(frozen=True)
class NoiseScaled(Direction):
    """Muon-NSR's and Muon-VS' stage before the polar factor: Nesterov's momentum over the root of its variance.

    ``m``, what comes in, is the average of an ``EMA(beta)`` with the same ``beta``, and ``m'`` the one before.
    ``v <- beta v + beta (1 - beta) (m' - g)^2``; with ``c = 1 - beta^step`` and ``h = g + beta / (1 - beta) m / c`` the
    result is ``h / (sqrt(h^2 + gamma v / c) + eps)``, without ``gamma`` ``h / (sqrt(v / c) + eps)``, entry by entry.
    ``Chain(NoiseScaled(), Spectral())`` is Muon-NSR, ``Chain(NoiseScaled(gamma=None), Spectral())`` Muon-VS (arXiv
    2601.14603; the authors' code adds ``eps`` to the root). It comes first in a chain: later stages see no gradient.

    Args:
        beta: decay rate of both averages, in (0, 1).
        gamma: weight of the noise against the signal, not negative; the authors' code has 10 for GPT-2 and 1000 for
            Llama. ``None``: noise alone, of which a steady gradient has none: only a norm after it bounds the step.
        eps: added to the root, not negative.
    """

    sees_weights = False
    needs_matrix = False
    reduces = "entry"
    degree = None
    squares = True
    beta: float = 0.95
    gamma: float | None = 10.0
    eps: float = 1e-8

    def __post_init__(self) -> None:
        check_range(self, "beta", self.beta, 0, 1)
        if self.beta == 0:
            raise ValueError("NoiseScaled: beta must be positive: the gradient is compared with an average")
        if self.gamma is not None:
            check_range(self, "gamma", self.gamma, 0, float("inf"))
        check_range(self, "eps", self.eps, 0, float("inf"))

    @property
    def cell(self) -> tuple[str, str]:
        """That of Adam's denominator."""
        return "Max", SECOND_MOMENT

    @property
    def averages(self) -> frozenset[str]:
        return frozenset({"variance"})

    def init_state(self, x: Tensor) -> dict[str, Tensor]:
        return {"variance": torch.zeros_like(x)}

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        innovation = (x - context.g).div_(self.beta)  # m' - g, since m - g = beta (m' - g)
        factor = self.beta * (1 - self.beta)
        state["variance"].mul_(self.beta).addcmul_(innovation, innovation, value=factor)
        return self.apply(x, state, context)

    def apply(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        correction = 1 - self.beta**context.step
        h = context.g + x * (self.beta / (1 - self.beta) / correction)
        noise = state["variance"] / correction
        squares = noise if self.gamma is None else (h * h).add_(noise, alpha=self.gamma)
        return h / squares.sqrt_().add_(self.eps * context.scale)
