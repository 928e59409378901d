"""Running an optimizer and its reference side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from normopt import zoo

Make = Callable[[list[Tensor]], Optimizer]
STEPS = 30
#: Wide, tall and square.
MATRICES: list[tuple[int, ...]] = [(6, 10), (10, 6), (8, 8)]
#: Those and a vector.
SHAPES: list[tuple[int, ...]] = [*MATRICES, (7,)]


def case(name: str, reference: Any = None, **options: Any) -> Any:
    """The same arguments for the class of that name in the zoo and in torch.optim (or in ``reference``)."""
    options = dict(options)
    ours = getattr(zoo, name)
    theirs = reference or getattr(torch.optim, name)
    label = "-".join([name, *(f"{k}={v}" for k, v in options.items())])
    return pytest.param(lambda p: ours(p, **options), lambda p: theirs(p, **options), id=label)


def gradients(weights: list[Tensor], seed: int) -> Iterator[list[Tensor]]:
    """Noisy gradients of 0.5 ||w - target||^2 at the reference's weights, the same for both optimizers."""
    noise = torch.Generator().manual_seed(seed)
    targets = [torch.randn(w.shape, generator=noise) for w in weights]
    while True:
        noises = [0.5 * torch.randn(w.shape, generator=noise) for w in weights]
        yield [w.detach() - target + n for w, target, n in zip(weights, targets, noises, strict=True)]


def assert_same_path(
    ours: Make,
    reference: Make,
    shapes: list[tuple[int, ...]],
    tolerance: float,
    steps: int = STEPS,
    seed: int = 0,
    scale: float = 1.0,
    share: Callable[[Optimizer, Optimizer, int], None] | None = None,
) -> None:
    """Run both on the same gradients: they never differ by more than ``tolerance`` times the distance travelled.

    After each step (with its number, from 1), ``share`` may give ours what the reference was free to choose.
    """
    start = torch.Generator().manual_seed(seed + 1)
    initial = [torch.randn(shape, generator=start) for shape in shapes]
    a, b = ([torch.nn.Parameter(w.clone()) for w in initial] for _ in range(2))
    first, second = ours(a), reference(b)
    travelled, worst = torch.zeros(len(initial)), torch.zeros(len(initial))
    stream = gradients(b, seed)
    for step in range(1, steps + 1):
        for i, g in enumerate(next(stream)):
            a[i].grad, b[i].grad = scale * g, scale * g
        before = [w.detach().clone() for w in b]
        first.step()
        second.step()
        if share is not None:
            share(first, second, step)
        travelled += largest(b, before)
        worst = worst.maximum(largest(a, b))
    assert (travelled > 0).all(), "the reference did not move"
    assert (worst <= tolerance * travelled).all(), f"differs by {worst / travelled} of the distance travelled"


def largest(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """The largest difference of each pair."""
    return torch.stack([(x - y).detach().abs().max() for x, y in zip(a, b, strict=True)])


def as_model(params: list[Tensor]) -> nn.Module:
    """A model of linear layers, convolutions, vectors and scalars with these parameters."""
    model = nn.Module()
    for i, p in enumerate(params):
        layer = {2: nn.Linear(1, 1, bias=False), 3: nn.Conv1d(1, 1, 1, bias=False)}.get(p.ndim)
        if layer is None:
            model.register_parameter(f"vector{i}", p)
        else:
            layer.weight = p
            model.add_module(f"layer{i}", layer)
    return model
