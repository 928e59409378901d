"""Optimizers that watch the inputs of layers, on models in all layouts, beside one process with all of each batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel
from torch.nn.parallel import DistributedDataParallel

import normopt
from normopt import EMA, InputStatistics, InputWhitened, Max, Smoothed, Spectral, SteepestDescent
from normopt.engine import mesh as meshes
from tests.support.sharded import copy_weights, error_of, laid_out, mesh_of, options_of, state_dicts, states, whole

PLAN: dict[str, ParallelStyle] = {
    "up": ColwiseParallel(),
    "down": RowwiseParallel(),
    "head": ColwiseParallel(output_layouts=Replicate()),
}


class Net(nn.Module):
    """Sides that tensor parallelism cuts evenly, and a head whose rows no two ranks can share evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 8)
        self.down = nn.Linear(8, 6)
        self.head = nn.Linear(6, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.down(self.up(x).relu()))


def batch(step: int) -> tuple[Tensor, Tensor]:
    noise = torch.Generator().manual_seed(step)
    return torch.randn(8, 3, 6, generator=noise), torch.randint(5, (8, 3), generator=noise)


def watching(model: nn.Module, **options: Any) -> SteepestDescent:
    """Newton-Muon on the hidden matrices of the model and Adam after KFAC's factor on its head."""
    norm = InputWhitened(Spectral("max1", "exact"), -1.0, 0.2, keep_length=False, frequency=2)
    head = {"norm": InputWhitened(Smoothed(Max(), 0.95)), "momentum": EMA(0.9, bias_correction=True)}
    return normopt.create("muon", model, lr=0.02, geometry={"linear": {"norm": norm}, "unembedding": head}, **options)


