"""Lightning with Muon and one learning rate for each group.

``OneCycleLR`` sets rates and does not multiply them: it gets one peak for each group, from the group's ``lr_ratio``.
Needs ``pip install lightning``.
"""

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import normopt

STEPS = 60


class Classifier(lightning.LightningModule):
    """Which of four quarters of the plane a point lies in."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
        self.losses: list[float] = []

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        points, labels = batch
        loss = nn.functional.cross_entropy(self.layers(points), labels)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> dict:
        optimizer = normopt.create("muon", self, lr=0.02)
        peaks = [0.02 * group["lr_ratio"] for group in optimizer.param_groups]
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=peaks, total_steps=STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


lightning.seed_everything(0)
points = torch.randn(2048, 2)
labels = 2 * (points[:, 0] > 0).long() + (points[:, 1] > 0).long()
model = Classifier()
trainer = lightning.Trainer(
    max_steps=STEPS,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(model, DataLoader(TensorDataset(points, labels), batch_size=64, shuffle=True))
print(f"loss {model.losses[0]:.3f} at first, {model.losses[-1]:.3f} after {STEPS} steps")
assert model.losses[-1] < 0.3
