"""Where all parameters of an optimizer are moved, and in which waves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from normopt.engine import mesh as meshes
from normopt.engine import products
from normopt.engine.checks import names_of
from normopt.engine.exchange import owners
from normopt.engine.finite import FiniteGuard, Watched
from normopt.engine.home import Home
from normopt.engine.plan import State
from normopt.engine.ranks import Present, Ranks
from normopt.engine.sharded_wave import ShardedWave
from normopt.engine.totals import Party, kind, shared_by
from normopt.rule import rule_of

#: The most entries that one rank brings together at a time, unless a single parameter has more. It bounds the temporary
#: memory of a step.
WAVE_ENTRIES = 1 << 24


class Layout:
    """Where all parameters of an optimizer are moved, for one process group.

    A parameter is moved by each rank that has a part of it if its rule needs no more than that. Otherwise one rank
    owns it, and moves all of it: gradients come to the owner, and weights if the rule sees them, and the update goes
    back. All ranks know who owns what without telling each other, and it stays so, whoever has a gradient.

    Args:
        groups: the optimizer's param groups.
        mesh: that plain tensors are replicated on, whose ranks share the work; ``None`` if each rank does all of it.
        group: the process group that steps together; by default the ranks of all meshes.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], mesh: DeviceMesh | None, group: Any) -> None:
        self.homes = [
            Home.of(group, place, index, mesh)
            for place, group in enumerate(groups)
            for index in range(len(group["params"]))
        ]
        self._fingerprint = fingerprint(groups)
        on_meshes = [home.mesh for home in self.homes if home.mesh is not None]
        #: Whether ranks have different tensors to move.
        self.divides = bool(on_meshes)
        self.device = next((meshes.local(home.p).device for home in self.homes), torch.device("cpu"))
        self._cover = meshes.covering(on_meshes) if on_meshes else None
        if self._cover is not None:
            self._assign(self._cover)
        self._groups, self._process_group = groups, group
        self._has_agreed = False

    # What needs process groups is made at the first step, which all ranks take; a layout can be looked at by one.

    @cached_property
    def _sums(self) -> Ranks:
        """The ranks over which step sizes add up."""
        assert self._cover is not None
        return Ranks(meshes.group_of(self._cover), self.device)

    @cached_property
    def ranks(self) -> Ranks:
        """The ranks that step together."""
        return self._sums if self._process_group is None else Ranks(self._process_group, self.device)

    @cached_property
    def _waves(self) -> list[ShardedWave]:
        everywhere, may_all_go = (self if self.divides else None), partial(self.may_go, refusal=None, again=True)
        return [ShardedWave(homes, everywhere, may_all_go) for homes in self._cut(self._groups)]

    def fits(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Whether parameters, their memory and their rules are still what they were."""
        return fingerprint(groups) == self._fingerprint

    def _assign(self, cover: DeviceMesh) -> None:
        here = meshes.place_in(cover)
        by_mesh: dict[DeviceMesh, list[Home]] = defaultdict(list)
        for home in self.homes:
            mesh, inside = home.mesh, list[int]()
            if mesh is not None:
                inside = meshes.dimensions_in(cover, mesh)
                by_mesh[mesh].append(home)
            # Of equal copies one counts: that of the first ranks along all dimensions on which they are equal.
            home.counts = all(here[i] == 0 for i in range(cover.ndim) if i not in inside)
            if mesh is not None and home.is_local:
                place = zip(meshes.place_in(mesh), home.placements, strict=True)
                home.counts &= all(at == 0 for at, placement in place if isinstance(placement, Replicate))
        for mesh, homes in by_mesh.items():
            owned = [home for home in homes if not home.is_local]
            me = meshes.coordinates(mesh.shape).index(meshes.place_in(mesh))
            given = owners([home.cost for home in owned], [home.p.numel() for home in owned], mesh.size())
            for home, owner in zip(owned, given, strict=True):
                home.owner, home.is_mine = owner, owner == me
                home.counts &= home.is_mine

    def _cut(self, groups: Sequence[dict[str, Any]]) -> list[list[Home]]:
        """The parameters that can have gradients, wave by wave; one wave if something must see all of them at once.

        What is exchanged does not depend on which gradients there are: no rank can find that out before it must send.
        """
        moving = [home for home in self.homes if home.p.requires_grad or home.p.grad is not None]
        waves: list[list[Home]] = [[home for home in moving if home.is_local]]
        rules = [rule_of(group).at(group) for group in groups]
        at_once = any(rule.step_size.overrides(method) for rule in rules for method in ("survey", "measure"))
        at_once |= any(rule.momentum.looks_back for rule in rules)
        filled: dict[tuple[Any, int], tuple[int, int]] = defaultdict(lambda: (0, 0))
        owned = [home for home in moving if not home.is_local]
        for home in sorted(owned, key=lambda home: tuple(home.p.shape)):  # so that equal shapes move together
            wave, entries = filled[home.mesh, home.owner]
            if entries and entries + home.p.numel() > WAVE_ENTRIES and not at_once:
                wave, entries = wave + 1, 0
            filled[home.mesh, home.owner] = wave, entries + home.p.numel()
            waves += [[] for _ in range(wave + 1 - len(waves))]
            waves[wave].append(home)
        return waves

    # A step -------------------------------------------------------------------------------------------------------

    def may_go(self, guard: FiniteGuard, refusal: Exception | None, *, again: bool = False) -> bool:
        """Whether all ranks can take the step, see :meth:`~normopt.engine.finite.FiniteGuard.may_all_go`."""
        watched = []
        for group in (group for group in self._groups if group["nonfinite"] != "propagate"):
            params = [p for p in group["params"] if p.grad is not None]
            watched.append(Watched(group, params, [meshes.local_gradient(p) for p in params]))
        present = [home.p.grad is not None for home in self.homes]
        return guard.may_all_go(self.ranks, watched, Present(present, self.names), refusal, again=again)

    def names(self) -> list[str]:
        """The names of all parameters."""
        return [name for group in self._groups for name in names_of(group)]

    def agree_on_products(self, by_rule: bool) -> None:
        """Let all ranks multiply matrices as the first has found fastest: replicas must be equal to the bit."""
        if not self._has_agreed and any(rule_of(group).open_parts for group in self._groups):
            found = products.choices(self._groups, by_rule) if self.ranks.rank == 0 else {}
            products.adopt(self._groups, self.ranks.every(found)[0])
        self._has_agreed = True

    def check(self, state: State) -> None:
        """Raise a ``ValueError`` for what this rank can find wrong with numbers and state before anything moves."""
        for wave in self._waves:
            wave.check(state)

    def waves(self, guard: FiniteGuard, state: State) -> Iterator[ShardedWave]:
        """The waves of a step: what they bring is there when they come, and goes back when the next one comes."""
        for wave in self._waves:
            wave.arrive(self._groups, state, guard)
            yield wave
            wave.leave(state, guard)

    def where(self) -> dict[Tensor, str]:
        """Which ranks move each parameter, in words."""
        return {home.p: home.where for home in self.homes}

    def parties(self, method: str) -> list[Party]:
        return self.parties_in(self._groups, method)

    @staticmethod
    def parties_in(groups: Sequence[dict[str, Any]], method: str) -> list[Party]:
        """The first step size of each kind that has summands from ``method``, in the order of param groups.

        Raises:
            ValueError: it does not say which.
        """
        found: dict[str, Party] = {}
        for group in groups:
            rule = rule_of(group).at(group)
            step_size = rule.step_size
            if step_size.overrides(method) and any(p.grad is not None for p in group["params"]):
                if not getattr(step_size, f"{method}_sums"):
                    raise ValueError(
                        f"{type(step_size).__name__} does not say which sums its {method} makes, which all ranks must "
                        f"know: give the class {method}_sums = (names of what it returns)"
                    )
                found.setdefault(kind(step_size), Party(step_size, shared_by(group, rule)))
        return [*found.values()]

    def total(self, x: Tensor) -> Tensor:
        return self._sums.total(x)

    @property
    def bytes_sent(self) -> int:
        """How many bytes this rank has sent to others since the layout was made."""
        return sum(wave.bytes_sent for wave in self._waves)

    @property
    def all_to_alls(self) -> int:
        """How many there are in a step, beside one small all-reduce first and one whenever a step size sums."""
        return sum(wave.all_to_alls for wave in self._waves)

    def bytes_in_step(self, number: int | None = None) -> int:
        """How many bytes the all-to-alls of one step take from a rank to others: from placements alone.

        Args:
            number: the rank's, in the mesh that all parameters must then be on; by default this rank.
        """
        return sum(wave.bytes_in_step(number) for wave in self._waves)


def found(groups: Sequence[dict[str, Any]], mesh: DeviceMesh | None, group: Any) -> Layout | None:
    """The layout of these param groups; ``None`` if every process has plain tensors and steps by itself."""
    is_sharded = any(isinstance(p, DTensor) for each in groups for p in each["params"])
    return Layout(groups, mesh, group) if is_sharded or mesh is not None or group is not None else None


def fingerprint(groups: Sequence[dict[str, Any]]) -> list[Any]:
    """What a layout depends on, beside which parameters have gradients."""
    found: list[Any] = []
    for group in groups:
        rule = rule_of(group).at(group)
        asks = [rule.step_size.overrides(method) for method in ("survey", "measure")]
        found += [group["rule"], rule.elementwise, rule.sees_weights, *asks]
        found += [id(x) for p in group["params"] for x in (p, meshes.local(p))]
    return found
