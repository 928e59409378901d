"""What steps on sharded models cost: collectives, bytes, layouts and plans made, memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode

import normopt
from normopt import SteepestDescent, rule
from normopt.engine import layout as layouts
from normopt.engine import loop
from normopt.engine.plan import Plan
from normopt.engine.ranks import Ranks
from tests.support import sharded
from tests.support.memory import peak_bytes

BOUNDED = {"geometry": {"linear": {"bounds": "RowBound(radius=1.0)"}}}


class Blocks(nn.Module):
    """Linear layers without biases between an embedding and a head."""

    def __init__(self, layers: int, dim: int = 8) -> None:
        super().__init__()
        self.emb = nn.Embedding(2 * dim, dim)
        self.layers = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 2 * dim, bias=False)


def blocks(layers: int, dim: int = 8) -> nn.Module:
    """Sharded by rows over all ranks, with equal values everywhere."""
    torch.manual_seed(0)
    return fully_shard(Blocks(layers, dim), mesh=sharded.mesh_of(dist.get_world_size()))


def give(model: nn.Module, step: int) -> None:
    """Gradients that are the same parts of the same tensors on any number of ranks."""
    draws = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = sharded.like(torch.randn(p.shape, generator=draws), p)


def collectives(call: Callable[[], Any]) -> dict[str, int]:
    """How many of each kind a call makes."""
    with CommDebugMode() as mode:
        call()
    return {str(op).removeprefix("c10d.").rstrip("_"): n for op, n in mode.get_comm_counts().items() if n}


def a_step(model: nn.Module, optimizer: SteepestDescent, step: int) -> Any:
    """One step from new gradients; momenta that look back get them from a closure."""
    give(model, step)
    closure = (lambda: give(model, step)) if looks_back(optimizer) else None
    return optimizer.step(closure)


def looks_back(optimizer: SteepestDescent) -> bool:
    return any(rule.rule_of(group).momentum.looks_back for group in optimizer.param_groups)


def costs(name: str, layers: int, dim: int = 8, **options: Any) -> dict[str, Any]:
    """What the second step of an optimizer costs this rank: the first makes the state."""
    model = blocks(layers, dim)
    optimizer = normopt.create(name, model, **options)
    a_step(model, optimizer, 0)
    layout = optimizer._layout
    assert layout is not None
    before = layout.bytes_sent
    counted = collectives(lambda: a_step(model, optimizer, 1))
    rules = [rule.rule_of(group).at(group) for group in optimizer.param_groups]
    return {
        "collectives": counted,
        "sent": layout.bytes_sent - before,
        "foretold": layout.bytes_in_step(),
        "all_to_alls": layout.all_to_alls,
        "sums": sum(bool(layout.parties(method)) for method in ("survey", "measure")),
        "looks_back": looks_back(optimizer),
        "is_entrywise": all(rule.elementwise for rule in rules),
        "sees_weights": any(home.sees_weights for home in layout.homes if not home.is_local),
        "owned": sum(home.p.numel() for home in layout.homes if not home.is_local),
        "is_kept": optimizer._layout is layout,
    }


def costs_of_all(names: list[str], layers: int) -> dict[str, dict[str, Any]]:
    return {name: costs(name, layers) for name in names}


def foretold(layout: str, names: list[str]) -> dict[str, tuple[int, int]]:
    """For each optimizer the bytes of a step on awkward shapes, sent and as placements say."""
    found = {}
    for name in names:
        pair = sharded.Pair(lambda model, name=name, **more: normopt.create(name, model, **more), layout)
        pair.step(0)
        made = pair.many._layout
        assert made is not None
        found[name] = made.bytes_sent, made.bytes_in_step()
    return found


def remade(kind: str, name: str, steps: int) -> tuple[int, int]:
    """Layouts and plans that a training loop makes after its second step, with gradients from the backward pass."""
    model = sharded.laid_out(sharded.net(kind), kind)
    optimizer = normopt.create(name, model)
    made = {"layouts": 0, "plans": 0}

    def counting(cls: type, key: str) -> Any:
        init = cls.__init__  # type: ignore[misc]

        def counted(self: Any, *args: Any, **kwargs: Any) -> None:
            made[key] += 1
            init(self, *args, **kwargs)

        return patch.object(cls, "__init__", counted)

    with counting(layouts.Layout, "layouts"), counting(Plan, "plans"):
        for step in range(steps):
            if step == 2:
                assert made["layouts"] == 1 and made["plans"] > 0
                made |= {"layouts": 0, "plans": 0}
            optimizer.zero_grad()
            sharded.loss_of(model, step).backward()
            optimizer.step()
    return made["layouts"], made["plans"]


def types_seen(layout: str, name: str) -> set[str]:
    """The types of all tensors that batches and ingredients of an optimizer get in two steps."""
    seen: set[str] = set()
    find, run = loop.find_direction, loop.run_kernel

    def look(tensors: Iterable[Tensor]) -> None:
        seen.update(type(x).__name__ for x in tensors)

    def finds(batch: Any, totals: Any) -> Any:
        pending = find(batch, totals)
        context = pending.context
        weights = [context.w] if batch.rule.sees_weights else []
        look([*batch.params, *batch.gradients, context.g, pending.averaged, *pending.state.values(), *weights])
        return pending

    def runs(batch: Any, kernel: Any) -> None:
        look([*batch.params, *batch.gradients])
        run(batch, kernel)

    with patch.object(loop, "find_direction", finds), patch.object(loop, "run_kernel", runs):
        pair = sharded.Pair(lambda model, **more: normopt.create(name, model, **more), layout)
        seen.clear()
        for step in range(2):
            pair.step(step)
    return seen


def in_waves(name: str, layers: int, entries: int, dim: int = 32) -> tuple[Tensor, int, int]:
    """Weights after four steps whose waves bring so many entries together, how many all-to-alls, and peak memory.

    The least peak of the steps after the first: memory that a thread of the process group frees, the profiler misses.
    """
    with patch.object(layouts, "WAVE_ENTRIES", entries):
        model = blocks(layers, dim)
        optimizer = normopt.create(name, model)
        peaks = []
        for step in range(4):
            give(model, step)
            peaks.append(peak_bytes(optimizer.step))
        assert optimizer._layout is not None
        return sharded.whole(model.parameters()), optimizer._layout.all_to_alls, min(peaks[1:])


def alike(self: Ranks, x: Tensor) -> Tensor:
    """:meth:`Ranks.total` where all ranks have the same and this one is the only one: a fake group makes no sums."""
    dist.all_reduce(x, group=self._group)
    return x.mul_(self.size)
