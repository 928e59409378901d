"""A model whose modules declare bounds."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from normopt import SteepestDescent


def noise(size: tuple[int, ...], seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Layer(nn.Module):
    normopt_bounds: ClassVar[dict[str, str]] = {"up.weight": "RowBound(radius=1.0)", "down.weight": "Sphere(axis=-2)"}

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 8)
        self.down = nn.Linear(8, 6, bias=False)


class Net(nn.Module):
    """Rows of the embedding and of the head are bounded, as they are stored; `free` and the biases are not."""

    normopt_bounds: ClassVar[dict[str, str]] = {"embed.weight": "RowBound()", "head.weight": "RowBound(0.5)"}

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.free = nn.Linear(6, 6)
        self.layer = Layer()
        self.head = nn.Linear(6, 11, bias=False)
        with torch.no_grad():
            for name, (axis, radius, _) in BOUNDS.items():
                w = self.get_parameter(name)
                w.mul_(radius / w.norm(dim=axis, keepdim=True))

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.free(self.embed(tokens))
        return self.head(h + self.layer.down(self.layer.up(h).relu()))

    def loss(self) -> Tensor:
        tokens = torch.arange(22).reshape(2, 11) % 11
        return nn.functional.cross_entropy(self(tokens).flatten(0, 1), tokens.flatten())


#: Axis of the stored tensor, radius, and whether shorter rows are allowed.
BOUNDS = {
    "embed.weight": (1, 1.0, True),
    "head.weight": (1, 0.5, True),
    "layer.up.weight": (1, 1.0, True),
    "layer.down.weight": (0, 1.0, False),
}


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def closure(model: nn.Module, optimizer: SteepestDescent) -> Tensor:
    optimizer.zero_grad()
    loss = model.loss()  # type: ignore[operator]
    loss.backward()
    return loss  # type: ignore[no-any-return]
