"""Trainers of other libraries on sharded models, for torchrun.

``-m tests.support.fsdp2_trainers LIBRARY NAMES FOLDER``: the library, optimizers, and where checkpoints go.

Every process asserts that losses are those of a plain loop on one process, and that a loaded checkpoint goes on as the
run did.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import normopt
from normopt.nn import GPT

#: Optimizers that amplify the last bits, in which averages of two shares of a batch differ.
AMPLIFY = {"soap": 1e-2, "shampoo": 1e-2}


def gpt() -> GPT:
    torch.manual_seed(0)
    return GPT(20, 8, 2, 2)


def batch(step: int) -> Tensor:
    return torch.randint(20, (4, 9), generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def by_hand(name: str, steps: int) -> tuple[list[float], list[Any]]:
    """Losses of one process, and the rules and names of its param groups."""
    model = gpt()
    optimizer = normopt.create(name, model)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, batch(step))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses, [(group["rule"], group["param_names"]) for group in optimizer.param_groups]


def mean(loss: Tensor) -> float:
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def check(name: str, found: list[float], expected: list[float]) -> None:
    apart = max(abs(a - b) for a, b in zip(found, expected, strict=True))
    assert apart < AMPLIFY.get(name, 1e-4), (name, found, expected)


# accelerate -----------------------------------------------------------------------------------------------------------


def accelerate_fsdp2(names: list[str], folder: Path) -> None:
    import accelerate

    plugin = accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Block"]
    )
    accelerator = accelerate.Accelerator(cpu=True, fsdp_plugin=plugin)
    # On CPUs accelerate leaves the plugin unused, and would wrap the model in DistributedDataParallel.
    accelerator.state.distributed_type = accelerate.DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    accelerate.PartialState._shared_state["distributed_type"] = accelerate.DistributedType.FSDP
    for name in names:
        plain = gpt()
        model, optimizer = accelerator.prepare(plain, normopt.create(name, plain))
        assert all(isinstance(p, DTensor) for p in model.parameters())

        def train(first: int, last: int, model: nn.Module = model, optimizer: Any = optimizer) -> list[float]:
            losses = []
            for step in range(first, last):
                optimizer.zero_grad()
                loss = loss_of(model, batch(step).chunk(2)[dist.get_rank()])
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                losses.append(mean(loss))
            return losses

        losses = train(0, 4)
        accelerator.save_state(str(folder / name))
        losses += train(4, 6)
        ended = [p.full_tensor().clone() for p in model.parameters()]
        accelerator.load_state(str(folder / name))
        assert train(4, 6) == losses[4:], name
        for p, q in zip(model.parameters(), ended, strict=True):
            assert torch.equal(p.full_tensor(), q), name
        expected, groups = by_hand(name, 6)
        check(name, losses, expected)
        assert [(group["rule"], group["param_names"]) for group in optimizer.param_groups] == groups
        accelerator.free_memory()


# Lightning ------------------------------------------------------------------------------------------------------------


def lightning_model_parallel(names: list[str], folder: Path) -> None:
    import lightning
    from lightning.pytorch.strategies import ModelParallelStrategy

    class Module(lightning.LightningModule):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.gpt, self.optimizer_name = gpt(), name
            self.losses: list[float] = []

        def configure_model(self) -> None:
            mesh = self.device_mesh["data_parallel"]
            for block in self.gpt.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(self.gpt, mesh=mesh)

        def training_step(self, _: Tensor, __: int) -> Tensor:
            loss = loss_of(self.gpt, batch(self.global_step).chunk(2)[dist.get_rank()])
            self.losses.append(mean(loss))
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return normopt.create(self.optimizer_name, self)

    def fit(module: Module, steps: int, checkpoint: Path | None = None) -> lightning.Trainer:
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=2,
            strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
            max_steps=steps,
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        trainer.fit(module, torch.utils.data.DataLoader(range(steps)), ckpt_path=checkpoint)
        return trainer

    for name in names:
        whole, half, rest = Module(name), Module(name), Module(name)
        fit(whole, 6)
        fit(half, 4).save_checkpoint(folder / name)
        fit(rest, 6, folder / name)
        assert half.losses + rest.losses == whole.losses, (name, half.losses, rest.losses, whole.losses)
        for p, q in zip(rest.parameters(), whole.parameters(), strict=True):
            assert isinstance(p, DTensor)
            assert torch.equal(p.full_tensor(), q.full_tensor()), name
        check(name, whole.losses, by_hand(name, 6)[0])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    library, asked, place = sys.argv[1:]
    {"accelerate": accelerate_fsdp2, "lightning": lightning_model_parallel}[library](asked.split(","), Path(place))
    dist.destroy_process_group()
