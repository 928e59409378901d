"""How parameters are taken together, remembered from step to step, and where their state lies."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence, Set
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._nn import flatten_dense_tensors

from normopt.engine import kernels
from normopt.engine.checks import dtype_name
from normopt.rule import Rule

#: The most entries that one batch of matrices holds, unless a single parameter has more, for rules that multiply
#: matrices. It bounds the temporary memory of a step to a few times this many numbers.
MAX_ENTRIES = 1 << 22

#: The same for rules that neither multiply matrices nor have a kernel: few enough for the caches, since they do little
#: more than read and write memory. Where every entry moves by itself, larger parameters are worked through in chunks.
FLAT_ENTRIES = 1 << 18

#: What ``optimizer.state`` is: each parameter's entries by name.
State = MutableMapping[Tensor, dict[str, Any]]

#: What a parameter's data must keep for its plan to hold: it may have been replaced.
_kind = attrgetter("shape", "dtype", "device")


class _Layout(NamedTuple):
    """One piece of state of a plan's parameters: the tensor that holds it all, and where each parameter's part is."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    bytes: int
    shapes: list[torch.Size]
    strides: list[tuple[int, ...]]
    #: In bytes, for the parts that are not empty: their places among the parameters, and where they begin.
    filled: list[int]
    offsets: list[int]
    is_contiguous: bool

    @classmethod
    def of(cls, whole: Tensor, parts: Iterable[Tensor], device: torch.device) -> _Layout:
        """From a tensor with memory of its own on ``device``, or one of the same layout on the device ``meta``."""
        views, size = [*parts], whole.element_size()
        filled = [i for i, view in enumerate(views) if view.numel()]
        offsets = [int(views[i].storage_offset()) * size for i in filled]
        shapes, strides = [view.shape for view in views], [view.stride() for view in views]
        layout = whole.shape, whole.stride(), whole.dtype, device, whole.numel() * size
        return cls(*layout, shapes, strides, filled, offsets, all(map(Tensor.is_contiguous, views)))

    def are_parts(self, entries: Sequence[Any], places: Sequence[int]) -> bool:
        """Whether ``entries``, one for each parameter, at these addresses, are parts of one tensor as described."""
        fit = all(map(self._fits, entries, self.shapes, self.strides))
        begins = [places[i] for i in self.filled] if fit else []
        return fit and begins == [begins[0] + offset for offset in self.offsets]

    def _fits(self, entry: Any, shape: torch.Size, strides: tuple[int, ...]) -> bool:
        return (
            not entry.is_inference()  # which could not be changed in place
            and (entry.dtype, entry.device) == (self.dtype, self.device)
            and entry.shape == shape
            # Where there is one entry, a stride means nothing.
            and all(a == b for a, b, size in zip(entry.stride(), strides, shape, strict=True) if size > 1)
        )

    def own_their_memory(self, entries: Sequence[Tensor]) -> bool:
        """Whether the memory that parts lie in is theirs alone, and all of it is there."""
        return not self.filled or entries[self.filled[0]].untyped_storage().nbytes() == self.bytes

    def whole(self, entries: Sequence[Tensor]) -> Tensor:
        """The tensor that all of them are parts of."""
        return entries[self.filled[0] if self.filled else 0].as_strided(self.shape, self.stride, 0)


class Joined(NamedTuple):
    """The state of a plan's parameters where it lies together."""

    #: Each parameter's entries by name.
    entries: dict[str, list[Tensor]]
    #: All entries ``step`` as one tensor.
    steps: Tensor


