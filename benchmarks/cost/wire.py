"""`python -m benchmarks wire`: the bytes that sharded steps send, counted from placements; nothing runs.

One process stands for a rank of a process group of any size (torch's fake one). Parameters are on the meta device, in
the optimizer's own layout, which says what every rank sends, owns and keeps.
"""

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import normopt
from benchmarks.cost.wire_report import write_wire
from benchmarks.harness import PlanError, in_new_process, origin
from benchmarks.output.records import Row, append_row
from normopt.engine import mesh as meshes
from normopt.engine.home import Home
from normopt.engine.layout import Layout
from normopt.engine.plan import state_shapes
from normopt.rule import Rule


@dataclass(frozen=True)
class Shapes:
    """The parameters of a language model: vocabulary, width, layers, and the matrices (out, in) of each layer."""

    vocabulary: int
    width: int
    layers: int
    matrices: tuple[tuple[str, int, int], ...]
    #: Positions that have an embedding, and whether the output layer has weights of its own.
    positions: int = 0
    has_head: bool = False
    bias: bool = True


def _gpt2(width: int, layers: int) -> Shapes:
    matrices = (("qkv", 3 * width, width), ("out", width, width), ("up", 4 * width, width), ("down", width, 4 * width))
    return Shapes(50257, width, layers, matrices, positions=1024)


def _llama(width: int, layers: int, inner: int, kv: int, vocabulary: int) -> Shapes:
    attention = (("q", width, width), ("k", kv, width), ("v", kv, width), ("o", width, width))
    mlp = (("gate", inner, width), ("up", inner, width), ("down", width, inner))
    return Shapes(vocabulary, width, layers, (*attention, *mlp), has_head=True, bias=False)


#: GPT-2 (Radford et al., 2019) and Llama 3 (arXiv 2407.21783).
MODELS: dict[str, Shapes] = {
    "smoke": _gpt2(16, 2),
    "gpt2-124m": _gpt2(768, 12),
    "gpt2-1.5b": _gpt2(1600, 48),
    "llama3-8b": _llama(4096, 32, 14336, 1024, 128256),
}
#: What moves the model: Muon, whose owners need gradients alone, and with bounds of rows, which need weights too.
OPTIMIZERS: dict[str, dict[str, object]] = {
    "muon": {},
    "muon + RowBound": {"geometry": {"linear": {"bounds": "RowBound(radius=1.0)"}}},
}
#: How many ranks share a copy of the model where there are several copies (HSDP).
SHARDS = (8, 64)


def benchmark_wire(parsed: argparse.Namespace) -> int:
    """The command: count everything in a new process, then write the tables and the plot."""
    models, ranks = (["smoke"], [2, 16]) if parsed.smoke else (parsed.models, parsed.ranks)
    if min(ranks) < 2:
        raise PlanError("--ranks: one rank sends nothing; give numbers from 2 up")
    parsed.out.mkdir(parents=True, exist_ok=True)
    rows = in_new_process(1, count_all, models, ranks)
    for row in rows:
        append_row(parsed.out / "wire.jsonl", row)
    write_wire(rows, parsed.out)
    return 0


