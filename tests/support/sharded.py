"""A model with awkward shapes in all layouts of torch.distributed, and optimizers on it beside one process.

Every rank hands both runs the same full gradients: gradients of half a batch differ in the last bit, which SOAP and its
like amplify.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import normopt
from normopt import SteepestDescent
from normopt.engine import mesh as meshes

#: How a model is laid out -> on how many ranks.
LAYOUTS = {
    "fsdp 2": 2,
    "fsdp 4": 4,
    "shard(1) 4": 4,
    "hsdp 2x2": 4,
    "tp 2x2": 4,
    "fsdp+tp 2x2": 4,
    "replicate 2": 2,
    "mesh 2": 2,
    "mesh 4": 4,
}


class Net(nn.Module):
    """Rows that do not divide by the ranks, down to empty shards; a fused qkv, a convolution, a head, odd vectors."""

    def __init__(self, dim: int = 10) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.up = nn.Linear(dim, 7)
        self.down = nn.Linear(7, dim)
        self.narrow = nn.Linear(dim, 5)
        self.wide = nn.Linear(5, dim)
        self.norm = nn.LayerNorm(dim)
        self.conv = nn.Conv1d(dim, 6, 3, padding=1)
        self.back = nn.Linear(6, dim)
        self.gain = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(dim, 11, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.emb(x)
        q, k, v = self.qkv(self.norm(h)).chunk(3, -1)
        h = h + torch.softmax(q @ k.mT / 3, -1) @ v
        h = h + self.down(torch.relu(self.up(h)))
        h = h + self.wide(torch.tanh(self.narrow(h)))
        h = h + self.back(self.conv(h.mT).mT) * self.gain
        return self.head(h)


def net(layout: str = "", dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    # fully_shard takes even shards only along other dimensions than the first.
    return Net(12 if "shard(1)" in layout else 10).to(dtype)


def batch(step: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(11, (8, 7), generator=torch.Generator().manual_seed(1000 + step))
    return tokens[:, :-1], tokens[:, 1:]


def loss_of(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step)
    return nn.functional.cross_entropy(model(x).flatten(0, 1).float(), y.flatten())


_MESHES: dict[Any, DeviceMesh] = {}


def mesh_of(*shape: int, names: tuple[str, ...] | None = None) -> DeviceMesh:
    """One device mesh for all tests of a process: each makes process groups."""
    if (shape, names) not in _MESHES:
        _MESHES[shape, names] = init_device_mesh("cpu", shape, mesh_dim_names=names)
    return _MESHES[shape, names]


PLAN = {
    **dict.fromkeys(("up", "narrow", "qkv"), ColwiseParallel()),
    **dict.fromkeys(("down", "wide", "emb"), RowwiseParallel()),
}


def laid_out(model: nn.Module, layout: str, every_module: bool = False) -> nn.Module:
    """The model in one of ``LAYOUTS``, in place."""
    kind, world = layout.split()[0], dist.get_world_size()
    if kind in ("fsdp", "shard(1)"):
        if every_module:
            for module in [*model.modules()][1:]:
                fully_shard(module, mesh=mesh_of(world))
        second = None if kind == "fsdp" else lambda p: Shard(1) if p.ndim > 1 and p.shape[1] % world == 0 else Shard(0)
        fully_shard(model, mesh=mesh_of(world), shard_placement_fn=second)
    elif kind == "hsdp":
        fully_shard(model, mesh=mesh_of(2, world // 2, names=("replicate", "shard")))
    elif kind in ("tp", "fsdp+tp"):
        both = mesh_of(world // 2, 2, names=("dp", "tp"))
        parallelize_module(model, both["tp"], dict(PLAN))
        if kind == "fsdp+tp":
            fully_shard(model, mesh=both["dp"])
    elif kind == "replicate":
        from torch.distributed._composable.replicate_with_fsdp import replicate

        replicate(model, mesh=mesh_of(world))
    return model


def options_of(layout: str) -> dict[str, Any]:
    """What the optimizer of a layout is told."""
    return {"mesh": mesh_of(dist.get_world_size())} if layout.startswith("mesh") else {}


def like(full: Tensor, p: Tensor) -> Tensor:
    """``full`` as ``p`` is laid out."""
    if not isinstance(p, DTensor):
        return full.clone()
    place = meshes.place_in(p.device_mesh)
    part = meshes.part_of(full.shape, p.placements, tuple(p.device_mesh.shape), place)
    return meshes.dtensor(meshes.take(full, part).contiguous().clone(), p.device_mesh, p.placements, full.shape)


@torch.no_grad()
def whole(params: Iterable[Tensor]) -> Tensor:
    return torch.cat([meshes.whole(p.detach()).flatten().double() for p in params])


def hand_over(source: nn.Module, model: nn.Module) -> None:
    """Give a laid out model the gradients of a plain one."""
    for p, q in zip(source.parameters(), model.parameters(), strict=True):
        q.grad = None if p.grad is None else like(p.grad, q)


def learning_rate(name: str) -> dict[str, float]:
    """Steps that go somewhere."""
    if name in ("prodigy", "dadaptadam"):
        return {"lr": 1.0}
    return {} if name == "stormplus" else {"lr": 0.1 if name in ("sgd", "sgdp", "lars") else 1e-2}


Make = Callable[..., SteepestDescent]


class Pair:
    """An optimizer on a laid out model and the same on a plain one, which get the same gradients."""

    def __init__(self, make: Make, layout: str, dtype: torch.dtype = torch.float32) -> None:
        self.plain, self.model = net(layout, dtype), laid_out(net(layout, dtype), layout)
        self.one, self.many = make(self.plain), make(self.model, **options_of(layout))
        self._probe, self._start = net(layout, dtype), whole(self.plain.parameters())

    def step(self, step: int) -> None:
        looks = any(rule.momentum.looks_back for rule in map(normopt.rule.rule_of, self.one.param_groups))
        self.one.zero_grad()
        if looks:
            self.one.step(lambda: self._gradients(self.plain, self.plain, step))
            self.many.step(lambda: self._at_weights(step))
            return
        self._gradients(self.plain, self.plain, step)
        hand_over(self.plain, self.model)
        self.one.step()
        self.many.step()

    @staticmethod
    def _gradients(source: nn.Module, model: nn.Module, step: int) -> Tensor:
        source.zero_grad()
        loss = loss_of(source, step)
        loss.backward()
        if model is not source:
            hand_over(source, model)
        return loss

    def _at_weights(self, step: int) -> Tensor:
        """Gradients of a plain model at the laid out one's weights."""
        with torch.no_grad():
            for p, q in zip(self._probe.parameters(), self.model.parameters(), strict=True):
                p.copy_(meshes.whole(q))
        return self._gradients(self._probe, self.model, step)

    def distance(self) -> float:
        """How far apart both are, over the distance that the plain one has travelled."""
        mine, other = whole(self.model.parameters()), whole(self.plain.parameters())
        return float((mine - other).norm() / (other - self._start).norm())

    def spread(self) -> float:
        """How far apart replicas are: the largest difference between ranks in what should be equal."""
        mine = whole(self.model.parameters())
        least, most = mine.clone(), mine.clone()
        dist.all_reduce(least, dist.ReduceOp.MIN)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return float((most - least).abs().max())


def distances(names: list[str], layout: str, steps: int) -> dict[str, tuple[float, float] | str]:
    """For each optimizer of the registry the distance after some steps, and the largest spread after any."""
    found: dict[str, Any] = {}
    for name in names:
        try:
            pair = Pair(
                lambda model, name=name, **more: normopt.create(name, model, **learning_rate(name), **more), layout
            )
            spread = 0.0
            for step in range(steps):
                pair.step(step)
                spread = max(spread, pair.spread())
            found[name] = pair.distance(), spread
        except Exception as error:
            import traceback

            found[name] = "".join(traceback.format_exception(error))[-1500:]
    return found


__all__ = ["LAYOUTS", "Net", "Pair", "Replicate"]
