"""Muon++: directions orthogonal to the leading singular vectors of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from normopt.ingredient.registry import read
from normopt.ingredient.stage import Context, Direction
from normopt.ingredient.traits import like
from normopt.ingredient.validate import check_count
from normopt.norms.base import Norm
from normopt.norms.spectral import Spectral
from normopt.numerics.lengths import euclidean, normalized


@dataclass(frozen=True)
class Complement(Direction):
    """Muon++: a norm's direction that leaves the weights' largest singular values, and their vectors, unchanged.

    ``P(dualize(P(x)))`` with ``P(x) = (I - U U^T) x (I - V V^T)``, where ``U`` and ``V`` are the first ``protect`` left
    and right singular vectors of the weights (arXiv 2601.01306). The second projection removes rounding errors along
    the protected vectors, which a polar iteration magnifies. Where ``P(x)`` is no more than rounding errors, the result
    is 0.

    Args:
        norm: a norm that is the same in every basis, or its name.
        protect: number of singular vectors; ``min(out, in) - 1`` at most are protected, none of a matrix with one row
            or column.
        iterations: number of block power iterations a step, from the last step's vectors: ``4 out in protect`` FLOPs
            each, and a small QR decomposition. ``None``, and at the first step: a singular value decomposition of the
            weights, exact, and several times as expensive as a polar factor.

    Memory: ``(out + in) protect`` numbers for each matrix.

    Raises:
        ValueError: the norm changes with the basis, or a number is out of range.
    """

    cell = like("norm")
    degree = like("norm")
    needs_matrix = True
    decides_on_host = True
    norm: Norm = Spectral()
    protect: int = 1
    iterations: int | None = None

    def __post_init__(self) -> None:
        read(self, "norm", Norm)
        check_count(self, "protect", self.protect)
        if self.iterations is not None:
            check_count(self, "iterations", self.iterations)
        if not self.norm.rotation_invariant:
            raise ValueError(f"Complement: {self.norm} changes with the basis, and would leave the complement")

    def init_state(self, x: Tensor) -> dict[str, Tensor]:
        m, n = x.shape[-2:]
        k = max(min(self.protect, m - 1, n - 1), 0)
        return {"left": x.new_zeros(*x.shape[:-1], k), "right": x.new_zeros(*x.shape[:-2], n, k)}

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        if state["left"].numel():
            warm = self.iterations is not None and context.step > 1
            left, right = _leading(context.w, state["right"], self.iterations if warm else None)
            state["left"].copy_(left)
            state["right"].copy_(right)
        return self.apply(x, state, context)

    def apply(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        inside = _projected(x, state)
        size, noise = euclidean(inside, (-2, -1), keepdim=True), euclidean(x, (-2, -1), keepdim=True)
        noise = noise * (torch.finfo(x.dtype).eps * max(x.shape[-2:]) ** 0.5)
        return _projected(self.norm.dualize(torch.where(size > noise, inside, 0.0)), state)

    def rms(self, shape: tuple[int, ...]) -> float:
        """The norm's root mean square, a slight overestimate: the protected part is missing."""
        return self.norm.rms(shape)

    def steepness(self, g: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """The norm's steepness of the projected gradient."""
        return self.norm.steepness(_projected(g, state), state)


def _projected(x: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """``P(x)``."""
    left, right = state["left"], state["right"]
    x = x - left @ (left.mT @ x)
    return x - (x @ right) @ right.mT


def _leading(w: Tensor, right: Tensor, iterations: int | None) -> tuple[Tensor, Tensor]:
    """The first singular vectors of ``w``, as many as ``right`` has columns; 0 where the singular value is 0."""
    k, w = right.shape[-1], normalized(w)
    if iterations is None:
        left, values, right = torch.linalg.svd(w, full_matrices=False)
        right = right.mT
    else:
        for _ in range(iterations):
            right = torch.linalg.qr(w.mT @ (w @ right)).Q
        left, values, turn = torch.linalg.svd(w @ right, full_matrices=False)
        right = right @ turn.mT
    known = values[..., None, :k] > 0
    return left[..., :k] * known, right[..., :k] * known