class Plan:
    """Parameters of one group that move together, by their places in ``group["params"]``.

    They have one dtype, device, age and, unless the rule works entry by entry, shape. Plans, and the fingerprint of
    ``WarmStep``, are all that is remembered between two steps, and they hold numbers only: parameters and state belong
    to those who hold them. Each parameter's entries in ``optimizer.state`` are views of one tensor for all parameters
    of the plan, so that a step runs on whole batches without collecting anything but gradients. Whether they still are
    is asked at every step.
    """

    def __init__(self, group: Mapping[str, Any], members: list[int], rule: Rule) -> None:
        self.members, self.rule = members, rule
        #: The rule as the group writes it: under one plan only its numbers may change.
        self.text = group["rule"]
        params = self.params(group)
        self.kinds = [*map(_kind, params)]
        self.flat = rule.elementwise
        self.captured = bool(group["capturable"])
        #: The dtype that steps are computed in.
        self.working = torch.promote_types(params[0].dtype, torch.float32)
        self.wanted = group["state_dtype"]
        self.kept = kept_dtype(group, params[0].dtype, self.working)
        self.squares = rule.squares
        shapes = [rule.view.shape(tuple(p.shape)) for p in params]
        #: How much of the first dimension of a batch belongs to each parameter.
        self.sizes = [p.numel() for p in params] if self.flat else [shape[0] for shape in shapes]
        #: Whether each parameter is one matrix of the stack, as it is.
        self.is_stack = not (self.flat or rule.view.transpose) and all(
            len(p.shape) == 2 and (1, *p.shape) == shape for p, shape in zip(params, shapes, strict=True)
        )
        self.has_no_empty = 0 not in self.sizes
        #: Whether all parameters have one shape, of one dimension or more.
        self.is_uniform = len({p.shape for p in params}) == 1 and params[0].ndim > 0
        # As gradients are gathered, but without numbers: strides of state follow theirs.
        x = self.gather([torch.empty_like(g, device="meta") for g in (p.grad for p in params) if g is not None])
        self.shape = x.shape
        state = rule.init_state(x, lambda: x)
        #: The names of state that is kept in fewer bits than it is computed with.
        self.rounded = rule.averages(state) if self.kept != self.working else []
        state |= {name: state[name].to(self.kept) for name in self.rounded}
        steps = torch.empty(len(params), dtype=torch.float32, device="meta")
        #: Where steps are counted.
        self.home = params[0].device if self.captured else torch.device("cpu")
        self.layouts = {"step": _Layout.of(steps, steps.unbind(), self.home)}
        for name, whole in state.items():
            self.layouts[name] = _Layout.of(whole, self.parts(whole, params), params[0].device)
        self.kernel = self._find_kernel()
        # Which tensors the entries were, how they were strided and where, when they were last looked at.
        self._seen: list[int] = []
        self._strides: list[tuple[int, ...]] = []
        self._places: list[int] = []

    def _find_kernel(self) -> kernels.Kernel | None:
        """The kernel of the rule, if its state lies in memory as contiguous parameters do, in their dtype."""
        kernel = kernels.find(self.rule)
        if kernel is None or {dtype for _, dtype, _ in self.kinds} != {self.working}:
            return None
        shapes = [shape for shape, *_ in self.kinds]
        if not kernel.suits([shape.numel() for shape in shapes]):
            return None
        read = [self.layouts[name] for name in kernel.reads]
        fit = all(x.is_contiguous and x.dtype == self.working and x.shapes == shapes for x in read)
        return kernel if fit else None

    def whole(self, name: str, entries: Sequence[Tensor]) -> Tensor:
        """The tensor that each parameter's entries of this name are parts of."""
        return self.layouts[name].whole(entries)

    def laid_out(self, name: str, x: Tensor) -> Tensor:
        """``x``, a new piece of state, in memory of its own and in this plan's layout."""
        wanted = self.layouts[name]
        if x.stride() == wanted.stride and x.untyped_storage().nbytes() == wanted.bytes:
            return x
        return torch.empty_strided(wanted.shape, wanted.stride, dtype=x.dtype, device=x.device).copy_(x)

    def params(self, group: Mapping[str, Any]) -> list[Tensor]:
        """The parameters themselves."""
        given = group["params"]
        return [given[i] for i in self.members]

    def holds(self, params: Sequence[Tensor], group: Mapping[str, Any], rule: Rule) -> bool:
        """Whether the plan is still right for these parameters of the group under ``rule``.

        Their data may have been replaced, and the rule may have got a momentum in place of 0, or another
        ``state_dtype``.
        """
        if (
            group["rule"] != self.text
            or self.kinds != [*map(_kind, params)]
            or self.captured != bool(group["capturable"])
        ):
            return False
        if group["state_dtype"] != self.wanted and self.kept != kept_dtype(group, params[0].dtype, self.working):
            return False
        if rule is not self.rule:
            x = torch.empty(self.shape, device="meta")
            shapes = {name: y.shape for name, y in rule.init_state(x, x.clone).items()}
            if rule.elementwise != self.flat or shapes != {n: a.shape for n, a in self.layouts.items() if n != "step"}:
                return False
            self.rule, self.squares = rule, rule.squares
            self.kernel = self._find_kernel()
        return True

    def joined(self, held: Sequence[Mapping[str, Any]]) -> Joined | None:
        """The state of all parameters, if it is parts of one tensor for each name and all ages are equal.

        ``None`` if they are not: the state is new, or somebody has replaced, moved, cast or deleted some of it.

        Args:
            held: what ``optimizer.state`` has for each parameter, at this moment.
        """
        found: dict[str, list[Any]] = {name: [each.get(name) for each in held] for name in self.layouts}
        every = [entry for entries in found.values() for entry in entries]
        now = [*map(id, every)]
        if now != self._seen:
            if not all(isinstance(entry, Tensor) and entry.layout == torch.strided for entry in every):
                return None
            self._places = []
        strides = [*map(Tensor.stride, every)]
        if strides != self._strides:
            self._places = []
        places = _addresses(every)
        if places != self._places:
            each = zip(self.layouts.values(), found.values(), _split(places, len(held)), strict=True)
            if not all(wanted.are_parts(entries, begins) for wanted, entries, begins in each):
                return None
        if not all(map(_Layout.own_their_memory, self.layouts.values(), found.values())):
            return None
        steps = self.layouts["step"].whole(found["step"])
        if len(held) > 1 and not self.captured and len({*steps.tolist()}) > 1:
            return None
        self._seen, self._strides, self._places = now, strides, places
        return Joined(found, steps)

    def gather(self, tensors: Iterable[Tensor]) -> Tensor:
        """One tensor from one like each parameter; it may share memory with them, so it must not be modified."""
        return self.together(tensors).to(self.working)

    def together(self, tensors: Iterable[Tensor]) -> Tensor:
        """``gather`` in the dtype that they have."""
        if self.flat and len(self.members) == 1:
            return next(iter(tensors)).reshape(-1)
        if self.flat and self.is_uniform:  # which is faster for many small ones
            return torch.cat([*tensors]).reshape(-1)
        if self.flat:
            return flatten_dense_tensors([*tensors])
        if self.is_stack and len(self.members) > 1:
            return torch.stack([*tensors])
        parts = [self.rule.view.apply(tensor) for tensor in tensors]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def parts(self, whole: Tensor, params: Sequence[Tensor]) -> Iterator[Tensor]:
        """Each parameter's part of a state tensor, in the parameter's own shape where the state has one."""
        for part, p in zip(torch.split(whole, self.sizes), params, strict=True):
            view = self.rule.view
            is_own = self.flat or (view.keeps_order and tuple(part.shape) == view.shape(p.shape))
            yield self.like(part, p) if is_own else part

    def like(self, part: Tensor, p: Tensor) -> Tensor:
        """A part of a batch in the parameter's shape; shares memory."""
        return part.view(p.shape) if self.flat else self.rule.view.invert(part, p.shape)


