"""Parameters that move together: one tensor for all their gradients, and one for each piece of their state."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from functools import reduce
from operator import attrgetter, is_, methodcaller, mul
from typing import Any

import torch
from torch import Tensor

from normopt.engine import kernels
from normopt.numerics.host import host_may_look
from normopt.numerics.rounding import stochastically
from normopt.rule import Rule
from normopt.stepsize.base import Numbers, Shared, double

#: The most entries that one batch of matrices holds, unless a single parameter has more, for rules that multiply
#: matrices. It bounds the temporary memory of a step to a few times this many numbers.
MAX_ENTRIES = 1 << 22

#: The same for all other rules: few enough for the caches, since they do little more than read and write memory. Where
#: every entry moves by itself, larger parameters are worked through in pieces.
FLAT_ENTRIES = 1 << 19

#: Gradients whose entries are no larger have finite sums of squares in float32, however many there are.
LARGEST = torch.finfo(torch.float32).max ** 0.4

State = MutableMapping[Tensor, dict[str, Any]]

Number = Any  # a float, or a 0-dimensional tensor of the device in capturable steps


class Batch:
    """Parameters of one param group with the same dtype, device, age and, unless the rule works entry by entry, shape.

    Entry-wise rules see all parameters laid end to end, shape ``(entries,)``; the others a stack of matrices, shape
    ``(matrices, out, in)``. State lives in tensors of the batch; ``optimizer.state[p]`` holds views of them, so that
    each step runs on whole batches without collecting anything but gradients.
    """

    def __init__(self, group: dict[str, Any], params: list[Tensor], rule: Rule, state: State) -> None:
        self.group, self.params, self.rule = group, params, rule
        self.flat = rule.elementwise
        self._kept: Tensor | None = None
        self.number: Number = 0.0
        self._in_tensors = False
        self.lr: float | Tensor = 0.0
        self.first = 0
        self._squares, self.saturates = rule.squares, False
        self.known: tuple[Rule, kernels.AdamKernel | None] | None = None  # a rule, and its kernel if the tensors fit
        self.kernel: kernels.AdamKernel | None = None
        self.ok: Tensor | None = None  # whether the device finds that the step can be taken, if it must ask
        self.dtype = torch.promote_types(params[0].dtype, torch.float32)
        self.captured = bool(group["capturable"])
        home = params[0].device if self.captured else "cpu"
        self.steps = torch.full((len(params),), age(state, params[0]), dtype=torch.float32, device=home)
        self._kinds = [*map(_kind, params)]
        g = self.gradient()
        self._shape = g.shape
        self.state = rule.init_state(g, self.rounded_weights)
        self.kept = kept_dtype(group, params[0].dtype, self.dtype)
        self.rounded = rule.averages(self.state) if self.kept != self.dtype else []
        self.state |= {name: self.state[name].to(self.kept) for name in self.rounded}
        parts = {name: list(self._state_views(tensor)) for name, tensor in self.state.items()}
        self._views = {"step": list(self.steps.unbind()), **parts}
        for i, p in enumerate(params):
            _check_shapes(state.get(p, {}), self._views_of(i))

    def adopt(self, state: State) -> None:
        """Copy the parameters' state into this batch, and let ``state`` hold views of it from now on."""
        for i, p in enumerate(self.params):
            saved, views = state[p], self._views_of(i)
            for name in saved.keys() & views.keys():
                views[name].copy_(saved[name])
            saved.update(views)

    def is_current(self, state: State) -> bool:
        """Whether the parameters are what they were, and their state still consists of this batch's views."""
        held = [state.get(p, {}) for p in self.params]
        return self._kinds == [*map(_kind, self.params)] and all(
            all(map(is_, map(methodcaller("get", name), held), views)) for name, views in self._views.items()
        )

    def holds_state_of(self, rule: Rule) -> bool:
        """Whether ``rule`` needs this state and no other, as the param group wants it kept.

        It may have got a momentum in place of 0 since, or another ``state_dtype``.
        """
        is_kept_alike = self.kept == kept_dtype(self.group, self.params[0].dtype, self.dtype)
        if not is_kept_alike or self.captured != bool(self.group["capturable"]):
            return False
        if rule == self.rule:
            return True
        x = torch.empty(self._shape, device="meta")
        return rule.elementwise == self.flat and rule.init_state(x, x.clone).keys() == self.state.keys()

    def gather(self, tensors: Iterable[Tensor]) -> Tensor:
        """One tensor from one like each parameter; it may share memory with them, so it must not be modified."""
        if self.flat:
            parts = [tensor.reshape(-1) for tensor in tensors]
        else:
            parts = [self.rule.view.apply(tensor) for tensor in tensors]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole.to(self.dtype)

    def scatter(self, x: Tensor) -> list[Tensor]:
        """The inverse of ``gather``: views of ``x`` (or of a copy), one like each parameter."""
        x = x.contiguous() if self.rule.view.split > 1 else x
        return [self._like(piece, p) for piece, p in zip(self._pieces(x), self.params, strict=True)]

    def gradient(self, gradients: Iterable[Tensor] | None = None) -> Tensor:
        """The gradients, or those given, negated where the group maximizes; 0 for a step that must not be taken."""
        if gradients is None:
            g, self._kept = self._gathered() if self._kept is None else self._kept, None
        else:
            g = self.gather(gradients)
        g = g if self.ok is None else choose(self.ok, g, torch.zeros_like(g))
        g = saturated(g) if self.saturates else g
        return g.neg() if self.group["maximize"] else g

    @property
    def gradients(self) -> list[Tensor]:
        """The parameters' gradients as they are."""
        return [p.grad for p in self.params]  # type: ignore[misc]

    def _gathered(self) -> Tensor:
        return self.gather(self.gradients)

    def norm_of_gradient(self) -> float:
        """The Euclidean norm of the gradients, which are gathered now and kept until the step asks for them.

        Kernels take gradients as they are; then it is the sum of their norms.
        """
        if self.kernel is not None:
            return sum(norm.item() for norm in torch._foreach_norm(self.gradients))
        self._kept = self._gathered()
        return norm_on_host(self._kept)

    def pieces(self) -> Sequence[tuple[Batch | Piece, list[Tensor]]]:
        """This batch, or the parts of its one parameter, if that is large and every entry moves by itself.

        Each with what must be put back if the device finds that the step must not be taken.
        """
        p = self.params[0]
        in_pieces = (
            self.flat
            and not self._in_tensors  # compilers make no temporary tensors of this size
            and self.ok is None
            and len(self.params) == 1
            and p.numel() > FLAT_ENTRIES
            and all(x.is_contiguous() for x in (p, *self.gradients))
            and all(x.shape == self._shape for x in self.state.values())
            and not (self.rule.momentum.looks_back or self.rule.norm.looks_first)
        )
        if not in_pieces:
            return [(self, self.snapshot())]
        self._kept = None
        return [(Piece(self, slice(i, i + FLAT_ENTRIES)), []) for i in range(0, p.numel(), FLAT_ENTRIES)]

    def views(self, name: str) -> list[Tensor]:
        """Each parameter's part of one piece of state."""
        return self._views[name]

    def _views_of(self, i: int) -> dict[str, Tensor]:
        return {name: views[i] for name, views in self._views.items()}

    def weights(self) -> Tensor:
        """The weights, in float32 or better, with what constraints know of them beyond the parameters."""
        return self.rule.whole(self.rounded_weights(), self.state)

    def rounded_weights(self) -> Tensor:
        """The parameters as they are, in float32 or better."""
        return self.gather(self.params)

    @property
    def is_watched(self) -> bool:
        """Whether gradients that are not finite keep these parameters from moving."""
        return bool(self.group["nonfinite"] != "propagate" and not self.params[0].is_meta)

    @property
    def on_host(self) -> bool:
        """Whether the host may look at numbers at any time: nothing is traced or captured, no device is waited for."""
        return host_may_look(self.steps) and self.params[0].is_cpu and not (self.captured or self._in_tensors)

    @property
    def is_vector(self) -> bool:
        """Whether these are vectors or scalars, each seen as a matrix with one row."""
        return not self.flat and self.params[0].ndim < 2

    def snapshot(self) -> list[Tensor]:
        """Copies of weights and state, if only the device will know whether the step can be taken."""
        return [] if self.ok is None else [x.clone() for x in (self.rounded_weights(), *self.state.values())]

    def undo_unless_ok(self, before: list[Tensor]) -> None:
        """Put back what ``snapshot`` has returned if the device finds that the step must not be taken."""
        if self.ok is None:
            return
        old_weights, *old = before
        torch._foreach_copy_(self.params, self.scatter(choose(self.ok, self.rounded_weights(), old_weights)))
        for x, y in zip(self.state.values(), old, strict=True):
            x.copy_(choose(self.ok, x, y))
        if self.captured:
            self.steps.copy_(choose(self.ok, self.steps, self.steps - 1))

    def prepare(self, rule: Rule, shared: Shared, in_tensors: bool = False) -> None:
        """Take this step's numbers from the param group, before anything moves: they may be out of range.

        ``in_tensors``: for a compiler, which makes a new graph for each number that is none.
        """
        self._in_tensors = in_tensors and not rule.decides_on_host
        self._squares = self._squares if rule is self.rule else rule.squares
        self.saturates = self._squares and self.is_watched
        self.rule, self._kept, self.lr = rule, None, self.group["lr"]
        if self._in_tensors and not isinstance(self.lr, Tensor):
            self.lr = torch.tensor(self.lr, dtype=torch.float64, device="cpu")
        elif isinstance(self.lr, Tensor):
            self.lr = self.lr.squeeze().to(self.params[0].device, non_blocking=True)
        step = self.taken() + 1
        step = step if self._in_tensors or self.captured else max(1.0, step)
        self.rate = rule.step_size.rate(self.lr, step, readable(self, shared))
        self.kernel = kernels.kernel_of(self)
        self.shrink = reduce(mul, (constraint.shrink(self.rate) for constraint in rule.constraint), 1.0)

    def look(self) -> bool:
        """Whether this is a first gradient that only prepares the direction's state, which has been done."""
        looks = self.rule.norm.looks_first and self.steps[0].item() == 0
        if looks:
            before = self.snapshot()
            self.rule.norm.look(self.gradient(), self.state)
            self.steps.add_(1)
            self.undo_unless_ok(before)
        return looks

    def advance(self) -> None:
        """Count one more step; its ``number``, from 1, is what ``begin`` sees."""
        self.steps.add_(1)
        self.number = self.taken()

    def taken(self) -> Number:
        """How many steps these parameters have taken; first gradients that moved nothing do not count.

        A tensor of the device if the host must not look.
        """
        if self.captured:
            return self.steps[0].to(double(self.steps.device))
        taken = self._views["step"][0].item() - self.rule.norm.looks_first
        return torch.tensor(taken, dtype=torch.float64, device="cpu") if self._in_tensors else taken

    def _pieces(self, x: Tensor) -> tuple[Tensor, ...]:
        sizes = [p.numel() if self.flat else self.rule.view.shape(p.shape)[0] for p in self.params]
        return torch.split(x, sizes)

    def _like(self, piece: Tensor, p: Tensor) -> Tensor:
        return piece.view(p.shape) if self.flat else self.rule.view.invert(piece, p.shape)

    def _state_views(self, x: Tensor) -> Iterator[Tensor]:
        """Each parameter's part of a state tensor, in the parameter's own shape where the state has one."""
        for piece, p in zip(self._pieces(x), self.params, strict=True):
            whole = self.flat or tuple(piece.shape) == self.rule.view.shape(p.shape)
            yield self._like(piece, p) if whole else piece


