"""Where each parameter is moved: here as it is, or, where its rule needs all of it, whole on the rank that owns it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from normopt.engine import mesh as meshes
from normopt.engine import products
from normopt.engine.batch import Batch, number_of, rate_and_shrink
from normopt.engine.checks import name_of, names_of
from normopt.engine.exchange import Exchange, Item, Routes, owners
from normopt.engine.finite import FiniteGuard, Watched
from normopt.engine.plan import State, age, state_shapes
from normopt.engine.ranks import Present, Ranks
from normopt.engine.totals import Party, kind, shared_by
from normopt.engine.wave import Wave
from normopt.ingredient.stage import Rate
from normopt.ingredient.view import View
from normopt.rule import Rule, rule_of

#: The most entries that one rank brings together at a time, unless a single parameter has more. It bounds the temporary
#: memory of a step.
WAVE_ENTRIES = 1 << 24


@dataclass(eq=False)
class Home:
    """Where one parameter is moved.

    Args:
        p: the parameter.
        place: the place of its param group.
        index: its place in the group.
        mesh: that it is on; ``None`` for a plain tensor that every rank moves by itself.
        placements: on the mesh.
        rule: that of its group, as text, or the same for parts of its matrices.
        is_local: whether this rank moves what it has of it; else its owner moves all of it.
        sees_weights: whether the rule asks for the weights.
        cost: the work of its step, in multiplications up to a factor.
    """

    p: Tensor
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
    def group(self) -> Any:
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

    @classmethod
    def of(cls, group: Mapping[str, Any], place: int, index: int, mesh: DeviceMesh | None) -> Home:
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
        return cls(p, place, index, mesh, placements, text, is_local, resolved.sees_weights, float(size * shorter))


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
        self._numbered: dict[Home, tuple[int, torch.Size, meshes.Part | None]] = {}
        self._state_shapes: dict[Home, dict[str, tuple[int, ...]]] = {}

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
        return [ShardedWave(self, homes) for homes in self._cut(self._groups)]

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
            wave.check(self._groups, state)

    def waves(self, guard: FiniteGuard, state: State) -> Iterator[ShardedWave]:
        """The waves of a step: what they bring is there when they come, and goes back when the next one comes."""
        for wave in self._waves:
            wave.arrive(self._groups, state, guard)
            yield wave
            wave.leave(state, guard)

    def where(self) -> dict[Tensor, str]:
        """Which ranks move each parameter, in words."""
        return {home.p: home.where for home in self.homes}

    def group_of(self, home: Home) -> dict[str, Any]:
        """The param group of a parameter."""
        return self._groups[home.place]

    def numbered(self, home: Home) -> tuple[int, torch.Size, meshes.Part | None]:
        """A parameter's number, its shape, and what of it is moved here, see :func:`numerics.rounding.places`."""
        if home not in self._numbered:
            part = None
            if home.mesh is not None and home.is_local:
                sizes, place = tuple(home.mesh.shape), meshes.place_in(home.mesh)
                part = meshes.part_of(home.p.shape, home.placements, sizes, place)
            number = number_of(self._groups[home.place], home.place, home.index)
            self._numbered[home] = number, home.p.shape, part
        return self._numbered[home]

    def state_shapes(self, home: Home) -> dict[str, tuple[int, ...]]:
        """The shape of each piece of state, save ``step``, where the parameter is moved."""
        if home not in self._state_shapes:
            like = meshes.local(home.p) if home.is_local else torch.empty(home.p.shape, device="meta")
            rule = rule_of({"rule": home.rule}).at(self._groups[home.place])
            self._state_shapes[home] = state_shapes(like, rule)
        return self._state_shapes[home]

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


# Waves ----------------------------------------------------------------------------------------------------------------


