"""Where one parameter is moved: here as it is, or, where its rule needs all of it, whole on the rank that owns it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from normopt.engine import mesh as meshes
from normopt.engine.batch import number_of
from normopt.engine.checks import name_of
from normopt.engine.plan import state_shapes
from normopt.ingredient.view import View
from normopt.rule import Rule, rule_of


@dataclass(eq=False)
class Home:
    """Where one parameter is moved.

    Args:
        p: the parameter.
        group: its param group.
        place: the place of the group.
        index: its place in the group.
        mesh: that it is on; ``None`` for a plain tensor that every rank moves by itself.
        placements: on the mesh.
        rule: that of its group, as text, or the same for parts of its matrices.
        is_local: whether this rank moves what it has of it; else its owner moves all of it.
        sees_weights: whether the rule asks for the weights.
        cost: the work of its step, in multiplications up to a factor.
    """

    p: Tensor
    group: dict[str, Any]
    place: int
    index: int
    mesh: DeviceMesh | None
    placements: tuple[Any, ...]
    rule: str
    is_local: bool
    sees_weights: bool
    cost: float
    #: The number in the mesh of the rank that owns it, and whether that is this rank.
    owner: int = -1
    is_mine: bool = False
    #: Whether this rank adds what it sees of it to sums over the whole model.
    counts: bool = True

    @property
    def is_whole_here(self) -> bool:
        """Whether every rank has all of the weights and of the gradient."""
        return meshes.is_replicated(self.placements)

    @property
    def is_here(self) -> bool:
        """Whether this rank moves it, or what it has of it, and so keeps its state."""
        return self.is_local or self.is_mine

    @property
    def process_group(self) -> Any:
        """All ranks of its mesh, see :func:`normopt.engine.mesh.group_of`; ``None`` if it has none."""
        return None if self.mesh is None else meshes.group_of(self.mesh)

    @property
    def moves_weights(self) -> bool:
        """Whether the owner has the weights; else it makes the update alone, which starts from 0."""
        return self.sees_weights or self.is_whole_here

    @property
    def where(self) -> str:
        """Which ranks move it, in words."""
        if self.mesh is None:
            return "all"
        return "shards" if self.is_local else f"rank {self.mesh.mesh.flatten()[self.owner].item()}"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of what the owner moves."""
        return self.p.dtype if self.moves_weights else torch.promote_types(self.p.dtype, torch.float32)

    @property
    def gradient(self) -> Tensor:
        """What this rank has of the gradient; 0 where there is none."""
        return torch.zeros_like(meshes.local(self.p)) if self.p.grad is None else meshes.local_gradient(self.p)

    @property
    def resolved(self) -> Rule:
        """The rule that moves what is moved here, at the numbers of the param group."""
        return rule_of({"rule": self.rule}).at(self.group)

    @cached_property
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each piece of state, save ``step``, where the parameter is moved."""
        like = meshes.local(self.p) if self.is_local else torch.empty(self.p.shape, device="meta")
        return state_shapes(like, self.resolved)

    @cached_property
    def numbered(self) -> tuple[int, torch.Size, meshes.Part | None]:
        """The parameter's number, its shape, and what of it is moved here, see :func:`numerics.rounding.places`."""
        part = None
        if self.mesh is not None and self.is_local:
            part = meshes.part_of(self.p.shape, self.placements, tuple(self.mesh.shape), meshes.place_in(self.mesh))
        return number_of(self.group, self.place, self.index), self.p.shape, part

    @classmethod
    def of(cls, group: dict[str, Any], place: int, index: int, mesh: DeviceMesh | None) -> Home:
        """Of one parameter, which is on ``mesh`` if it is a plain tensor."""
        p, rule = group["params"][index], rule_of(group)
        resolved = rule.at(group)
        placements: tuple[Any, ...] = ()
        local: Rule | None = None
        if isinstance(p, DTensor):
            meshes.check_placements(name_of(group, p), p)
            mesh, placements = p.device_mesh, tuple(p.placements)
            if resolved.elementwise:
                local = replace(rule, view=View())  # parts need not be seen as matrices
            elif meshes.sharded_dimensions(placements) == {0}:
                local = rule.of_rows(tuple(p.shape))
        elif mesh is not None:
            placements = (Replicate(),) * mesh.ndim
        else:
            local = rule
        size = p.numel()
        shorter = min(p.shape[0], size // max(p.shape[0], 1)) if p.ndim > 1 and not resolved.elementwise else 1
        text = group["rule"] if local is None or local is rule else repr(local)
        is_local = local is not None
        return cls(
            p, group, place, index, mesh, placements, text, is_local, resolved.sees_weights, float(size * shorter)
        )
