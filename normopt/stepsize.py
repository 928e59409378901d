"""How far do we go? The learning rate, and what multiplies it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from normopt.ingredient import Context, Ingredient, Stage, check_count, check_range
from normopt.norms.base import Direction, axes, euclidean

#: The state of the whole optimizer: 0-dimensional tensors by name.
Shared = dict[str, Tensor]
#: The same as ingredients multiply by it: floats where the host may look, else those tensors.
Numbers = dict[str, Any]
Rate = float | Tensor


def double(device: torch.device) -> torch.dtype:
    """The dtype of numbers that belong to the whole optimizer: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


class StepSize(Ingredient):
    """The length of a step, in units of the direction: ``w <- w - length * d``.

    At each step the loop asks every batch for its ``rate``. Step sizes that override ``survey`` then see all gradients,
    those that override ``measure`` all directions; ``conclude`` gets the sums over all batches before any weight moves.
    ``weigh`` changes what momentum and memory see of a gradient, ``length`` says how far to go.
    """

    #: As for stages; ``"entry"`` when one length serves all entries, ``"all"`` when it differs from matrix to matrix.
    reduces: str = "matrix"
    #: What the length is multiplied by beside the rate and constants, for people to read.
    times: str = ""

    def check_composes(self, direction: Direction) -> None:
        """Raise a ``ValueError`` for directions that this step size makes no sense with; without options in either."""

    def init_state(self, x: Tensor, weights: Callable[[], Tensor], direction: Stage) -> dict[str, Tensor]:
        """State for each parameter, like a stage's; ``weights`` returns the initial weights."""
        return {}

    def init_shared(self) -> dict[str, float]:
        """State of the whole optimizer; it is kept in the param groups under these names, as 0-dimensional tensors."""
        return {}

    def rate(self, lr: Rate, step: float, shared: Numbers) -> Rate:
        """The learning rate of this step, as the constraints see it too; ``shared`` is from before ``conclude``."""
        return lr

    def survey(self, state: dict[str, Tensor], context: Context, shared: Numbers) -> dict[str, Tensor]:
        """This batch's summands, by name, from its gradient, before momentum and memory see it.

        Args:
            state: the batch's tensors; this step size's own are updated in place.
            context: the gradient, the weights, the rate, the direction.
            shared: the state of the whole optimizer, floats where the host may look, else 0-dimensional tensors.
        """
        return {}

    def measure(self, x: Tensor, d: Tensor, context: Context) -> dict[str, Tensor]:
        """This batch's summands, by name, from the averaged gradient ``x`` and its direction ``d``."""
        return {}

    def conclude(self, sums: dict[str, Tensor], shared: Shared) -> Shared:
        """What the methods below get, from the sums over all batches and the state of the whole optimizer.

        Names of ``init_shared`` are kept for the next step.
        """
        return shared

    def weigh(self, g: Tensor, context: Context, shared: Numbers) -> tuple[Tensor, Tensor]:
        """The gradient as momentum and as memory should see it; may set ``context.scale``, which an eps follows."""
        return g, g

    def length(self, x: Tensor, d: Tensor, context: Context, shared: Numbers) -> Rate:
        """What multiplies the direction: a number, or one for each matrix, shape ``(..., 1, 1)``."""
        return context.rate

    def overrides(self, method: str) -> bool:
        """Whether this step size does anything in ``method``."""
        return getattr(type(self), method) is not getattr(StepSize, method)


@dataclass(frozen=True)
class Constant(StepSize):
    """The learning rate times a fixed ``radius``: an update of norm ``lr * radius``, the ball's radius in Scion.

    Args:
        radius: positive; 1 by default.
    """

    reduces: ClassVar[str] = "entry"  # type: ignore[misc]
    radius: float = 1.0

    def __post_init__(self) -> None:
        check_range(self, "radius", self.radius, 0, float("inf"))

    def length(self, x: Tensor, d: Tensor, context: Context, shared: Numbers) -> Rate:
        return context.rate * self.radius


