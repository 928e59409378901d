"""A step like the last one: what cannot have changed since is not looked at again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normopt.engine.batch import Batch
from normopt.engine.names import ALONGSIDE
from normopt.engine.plan import Plan, State
from normopt.rule import is_plain

#: What is read anew at every step, so that its change is none of the fingerprint.
_READ_ANEW = {"params", "lr", *ALONGSIDE}

#: What a tensor is, apart from its numbers.
_kind = attrgetter("shape", "dtype", "device", "layout")


class _Known(NamedTuple):
    """A param group as it was at the last step; no tensor is held."""

    size: int
    names: list[str]
    values: list[Any]
    #: Which parameters have no gradient.
    missing: list[bool]
    #: Of the parameters of each plan, and of their gradients.
    kinds: list[tuple[list[Any], list[Any]]]

    @classmethod
    def of(cls, group: Mapping[str, Any], batches: Sequence[Batch]) -> _Known:
        names = [name for name in group if name not in _READ_ANEW]
        kinds = [([*map(_kind, batch.params)], [*map(_kind, batch.gradients)]) for batch in batches]
        missing = [p.grad is None for p in group["params"]]
        return cls(len(group), names, [group[name] for name in names], missing, kinds)

    def is_as_it_was(self, group: Mapping[str, Any]) -> bool:
        """Whether the group says what it said; learning rates may be other numbers in range."""
        lr, names = group["lr"], group.get("param_names")
        return (
            type(lr) is float
            and 0 <= lr < math.inf
            and len(group) == self.size
            and all(map(is_, map(group.get, self.names), self.values))
            and (names is None or len(names) == len(self.missing))
        )


class WarmStep:
    """The fingerprint of a step, by which the next one knows that it is like it, and what it need not find out again.

    It stands for what param groups say, save learning rates, for which parameters have gradients, and for shapes,
    dtypes and devices of both. Where state lies is asked of the plans. It is for steps whose numbers are all read by
    the host.
    """

    def __init__(self, known: list[_Known]) -> None:
        self._known = known

    @classmethod
    def after(cls, groups: Sequence[Mapping[str, Any]], batches: Iterable[Sequence[Batch]]) -> WarmStep | None:
        """The fingerprint of a step that has been taken; ``None`` if the next one must look at everything anew."""
        found = [*zip(groups, batches, strict=True)]
        if not all(_can_repeat(group, each) for group, each in found):
            return None
        return cls([_Known.of(group, each) for group, each in found])

    def batches(
        self, groups: Sequence[Mapping[str, Any]], state: State, plans: Mapping[int, Sequence[Plan]]
    ) -> list[Batch] | None:
        """This step's batches, or ``None`` if something is not as it was."""
        if len(groups) != len(self._known):
            return None
        found = []
        for place, (group, known) in enumerate(zip(groups, self._known, strict=True)):
            given = group["params"]
            if not known.is_as_it_was(group) or [p.grad is None for p in given] != known.missing:
                return None
            for plan, kinds in zip(plans[place], known.kinds, strict=True):
                params = [given[i] for i in plan.members]
                gradients = [p.grad for p in params]
                if not _are_as_they_were(params, gradients, kinds):
                    return None
                joined = plan.joined([state.get(p, {}) for p in params])
                if joined is None:
                    return None
                found.append(Batch(plan, group, params, plan.rule, state, {}, False, joined, place))
        return found


def _can_repeat(group: Mapping[str, Any], batches: Sequence[Batch]) -> bool:
    numbers = [value for name, value in group.items() if name not in _READ_ANEW - {"lr"}]
    tensors = [x for batch in batches for x in (*batch.params, *batch.gradients)]
    return (
        all(map(is_plain, numbers))
        and not any(batch.shared or batch.captured for batch in batches)
        and all(x.is_cpu for x in tensors)
        and all(type(g) is Tensor for batch in batches for g in batch.gradients)
    )


def _are_as_they_were(params: list[Tensor], gradients: list[Any], kinds: tuple[list[Any], list[Any]]) -> bool:
    return (
        [*map(_kind, params)] == kinds[0]
        and [*map(_kind, gradients)] == kinds[1]
        and all(map(torch.Tensor.is_contiguous, params))  # an expanded one has fewer numbers than entries
        and {*map(type, gradients)} == {Tensor}
    )
