"""First steps: a small network, Muon, and what each tensor got.

A network learns which of ten prototypes a noisy point belongs to. The optimizer is given the model itself, so that
roles come from its modules.
"""

import torch
from torch import nn
from torch.nn import functional as F

import normopt

torch.manual_seed(0)
prototypes = torch.randn(10, 32)


def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points around the prototypes, and which prototype each is near."""
    labels = torch.randint(10, (size,))
    return prototypes[labels] + 1.2 * torch.randn(size, 32), labels


model = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = normopt.create("muon", model, lr=0.02)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=200)

for step in range(200):
    points, labels = batch(128)
    loss = F.cross_entropy(model(points), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    if step % 50 == 0:
        print(f"step {step}: loss {loss.item():.3f}")

points, labels = batch(2000)
accuracy = (model(points).argmax(dim=1) == labels).float().mean().item()
print(f"accuracy on new points: {accuracy:.1%}")
print(normopt.describe(optimizer))
assert accuracy > 0.9
