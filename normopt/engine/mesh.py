"""Device meshes and DTensors: which part of a tensor is here. All that torch keeps private of them is in this file."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.placement_types import Placement

from normopt.numerics.sharded import whole

#: A part of a tensor: for each dimension the runs of indices ``(begin, end)`` that it has, in order.
Part = tuple[tuple[tuple[int, int], ...], ...]

#: Process groups over all ranks of meshes with several dimensions, by the whole world's group and the ranks.
_GROUPS: dict[tuple[int, tuple[int, ...]], Any] = {}


def local(x: Tensor) -> Tensor:
    """What a DTensor has on this rank, sharing its memory; a plain tensor is all here."""
    part = x._local_tensor if isinstance(x, DTensor) else x
    wait = getattr(part, "wait", None)  # of tensors that a collective is still filling
    return wait() if wait is not None else part


def local_gradient(p: Tensor) -> Tensor:
    """What this rank has of a parameter's gradient, placed as the parameter is."""
    g = p.grad
    assert g is not None
    if isinstance(p, DTensor) and isinstance(g, DTensor) and g.placements != p.placements:
        g = g.redistribute(placements=p.placements)
    return local(g)


def dtensor(part: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: Sequence[int]) -> DTensor:
    """A DTensor of ``shape`` from this rank's part."""
    stride = torch.empty(tuple(shape), device="meta").stride()
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


def placed_as(p: Tensor, x: Tensor) -> Tensor:
    """``x``, whole or a DTensor, as the parameter ``p`` is placed; other memory than that of ``x`` where ``x`` is cut.

    Where ``x`` is a DTensor that is placed otherwise all ranks must call together.
    """
    if not isinstance(p, DTensor):
        return whole(x)
    if isinstance(x, DTensor):
        return x if x.placements == p.placements else x.redistribute(p.device_mesh, p.placements)
    part = part_of(p.shape, p.placements, tuple(p.device_mesh.shape), place_in(p.device_mesh))
    return dtensor(take(x, part).contiguous().clone(), p.device_mesh, p.placements, p.shape)


def check_placements(name: str, p: DTensor) -> None:
    """Raise a ``ValueError`` for a parameter that no rank has all of any entry of."""
    if any(isinstance(placement, Partial) for placement in p.placements):
        raise ValueError(
            f"{name} has placements {p.placements}: a sum that is still to be made cannot be trained; replicate "
            "or shard it first, p.redistribute(placements=...)"
        )


def is_replicated(placements: Sequence[Placement]) -> bool:
    """Whether every rank has all of the tensor."""
    return all(isinstance(placement, Replicate) for placement in placements)


def sharded_dimensions(placements: Sequence[Placement]) -> set[int]:
    """The tensor's dimensions that are cut."""
    return {placement.dim for placement in placements if not isinstance(placement, Replicate)}  # type: ignore[attr-defined]


def coordinates(mesh: Sequence[int]) -> list[tuple[int, ...]]:
    """The place in a mesh of this shape of each rank of :func:`group_of`, in their order."""
    return [*itertools.product(*map(range, mesh))]


def place_in(mesh: DeviceMesh) -> tuple[int, ...]:
    """This rank's place.

    Raises:
        ValueError: it is not in the mesh.
    """
    place = mesh.get_coordinate()
    if place is None:
        raise ValueError(f"this process, rank {dist.get_rank()}, is not in the {mesh} of a parameter that it has")
    return tuple(place)


def group_of(mesh: DeviceMesh) -> Any:
    """The process group of all ranks of a mesh. The first time that a mesh is seen they must call together."""
    if mesh.ndim == 1:
        return mesh.get_group()
    ranks = tuple(mesh.mesh.flatten().tolist())
    world = dist.group.WORLD
    if ranks == tuple(range(dist.get_world_size())):
        return world
    key = id(world), ranks
    if key not in _GROUPS:
        backend = world._get_backend(torch.device(mesh.device_type))  # type: ignore[union-attr]
        timeout = getattr(getattr(backend, "options", None), "_timeout", None)
        _GROUPS[key] = dist.new_group([*ranks], timeout=timeout, use_local_synchronization=True)
    return _GROUPS[key]