class _Bucket:
    """Tensors of one mesh and dtype that are exchanged together."""

    def __init__(self, dtype: torch.dtype, homes: Sequence[Home], kinds: Sequence[str] = ()) -> None:
        mesh = homes[0].mesh
        assert mesh is not None
        self.dtype = dtype
        #: Of each that comes to its owner, whether it is ``"gradient"`` or ``"weights"``.
        self.homes, self.kinds = homes, kinds
        self.exchange = Exchange(mesh, [Item(tuple(home.p.shape), home.placements, home.owner) for home in homes])

    def routes(self, number: int | None = None) -> Routes:
        """Of the rank with this number in the mesh; by default of this one."""
        here = self.exchange
        return here if number is None else Routes(here.sizes, here.items, number)


class ShardedWave(Wave):
    """Parameters that are brought together, moved and taken back before the next ones come."""

    def __init__(self, layout: Layout, homes: list[Home]) -> None:
        super().__init__([], {}, {})
        self._layout, self._homes = layout, homes
        self.everywhere = layout if layout.divides else None
        self._owned = [home for home in homes if not home.is_local]
        coming: dict[Any, list[tuple[Home, str]]] = defaultdict(list)
        going: dict[Any, list[Home]] = defaultdict(list)
        for home in self._owned:
            if not home.is_whole_here:
                coming[home.mesh, home.gradient.dtype].append((home, "gradient"))
                if home.sees_weights:
                    coming[home.mesh, home.p.dtype].append((home, "weights"))
            going[home.mesh, home.dtype, home.moves_weights].append(home)
        self._coming = [_Bucket(dtype, *zip(*each, strict=True)) for (_, dtype), each in coming.items()]
        self._going = [_Bucket(dtype, each) for (_, dtype, _), each in going.items()]
        self._stand_ins: dict[Home, Tensor] = {}
        self._shrinks: dict[Home, Rate] = {}
        self._guard: FiniteGuard | None = None
        self._goes_again = True

    @property
    def bytes_sent(self) -> int:
        """How many bytes this rank has sent to others."""
        return sum(bucket.exchange.bytes_sent for bucket in (*self._coming, *self._going))

    @property
    def all_to_alls(self) -> int:
        return len(self._coming) + len(self._going)

    def bytes_in_step(self, number: int | None = None) -> int:
        """See :meth:`Layout.bytes_in_step`."""
        coming = sum(bucket.routes(number).leaving_in * bucket.dtype.itemsize for bucket in self._coming)
        return coming + sum(bucket.routes(number).leaving_out * bucket.dtype.itemsize for bucket in self._going)

    def may_go(self, guard: FiniteGuard, batches: Sequence[Batch], *, again: bool = False) -> bool:
        return not again or self._goes_again  # all ranks have agreed before

    # What comes ---------------------------------------------------------------------------------------------------

    def check(self, groups: Sequence[dict[str, Any]], state: State) -> None:
        """See :meth:`Layout.check`; it also finds the factors of weights."""
        self._shrinks = self._shrinks_of(groups, state)
        for home in self._homes:
            age(state, home.p)
            wanted = self._layout.state_shapes(home) if home.is_here else {}
            for name, held in state.get(home.p, {}).items():
                if isinstance(held, Tensor) and held.shape != wanted.get(name, held.shape):
                    raise ValueError(
                        f"the state {name!r} of {names_of(groups[home.place])[home.index]} has shape "
                        f"{tuple(held.shape)} where {tuple(wanted[name])} is needed: it is the state of another one"
                    )

    def arrive(self, groups: Sequence[dict[str, Any]], state: State, guard: FiniteGuard) -> None:
        """Bring what this rank moves to tensors that stand for the parameters, and make param groups of these."""
        self._guard = guard
        came = self._collected()
        self._stand_ins = {}
        for home in self._homes:
            if home.is_local and not isinstance(home.p, DTensor):
                self._stand_ins[home] = home.p
            elif home.is_local or (home.is_mine and home.is_whole_here):
                self._stand_ins[home] = meshes.local(home.p).detach()
            elif home.is_mine and home.moves_weights:
                self._stand_ins[home] = came[home, "weights"]
            elif home.is_mine:
                self._stand_ins[home] = torch.zeros(home.p.shape, dtype=home.dtype, device=meshes.local(home.p).device)
        self._give_gradients(came)
        self.state = _StandIns(state, {q: home.p for home, q in self._stand_ins.items()})
        self.groups = [*self._local_groups(groups)]

    def _collected(self) -> dict[tuple[Home, str], Tensor]:
        """The whole gradients and weights that come to this rank."""
        found: dict[tuple[Home, str], Tensor] = {}
        for bucket in self._coming:
            each = [*zip(bucket.homes, bucket.kinds, strict=True)]
            sent = [home.gradient if what == "gradient" else meshes.local(home.p) for home, what in each]
            found |= {each[i]: x for i, x in bucket.exchange.collect(sent).items()}
        return found

    def _give_gradients(self, came: Mapping[tuple[Home, str], Tensor]) -> None:
        for home, q in self._stand_ins.items():
            if q is not home.p and home.p.grad is not None:
                g = came.get((home, "gradient"))
                q.grad = (home.gradient if g is None else g).to(q.dtype)

    def _local_groups(self, groups: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Each param group, if need be in parts that have one rule and either count in sums or not."""
        parts: dict[int, dict[tuple[str, bool, torch.dtype], list[Home]]] = defaultdict(lambda: defaultdict(list))
        for home in self._stand_ins:
            parts[home.place][home.rule, home.counts, home.p.dtype].append(home)
        for place, group in enumerate(groups):
            labels = names_of(group)
            for (rule, counts, dtype), homes in (parts[place] or {(group["rule"], True, torch.float32): []}).items():
                local = {key: value for key, value in group.items() if key not in ("param_names", "reasons")}
                local |= {"rule": rule, "counts": counts, "params": [self._stand_ins[home] for home in homes]}
                local["labels"] = [labels[home.index] for home in homes]
                local["numbered"] = [self._layout.numbered(home) for home in homes]
                if group["state_dtype"] == "parameter":  # that of the parameter, which the stand-in need not have
                    local["state_dtype"] = None if dtype == torch.float64 else str(dtype).removeprefix("torch.")
                yield local

    def _shrinks_of(self, groups: Sequence[dict[str, Any]], state: State) -> dict[Home, Rate]:
        """The factors of weights that no owner sees, which all ranks know: they depend on the step's number alone."""
        found: dict[Home, Rate] = {}
        known: dict[tuple[int, float], Rate] = {}
        for home in self._owned:
            found[home] = 1.0
            if not home.moves_weights and home.p.grad is not None:
                step = state.get(home.p, {}).get("step", 0.0)  # nothing is made before all ranks have agreed
                on_device = isinstance(step, Tensor) and not step.is_cpu
                taken = step if on_device else age(state, home.p)
                key = home.place, id(home) if on_device else taken
                if key not in known:
                    known[key] = _shrink(groups[home.place], taken)
                found[home] = known[key]
        return found

    @staticmethod
    def _counter(home: Home, group: Mapping[str, Any], state: State) -> Tensor:
        """Where this rank counts a parameter's steps, which ranks do that do not move it, too."""
        held = state.setdefault(home.p, {})
        device = meshes.local(home.p).device if group["capturable"] else torch.device("cpu")
        step = held.get("step", 0.0)
        if not isinstance(step, Tensor) or step.device != device:
            age(state, home.p)
            held["step"] = step = torch.tensor(float(step), device=device)
        return step

    # What goes back -----------------------------------------------------------------------------------------------

    def leave(self, state: State, guard: FiniteGuard) -> None:
        """Take what owners have made to where the parameters are placed; all ranks count the step."""
        found_inf = guard.found_inf()
        for bucket in self._going:
            parts = self._distributed(bucket)
            if bucket.homes[0].moves_weights:
                self._write(bucket, parts)
                continue
            shares = [meshes.local(home.p) for home in bucket.homes]
            factors = [self._shrinks[home] - 1 for home in bucket.homes]
            if found_inf is not None:
                factors = [torch.where(found_inf, 0.0, torch.as_tensor(x, device=found_inf.device)) for x in factors]
            wide = [share.to(part.dtype) for share, part in zip(shares, parts, strict=True)]
            if any(isinstance(x, Tensor) or x != 0 for x in factors):
                parts = [*torch._foreach_add([*parts], [w * x for w, x in zip(wide, factors, strict=True)])]
            torch._foreach_copy_(shares, torch._foreach_add(wide, parts))
        for home in self._owned:
            if not home.is_mine and home.p.grad is not None:
                self._count_away(home, state, guard, found_inf)
        self._stand_ins, self.groups, self.state = {}, [], {}

    def _distributed(self, bucket: _Bucket) -> list[Tensor]:
        home = bucket.homes[0]
        wholes = {i: self._stand_ins[bucket.homes[i]] for i in bucket.exchange.owned}
        return bucket.exchange.distribute(wholes, torch.empty(0, dtype=home.dtype, device=meshes.local(home.p).device))

    def _write(self, bucket: _Bucket, parts: Sequence[Tensor]) -> None:
        """Write weights to where the parameters are placed."""
        elsewhere = [not (home.is_mine and home.is_whole_here) for home in bucket.homes]
        shares = [meshes.local(home.p) for home, is_away in zip(bucket.homes, elsewhere, strict=True) if is_away]
        if shares:
            torch._foreach_copy_(shares, [part for part, is_away in zip(parts, elsewhere, strict=True) if is_away])

    def _count_away(self, home: Home, state: State, guard: FiniteGuard, found_inf: Tensor | None) -> None:
        """Count a step of a parameter that another rank moves; its state has the same names here, without entries."""
        group = self._layout.group_of(home)
        step, held = self._counter(home, group, state), state[home.p]
        for name in self._layout.state_shapes(home):
            held.setdefault(name, torch.empty(0, device=meshes.local(home.p).device))
        if found_inf is not None and step.is_cpu:
            guard.note_steps([step])
        step += 1 if found_inf is None or step.is_cpu else (~found_inf).to(step.dtype)

    @torch.no_grad()
    def run(self, closure: Callable[[], Any]) -> None:
        """Compute gradients at the weights as they are in the stand-ins, and bring them here."""
        assert self._guard is not None
        shares = [meshes.local(home.p) for home in self._owned]
        kept = [share.clone() for share in shares]
        try:
            for bucket in self._going:
                if bucket.homes[0].moves_weights:
                    self._write(bucket, self._distributed(bucket))
            with torch.enable_grad():
                closure()
            self._goes_again = self._layout.may_go(self._guard, None, again=True)
            self._give_gradients(self._collected())
        finally:
            for share, was in zip(shares, kept, strict=True):
                share.copy_(was)


class _StandIns(MutableMapping[Tensor, dict[str, Any]]):
    """``optimizer.state`` by the tensors that stand for parameters in one wave."""

    def __init__(self, state: State, origin: Mapping[Tensor, Tensor]) -> None:
        self._state, self._origin = state, origin

    def __getitem__(self, q: Tensor) -> dict[str, Any]:
        held = self._state.get(self._origin[q])  # a plain look would make an entry
        if held is None:
            raise KeyError(q)
        return held

    def __setitem__(self, q: Tensor, held: dict[str, Any]) -> None:
        self._state[self._origin[q]] = held

    def __delitem__(self, q: Tensor) -> None:
        del self._state[self._origin[q]]

    def __iter__(self) -> Iterator[Tensor]:
        return (q for q, p in self._origin.items() if p in self._state)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _shrink(group: dict[str, Any], taken: Any) -> Rate:
    """The factor of the weights of a rule that does not see them, after so many steps."""
    rule = rule_of(group).at(group)
    if rule.norm.looks_first and not isinstance(taken, Tensor) and taken == 0:
        return 1.0  # this gradient only prepares the state
    lr = group["lr"]
    lr = lr.squeeze() if isinstance(lr, Tensor) else lr
    shared = shared_by(group, rule)
    numbers = {name: x.item() for name, x in shared.items()} if all(x.is_cpu for x in shared.values()) else shared
    step = taken + 1 - rule.norm.looks_first
    return rate_and_shrink(rule, lr, step if isinstance(step, Tensor) else max(1.0, step), numbers)[1]
