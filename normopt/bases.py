"""In which coordinates? Orthonormal bases of rows and columns, learnt from the gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from normopt.host import host_may_look
from normopt.ingredient import Context, Ingredient, check_count, check_range
from normopt.norms.schatten import eigh


class Basis(Ingredient):
    """Orthonormal coordinates ``x -> L^T x R`` for :class:`~normopt.directions.Rotated`."""

    #: Whether the first gradient only prepares the basis and moves nothing.
    looks_first: ClassVar[bool] = False

    def init_state(self, x: Tensor) -> dict[str, Tensor]:
        """The state before the first gradient, for a batch ``x`` of shape ``(..., out, in)``."""
        raise NotImplementedError

    def look(self, g: Tensor, state: dict[str, Tensor]) -> None:
        """Prepare the basis from the first gradient; only called if ``looks_first``."""

    def rotate(self, x: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """``L^T x R``, a new tensor or ``x`` itself."""
        raise NotImplementedError

    def unrotate(self, x: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """``L x R^T``."""
        raise NotImplementedError

    def learn(self, g: Tensor, state: dict[str, Tensor], context: Context, memory: Sequence[Tensor]) -> None:
        """Change the basis after a step, for the next one; ``memory`` are tensors in its coordinates, shape
        ``(..., out or 1, in or 1)``, to be reordered in place where the new basis has another order.
        """


@dataclass(frozen=True)
class Eigenbasis(Basis):
    """The eigenvectors of averages of ``g g^T`` and ``g^T g``, followed by one step of power iteration at a time.

    The first gradient only builds the bases, from its own eigendecompositions. Then, after each step, ``S <- beta S +
    (1 - beta) g g^T``; every ``frequency`` steps the basis is sorted by its Rayleigh quotients, the largest first, and
    replaced by the orthonormal factor ``Q`` of ``S Q`` (SOAP, arXiv 2409.11321). Statistics and bases are kept in
    float32 or better; gradients whose squares overflow are not learnt from.

    Args:
        beta: weight of the past in the averages, in [0, 1).
        frequency: steps from one change of basis to the next.
        max_dim: longer sides are not rotated.
        vectors: rotate vectors too, matrices with a single row or column among them.
    """

    looks_first: ClassVar[bool] = True
    decides_on_host: ClassVar[bool] = True
    beta: float = 0.95
    frequency: int = 10
    max_dim: int = 10000
    vectors: bool = False

    def __post_init__(self) -> None:
        check_range(self, "beta", self.beta, 0, 1)
        check_count(self, "frequency", self.frequency)
        check_count(self, "max_dim", self.max_dim)

    def _sides(self, x: Tensor) -> list[str]:
        m, n = x.shape[-2:]
        if min(m, n) == 1 and not self.vectors:
            return []
        return [side for side, size in (("left", m), ("right", n)) if 1 < size <= self.max_dim]

    def init_state(self, x: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for side in self._sides(x):
            gram = gram_matrix(x, side)
            state |= {f"{side}_gram": torch.zeros_like(gram), f"{side}_basis": torch.zeros_like(gram)}
        return state

    def look(self, g: Tensor, state: dict[str, Tensor]) -> None:
        for side in self._sides(g):
            gram = average_(state[f"{side}_gram"], gram_matrix(g, side), self.beta)
            state[f"{side}_basis"].copy_(eigh(gram)[1].flip(-1))

    def rotate(self, x: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        left, right = state.get("left_basis"), state.get("right_basis")
        x = x if left is None else left.mT @ x
        return x if right is None else x @ right

    def unrotate(self, x: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        left, right = state.get("left_basis"), state.get("right_basis")
        x = x if left is None else left @ x
        return x if right is None else x @ right.mT

    def learn(self, g: Tensor, state: dict[str, Tensor], context: Context, memory: Sequence[Tensor]) -> None:
        for side in self._sides(g):
            gram = average_(state[f"{side}_gram"], gram_matrix(g, side), self.beta)
            if context.step % self.frequency == 0:
                order = power_iteration_(state[f"{side}_basis"], gram)
                for tensor in memory:
                    reorder_(tensor, order, side)


def gram_matrix(g: Tensor, side: str) -> Tensor:
    """``g g^T`` for ``side="left"``, ``g^T g`` for ``"right"``."""
    return g @ g.mT if side == "left" else g.mT @ g


def average_(old: Tensor, new: Tensor, beta: float) -> Tensor:
    """``old <- beta old + (1 - beta) new`` in place, for those matrices of ``new`` whose entries have a finite sum."""
    finite = new.sum(dim=(-2, -1), keepdim=True).isfinite()
    all_are = host_may_look(finite) and bool(finite.all())
    return old.lerp_(new if all_are else torch.where(finite, new, old), 1 - beta)


def power_iteration_(basis: Tensor, gram: Tensor, ordered: bool = True) -> Tensor:
    """Replace ``basis`` by the orthonormal factor of ``gram @ basis``, its columns sorted by their Rayleigh quotients.

    Args:
        basis: orthonormal columns, shape ``(..., n, n)``, modified.
        gram: symmetric positive semidefinite matrices of the same shape.
        ordered: whether to sort.

    Returns:
        The order of the old columns, shape ``(..., n)``: the largest first, or as they are.
    """
    largest = gram.abs().amax(dim=(-2, -1), keepdim=True)
    product = (gram / torch.where(largest == 0, 1.0, largest)) @ basis
    order = torch.arange(basis.shape[-1], device=basis.device).expand(basis.shape[:-1])
    if ordered:
        order = (basis * product).sum(dim=-2).argsort(dim=-1, descending=True, stable=True)
        product = _ordered(product, order, "right")
    q = torch.linalg.qr(product)[0]
    finite = q.sum(dim=(-2, -1), keepdim=True).isfinite()
    basis.copy_(torch.where(finite, q, _ordered(basis, order, "right")))
    return order


def reorder_(x: Tensor, order: Tensor, side: str) -> None:
    """Put the rows (``side="left"``) or columns of ``x`` in ``order``, in place, where it has that many."""
    if x.shape[-2 if side == "left" else -1] == order.shape[-1]:
        x.copy_(_ordered(x, order, side))


def _ordered(x: Tensor, order: Tensor, side: str) -> Tensor:
    """The rows or columns of ``x`` in ``order``; torch's take_along_dim also looks for negative numbers in it."""
    along, across = (-2, -1) if side == "left" else (-1, -2)
    return x.gather(along, order.unsqueeze(across).expand(x.shape))