def count_all(models: list[str], ranks: list[int]) -> list[Row]:
    """Body of the process: a row for each model, optimizer, number of ranks and layout."""
    rows = []
    for size in ranks:
        copies = [1, *(size // shards for shards in SHARDS if size > shards and size % shards == 0)]
        with one_of(size):
            for name in models:
                print(f"counting {name} on {size} ranks", flush=True)
                for several in copies:
                    mesh = mesh_of(size, several)
                    rows += [count(name, optimizer, mesh) for optimizer in OPTIMIZERS]
    return rows


@contextmanager
def one_of(size: int) -> Iterator[None]:
    """A process group of `size` ranks of which this process is the first, and the others do not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def mesh_of(ranks: int, copies: int = 1) -> DeviceMesh:
    """A mesh that shards over all ranks (FSDP2), or over those of each of several copies (HSDP)."""
    if copies == 1:
        return init_device_mesh("cpu", (ranks,), mesh_dim_names=("shard",))
    return init_device_mesh("cpu", (copies, ranks // copies), mesh_dim_names=("copy", "shard"))


def copies_in(mesh: DeviceMesh) -> int:
    """How many copies of the model a mesh of `mesh_of` has."""
    return mesh.size(0) if mesh.ndim == 2 else 1


def make(shapes: Shapes) -> nn.Module:
    """Modules with these parameters, without memory."""
    with torch.device("meta"):
        model = nn.Module()
        model.tokens = nn.Embedding(shapes.vocabulary, shapes.width)
        if shapes.positions:
            model.positions = nn.Embedding(shapes.positions, shapes.width)
        model.layers = nn.ModuleList()
        for _ in range(shapes.layers):
            linear = {name: nn.Linear(i, o, bias=shapes.bias) for name, o, i in shapes.matrices}
            norms = {name: nn.LayerNorm(shapes.width, bias=shapes.bias) for name in ("norm1", "norm2")}
            model.layers.append(nn.ModuleDict({**linear, **norms}))
        model.norm = nn.LayerNorm(shapes.width, bias=shapes.bias)
        if shapes.has_head:
            model.head = nn.Linear(shapes.width, shapes.vocabulary, bias=False)
    return model


def laid_out(model: nn.Module, optimizer: str, mesh: DeviceMesh) -> Layout:
    """The layout of a step of the optimizer on the model, sharded by rows over a mesh, when all have gradients."""
    fully_shard(model, mesh=mesh)
    options = OPTIMIZERS[optimizer]
    made = normopt.create("muon", model, lr=0.02, **options)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    return Layout(made.param_groups, None, None)


def count(name: str, optimizer: str, mesh: DeviceMesh) -> Row:
    """What a step sends, and how work and state are shared out."""
    model = make(MODELS[name])
    layout = laid_out(model, optimizer, mesh)
    owned = [home for home in layout.homes if not home.is_local]
    ranks = mesh.size()
    sent = [layout.bytes_in_step(rank) for rank in range(ranks)]
    work = [0.0] * ranks
    for home in owned:
        work[home.owner] += home.cost
    state = state_bytes(layout, mesh)
    return {
        "key": f"{name}-{optimizer}-{ranks}-{copies_in(mesh)}",
        "model": name,
        "optimizer": optimizer,
        "ranks": ranks,
        "layout": "FSDP2" if mesh.ndim == 1 else f"HSDP {copies_in(mesh)} x {ranks // copies_in(mesh)}",
        "copies": copies_in(mesh),
        "shards": ranks // copies_in(mesh),
        "parameters": sum(p.numel() for p in model.parameters()),
        "owned": sum(home.p.numel() for home in owned),
        "matrices": len(owned),
        "sent_mean": sum(sent) / ranks,
        "sent_max": max(sent),
        "all_to_alls": layout.all_to_alls,
        "work_mean": sum(work) / ranks,
        "work_max": max(work),
        "work_largest": max(home.cost for home in owned),
        "idle": sum(x == 0 for x in work),
        "state_mean": sum(state) / ranks,
        "state_max": max(state),
        **bounds(model, owned, mesh),
        **origin(),
    }


def bounds(model: nn.Module, owned: list[Home], mesh: DeviceMesh) -> dict[str, float]:
    """Bytes that a rank sends in other ways to do the same, for P entries of 4 bytes and N shards.

    `least`: 2 P (N-1) / N^2, what anything sends that makes each matrix in one place, once for each copy of the model:
    all but the maker's own part in, and out again; 3 P (N-1) / N^2 where the weights come, too. `gather_all`:
    P (N-1) / N, every rank gathers everything and does all the work. `fsdp`: what FSDP2 sends for the forward and the
    backward pass, two all-gathers of the weights and one reduce-scatter, and an all-reduce over copies.
    """
    copies = copies_in(mesh)
    n = mesh.size() // copies
    carried = sum(home.p.numel() * (3 if home.sees_weights else 2) for home in owned)
    entries, total = sum(home.p.numel() for home in owned), sum(p.numel() for p in model.parameters())
    return {
        "least": 4 * carried * (n - 1) / n**2,
        "gather_all": 4 * entries * (n - 1) / n,
        "fsdp": 4 * total * (3 * (n - 1) / n + 2 * (copies - 1) / copies / n),
    }


def state_bytes(layout: Layout, mesh: DeviceMesh) -> list[int]:
    """Bytes of state on each rank, in float32."""
    sizes, places = tuple(mesh.shape), meshes.coordinates(mesh.shape)
    found, known = [0] * len(places), dict[object, list[int]]()
    for home in layout.homes:
        rule, shape = home.resolved, tuple(home.p.shape)
        if not home.is_local:
            found[home.owner] += _bytes(shape, rule)
            continue
        key = home.rule, home.place, shape
        if key not in known:
            parts = [meshes.part_of(shape, home.placements, sizes, place) for place in places]
            each = {part: _bytes(part, rule) for part in {meshes.shape_of(part) for part in parts}}
            known[key] = [each[meshes.shape_of(part)] for part in parts]
        found = [a + b for a, b in zip(found, known[key], strict=True)]
    return found


def _bytes(shape: tuple[int, ...], rule: Rule) -> int:
    kept = state_shapes(torch.empty(shape, device="meta"), rule)
    return 4 * sum(map(math.prod, kept.values()))
