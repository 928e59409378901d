"""Sharded parameters that are brought together, moved, and taken back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from normopt.engine import mesh as meshes
from normopt.engine.batch import Batch, rate_and_shrink
from normopt.engine.checks import names_of
from normopt.engine.exchange import Exchange, Item, Routes
from normopt.engine.finite import FiniteGuard
from normopt.engine.home import Home
from normopt.engine.plan import State, age
from normopt.engine.totals import Everywhere, shared_by
from normopt.engine.wave import Wave
from normopt.ingredient.stage import Rate
from normopt.rule import rule_of


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
    """Parameters that are brought together, moved and taken back before the next ones come.

    Args:
        homes: where each is moved.
        everywhere: the other ranks, if they have tensors that this one has not.
        may_all_go: whether all ranks can go on with the gradients that a closure has computed once more.
    """

    def __init__(
        self, homes: list[Home], everywhere: Everywhere | None, may_all_go: Callable[[FiniteGuard], bool]
    ) -> None:
        super().__init__([], {}, {})
        self._homes, self.everywhere, self._may_all_go = homes, everywhere, may_all_go
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
        """How many bytes the all-to-alls of one step take from a rank to others; by default from this one."""
        coming = sum(bucket.routes(number).leaving_in * bucket.dtype.itemsize for bucket in self._coming)
        return coming + sum(bucket.routes(number).leaving_out * bucket.dtype.itemsize for bucket in self._going)

    def may_go(self, guard: FiniteGuard, batches: Sequence[Batch], *, again: bool = False) -> bool:
        return not again or self._goes_again  # all ranks have agreed before

    # What comes ---------------------------------------------------------------------------------------------------

    def check(self, state: State) -> None:
        """Raise a ``ValueError`` for state of another shape, before anything moves; and find the factors of weights."""
        self._shrinks = self._shrinks_of(state)
        for home in self._homes:
            age(state, home.p)
            wanted = home.state_shapes if home.is_here else {}
            for name, held in state.get(home.p, {}).items():
                if isinstance(held, Tensor) and held.shape != wanted.get(name, held.shape):
                    raise ValueError(
                        f"the state {name!r} of {names_of(home.group)[home.index]} has shape "
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
                local["numbered"] = [home.numbered for home in homes]
                if group["state_dtype"] == "parameter":  # that of the parameter, which the stand-in need not have
                    local["state_dtype"] = None if dtype == torch.float64 else str(dtype).removeprefix("torch.")
                yield local

    def _shrinks_of(self, state: State) -> dict[Home, Rate]:
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
                    known[key] = _shrink(home.group, taken)
                found[home] = known[key]
        return found

    @staticmethod
    def _counter(home: Home, state: State) -> Tensor:
        """Where this rank counts a parameter's steps, which ranks do that do not move it, too."""
        held = state.setdefault(home.p, {})
        device = meshes.local(home.p).device if home.group["capturable"] else torch.device("cpu")
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
        step, held = self._counter(home, state), state[home.p]
        for name in home.state_shapes:
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
            self._goes_again = self._may_all_go(self._guard)
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
