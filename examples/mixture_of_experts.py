"""A mixture of experts whose experts are one tensor with three dimensions: one matrix, and one polar factor, an expert.

The module says so itself, by ``normopt_roles`` and ``normopt_views``. In a module whose name says that it holds experts
the library finds it out by itself.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normopt

torch.manual_seed(0)


class Mixture(nn.Module):
    """The best of several small MLPs for each input, chosen by a router."""

    normopt_roles: ClassVar = {"up": "linear", "down": "linear"}
    normopt_views: ClassVar = {"up": {"flatten": False}, "down": {"flatten": False}}

    def __init__(self, width: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, hidden, width) / width**0.5)
        self.down = nn.Parameter(torch.randn(experts, width, hidden) / hidden**0.5)

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.router(x).softmax(dim=-1).max(dim=-1)
        hidden = torch.einsum("nhw,nw->nh", self.up[chosen], x).relu()
        return x + weight[:, None] * torch.einsum("nwh,nh->nw", self.down[chosen], hidden)


model = nn.Sequential(nn.Linear(8, 32), Mixture(32, 64, experts=4), nn.Linear(32, 1))
optimizer = normopt.create("muon", model, lr=0.02)
print(normopt.describe(optimizer))

losses = []
for _ in range(300):
    x = torch.randn(256, 8)
    y = (x[:, :1] * x[:, 1:2]).sin() + x[:, 2:3].abs()  # no linear model comes below 0.5
    loss = F.mse_loss(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} at first, {sum(losses[-20:]) / 20:.3f} at the end")
assert sum(losses[-20:]) / 20 < 0.3