@dataclass(frozen=True)
class Dual(StepSize):
    """The learning rate times the dual norm, summed over all layers: true steepest descent (Anthology, Prop. 7).

    Under the modular norm ``max_l ||W_l||`` the minimizer of ``<g, dW> + ||dW||^2 / (2 lr)`` moves every layer by the
    same ``lr * sum_l dual_norm(g_l)`` along its duality map. The dual norm is taken as ``<x, d>``, which for a norm's
    duality map it is.
    """

    times: ClassVar[str] = "dual norm"  # type: ignore[misc]
    reduces: ClassVar[str] = "entry"  # type: ignore[misc]

    def measure(self, x: Tensor, d: Tensor, context: Context) -> dict[str, Tensor]:
        return {"dual_norm": (x * d).sum()}

    def conclude(self, sums: dict[str, Tensor], shared: Shared) -> Shared:
        return sums

    def length(self, x: Tensor, d: Tensor, context: Context, shared: Numbers) -> Rate:
        return context.rate * shared["dual_norm"]


@dataclass(frozen=True)
class Sharp(StepSize):
    """The learning rate times each tensor's own dual norm: every layer's own steepest descent, ``dual_norm(x) d``.

    With the Euclidean norm at scale ``"unit"`` this is the gradient itself (SGD), with the spectral norm PolarGrad
    (arXiv 2505.21799). The dual norm is taken as ``<x, d>`` for each matrix.
    """

    times: ClassVar[str] = "dual norm"  # type: ignore[misc]
    reduces: ClassVar[str] = "all"  # type: ignore[misc]

    def length(self, x: Tensor, d: Tensor, context: Context, shared: Numbers) -> Rate:
        return torch.sum(x * d, dim=axes(x), keepdim=True) * context.rate


@dataclass(frozen=True)
class GradientTrust(StepSize):
    """LARS' local rate: each gradient is multiplied by ``coefficient ||w|| / (||g|| + weight_decay ||w||)`` first.

    Momentum then averages the products, so that a step's length is the rate times the size of the weights. The ratio is
    1 where weights or gradient are 0; ``g`` is the gradient without L2 (You et al., arXiv 1708.03888).

    Args:
        coefficient: the trust coefficient.
        weight_decay: that of the :class:`~normopt.constraints.L2` beside it.
    """

    reduces: ClassVar[str] = "all"  # type: ignore[misc]
    coefficient: float = 1e-3
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        check_range(self, "coefficient", self.coefficient, 0, float("inf"))
        check_range(self, "weight_decay", self.weight_decay, 0, float("inf"))

    def weigh(self, g: Tensor, context: Context, shared: Numbers) -> tuple[Tensor, Tensor]:
        size, slope = (euclidean(x, axes(x), keepdim=True) for x in (context.w, context.raw))
        trusted = g * _ratio(size, slope + self.weight_decay * size, self.coefficient)
        return trusted, trusted