def readable(batch: Batch | Piece, shared: Shared) -> Numbers:
    """Numbers of the whole optimizer as the host reads them, if it may look; what is multiplied by them is faster."""
    return {name: x.item() for name, x in shared.items()} if batch.on_host else shared


def saturated(g: Tensor) -> Tensor:
    """``g`` with entries of at most 3e15 in float32, 1e123 in float64, so that sums of many squares stay finite."""
    limit = torch.finfo(g.dtype).max ** 0.4
    return g.clamp(-limit, limit)


def kept_dtype(group: Mapping[str, Any], own: torch.dtype, working: torch.dtype) -> torch.dtype:
    """The dtype that averages are kept in: that of the param group, of the parameter, or of the computation."""
    wanted = group["state_dtype"]
    return working if wanted is None else own if wanted == "parameter" else getattr(torch, wanted)


def unpacked(batch: Batch | Piece) -> dict[str, Tensor]:
    """The state for this step: what is kept in fewer bits as copies."""
    return {**batch.state, **{name: batch.state[name].to(batch.dtype) for name in batch.rounded}}


def pack(batch: Batch | Piece, state: Mapping[str, Tensor]) -> None:
    """Keep what the step has made of these copies."""
    for salt, name in enumerate(batch.rounded):
        kept = batch.state[name]
        kept.copy_(stochastically(state[name], kept.dtype, batch.number, salt, batch.first))


