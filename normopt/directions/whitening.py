"""KL-Shampoo: gradients whitened from both sides."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from normopt.directions.base import UnitRMS
from normopt.directions.turns import due, in_turn
from normopt.ingredient.stage import Context
from normopt.ingredient.validate import check_count, check_range
from normopt.numerics.eigen import average_, eigh, gram_matrix, power_iteration_

#: Inverse roots of a factor's eigenvalues are at most the factor's size, which is clamped to this interval.
LARGEST_ROOTS = (10, 4000)


@dataclass(frozen=True)
class KLWhitened(UnitRMS):
    """KL-Shampoo: ``L^(-1/2) x R^(-1/2)``, where each factor averages gradients whitened by the other factor.

    ``L <- beta L + (1 - beta) g R^-1 g^T / in`` and ``R <- beta R + (1 - beta) g^T L^-1 g / out``: the Kronecker
    factors nearest to the gradients' covariance in Kullback-Leibler divergence (arXiv 2509.03378). At a fixed point the
    result ``u`` has ``mean(u u^T) / in = 1`` and ``mean(u^T u) / out = 1``.

    The inverse roots are computed from estimated eigenvalues in an orthonormal basis of each factor. The first gradient
    only initializes the bases, by its own eigendecompositions. Each step uses the factors of the previous step, then
    updates the averages of the eigenvalues in these bases, and of the factors; every ``frequency`` steps a basis
    becomes the orthonormal factor ``Q`` of ``L Q``. All of them are kept in float32 or better, in units of the
    gradients before a step size scales them; gradients whose squares overflow are left out of the averages.

    Args:
        beta: decay rate of the averages, in [0, 1).
        eps: added to the roots of the products of eigenvalues.
        frequency: number of steps between updates of the bases.
        init_factor: first value of all eigenvalues.
        staggered: give each matrix a step of its own for the update of its bases, spread over the ``frequency`` steps.
    """

    sees_weights = False
    needs_matrix = True
    looks_first = True
    decides_on_host = True
    beta: float = 0.98
    eps: float = 1e-8
    frequency: int = 10
    init_factor: float = 0.1
    staggered: bool = True

    def __post_init__(self) -> None:
        check_range(self, "beta", self.beta, 0, 1)
        check_range(self, "eps", self.eps, 0, float("inf"))
        check_range(self, "init_factor", self.init_factor, 1e-300, float("inf"))
        check_count(self, "frequency", self.frequency)

    def init_state(self, x: Tensor) -> dict[str, Tensor]:
        left, right = gram_matrix(x, "left"), gram_matrix(x, "right")
        return {
            "left_gram": left.new_zeros(left.shape),
            "right_gram": right.new_zeros(right.shape),
            "left_basis": left.new_zeros(left.shape),
            "right_basis": right.new_zeros(right.shape),
            "left_eigenvalues": x.new_full((*x.shape[:-1], 1), self.init_factor),
            "right_eigenvalues": x.new_full((*x.shape[:-2], 1, x.shape[-1]), self.init_factor),
        }

    def look(self, g: Tensor, state: dict[str, Tensor]) -> None:
        for side, others in ("left", g.shape[-1]), ("right", g.shape[-2]):
            average_(state[f"{side}_gram"], gram_matrix(g, side) / others, self.beta)
            state[f"{side}_basis"].copy_(eigh(state[f"{side}_gram"])[1].flip(-1))

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        d = self.apply(x, state, context)
        self._learn(context.unscaled(context.g), state)
        mask = due(context, x.shape, self.frequency, self.staggered)
        for side in "left", "right":
            in_turn(mask, _turn, state[f"{side}_basis"], state[f"{side}_gram"])
        return d

    def apply(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        left, right = state["left_basis"], state["right_basis"]
        roots = state["left_eigenvalues"].sqrt() * state["right_eigenvalues"].sqrt()
        whitened = (left.mT @ context.unscaled(x) @ right).div_(roots.add_(self.eps))
        return left @ whitened @ right.mT

    def _learn(self, g: Tensor, state: dict[str, Tensor]) -> None:
        m, n = g.shape[-2:]
        left, right = state["left_eigenvalues"], state["right_eigenvalues"]
        from_right = g @ state["right_basis"]
        both = (state["left_basis"].mT @ from_right).square_()
        rows, columns = (both / right).mean(dim=-1, keepdim=True), (both / left).mean(dim=-2, keepdim=True)
        from_right /= right.sqrt()
        from_left = (state["left_basis"].mT @ g).div_(left.sqrt())
        average_(state["left_gram"], gram_matrix(from_right, "left") / n, self.beta)
        average_(state["right_gram"], gram_matrix(from_left, "right") / m, self.beta)
        average_(left, rows, self.beta).clamp_(min=_least(m))
        average_(right, columns, self.beta).clamp_(min=_least(n))


def _turn(basis: Tensor, gram: Tensor) -> None:
    power_iteration_(basis, gram, ordered=False)


def _least(size: int) -> float:
    """The smallest eigenvalue that a factor of this size may have."""
    low, high = LARGEST_ROOTS
    return float(max(low, min(size, high))) ** -2
