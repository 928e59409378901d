"""Published rules, written out for one tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from normopt import SteepestDescent

FLOAT32 = {"orthogonalize": "newton-schulz", "orthogonalize_dtype": None}
EXACT = {"orthogonalize": "exact", "orthogonalize_dtype": None}
State = dict[str, Tensor]


class Written(Optimizer):
    """``w <- (1 - lr decay) w - update(g, state, step)`` for each tensor by itself."""

    def __init__(self, params: Any, update: Callable[[Tensor, State, int], Tensor], decay: float = 0.0) -> None:
        super().__init__(params, {"update": update, "decay": decay})
        self.steps = 0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                change = group["update"](p.grad, self.state[p], self.steps)
                p.mul_(1 - group["decay"]).sub_(change)


def average(g: Tensor, state: State, beta: float, nesterov: bool) -> Tensor:
    m = state.setdefault("m", torch.zeros_like(g))
    m.mul_(beta).add_((1 - beta) * g)
    return beta * m + (1 - beta) * g if nesterov else m


def newton_schulz(g: Tensor, steps: int = 5) -> Tensor:
    x = (g.mT if g.shape[0] > g.shape[1] else g) / g.norm()
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if g.shape[0] > g.shape[1] else x


def polar(g: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    return u @ vh


def rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def single(make: Callable[..., SteepestDescent], g: Tensor, **options: Any) -> Tensor:
    """The update ``(w before - w after) / lr`` of the first step."""
    w = nn.Parameter(torch.zeros_like(g))
    optimizer = make([w], lr=1.0, **options)
    w.grad = g.clone()
    optimizer.step()
    return -w.detach()


def gaussian(m: int, n: int) -> Tensor:
    return torch.randn(m, n, dtype=torch.float64)
