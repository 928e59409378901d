"""Small matrices, their gradients and comparisons to the bit: what the probes are made of."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Make = Callable[..., Optimizer]
Probe = Callable[[Make], bool | float]

SHAPES = ((6, 4), (4, 6))


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Two small matrices, the same every time."""
    noise = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=noise).div(100).to(dtype)) for shape in SHAPES]


def set_gradients(params: Sequence[Tensor], seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> None:
    """Give all parameters the gradients of that seed, rounded to `dtype` and times `scale`."""
    noise = torch.Generator().manual_seed(seed + 1000)
    for p in params:
        p.grad = torch.randn(p.shape, generator=noise).to(dtype).mul(scale).to(p.dtype)


def take_steps(optimizer: Optimizer, params: Sequence[Tensor], count: int, first: int = 0) -> None:
    """Take steps with fixed gradients, which depend on the number of the step, from `first` on."""
    for i in range(first, first + count):
        set_gradients(params, i)
        optimizer.step()


def values(params: Sequence[Tensor]) -> list[Tensor]:
    """Copies of the weights."""
    return [p.detach().clone() for p in params]


def is_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all entries are finite."""
    return all(bool(x.isfinite().all()) for x in tensors)


def same(a: Any, b: Any) -> bool:
    """Whether nested dicts, lists and tensors are equal to the bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)
