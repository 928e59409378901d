"""A convolutional net on scikit-learn's handwritten digits, by Muon and by AdamW.

1797 pictures of 8 x 8 pixels, a quarter of them held out. Convolutions are seen as one matrix, out x (in k k). Needs
``pip install scikit-learn``; nothing is downloaded. One seed and untuned rates: this shows how, not which is better.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import normopt


def make_model() -> nn.Module:
    """Three convolutions and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
labels = torch.tensor(digits.target)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
train, held_out = order[450:], order[:450]

for name, lr in ("muon", 0.02), ("adamw", 0.003):
    torch.manual_seed(0)
    model = make_model()
    optimizer = normopt.create(name, model, lr=lr)
    steps = 8 * (len(train) // 64)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    for _epoch in range(8):
        for chosen in train[torch.randperm(len(train))].split(64)[:-1]:
            loss = F.cross_entropy(model(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(images[held_out]).argmax(dim=1) == labels[held_out]).float().mean().item()
    print(f"{name} at {lr}: {accuracy:.1%} of 450 held-out digits")
    assert accuracy > 0.93