def kept_dtype(group: Mapping[str, Any], own: torch.dtype, working: torch.dtype) -> torch.dtype:
    """The dtype that averages are kept in: the param group's, the parameter's, or that of the computation."""
    wanted = dtype_name(group["state_dtype"])
    return working if wanted is None else own if wanted == "parameter" else getattr(torch, wanted)


def partition(group: Mapping[str, Any], members: Iterable[int], rule: Rule, state: State) -> Iterator[Plan]:
    """Plans for those parameters of a group that have gradients; no batch is too large unless it is one parameter."""
    params = group["params"]
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for i in members:
        p = params[i]
        shape = () if rule.elementwise else (p.ndim < 2, *rule.view.shape(p.shape)[1:])
        kinds.setdefault((shape, p.dtype, p.device, age(state, p)), []).append(i)
    kernel = kernels.find(rule)
    for (_, dtype, *_), alike in kinds.items():
        suits = kernel is not None and kernel.suits([params[i].numel() for i in alike])
        is_whole = rule.norm.reduces == "matrix" or (suits and dtype in (torch.float32, torch.float64))
        limit = MAX_ENTRIES if is_whole else FLAT_ENTRIES
        entries, part = 0, list[int]()
        for i in alike:
            size = params[i].numel()
            if part and entries + size > limit:
                yield Plan(group, part, rule)
                entries, part = 0, []
            entries, part = entries + size, [*part, i]
        yield Plan(group, part, rule)


def age(state: State, p: Tensor) -> float:
    """How many steps ``p`` has taken.

    Raises:
        ValueError: its state says something that is no number of steps.
    """
    step = state[p]["step"] if "step" in state.get(p, ()) else 0.0
    number = float(step) if isinstance(step, (int, float)) or (isinstance(step, Tensor) and step.numel() == 1) else -1.0
    if not 0 <= number < math.inf:
        raise ValueError(f"the state 'step' must be a number of steps, 0 or more, got {step!r}")
    return number


def state_shapes(p: Tensor, rule: Rule) -> dict[str, tuple[int, ...]]:
    """The shape of each piece of state, save ``step``, that a rule keeps for a parameter; nothing is computed."""
    seen = (p.numel(),) if rule.elementwise else rule.view.shape(tuple(p.shape))
    x = torch.empty(seen, device="meta")
    state = rule.init_state(x, lambda: x)
    is_own = rule.elementwise or rule.view.keeps_order
    return {name: tuple(p.shape if is_own and y.shape == x.shape else y.shape) for name, y in state.items()}


def separate(state: State, joined: Mapping[int, Set[str]], names: Set[str]) -> None:
    """Give those ``names`` of state memory of their own that are no longer part of a batch.

    A parameter that has left its batch would keep the memory of the whole batch alive.

    Args:
        state: what ``optimizer.state`` is.
        joined: the names that are parts of batches, by the parameter's ``id``.
        names: what plans call their state; other entries are somebody else's.
    """
    for p, held in state.items():
        for name in names & held.keys() - joined.get(id(p), frozenset()):
            entry = held[name]
            if isinstance(entry, Tensor) and entry.untyped_storage().nbytes() > entry.numel() * entry.element_size():
                held[name] = entry.clone()


def _addresses(entries: Sequence[Tensor]) -> list[int]:
    """Where tensors begin; those without numbers have a storage and a place in it all the same."""
    if type(entries[0]) is Tensor and not entries[0].is_meta:
        return [*map(Tensor.data_ptr, entries)]
    return [x.untyped_storage()._cdata + x.storage_offset() * x.element_size() for x in entries]


def _split(places: list[int], size: int) -> Iterator[list[int]]:
    return (places[i : i + size] for i in range(0, len(places), size))
