"""Parameters that move together in one step: one tensor for all their gradients, and one for each piece of state."""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import reduce
from operator import mul
from typing import Any

import torch
from torch import Tensor
from torch._C._nn import unflatten_dense_tensors

from normopt.engine import plan as plans
from normopt.engine.checks import name_of
from normopt.engine.kernels import Kernel
from normopt.engine.names import plain
from normopt.engine.plan import Joined, Plan, State, age
from normopt.ingredient.stage import Context, Rate
from normopt.ingredient.view import is_small
from normopt.numerics.host import can_read_values
from normopt.numerics.rounding import places, stochastically
from normopt.rule import Rule
from normopt.stepsize.base import Numbers, Shared, double

#: Adding a tensor is faster than adding a number, which torch makes a tensor of.
_ONE = torch.ones((), dtype=torch.float32, device="cpu")

#: Gradients with fewer entries on average are copied together to be looked at: that takes less than one call for each.
FEW_ENTRIES = 4096

#: Gradients whose entries are no larger have finite sums of squares in float32, however many there are.
LARGEST = torch.finfo(torch.float32).max ** 0.4


class Batch:
    """The parameters of a plan at one step, with their gradients, their state and the numbers of their param group.

    Entry-wise rules see all parameters laid end to end, shape ``(entries,)``; the others a stack of matrices, shape
    ``(matrices, out, in)``. A batch is made anew for each step, and nothing outlives it.

    Args:
        plan: which parameters of the group, and how they are laid out.
        group: their param group.
        params: the parameters.
        rule: their rule with this step's numbers.
        state: what ``optimizer.state`` is.
        shared: the numbers of the whole optimizer that the group holds.
        in_tensors: for a compiler, which makes a new graph for each number that is no tensor.
        joined: the parameters' state, where it lies together, see ``Plan.joined``.
        place: of the group among the param groups.

    Raises:
        ValueError: a number out of range, or state of another shape; nothing has changed yet.
    """

    def __init__(
        self,
        plan: Plan,
        group: Mapping[str, Any],
        params: list[Tensor],
        rule: Rule,
        state: State,
        shared: Shared,
        in_tensors: bool = False,
        joined: Joined | None = None,
        place: int = 0,
    ) -> None:
        self.plan, self.group, self.rule, self.shared = plan, group, rule, shared
        self.params = params
        self.gradients: list[Tensor] = [p.grad for p in params]  # type: ignore[misc]
        #: The gradients at the weights before the last step, for momenta that look back.
        self.past: list[Tensor] | None = None
        self.working, self.flat, self.captured = plan.working, plan.flat, plan.captured
        self.is_vector = not plan.flat and is_small(params[0].shape, group.get("role", ""))
        #: Whether gradients that are not finite keep these parameters from moving.
        self.is_watched = bool(group["nonfinite"] != "propagate" and not self.params[0].is_meta)
        #: Whether entries are clamped so that their squares stay finite.
        self.clamps = plan.squares and self.is_watched
        #: Whether what step sizes see of it belongs to sums over the whole model; of equal copies one does.
        self.counts: bool = group.get("counts", True)
        # Of which entries, where a large parameter is worked through in chunks.
        self._chunk_of: slice | None = None
        #: Whether the device has found NaN or Inf, if only the device knows: then nothing must change.
        self.found_inf: Tensor | None = None
        self._gathered: Tensor | None = None
        self._before: list[Tensor] = []
        self._place = place
        self._in_tensors = in_tensors and not rule.decides_on_host
        self._entries: dict[str, list[Tensor]] | None = None
        self._state: dict[str, Tensor] | None = None
        if joined is None:
            self._state = self._laid_out(state)
            self.steps = self._state.pop("step")
        else:
            self._entries, self.steps = joined
        #: The kernel that takes this step, if torch has one for the rule and its tensors.
        self.kernel = self._find_kernel()
        if self._in_tensors:  # so that the compiled part sees tensors, not how they are found
            self._state = self.state
        self._read_numbers()
        if self.kernel is not None and self.kernel.needs_numbers and isinstance(self.rate, Tensor):
            self.kernel = None

    # State ------------------------------------------------------------------------------------------------------------

    def _laid_out(self, state: State) -> dict[str, Tensor]:
        """Fresh state in a new layout; ``adopt`` copies into it what there is."""
        self._check_shapes(state)
        taken = age(state, self.params[0])
        counted = torch.full((len(self.params),), taken, dtype=torch.float32, device=self.plan.home)
        fresh = self.rule.init_state(self.plan.gather(self.gradients), self._seen(self.low_precision_weights))
        fresh |= {name: fresh[name].to(self.plan.kept) for name in self.plan.rounded}
        return {"step": counted, **{name: self.plan.laid_out(name, x) for name, x in fresh.items()}}

    def _check_shapes(self, state: State) -> None:
        for name, wanted in self.plan.layouts.items():
            for shape, held in zip(wanted.shapes, (state.get(p, {}) for p in self.params), strict=True):
                if isinstance(held.get(name), Tensor) and held[name].shape != shape:
                    shapes = f"{tuple(held[name].shape)} where its parameter needs {tuple(shape)}"
                    raise ValueError(f"the state {name!r} has shape {shapes}: it is the state of another parameter")

    @property
    def is_new(self) -> bool:
        """Whether the state has been laid out anew and ``optimizer.state`` does not know yet."""
        return self._entries is None

    def adopt(self, state: State) -> None:
        """Copy what ``optimizer.state`` has into a new layout, of which it holds views from now on."""
        self._entries = {name: self.entries(name) for name in self.plan.layouts}
        for name, parts in self._entries.items():
            for p, part in zip(self.params, parts, strict=True):
                held = state.setdefault(p, {})
                if isinstance(held.get(name), Tensor):
                    part.copy_(held[name])
                held[name] = part

    def entries(self, name: str) -> list[Tensor]:
        """Each parameter's part of one piece of state."""
        if self._entries is not None:
            return self._entries[name]
        if name == "step":
            return [*self.steps.unbind()]
        return [*self.plan.parts(self.state[name], self.params)]

    @property
    def state(self) -> dict[str, Tensor]:
        """Each piece of state save ``step`` as one tensor for all parameters."""
        if self._state is None:
            assert self._entries is not None
            self._state = {n: self.plan.whole(n, parts) for n, parts in self._entries.items() if n != "step"}
        return self._state

    def loaded(self) -> dict[str, Tensor]:
        """The state for this step: copies of what is kept in fewer bits."""
        if not self.plan.rounded:
            return self.state
        return {**self.state, **{name: self.state[name].to(self.working) for name in self.plan.rounded}}

    def save_low_precision(self, state: Mapping[str, Tensor]) -> None:
        """Keep what the step has made of these copies."""
        for salt, name in enumerate(self.plan.rounded):
            kept = self.state[name]
            kept.copy_(stochastically(state[name], kept.dtype, self.number, salt, self.places()))

    def places(self) -> Tensor:
        """An integer for each entry, by its parameter and its place in it, see :func:`numerics.rounding.places`."""
        known = self.group.get("numbered")  # where parameters are parts of others
        given = self.group["params"]
        each = [(number_of(self.group, self._place, i), given[i].shape, None) for i in self.plan.members]
        each = each if known is None else [known[i] for i in self.plan.members]
        device, chunk = self.params[0].device, self._chunk_of
        if chunk is not None and each[0][2] is None:
            number, shape, _ = each[0]
            return places(number, (math.prod(shape),), (((chunk.start, min(chunk.stop, math.prod(shape))),),), device)
        found = self.plan.together([places(*numbered, device=device) for numbered in each])
        return found if chunk is None else found[chunk]

    def turns(self) -> list[int]:
        """A number for each matrix, from its parameter's :func:`number_of`, for what is done in turn."""
        known = self.group.get("numbered")  # where parameters are parts of others
        each = [known[i][0] if known else number_of(self.group, self._place, i) for i in self.plan.members]
        return [turn + i for turn, size in zip(each, self.plan.sizes, strict=True) for i in range(size)]

    def _find_kernel(self) -> Kernel | None:
        kernel = self.plan.kernel
        return kernel if kernel is not None and kernel.takes(self.params, self.gradients) else None

    # Numbers ----------------------------------------------------------------------------------------------------------

    def _read_numbers(self) -> None:
        """This step's numbers from the param group; constraints refuse those that are out of range."""
        self.lr: Rate = self.group["lr"]
        if self._in_tensors and not isinstance(self.lr, Tensor):
            self.lr = torch.tensor(self.lr, dtype=torch.float64, device="cpu")
        elif isinstance(self.lr, Tensor):
            self.lr = self.lr.squeeze().to(self.params[0].device, non_blocking=True)
        taken = self.taken()
        if not (self.captured or self._in_tensors) and not taken >= -self.rule.norm.looks_first:
            raise ValueError(
                f"{name_of(self.group, self.params[0])}: the state 'step' must be a number of steps, 0 or more, got "
                f"{self.steps[0].item()!r}"
            )
        step = taken + 1
        step = step if self._in_tensors or self.captured else max(1.0, step)
        self.rate, self.shrink = rate_and_shrink(self.rule, self.lr, step, self.readable(self.shared))

    def taken(self) -> Any:
        """How many steps these parameters have taken, a first gradient that only prepared the state not counted.

        A float, or a tensor: of the device in ``capturable`` steps, of the host under a compiler.
        """
        first = self.steps[0] if self._entries is None else self._entries["step"][0]
        if self.captured:
            return first.to(double(first.device))
        taken = first.item() - self.rule.norm.looks_first
        return torch.tensor(taken, dtype=torch.float64, device="cpu") if self._in_tensors else taken

    def count(self) -> None:
        """Count one more step; its ``number``, from 1, is what ingredients see."""
        self.steps.add_(_ONE if self.steps.is_cpu else 1)
        self.number = self.taken()

    @property
    def moves(self) -> bool:
        """Whether weights can move: at a learning rate of 0 they stay, also where they may not live."""
        return isinstance(self.lr, Tensor) or self.lr != 0

    @property
    def can_read_values(self) -> bool:
        """Whether ``.item()`` is free here: CPU tensors, not compiling, not capturing a CUDA graph."""
        return can_read_values(self.steps) and self.params[0].is_cpu and not (self.captured or self._in_tensors)

    def readable(self, shared: Shared) -> Numbers:
        """Numbers of the whole optimizer as floats where reading them is free: multiplying by floats is faster."""
        return {name: x.item() for name, x in shared.items()} if shared and self.can_read_values else shared

    # Gather and scatter -----------------------------------------------------------------------------------------------

    def scatter(self, x: Tensor) -> list[Tensor]:
        """The inverse of ``Plan.gather``: views of ``x`` (or of a copy), one like each parameter."""
        as_stored = self.flat or not self.rule.view.transpose  # a stack of square matrices has one shape both ways
        if as_stored and len(self.params) == 1 and x.shape == self.params[0].shape:
            return [x]
        if self.flat and self.plan.is_uniform:  # which is faster for many small ones
            return [*x.view(len(self.params), *self.params[0].shape).unbind()]
        if self.flat and self.plan.has_no_empty:
            return [*unflatten_dense_tensors(x, self.params)]
        if self.plan.is_stack:
            return [*x.unbind()]
        x = x.contiguous() if self.rule.view.equal_parts > 1 or self.rule.view.groups > 1 else x
        parts = torch.split(x, self.plan.sizes)
        return [self.plan.like(part, p) for part, p in zip(parts, self.params, strict=True)]

    def gradient(self, gradients: Iterable[Tensor] | None = None) -> Tensor:
        """The gradients, or those given, negated where the group maximizes; 0 for a step that must not be taken."""
        if gradients is not None:
            g = self.plan.gather(gradients)
        else:
            g = self.plan.gather(self.gradients) if self._gathered is None else self._gathered
        g = g if self.found_inf is None else torch.where(self._found_inf_on(g.device), torch.zeros_like(g), g)
        g = clamped(g) if self.clamps else g
        return g.neg() if self.group["maximize"] else g

    def weights(self) -> Tensor:
        """The weights in float32 or better, with what constraints know of them beyond the parameters' dtype."""
        return self.rule.whole(self.low_precision_weights(), self.state)

    def low_precision_weights(self) -> Tensor:
        """The parameters as they are stored, in float32 or better."""
        return self.plan.gather(self.params)

    def norm_of_gradient(self) -> float:
        """The Euclidean norm of the gradients, which are gathered now and kept until the step asks for them.

        Kernels take gradients as they are; of many numbers it is then the sum of the gradients' norms.
        """
        if self.kernel is not None and self.plan.shape.numel() > FEW_ENTRIES * len(self.gradients):
            return sum([norm.item() for norm in torch._foreach_norm(self.gradients)])
        gathered = self.plan.gather(self.gradients)
        self._gathered = gathered if self.kernel is None else None
        return norm_on_host(gathered)

    def context(self, shared: Shared, *, again: bool = False) -> Context:
        """What ingredients see: the gradient as constraints want it (L2), the weights, the numbers of this step.

        Args:
            shared: the numbers of the whole optimizer, as far as they are known.
            again: whether the step asks once more, so that gradients that have been gathered are kept.
        """
        numbers = self.readable(shared)
        at_previous = None if self.past is None else lambda: self._gradient_at_previous(numbers)
        g = self.gradient()
        self._gathered = self._gathered if again else None
        return self._context(g, self._seen(self.weights), numbers, at_previous)

    def _seen(self, weights: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """What ingredients get when they ask for the weights: an error if they say that they do not."""
        return weights if self.rule.sees_weights else self._refuse_weights

    def _refuse_weights(self) -> Tensor:
        raise ValueError(
            f"{self.rule}: an ingredient has asked for the weights, but all of them say sees_weights = False; remove "
            "that from the one that asks, so that weights are brought to it where they are sharded"
        )

    def _context(
        self, raw: Tensor, weights: Callable[[], Tensor], shared: Numbers, past: Callable[[], Tensor] | None = None
    ) -> Context:
        context = Context(
            raw,
            raw,
            self.number,
            self.rate,
            self.rule.direction,
            weights,
            shared=shared,
            shrink=self.shrink,
            is_vector=self.is_vector,
            past=past,
            dtype=self.params[0].dtype,
            places=self.places,
            turns=self.turns,
        )
        for constraint in self.rule.acting("gradient"):
            context = replace(context, g=constraint.gradient(context.g, context))
        return context

    def _gradient_at_previous(self, shared: Numbers) -> Tensor:
        """The gradient at the weights before the last step, with what constraints add to it there."""
        return self._context(self.gradient(self.past), lambda: self.state["previous"], shared).g

    # Parts, and steps that are taken back -----------------------------------------------------------------------------

    def chunks(self) -> list[Batch]:
        """This batch; or parts of its one parameter, if that is large and every entry moves by itself.

        Chunks bound the temporary memory of a step.
        """
        p, limit = self.params[0], plans.FLAT_ENTRIES
        is_cut = (
            self.flat
            and not self._in_tensors  # compilers make no temporary tensors of this size
            and self.found_inf is None
            and len(self.params) == 1
            and p.numel() > limit
            and all(x.is_contiguous() for x in (p, *self.gradients))
            and all(x.shape == self.plan.shape for x in self.state.values())
            and not (self.rule.momentum.looks_back or self.rule.norm.looks_first)
        )
        return [self._chunk(slice(i, i + limit)) for i in range(0, p.numel(), limit)] if is_cut else [self]

    def _chunk(self, part: slice) -> Batch:
        chunk = copy.copy(self)
        chunk.params = [self.params[0].detach().view(-1)[part]]
        chunk.gradients = [self.gradients[0].view(-1)[part]]
        chunk._state = {name: x[part] for name, x in self.state.items()}
        chunk._chunk_of, chunk._gathered = part, None
        return chunk

    def snapshot(self) -> None:
        """Copy weights and state once, if only the device knows whether the step can be taken."""
        if self.found_inf is not None and not self._before:
            self._before = [x.clone() for x in (self.low_precision_weights(), *self.state.values())]

    def undo_if_found_inf(self) -> None:
        """Put back what ``snapshot`` has copied if the device has found NaN or Inf."""
        if self.found_inf is None:
            return
        found_inf, (old_weights, *old) = self._found_inf_on(self.params[0].device), self._before
        restored = torch.where(found_inf, old_weights, self.low_precision_weights())
        torch._foreach_copy_(self.params, self.scatter(restored))
        for x, y in zip(self.state.values(), old, strict=True):
            x.copy_(torch.where(found_inf, y, x))
        self._before = []
        if self.captured:
            self.steps.copy_(torch.where(found_inf, self.steps - 1, self.steps))

    def look(self) -> bool:
        """Whether this is a first gradient that only initializes the direction's state, which has been done."""
        looks = self.rule.norm.looks_first and self.steps[0].item() == 0
        if looks:
            self.snapshot()
            self.rule.direction.look(self.gradient(), self.state)
            self.steps.add_(1)
            self.undo_if_found_inf()
        return looks

    def _found_inf_on(self, device: torch.device) -> Tensor:
        assert self.found_inf is not None
        return self.found_inf.to(device, non_blocking=True)


def number_of(group: Mapping[str, Any], place: int, index: int) -> int:
    """A parameter's number: by its name, else by where it is, whichever others come and go."""
    names = group.get("param_names")
    return zlib.crc32(plain(names[index]).encode()) if names else (place << 20) + index


def rate_and_shrink(rule: Rule, lr: Rate, step: Any, shared: Numbers) -> tuple[Rate, Rate]:
    """The learning rate of one step, counted from 1, and the factor of the weights before the update is added."""
    rate = rule.step_size.rate(lr, step, shared)
    return rate, reduce(mul, (constraint.shrink(rate) for constraint in rule.constraint), 1.0)


def clamped(g: Tensor) -> Tensor:
    """``g`` with entries of at most 3e15 in float32, 1e123 in float64, so that sums of many squares stay finite."""
    limit = torch.finfo(g.dtype).max ** 0.4
    return g.clamp(-limit, limit)


def norm_on_host(g: Tensor) -> float:
    """The Euclidean norm, read by the host; where it can be had as a dot product, that is faster."""
    if g.is_contiguous() and g.dtype in (torch.float32, torch.float64):
        flat = g if g.ndim == 1 else g.view(-1)
        return math.sqrt(torch.dot(flat, flat).item())
    return torch.linalg.vector_norm(g).item()
