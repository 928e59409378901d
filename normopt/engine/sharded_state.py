"""State of sharded parameters in checkpoints: DTensors, whatever rank moves the parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from normopt.engine import mesh as meshes
from normopt.engine.exchange import Exchange, Item
from normopt.engine.home import Home
from normopt.engine.layout import Layout
from normopt.engine.plan import State, state_shapes


def saved(layout: Layout, state: State) -> dict[Tensor, dict[str, Any]]:
    """The state of all parameters that are on meshes. All ranks must call together.

    It is placed as the parameter is where it has the parameter's shape, else along its longest side; that of plain
    parameters is whole on every rank.
    """
    known = {i: _kinds(state.get(home.p, {})) for i, home in enumerate(layout.homes) if home.is_mine}
    kinds: dict[int, dict[str, tuple[tuple[int, ...], torch.dtype]]] = {}
    for each in layout.ranks.every(known):
        kinds |= each
    found: dict[Tensor, dict[str, Any]] = {}
    for i, home in enumerate(layout.homes):
        held = state.get(home.p, {})
        if home.mesh is None or "step" not in held:
            continue
        if home.is_local:
            found[home.p] = {**held, **_saved_rows(home, held)}
            continue
        found[home.p] = {"step": held["step"]}
        for name, (shape, dtype) in kinds[i].items():
            placements = _placements(home, shape)
            exchange = Exchange(home.mesh, [Item(shape, placements, home.owner)])
            like = torch.empty(0, dtype=dtype, device=meshes.local(home.p).device)
            (part,) = exchange.distribute({0: held[name].detach()} if home.is_mine else {}, like)
            is_plain = not isinstance(home.p, DTensor)
            found[home.p][name] = part if is_plain else meshes.dtensor(part.clone(), home.mesh, placements, shape)
        found[home.p] |= {name: x for name, x in held.items() if name not in found[home.p]}  # somebody else's
    return found


def load(layout: Layout, state: State) -> None:
    """Bring what ``saved`` has made, or whole tensors, to where it is needed. All ranks must call together."""
    for home in layout.homes:
        held = state.get(home.p, {})
        if home.mesh is None or "step" not in held:
            continue
        rows = _row_layouts(home) if home.is_local else {}
        for name, value in [*held.items()]:
            if name == "step" or not isinstance(value, Tensor):
                continue
            if not home.is_local:
                held[name] = _to_owner(home, value)
            elif name in rows:
                held[name] = _to_rows(home, value, *rows[name])


def _kinds(held: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    each = ((name, x) for name, x in held.items() if name != "step" and isinstance(x, Tensor))
    return {name: (tuple(x.shape), x.dtype) for name, x in each}


def _placements(home: Home, shape: Sequence[int]) -> tuple[Any, ...]:
    """How a piece of state of this shape is placed in a checkpoint."""
    if tuple(shape) == tuple(home.p.shape):
        return home.placements
    cut = [dim for dim, placement in enumerate(home.placements) if not isinstance(placement, Replicate)]
    placements: list[Any] = [Replicate()] * len(home.placements)
    if cut and shape:
        placements[cut[0]] = Shard(max(range(len(shape)), key=lambda dim: shape[dim]))
    return tuple(placements)


def _to_owner(home: Home, value: Tensor) -> Tensor:
    assert home.mesh is not None
    if not isinstance(value, DTensor):
        return value.clone() if home.is_mine else value.new_empty(0)
    exchange = Exchange(home.mesh, [Item(tuple(value.shape), tuple(value.placements), home.owner)])
    whole = exchange.collect([meshes.local(value)])
    return whole[0] if home.is_mine else meshes.local(value).new_empty(0)


# State of parts of a parameter ----------------------------------------------------------------------------------------

#: The shape of a piece of state for the whole parameter, and its placements.
_RowLayout = tuple[tuple[int, ...], tuple[Any, ...]]


def _row_layouts(home: Home) -> dict[str, _RowLayout]:
    """Of each piece of state: where the state of a parameter with one more row is longer, rows are cut."""
    p, rule = home.p, home.resolved
    shapes = state_shapes(torch.empty(p.shape, device="meta"), rule)
    longer = state_shapes(torch.empty((p.shape[0] + 1, *p.shape[1:]), device="meta"), rule) if p.ndim else shapes
    found = {}
    for name, shape in shapes.items():
        along = [dim for dim, (a, b) in enumerate(zip(shape, longer[name], strict=True)) if a != b]
        placements = home.placements
        if shape != tuple(p.shape):
            placements = tuple(
                x if isinstance(x, Replicate) else Shard(along[0]) if along else Replicate() for x in home.placements
            )
        found[name] = shape, placements
    return found


def _saved_rows(home: Home, held: Mapping[str, Any]) -> dict[str, DTensor]:
    assert home.mesh is not None
    return {
        name: meshes.dtensor(held[name], home.mesh, placements, shape)
        for name, (shape, placements) in _row_layouts(home).items()
        if isinstance(held.get(name), Tensor)
    }


def _to_rows(home: Home, value: Tensor, shape: tuple[int, ...], placements: tuple[Any, ...]) -> Tensor:
    assert home.mesh is not None
    if isinstance(value, DTensor):
        value = value if tuple(value.placements) == placements else value.redistribute(home.mesh, placements)
        return meshes.local(value).clone()
    part = meshes.part_of(shape, placements, tuple(home.mesh.shape), meshes.place_in(home.mesh))
    return meshes.take(value.view(shape), part).clone()