@dataclass(frozen=True)
class TrustRatio(StepSize):
    """LAMB's trust ratio: a step as long as the rate times the size of the weights, ``||w|| / ||d||`` for each matrix.

    The ratio is 1 where either is 0 (You et al., arXiv 1904.00962).

    Args:
        weight_decay: where it is 0, the ratio is 1 unless ``always_adapt``, as in timm.
        always_adapt: see above.
        clip: the largest ratio.
        max_grad_norm: before anything else, all gradients together are shortened to at most this Euclidean norm.
    """

    times: ClassVar[str] = "trust ratio"  # type: ignore[misc]
    reduces: ClassVar[str] = "all"  # type: ignore[misc]
    weight_decay: float = 0.0
    always_adapt: bool = True
    clip: float = float("inf")
    max_grad_norm: float = float("inf")

    def __post_init__(self) -> None:
        check_range(self, "weight_decay", self.weight_decay, 0, float("inf"))
        for name in ("clip", "max_grad_norm"):
            check_range(self, name, getattr(self, name), 1e-300, float("inf"), closed=True)

    def overrides(self, method: str) -> bool:
        """``survey`` only with a ``max_grad_norm``."""
        return super().overrides(method) and (method != "survey" or self.max_grad_norm != float("inf"))

    def survey(self, state: dict[str, Tensor], context: Context, shared: Numbers) -> dict[str, Tensor]:
        return {"square": _square(context.raw)}

    def conclude(self, sums: dict[str, Tensor], shared: Shared) -> Shared:
        return {"shrink": (self.max_grad_norm / sums["square"].sqrt()).clamp(max=1.0)}

    def weigh(self, g: Tensor, context: Context, shared: Numbers) -> tuple[Tensor, Tensor]:
        g = g if self.max_grad_norm == float("inf") else g * shared["shrink"]
        return g, g

    def length(self, x: Tensor, d: Tensor, context: Context, shared: Numbers) -> Rate:
        if not self.weight_decay and not self.always_adapt:
            return context.rate
        size, length = (euclidean(y, axes(y), keepdim=True) for y in (context.w, d))
        return _ratio(size, length).clamp_(max=self.clip) * context.rate


def _square(x: Tensor) -> Tensor:
    """The sum of all squares, as a number of the whole optimizer."""
    norm = euclidean(x, tuple(range(x.ndim)))
    return norm.to(double(norm.device)) ** 2


def _ratio(a: Tensor, b: Tensor, factor: float = 1.0) -> Tensor:
    """``factor a / b``, and 1 where ``a`` or ``b`` is 0."""
    return torch.where((a > 0) & (b > 0), a / b * factor, 1.0)


@dataclass(frozen=True)
class InverseTime(StepSize):
    """A learning rate that falls like one over time, ``lr / (1 + (step - 1) decay)`` (torch.optim.Adagrad).

    Args:
        decay: not negative.
    """

    reduces: ClassVar[str] = "entry"  # type: ignore[misc]
    decay: float = 0.0

    def __post_init__(self) -> None:
        check_range(self, "decay", self.decay, 0, float("inf"))

    def rate(self, lr: Rate, step: float, shared: Numbers) -> Rate:
        return lr / (1 + (step - 1) * self.decay)


@dataclass(frozen=True)
class Storm(StepSize):
    """STORM+'s rate, the same for all tensors: ``lr (sum of |d_i|^2 / a_(i+1) / b0)^(-1/3)`` (arXiv 2111.01040).

    ``d_i`` are the averaged gradients, ``a_(i+1) = (1 + sum up to i of |g_i|^2 / a0)^(-2/3)``, and both sums run over
    all tensors and steps. ``a_i`` is what :class:`~normopt.momentum.Recursive` takes for the weight of the newest
    gradient at step i.

    Args:
        a0: divides the sum of squared gradients, positive; the paper's 1.
        b0: divides the sum of squared averages, positive; the paper's 1.

    The sums are in every param group.
    """

    times: ClassVar[str] = "STORM+ rate"  # type: ignore[misc]
    reduces: ClassVar[str] = "entry"  # type: ignore[misc]
    a0: float = 1.0
    b0: float = 1.0

    def __post_init__(self) -> None:
        for name in ("a0", "b0"):
            check_range(self, name, getattr(self, name), 1e-300, float("inf"))

    def init_shared(self) -> dict[str, float]:
        return {"gradient_squares": 0.0, "average_squares": 0.0}

    def survey(self, state: dict[str, Tensor], context: Context, shared: Numbers) -> dict[str, Tensor]:
        return {"gradients": _square(context.g)}

    def measure(self, x: Tensor, d: Tensor, context: Context) -> dict[str, Tensor]:
        return {"averages": _square(x)}

    def conclude(self, sums: dict[str, Tensor], shared: Shared) -> Shared:
        if "gradients" in sums:
            past = shared["gradient_squares"]
            return {**shared, "a": self._a(past), "gradient_squares": past + sums["gradients"]}
        total = shared["average_squares"] + sums["averages"] / self._a(shared["gradient_squares"])
        factor = torch.where(total > 0, (total / self.b0) ** (-1 / 3), 0.0)
        return {**shared, "average_squares": total, "factor": factor}

    def _a(self, squares: Tensor) -> Tensor:
        return (1 + squares / self.a0) ** (-2 / 3)

    def length(self, x: Tensor, d: Tensor, context: Context, shared: Numbers) -> Rate:
        return context.rate * shared["factor"]


