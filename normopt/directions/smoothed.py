"""A norm with memory: the EMA of second moments in place of the gradient's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from normopt.directions.turns import due, in_turn
from normopt.ingredient.base import Option
from normopt.ingredient.registry import read
from normopt.ingredient.stage import SECOND_MOMENT, Context, Direction
from normopt.ingredient.traits import like
from normopt.ingredient.validate import check_choice, check_count, check_range
from normopt.norms.base import Norm

ACCUMULATE = ("ema", "sum", "max")

#: The state that roots are computed from.
_READ = {"second_moment", "max_second_moment", "mean"}

EPS_AT = ("corrected", "raw", "moment")

#: Rounding errors of new roots do not make them count as stale.
MARGIN = 1.001


@dataclass(frozen=True)
class Smoothed(Direction):
    """The EMA of second moments: ``norm.whiten`` by an average over steps, as in Adam and Shampoo.

    ``s <- beta s + (1 - beta) second_moment(g)``, then ``whiten(x, s / (1 - beta^step), eps)``. ``Smoothed(Max())`` is
    Adam's and RMSprop's denominator (optax's ``scale_by_rms``), ``Smoothed(Spectral())`` Shampoo's preconditioner,
    ``Smoothed(Euclidean())`` NovoGrad's. With ``beta=0`` and ``eps=0`` it is the norm's duality map.

    Args:
        norm: the norm, with a second moment, or its name.
        beta: decay rate of the average, in [0, 1); not used by ``accumulate="sum"``.
        eps: added to the root of the second moment; under the spectral norm to the diagonal of the second moment
            itself, as in Shampoo. It is multiplied by the factor that a step size gives to gradients (Prodigy).
        bias_correction: divide by ``1 - beta^step``.
        accumulate: ``"ema"``; ``"sum"`` over all steps (Adagrad, the Shampoo of arXiv 1802.09568); or ``"max"``,
            ``sqrt(s) <- max(beta sqrt(s), sqrt(second_moment(g)) + eps)`` (Adamax, arXiv 1412.6980, section 7.1). Sum
            and maximum have no bias to correct.
        initial: first value of every entry of the second moment; ``"first"``: the first gradient's second moment,
            without bias correction (NovoGrad).
        maximum: divide by the largest second moment so far, before the bias correction (AMSGrad as in torch.optim).
        centered: subtract the second moment of the average gradient (RMSprop's variance).
        eps_at: where ``eps`` is added: to the root, after the bias correction (``"corrected"``) or before it
            (``"raw"``, SOAP), or to the second moment under the root (``"moment"``, DASGO).
        frequency: compute the roots at the first step and at every multiple of this step, and keep them as state in
            between; for the spectral norm, whose roots are expensive. A matrix whose kept roots make its gradient
            longer than new roots can, sqrt(1 / (1 - beta)) times the duality map at most (once, for a sum), or 0, gets
            new ones at once: the directions in which the gradient is large were small when the roots were computed.
            So steps are as bounded as with 1. Directions that a root leaves out, see
            :func:`normopt.numerics.eigen.matrix_power`, wait for the next.
        staggered: give each matrix a step of its own for new roots, spread over the ``frequency`` steps.

    Raises:
        ValueError: the norm has no second moment, a number is out of range, or options exclude each other.
    """

    sees_weights = False
    reduces = like("norm")
    needs_matrix = like("norm")
    takes_vectors = like("norm", "remembers_vectors")
    rotation_invariant = like("norm")
    squares = True
    norm: Norm
    beta: float = 0.999
    eps: float = 1e-8
    bias_correction: bool = True
    accumulate: str = "ema"
    initial: float | str = 0.0
    maximum: bool = False
    centered: bool = False
    eps_at: str = "corrected"
    frequency: int = 1
    staggered: bool = True

    def __post_init__(self) -> None:
        read(self, "norm", Norm)
        check_range(self, "beta", self.beta, 0, 1, closed=self.accumulate == "sum")
        check_range(self, "eps", self.eps, 0, float("inf"))
        check_count(self, "frequency", self.frequency)
        check_choice(self, "accumulate", self.accumulate, ACCUMULATE)
        check_choice(self, "eps_at", self.eps_at, EPS_AT)
        if self.initial != "first":
            check_range(self, "initial", self.initial, 0, float("inf"))
        if not self.norm.has_memory:
            raise ValueError(f"Smoothed: {self.norm} has no second moment to remember")
        of_matrices = f"Smoothed: the second moments of {self.norm} are matrices"
        if self.norm.matrix_memory and (self.maximum is True or self.accumulate == "max"):
            raise ValueError(f"{of_matrices}, of which none is the largest")
        if self.norm.matrix_memory and self.initial not in (0.0, "first"):
            raise ValueError(f"{of_matrices}; they start from 0 or from the first one")
        if not self.norm.matrix_memory and not isinstance(self.frequency, Option) and self.frequency > 1:
            raise ValueError(f"Smoothed: frequency is for norms whose second moments are matrices, not for {self.norm}")
        if self.accumulate == "max" and (self.maximum is True or self.centered is True or self.initial):
            raise ValueError("Smoothed: accumulate='max' starts from 0 and is neither centered nor a maximum besides")

    @property
    def cell(self) -> tuple[str, str]:
        """The norm's row of the periodic table, in the column of second moments."""
        return self.norm.cell[0], SECOND_MOMENT

    def init_state(self, x: Tensor) -> dict[str, Tensor]:
        stats = self.norm.second_moment(x)
        start = 0.0 if isinstance(self.initial, str) else self.initial
        state = {f"second_moment{i or ''}": torch.full_like(s, start) for i, s in enumerate(stats)}
        if self.frequency > 1:
            state |= {f"root{i or ''}": torch.zeros_like(s) for i, s in enumerate(stats)}
        if self.maximum:
            state |= {f"max_second_moment{i or ''}": torch.full_like(s, start) for i, s in enumerate(stats)}
        return state | ({"mean": torch.zeros_like(x)} if self.centered else {})

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        self._remember(context.g, state, context)
        if self.frequency > 1:
            self._refresh(state, context)
        return self.apply(x, state, context)

    @property
    def averages(self) -> frozenset[str]:
        plain = self.accumulate == "ema" and not (self.centered or self.maximum or self.norm.matrix_memory)
        return frozenset({"second_moment"} if plain else ())

    @property
    def decides_on_host(self) -> bool:
        return self.frequency > 1 or self.initial == "first" or self.norm.matrix_memory

    def apply(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        kept = _named(state, "root")
        roots = kept or self._roots(state, context)
        d = self.norm.divide(x, roots, out=None if kept else roots[0])
        # (s / c^2)^(-1/2) = c s^(-1/2), so the result is multiplied by c; matrices were divided by c^2 in _roots.
        correction = 1.0 if self.norm.matrix_memory else self._correction(context.step)
        return d if isinstance(correction, float) and correction == 1.0 else d.mul_(correction)

    def _refresh(self, state: dict[str, Tensor], context: Context) -> None:
        """Recompute the kept roots: each every ``frequency`` steps, in between those that do not fit ``g``.

        New roots are those of statistics that are at least ``add / correction^2`` times the second moment of ``g``, so
        they make ``g`` at most ``correction / sqrt(add)`` times as long as its duality map: the inverse roots are
        operator-monotone. Roots for which that holds at every step bound averages of gradients alike.
        """
        kept, mask = _named(state, "root"), due(context, context.g.shape, self.frequency, self.staggered)
        if not bool(mask.all()):
            add = 1.0 if self.accumulate == "sum" else 1 - self.beta
            longest = MARGIN * self._correction(context.step) / add**0.5
            mask |= (self.norm.unit_lengthening(context.g, kept) > longest).cpu()
        read = {name: x for name, x in state.items() if name.rstrip("0123456789") in _READ}

        def refresh(*tensors: Tensor) -> None:
            part = dict(zip(read, tensors, strict=False))
            for root, new in zip(tensors[len(read) :], self._roots(part, context), strict=True):
                root.copy_(new)

        in_turn(mask, refresh, *read.values(), *kept)

    def _remember(self, g: Tensor, state: dict[str, Tensor], context: Context) -> None:
        stats = _named(state, "second_moment")
        if self.accumulate == "max":
            for s, new in zip(stats, self.norm.second_moment(g), strict=True):
                torch.maximum(s.mul_(self.beta**2), new.sqrt_().add_(self.eps * context.scale).square_(), out=s)
            return
        keep, add = (1.0, 1.0) if self.accumulate == "sum" else (self.beta, 1 - self.beta)
        if self.initial == "first" and context.step == 1:
            keep, add = 0.0, 1.0
        self.norm.remember_(stats, g, keep, add)
        for s, largest in zip(stats, _named(state, "max_second_moment"), strict=False):
            torch.maximum(s, largest, out=largest)
        if self.centered:
            state["mean"].mul_(keep).add_(g, alpha=add)

    def _correction(self, step: float) -> float:
        """The root of the bias correction, ``sqrt(1 - beta^step)``; 1 if there is none."""
        plain = not self.bias_correction or self.accumulate != "ema" or self.initial == "first"
        return 1.0 if plain else (1 - self.beta**step) ** 0.5

    def _roots(self, state: dict[str, Tensor], context: Context) -> tuple[Tensor, ...]:
        """The roots of the second moments plus eps; bias-corrected only if the moments are matrices (see ``apply``)."""
        stats = _named(state, "max_second_moment" if self.maximum else "second_moment")
        if self.centered:
            means = self.norm.second_moment(state["mean"])
            stats = tuple(s - mean for s, mean in zip(stats, means, strict=True))
            stats = stats if self.norm.matrix_memory else tuple(s.clamp_(min=0.0) for s in stats)
        correction = self._correction(context.step)
        unit = context.scale if self.eps_at == "raw" else context.scale * correction
        if self.norm.matrix_memory and correction != 1.0:
            stats, unit = tuple(s / correction**2 for s in stats), unit / correction
        inside = self.eps_at == "moment" or self.norm.matrix_memory
        eps = 0.0 if self.accumulate == "max" or not self.eps else self.eps * unit ** (2 if inside else 1)
        if inside and not self.norm.matrix_memory:
            stats, eps = tuple(s + eps for s in stats), 0.0
        return self.norm.unit_roots(stats, eps)

    def rms(self, shape: tuple[int, ...]) -> float:
        """The norm's root mean square: the size of a step whose gradient is as large as the gradients before it."""
        return self.norm.rms(shape)

    def steepness(self, g: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """The norm's steepness."""
        return self.norm.steepness(g, state)


def _named(state: Mapping[str, Tensor], name: str) -> tuple[Tensor, ...]:
    """The tensors named ``name``, ``name1``, ``name2`` ... in ``state``."""
    return tuple(tensor for key, tensor in state.items() if key.rstrip("0123456789") == name)
