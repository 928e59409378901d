"""FSDP2 with Muon: sharded parameters, a distributed checkpoint, and a run that continues from it.

Run it on a CPU, with as many processes as you like, twice to see it continue, the second time also with another number:

    torchrun --nproc-per-node 2 examples/fsdp2.py
    torchrun --nproc-per-node 3 examples/fsdp2.py --steps 80

Every process trains on its share of the batch. Muon needs whole matrices: each is owned by one process, to which its
gradient is brought, and from which the update is taken back. `normopt.describe` shows what every tensor gets.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import normopt

BATCH, TIME, VOCABULARY = 12, 32, 64


def sequences(step: int) -> torch.Tensor:
    """The whole batch of a step: numbers that grow by 1 or by 2 each time, which two tokens tell."""
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(VOCABULARY, (BATCH, 1), generator=generator)
    stride = torch.randint(1, 3, (BATCH, 1), generator=generator)
    return (start + stride * torch.arange(TIME + 1)) % VOCABULARY


def save(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Every process writes what it has of weights and state."""
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state, "step": step}, checkpoint_id=folder)


def load(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Every process reads what it needs, however many have written it; returns the number of steps taken."""
    weights, state = get_state_dict(model, optimizer)
    found = {"model": weights, "optimizer": state, "step": 0}
    dcp.load(found, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"])
    return found["step"]


def main() -> None:
    """Train to a number of steps, from the last checkpoint if there is one."""
    parser = argparse.ArgumentParser(description="FSDP2 with Muon on a CPU.")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--folder", type=Path, default=Path("runs/fsdp2"), help="of the checkpoints")
    arguments = parser.parse_args()

    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))
    torch.manual_seed(0)  # equal weights everywhere, of which each process keeps its part
    model = normopt.nn.GPT(VOCABULARY, d_model=32, n_layers=2, n_heads=2)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = normopt.create("muon", model, lr=0.02)  # after fully_shard: these are the parameters to move

    # A checkpoint is complete when it has this file, which is written last; there is one folder for each.
    written = sorted(arguments.folder.glob("*/.metadata"))
    first = load(written[-1].parent, model, optimizer) if written else 0
    if rank == 0:
        print(f"{ranks} processes, from step {first}")
    for step in range(first, arguments.steps):
        tokens = sequences(step).tensor_split(ranks)[rank]
        logits = model(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        # Gradients are averaged over processes: weigh each share of the batch by its size.
        (loss * (len(tokens) * ranks / BATCH)).backward()
        optimizer.step()
        optimizer.zero_grad()
        whole = loss.detach() * (len(tokens) / BATCH)
        dist.all_reduce(whole)
        if rank == 0 and (step + 1) % 10 == 0:
            print(f"step {step + 1}: loss {whole.item():.6f}")
    if first < arguments.steps:
        save(arguments.folder / f"{arguments.steps:06d}", model, optimizer, arguments.steps)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
