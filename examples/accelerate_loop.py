"""accelerate with SOAP, gradients accumulated over two batches, and a checkpoint that continues to the bit.

Needs ``pip install accelerate``.
"""

import tempfile

import accelerate
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import normopt

torch.manual_seed(0)
inputs = torch.randn(512, 16)
targets = inputs @ torch.randn(16, 4)
model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 4))
accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
loader = DataLoader(TensorDataset(inputs, targets), batch_size=32)
model, optimizer, loader = accelerator.prepare(model, normopt.create("soap", model, lr=0.01), loader)


def epoch() -> float:
    """One pass over the data; returns the mean loss."""
    losses = []
    for x, y in loader:
        with accelerator.accumulate(model):
            loss = nn.functional.mse_loss(model(x), y)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses) / len(losses)


losses = [epoch() for _ in range(8)]
folder = tempfile.mkdtemp()
accelerator.save_state(folder)
went_on = [epoch() for _ in range(2)]
accelerator.load_state(folder)
again = [epoch() for _ in range(2)]
print(
    f"loss {losses[0]:.3f} in the first pass, {went_on[-1]:.3f} in the tenth; after loading the same: {again[-1]:.3f}"
)
assert went_on == again and went_on[-1] < losses[0] / 5