def choose(ok: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """``new`` if the step can be taken, else ``old``, decided on the device."""
    return torch.where(ok.to(new.device, non_blocking=True), new, old)


class Piece:
    """A part of a batch of one parameter whose rule works entry by entry; it does for the loop what the batch does."""

    def __init__(self, batch: Batch, part: slice) -> None:
        self.rule, self.group, self.dtype = batch.rule, batch.group, batch.dtype
        self.lr, self.rate, self.shrink, self.is_vector = batch.lr, batch.rate, batch.shrink, batch.is_vector
        self.rounded, self.saturates, self.on_host = batch.rounded, batch.saturates, batch.on_host
        self.params = [batch.params[0].detach().view(-1)[part]]
        self.state = {name: x[part] for name, x in batch.state.items()}
        self.number = batch.number
        self.first = part.start
        self._batch, self._part = batch, part

    def gradient(self, gradients: Iterable[Tensor] | None = None) -> Tensor:
        """As that of a batch."""
        (whole,) = self._batch.gradients if gradients is None else gradients
        g = whole.view(-1)[self._part].to(self.dtype)
        g = saturated(g) if self.saturates else g
        return g.neg() if self.group["maximize"] else g

    def weights(self) -> Tensor:
        """As those of a batch."""
        return self.rule.whole(self.rounded_weights(), self.state)

    def rounded_weights(self) -> Tensor:
        """As those of a batch."""
        return self.params[0].to(self.dtype)

    def scatter(self, x: Tensor) -> list[Tensor]:
        """``x`` itself."""
        return [x]

    def undo_unless_ok(self, before: list[Tensor]) -> None:
        """Nothing: batches that may have to be undone are not taken in pieces."""


def sum_of_gathered_norms(batches: Iterable[Batch]) -> float | None:
    """The Euclidean norms of all watched gradients, added up; ``None`` if it would take the memory of batches.

    Nothing is gathered for its sake alone, so that it costs next to nothing.
    """
    watched = [batch for batch in batches if batch.is_watched]
    if sum(p.numel() for batch in watched for p in batch.params) > MAX_ENTRIES:
        return None
    return sum(batch.norm_of_gradient() for batch in watched)


def norm_on_host(g: Tensor) -> float:
    """The Euclidean norm, read by the host; where it can be had as a dot product, that is faster."""
    if g.is_contiguous() and g.dtype in (torch.float32, torch.float64):
        flat = g.view(-1)
        return math.sqrt(torch.dot(flat, flat).item())
    return torch.linalg.vector_norm(g).item()


def age(state: State, p: Tensor) -> float:
    """How many steps ``p`` has taken."""
    return float(state[p]["step"]) if "step" in state.get(p, ()) else 0.0


#: What the data of a parameter must keep for its batch to stay: it may have been replaced.
_kind = attrgetter("shape", "dtype", "device")


def _check_shapes(saved: Mapping[str, Any], views: Mapping[str, Tensor]) -> None:
    for name in saved.keys() & views.keys():
        if saved[name].shape != views[name].shape:
            shapes = f"{tuple(saved[name].shape)} where its parameter needs {tuple(views[name].shape)}"
            raise ValueError(f"the state {name!r} has shape {shapes}: it is that of another parameter")


def state_shapes(p: Tensor, rule: Rule) -> dict[str, tuple[int, ...]]:
    """The shape of each piece of state, save ``step``, that a rule keeps for a parameter; nothing is computed."""
    seen = (p.numel(),) if rule.elementwise else rule.view.shape(tuple(p.shape))
    x = torch.empty(seen, device="meta")
    state = rule.init_state(x, lambda: x)
    return {name: tuple(p.shape if y.shape == x.shape else y.shape) for name, y in state.items()}


def partition(group: dict[str, Any], params: list[Tensor], rule: Rule, state: State) -> Iterator[Batch]:
    """Batches of the parameters that can move together, none too large unless it is one parameter."""
    kinds: dict[tuple[Any, ...], list[Tensor]] = {}
    for p in params:
        shape = () if rule.elementwise else (p.ndim < 2, *rule.view.shape(p.shape)[1:])
        kinds.setdefault((shape, p.dtype, p.device, age(state, p)), []).append(p)
    for members in kinds.values():
        entries, part = 0, list[Tensor]()
        limit = MAX_ENTRIES if rule.norm.reduces == "matrix" else FLAT_ENTRIES
        for p in members:
            if part and entries + p.numel() > limit:
                yield Batch(group, part, rule, state)
                entries, part = 0, []
            entries, part = entries + p.numel(), [*part, p]
        yield Batch(group, part, rule, state)
