"""Updates, norms and ranks of every role in TensorBoard, and of every tensor in a file of JSON lines.

``optimizer.metrics()`` measures the step inside of its block and costs nothing outside of it. Needs ``pip install
tensorboard``; look at the run with ``tensorboard --logdir`` and the folder that is printed.
"""

import json
import tempfile
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter

import normopt
from normopt.metrics import write_jsonl, write_scalars

torch.manual_seed(0)
folder = Path(tempfile.mkdtemp())
model = normopt.nn.GPT(vocab_size=64, d_model=32, n_layers=2, n_heads=2)
optimizer = normopt.create("muon", model, lr=0.02)
writer = SummaryWriter(str(folder))

for step in range(40):
    tokens = (torch.randint(64, (16, 1)) + 3 * torch.arange(33)) % 64
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    if step % 10 == 0:  # every hundredth step in a real run
        with optimizer.metrics() as measured:
            optimizer.step()
        write_scalars(writer, measured.rows("role"), step)
        write_jsonl(folder / "metrics.jsonl", measured.rows(), step)
        for row in measured.rows("role"):
            print(f"step {step:3} {row['role']:12} update rms {row['update_rms']:.2e}")
    else:
        optimizer.step()
    writer.add_scalar("loss", loss.item(), step)
writer.close()
lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
print(f"{len(lines)} rows in {folder}")
assert len({line["step"] for line in lines}) == 4 and [*folder.glob("events.*")]