@dataclass(frozen=True)
class Relative(StepSize):
    """Adafactor's relative step size: ``min(lr, 1 / sqrt(step))`` times the root mean square of each matrix' weights.

    Weights smaller than ``eps`` count as ``eps`` (Shazeer & Stern, arXiv 1804.04235, section 8). Constraints see ``lr``
    itself.

    Args:
        eps: the least root mean square, not negative.
    """

    times: ClassVar[str] = "size of the weights"  # type: ignore[misc]
    reduces: ClassVar[str] = "all"  # type: ignore[misc]
    eps: float = 1e-3

    def __post_init__(self) -> None:
        check_range(self, "eps", self.eps, 0, float("inf"))

    def length(self, x: Tensor, d: Tensor, context: Context, shared: Numbers) -> Rate:
        entries = math.prod(context.w.shape[-2:])
        size = euclidean(context.w, axes(context.w), keepdim=True) / math.sqrt(max(entries, 1))
        limit, rate = context.step**-0.5, context.rate
        if isinstance(limit, Tensor):
            limit, rate = rate, limit
        return size.clamp_(min=self.eps) * (rate.clamp(max=limit) if isinstance(rate, Tensor) else min(rate, limit))


@dataclass(frozen=True)
class LearningRateFree(StepSize):
    """What :class:`Prodigy` and :class:`DAdaptation` share: the step is ``lr d radius`` with one ``d`` for all tensors.

    The learning rate is then a factor for schedules, 1 at its largest.
    """

    _abstract: ClassVar[bool] = True
    d0: float = 1e-6
    growth_rate: float = float("inf")
    radius: float = 1.0
    bias_correction: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name in ("d0", "radius"):
            check_range(self, name, getattr(self, name), 1e-300, float("inf"))
        check_range(self, "growth_rate", self.growth_rate, 1, float("inf"), closed=True)
        for beta in self.bias_correction or ():
            check_range(self, "bias_correction", beta, 0, 1)

    def check_composes(self, direction: Direction) -> None:
        """Raise a ``ValueError`` unless the dual norm can be measured."""
        probe = torch.ones(2, 2)
        direction.steepness(probe, direction.init_state(probe))

    def rate(self, lr: Rate, step: float, shared: Numbers) -> Rate:
        return shared["d"] * lr * self._correction(step)

    def _correction(self, step: float) -> float:
        if self.bias_correction is None:
            return 1.0
        beta1, beta2 = self.bias_correction
        return (1 - beta2**step) ** 0.5 / (1 - beta1**step)


