"""Muon: momentum, then the polar factor, which is steepest descent under the spectral norm; and Muon++."""

from __future__ import annotations

import torch

from normopt.directions import Complement
from normopt.ingredient import check_choice, check_range, option
from normopt.momentum import EMA
from normopt.norms import Spectral
from normopt.polar import PolarCoefficients
from normopt.rule import Rule
from normopt.zoo.base import arg
from normopt.zoo.matrices import HALF_LR, MatrixOptimizer

#: torch.optim.Muon's names for the scale of an update, and ours.
ADJUST_LR = {"original": "max1", "match_rms_adamw": "adamw", "spectral_unclamped": "rms"}


class Muon(MatrixOptimizer):
    """Momentum, then the polar factor: steepest descent under the spectral norm (Jordan et al. 2024).

    ``m <- momentum m + (1 - momentum) g``; ``u = momentum m + (1 - momentum) g`` with Nesterov, else ``m``;
    ``w <- (1 - lr weight_decay) w - lr scale polar(u)``. Arguments and defaults are those of torch.optim.Muon, and so
    are its results within the error of bfloat16; ``orthogonalize_dtype=torch.bfloat16`` computes them as it does. Both
    rules share one optimizer, one learning-rate schedule and one checkpoint.
    """

    weight_decay: float = 0.1
    momentum: float = 0.95
    nesterov: bool = True
    ns_coefficients: tuple[float, float, float] | None = arg(
        default=None, doc='``(a, b, c)`` of the Newton-Schulz iteration; needs ``orthogonalize="newton-schulz"``.'
    )
    eps: float = arg(
        default=1e-7,
        doc="accepted for compatibility with torch.optim; has no effect: gradients of any length are normalized, in "
        "float32.",
    )
    ns_steps: int | None = None
    adjust_lr_fn: str | None = arg(
        default=None,
        doc='scale of an (m x n) update. ``None`` or ``"original"``: sqrt(max(1, m/n)). ``"match_rms_adamw"``: '
        '0.2 sqrt(max(m, n)). ``"spectral_unclamped"``: sqrt(m/n), the RMS -> RMS norm.',
    )
    orthogonalize: str | PolarCoefficients = arg(default="newton-schulz", kw_only=True)
    orthogonalize_dtype: torch.dtype | str | None = arg(default="auto", kw_only=True)
    aux_lr: float | None = arg(
        default=None,
        doc='learning rate of AdamW for all other tensors; by default ``lr`` under ``"match_rms_adamw"`` and '
        "``lr / 2`` otherwise (tuned for a GPT of width 96; much wider models want less). Under a step size that finds "
        "the learning rate, its ratio to ``lr`` is the ``radius`` of these tensors.",
        kw_only=True,
    )

    def rule(self) -> Rule:
        scale = "original" if self.adjust_lr_fn is None else self.adjust_lr_fn
        check_choice(self, "adjust_lr_fn", scale, ADJUST_LR)
        check_range(self, "eps", self.eps, 0, float("inf"))
        self.aux_ratio = 1.0 if scale == "match_rms_adamw" else 0.5
        polar = Spectral(ADJUST_LR[scale], self._method(), self.ns_steps, self.orthogonalize_dtype)
        return Rule(polar, EMA(option("momentum"), option("nesterov")))

    def _method(self) -> str | PolarCoefficients:
        if self.ns_coefficients is None:
            return self.orthogonalize
        if self.orthogonalize != "newton-schulz":
            raise ValueError("Muon: ns_coefficients need orthogonalize='newton-schulz'")
        for coefficient in self.ns_coefficients:
            check_range(self, "ns_coefficients", coefficient, -1e30, 1e30)
        return PolarCoefficients((self.ns_coefficients,))


class MuonPlusPlus(MatrixOptimizer):
    """:class:`Muon` that leaves the largest singular value of the weights where it is (arXiv 2601.01306).

    ``m`` as in Muon, ``P = (I - u u^T) m (I - v v^T)`` with ``u``, ``v`` the leading singular vectors of ``w``;
    ``w <- w - lr S polar(P)``, ``S = sqrt(out / in)``. The spectral norm of the weights, which should be ``S`` at the
    start, stays what it is as long as the second singular value is smaller by ``lr S``. When the gap has closed, the
    leading pair changes and the norm grows: a smaller ``lr`` or a larger ``protect`` keeps it open. Of the paper only
    the projection and the scale are here, not how it treats small gaps; rate, momentum and
    Nesterov's look-ahead are those of :class:`Muon`.
    """

    aux_ratio = 0.5
    momentum: float = 0.95
    nesterov: bool = True
    protect: int = arg(default=1, doc="how many leading pairs are left as they are.")
    power_iterations: int | None = arg(
        default=2,
        doc="how many find the leading pairs, from those of the last step; ``None``: a singular value decomposition at "
        "every step, exact and expensive. See :class:`~normopt.Complement`.",
    )
    weight_decay: float = arg(default=0.0, doc="decoupled weight decay, which shrinks the spectral norm too.")
    orthogonalize: str | PolarCoefficients = arg(default="auto", kw_only=True)
    orthogonalize_dtype: torch.dtype | str | None = arg(default=None, kw_only=True)
    aux_lr: float | None = arg(default=None, doc=HALF_LR, kw_only=True)

    def rule(self) -> Rule:
        polar = Spectral("rms", self.orthogonalize, None, self.orthogonalize_dtype)
        beside = Complement(polar, self.protect, self.power_iterations)
        return Rule(beside, EMA(option("momentum"), option("nesterov")))
