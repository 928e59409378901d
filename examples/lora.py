"""Fine-tuning with adapters of low rank on frozen layers, by AdamW and by Muon.

A network is trained on one task, then frozen; adapters learn a second task. Frozen parameters belong to the optimizer,
take no memory and do not move; ``describe`` marks them.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normopt

torch.manual_seed(0)
tasks = [torch.randn(16, 4) for _ in range(2)]
tasks[1] = tasks[0] + 0.5 * tasks[1]


class Adapted(nn.Module):
    """A frozen layer and a trained correction of rank ``rank``, 0 at first."""

    def __init__(self, layer: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, task: Tensor, steps: int) -> float:
    """Regress ``tanh(x task)``; returns the mean loss of the last ten steps."""
    losses = []
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for _ in range(steps):
        x = torch.randn(128, 16)
        loss = F.mse_loss(model(x), (x @ task).tanh())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / 10


base = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
first = train(base, normopt.create("muon", base, lr=0.02), tasks[0], 300)
x = torch.randn(512, 16)
before = F.mse_loss(base(x), (x @ tasks[1]).tanh()).item()
print(f"first task: {first:.4f}; second task before fine-tuning: {before:.4f}")

for name, lr in ("adamw", 5e-3), ("muon", 0.01):
    layers = [Adapted(layer) if isinstance(layer, nn.Linear) else layer for layer in copy.deepcopy(base)]
    model = nn.Sequential(*layers)
    optimizer = normopt.create(name, model, lr=lr)
    frozen = layers[0].layer.weight.clone()
    loss = train(model, optimizer, tasks[1], 300)
    print(f"second task, adapters by {name}: {loss:.4f}")
    assert loss < before and torch.equal(frozen, layers[0].layer.weight)
print(normopt.describe(optimizer))