@dataclass(frozen=True)
class Prodigy(LearningRateFree):
    """A learning rate found on the way, for any norm: ``d``, a lower bound of the distance to the solution.

    ``d <- max(d, d_coef sum <g, w_0 - w> / dual_norm(sum g))``, where both sums weight each gradient by ``lr d^2`` and
    forget at the rate ``beta3``, and run over all tensors. The step is ``lr d``; momentum and memory see ``d g`` in
    place of ``g``, so that their past keeps its scale while ``d`` grows. The norm matters only through its dual: with
    the largest-entry norm it is the l1 norm of Mishchenko & Defazio (arXiv 2306.06101), with the spectral norm the
    nuclear norm; with several norms it is the sum, the dual of their largest (Anthology, Prop. 7). Without averages and
    with ``beta3 = 0`` under sign descent it is the Anthology's escape-velocity rule (arXiv 2409.20325, section 3.3).

    Args:
        d0: the first estimate.
        growth_rate: the most that ``d`` may grow by in one step.
        radius: how far this tensor goes beside the others: the step is ``lr d radius``, the dual norm is ``radius``
            times as large, and distances are measured by the largest of all ``norm(w - w_0) / radius``.
        bias_correction: the betas of Adam whose correction ``sqrt(1 - beta2^step) / (1 - beta1^step)`` multiplies the
            step, or ``None``.
        beta3: weight of the past in both sums, in [0, 1).
        d_coef: factor on the estimate.
        safeguard_warmup: leave the learning rate and the bias correction out of the dual norm's sum, so that a small
            learning rate at the start does not inflate ``d``.
        slice_p: take both sums over every ``slice_p``-th entry of each tensor only, to save memory; for directions that
            work entry by entry.

    Memory: two more numbers for each parameter, over ``slice_p``. Cost: one dual norm a step; for the spectral norm one
    more polar factor. ``d`` is in every param group.
    """

    beta3: float = 0.999**0.5
    d_coef: float = 1.0
    safeguard_warmup: bool = False
    slice_p: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "beta3", self.beta3, 0, 1)
        check_range(self, "d_coef", self.d_coef, 1e-300, float("inf"))
        check_count(self, "slice_p", self.slice_p)

    def check_composes(self, direction: Direction) -> None:
        """Raise a ``ValueError`` unless the dual norm can be measured, on slices if need be."""
        super().check_composes(direction)
        if self.slice_p > 1 and direction.reduces != "entry":
            raise ValueError(f"slice_p: the dual norm of {direction} is no sum over entries, so it needs slice_p=1")

    @property
    def reduces(self) -> str:  # type: ignore[override]
        """``"entry"``, or ``"all"`` where each tensor is sliced."""
        return "entry" if self.slice_p == 1 else "all"

    def init_state(self, x: Tensor, weights: Callable[[], Tensor], direction: Stage) -> dict[str, Tensor]:
        initial = self._sliced(weights()).clone()
        return {"initial": initial, "gradient_sum": torch.zeros_like(initial)}

    def init_shared(self) -> dict[str, float]:
        return {"d": self.d0, "d_max": self.d0, "d_numerator": 0.0}

    def survey(self, state: dict[str, Tensor], context: Context, shared: Numbers) -> dict[str, Tensor]:
        g, w, d = self._sliced(context.g), self._sliced(context.w), shared["d"]
        # d / d0 in place of d keeps both sums away from underflow and cancels in their ratio.
        total = state["gradient_sum"].mul_(self.beta3)
        _add_scaled_(total, g, (d if self.safeguard_warmup else context.rate) * (d / self.d0))
        moved = (state["initial"] - w).flatten()
        progress = torch.dot(g.flatten(), moved.to(g.dtype)).to(double(g.device)) * (context.rate * (d / self.d0))
        return {"numerator": progress, "denominator": context.direction.steepness(total, state).sum() * self.radius}

    def conclude(self, sums: dict[str, Tensor], shared: Shared) -> Shared:
        numerator = self.beta3 * shared["d_numerator"] + sums["numerator"]
        estimate = torch.where(sums["denominator"] > 0, self.d_coef * numerator / sums["denominator"], shared["d"])
        largest = torch.maximum(shared["d_max"], estimate)
        d = torch.minimum(largest, shared["d"] * self.growth_rate)
        return {"d": d, "d_max": largest, "d_numerator": numerator, "previous": shared["d"]}

    def weigh(self, g: Tensor, context: Context, shared: Numbers) -> tuple[Tensor, Tensor]:
        context.scale = shared["d"]
        weighted = g * shared["previous"]
        return weighted, weighted

    def length(self, x: Tensor, d: Tensor, context: Context, shared: Numbers) -> Rate:
        return context.rate * self.radius

    def _sliced(self, x: Tensor) -> Tensor:
        return x if self.slice_p == 1 else x.flatten(-2)[..., :: self.slice_p]