def covering(meshes: Sequence[DeviceMesh]) -> DeviceMesh:
    """The smallest mesh with all the dimensions of ``meshes``: what sums over a whole model run over.

    Dimensions of the root mesh that no parameter is placed on stay outside: pipeline stages have other parameters.

    Raises:
        ValueError: they are not parts of one mesh with named dimensions.
    """
    first = meshes[0]
    if all(mesh == first for mesh in meshes):
        return first
    root = first._get_root_mesh()
    names = root.mesh_dim_names
    if names is None or any(mesh._get_root_mesh() != root or not mesh.mesh_dim_names for mesh in meshes):
        raise ValueError("parameters on several device meshes must be on parts of one mesh with named dimensions")
    used = tuple(name for name in names if any(name in (mesh.mesh_dim_names or ()) for mesh in meshes))
    return root if used == names else root[used]


def dimensions_in(cover: DeviceMesh, mesh: DeviceMesh) -> list[int]:
    """Which dimensions of ``cover`` a mesh has."""
    if mesh == cover:
        return [*range(cover.ndim)]
    return [(cover.mesh_dim_names or ()).index(name) for name in mesh.mesh_dim_names or ()]


# Parts ----------------------------------------------------------------------------------------------------------------


def part_of(shape: Sequence[int], placements: Sequence[Placement], mesh: Sequence[int], place: Sequence[int]) -> Part:
    """What the rank at ``place`` in a mesh of shape ``mesh`` has of a tensor: from its placements alone."""
    part: list[tuple[tuple[int, int], ...]] = [((0, size),) for size in shape]
    for i, placement in enumerate(placements):  # from left to right, as DTensors are cut
        if isinstance(placement, Replicate):
            continue
        dim: int = placement.dim  # type: ignore[attr-defined]
        # Where FSDP2 stands over tensor parallelism, each of the pieces that the latter will make is cut by itself.
        pieces = getattr(placement, "split_factor", 1)
        part[dim] = _joined(_cut(_cut(part[dim], pieces, j), mesh[i], place[i]) for j in range(pieces))
    return tuple(part)


def _cut(runs: Sequence[tuple[int, int]], n: int, i: int) -> tuple[tuple[int, int], ...]:
    """Part ``i`` of ``n`` of these indices, as ``torch.chunk`` cuts; where it gives fewer, the last are empty."""
    size = sum(end - begin for begin, end in runs)
    each = -(-size // n)
    return _between(runs, min(i * each, size), min((i + 1) * each, size))


def _between(runs: Sequence[tuple[int, int]], first: int, last: int) -> tuple[tuple[int, int], ...]:
    """The indices from number ``first`` to ``last``."""
    found, seen = [], 0
    for begin, end in runs:
        a, b = max(first - seen, 0), min(last - seen, end - begin)
        if a < b:
            found.append((begin + a, begin + b))
        seen += end - begin
    return tuple(found)


def _joined(pieces: Any) -> tuple[tuple[int, int], ...]:
    """Runs one after the other; those that touch become one."""
    found: list[tuple[int, int]] = []
    for begin, end in itertools.chain.from_iterable(pieces):
        if found and found[-1][1] == begin:
            found[-1] = (found[-1][0], end)
        else:
            found.append((begin, end))
    return tuple(found)


def shape_of(part: Part) -> tuple[int, ...]:
    """The shape of a part."""
    return tuple(sum(end - begin for begin, end in runs) for runs in part)


def take(x: Tensor, part: Part) -> Tensor:
    """A part of ``x``; a view where it is in one piece."""
    for dim, runs in enumerate(part):
        pieces = [x.narrow(dim, begin, end - begin) for begin, end in runs]
        x = x.narrow(dim, 0, 0) if not pieces else pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
    return x


def put(x: Tensor, part: Part, value: Tensor) -> None:
    """Copy ``value`` to a part of ``x``."""
    for dim, runs in enumerate(part):
        if len(runs) > 1:
            for run, piece in zip(runs, torch.split(value, [end - begin for begin, end in runs], dim), strict=True):
                put(x, (*part[:dim], (run,), *part[dim + 1 :]), piece)
            return
    take(x, part).copy_(value)