class Watched:
    """A model in a layout whose ranks have parts of each batch, and its optimizer.

    Args:
        layout: one of ``LAYOUTS`` of ``tests.support.sharded``, on so many ranks; ``"ddp"``; with ``"every layer"``
            each is sharded by itself; ``"plain"`` is one process.
    """

    def __init__(self, layout: str) -> None:
        torch.manual_seed(0)
        self.layout, kind = layout, layout.split()[0]
        self.model: nn.Module = laid_out(Net(), layout, "every layer" in layout, PLAN)
        self.data: Any = None  # the ranks that have parts of a batch
        self.parts, self.part = (1, 0) if kind == "plain" else (dist.get_world_size(), dist.get_rank())
        if kind in ("tp", "fsdp+tp"):
            data = mesh_of(dist.get_world_size() // 2, 2, names=("dp", "tp"))["dp"]
            self.parts, self.part, self.data = data.size(), data.get_local_rank(), data.get_group()
        self.optimizer = watching(self.model, **options_of(layout))
        group = {"ddp": dist.group.WORLD, "plain": _alone()}.get(kind)
        if layout == "tp 2x2":
            group = self.data  # of which the device mesh of a weight knows nothing
        self.statistics = InputStatistics(self.model, self.optimizer, 0.7, group)
        self.forward = DistributedDataParallel(self.model) if kind in ("ddp", "mesh") else self.model

    def backward(self, step: int) -> None:
        """Gradients of the mean over the whole batch."""
        x, y = (each.chunk(self.parts)[self.part] for each in batch(step))
        nn.functional.cross_entropy(self.forward(x).flatten(0, 1), y.flatten()).backward()
        for p in self.model.parameters() if self.layout == "tp 2x2" else ():
            assert p.grad is not None
            dist.all_reduce(meshes.local(p.grad), group=self.data)
            meshes.local(p.grad).div_(self.parts)

    def step(self, step: int) -> None:
        self.optimizer.zero_grad()
        self.backward(step)
        self.optimizer.step()

    def weights(self) -> Tensor:
        return whole(self.model.parameters())

    def states(self) -> dict[tuple[str, str], Tensor]:
        return states(self.optimizer)


_ALONE: list[Any] = []


def _alone() -> Any:
    """A process group of this rank."""
    if not _ALONE:
        _ALONE.append(dist.new_group([dist.get_rank()], use_local_synchronization=True))
    return _ALONE[0]


def apart(a: dict[tuple[str, str], Tensor], b: dict[tuple[str, str], Tensor]) -> float:
    """The largest difference between two states, of the size of the tensor that it is in."""
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    return max(float((a[key] - b[key]).abs().max() / b[key].abs().max().clamp(min=1e-30)) for key in b)


def beside_one_process(layout: str) -> tuple[float, float]:
    """How far weights are from one process's, over the distance that these have travelled, and states."""
    one, many = Watched("plain"), Watched(layout)
    start = one.weights()
    for step in range(4):
        one.step(step)
        many.step(step)
    distance = (many.weights() - one.weights()).norm() / (one.weights() - start).norm()
    return float(distance), apart(many.states(), one.states())


def kept_by_owners(layout: str) -> dict[str, int]:
    """How many numbers of statistics this rank keeps of each matrix, between two steps."""
    many = Watched(layout)
    many.step(0)
    names = {p: name for name, p in many.model.named_parameters()}
    held = many.optimizer.state.items()
    return {names[p]: each["inputs"].numel() for p, each in held if "inputs" in each}


def seen_by_few(layout: str) -> tuple[str, bool, float, float]:
    """What steps do whose inputs no rank has seen, the first rank alone, and again no rank.

    The error of the first; whether it has left state; how far averages are from those of the first rank's inputs after
    the second, and after the third.
    """
    many, is_first = Watched(layout), dist.get_rank() == 0
    many.model.eval()
    many.backward(0)
    error = error_of(many.optimizer.step)
    has_state = bool(many.optimizer.state)
    many.model.train(is_first)
    many.step(1)
    x = batch(1)[0].chunk(many.parts)[0].flatten(0, 1)
    found = [_off(many, x)]
    many.model.eval()
    many.step(2)
    return error, has_state, *found, _off(many, x)


def _off(many: Watched, x: Tensor) -> float:
    expected = x.mT @ x / len(x)
    return float((many.states()["up.weight", "inputs"].squeeze() - expected).abs().max())


def saved_by(layout: str, folder: str) -> tuple[dict[tuple[str, str], Tensor], Tensor]:
    """Three steps, saved to a folder, and two more: the state when it was saved, and the weights at the end."""
    many = Watched(layout)
    for step in range(3):
        many.step(step)
    checkpoint.save(state_dicts(many.model, many.optimizer), checkpoint_id=folder)
    found = many.states()
    for step in range(3, 5):
        many.step(step)
    return found, many.weights()


def loaded_by(layout: str, folder: str) -> tuple[dict[tuple[str, str], Tensor], Tensor]:
    """The state after loading that, and the weights after the same two steps."""
    many = Watched(layout)
    found = state_dicts(many.model, many.optimizer)
    checkpoint.load(found, checkpoint_id=folder)
    set_model_state_dict(many.model, found["model"])
    set_optimizer_state_dict(many.model, many.optimizer, found["optimizer"])
    state = many.states()
    for step in range(3, 5):
        many.step(step)
    return state, many.weights()


def loads_one_process(layout: str) -> tuple[float, float]:
    """How far state and weights are from one process's after its state dict has been loaded, and two steps."""
    one, many = Watched("plain"), Watched(layout)
    start = one.weights()
    for step in range(3):
        one.step(step)
    copy_weights(one.model, many.model)
    many.optimizer.load_state_dict(one.optimizer.state_dict())
    loaded = apart(many.states(), one.states())
    for step in range(3, 5):
        one.step(step)
        many.step(step)
    return loaded, float((many.weights() - one.weights()).norm() / (one.weights() - start).norm())


def refused() -> dict[str, str]:
    """What is said where some processes have no part in a weight."""
    model = laid_out(Net(), "tp 2x2", plan=PLAN) if dist.get_world_size() == 4 else Net()
    return {"error": error_of(lambda: InputStatistics(model, watching(model)))}