def _add_scaled_(total: Tensor, x: Tensor, factor: Rate) -> None:
    """``total += factor x``; factors in tensors take the dtype of ``x``."""
    if isinstance(factor, Tensor):
        total.addcmul_(x, factor.to(x.dtype))
    else:
        total.add_(x, alpha=factor)


@dataclass(frozen=True)
class DAdaptation(LearningRateFree):
    """D-Adaptation, for any norm: like :class:`Prodigy`, with gradients weighted by ``d`` and not by its square.

    With ``s <- sqrt(beta) s + (1 - sqrt(beta)) rate g`` and the direction ``D`` with its memory as it stands,
    ``d <- max(d, r / ((1 - sqrt(beta)) dual_norm(s)))``, where ``r`` averages ``rate <g, D(s)>`` alike. Momentum sees
    ``rate g``, memory the gradient itself (Defazio & Mishchenko, arXiv 2301.07733, algorithm 5, as in the dadaptation
    package). A direction that ignores the length of ``s``, one without memory, says nothing of the way that has been
    gone: there ``w_0 - w`` stands for ``D(s) / (1 - sqrt(beta))``.

    Args:
        d0: the first estimate.
        growth_rate: the most that ``d`` may grow by in one step.
        radius: how far this tensor goes beside the others; see :class:`Prodigy`.
        bias_correction: see :class:`Prodigy`.
        beta: the square of the weight of the past in ``s`` and ``r``, in [0, 1).

    Memory: one more number for each parameter, two for directions without memory. Cost: one dual norm a step, and one
    more application of the direction where it has memory.
    """

    reduces: ClassVar[str] = "entry"  # type: ignore[misc]
    beta: float = 0.999

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "beta", self.beta, 0, 1)

    def check_composes(self, direction: Direction) -> None:
        """Raise a ``ValueError`` unless the dual norm can be measured, and averages of ``rate g`` have a meaning."""
        super().check_composes(direction)
        if direction.degree is None:
            raise ValueError(f"DAdaptation: {direction} is neither linear nor independent of length; use Prodigy")

    def init_state(self, x: Tensor, weights: Callable[[], Tensor], direction: Stage) -> dict[str, Tensor]:
        initial = {} if direction.degree else {"initial": weights().clone()}
        return {"gradient_sum": torch.zeros_like(x), **initial}

    def init_shared(self) -> dict[str, float]:
        return {"d": self.d0, "d_numerator": 0.0}

    def survey(self, state: dict[str, Tensor], context: Context, shared: Numbers) -> dict[str, Tensor]:
        total, keep, direction = state["gradient_sum"], self.beta**0.5, context.direction
        weighted = context.g * context.rate
        if direction.degree:
            progress = (weighted * direction.apply(total, state, context)).sum() * self.radius
        else:
            progress = (weighted * (state["initial"] - context.w)).sum() * (1 - keep)
        total.mul_(keep).add_(weighted, alpha=1 - keep)
        return {"numerator": progress, "denominator": direction.steepness(total, state).sum() * self.radius}

    def conclude(self, sums: dict[str, Tensor], shared: Shared) -> Shared:
        keep = self.beta**0.5
        numerator = keep * shared["d_numerator"] + (1 - keep) * sums["numerator"]
        estimate = numerator / ((1 - keep) * sums["denominator"])
        grown = torch.minimum(estimate, shared["d"] * self.growth_rate)
        d = torch.where(sums["denominator"] > 0, torch.maximum(shared["d"], grown), shared["d"])
        return {"d": d, "d_numerator": numerator}

    def weigh(self, g: Tensor, context: Context, shared: Numbers) -> tuple[Tensor, Tensor]:
        return g * context.rate, g

    def length(self, x: Tensor, d: Tensor, context: Context, shared: Numbers) -> Rate:
        if not context.direction.degree:
            return context.rate * self.radius
        # The average has the rate in it; at rate 0 nothing moves all the same.
        rate = context.rate
        return (torch.sign(rate) if isinstance(rate, Tensor) else float(rate > 0)) * self.radius
