"""Numbers of the whole optimizer: what step sizes conclude from sums over all tensors, and over all ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from normopt.rule import Rule, rule_of
from normopt.stepsize.base import Shared, StepSize, double


class Party(NamedTuple):
    """A step size that takes part in a sum, and what its param group holds of the whole optimizer's numbers."""

    step_size: StepSize
    known: Shared


class Everywhere(Protocol):
    """Sums over ranks that each have some of the tensors."""

    #: That the sums are made on.
    device: torch.device

    def parties(self, method: str) -> list[Party]:
        """The step sizes, one of each kind, that have summands from ``method`` on any rank; the same on all."""

    def total(self, x: Tensor) -> Tensor:
        """The sum of ``x`` over all ranks."""


class Totals:
    """Sums over all batches of one step, and what step sizes conclude from them.

    Step sizes of one kind (class) share sums and numbers in all param groups; the first group's own numbers count.

    Args:
        everywhere: the other ranks, if they have batches that this one has not.
    """

    def __init__(self, everywhere: Everywhere | None = None) -> None:
        #: What has been concluded, by kind of step size.
        self.concluded: dict[str, Shared] = {}
        self._everywhere = everywhere
        self._summands: dict[str, list[dict[str, Tensor]]] = defaultdict(list)
        self._first: dict[str, Party] = {}

    def of(self, rule: Rule, known: Shared) -> Shared:
        """The numbers for a batch of this rule: those concluded in this step, else those ``known`` before."""
        return self.concluded.get(kind(rule.step_size)) or known

    def expects(self, method: str) -> bool:
        """Whether other ranks have summands from ``method``."""
        return self._everywhere is not None and bool(self._everywhere.parties(method))

    def add(self, rule: Rule, known: Shared, summands: dict[str, Tensor]) -> None:
        """Add what a batch of this rule contributes, by name."""
        name = kind(rule.step_size)
        self._summands[name].append(summands)
        self._first.setdefault(name, Party(rule.step_size, known))

    def conclude(self, method: str) -> None:
        """Let each kind of step size say what follows from the sums of what ``method`` returned."""
        sums = {
            name: {
                key: torch.stack([summands[key].to(summand.device) for summands in several]).sum()
                for key, summand in several[0].items()
            }
            for name, several in self._summands.items()
        }
        if self._everywhere is not None:
            sums = self._summed_everywhere(method, sums, self._everywhere)
        for name, each in sums.items():
            step_size, known = self._first[name]
            self.concluded[name] = step_size.conclude(each, self.concluded.get(name) or known)
        self._summands.clear()
        self._first.clear()

    def _summed_everywhere(
        self, method: str, sums: dict[str, dict[str, Tensor]], everywhere: Everywhere
    ) -> dict[str, dict[str, Tensor]]:
        """The sums over all ranks, in one all-reduce; a rank that has nothing to add adds 0."""
        self._first = {kind(party.step_size): party for party in everywhere.parties(method)}
        places = [(name, key) for name, party in self._first.items() for key in _names(party.step_size, method)]
        if not places:
            return {}
        for name, each in sums.items():
            known = _names(self._first[name].step_size, method)
            if {*each} != {*known}:
                raise ValueError(
                    f"{name}.{method} has the summands {sorted(each)}, but says of itself {method}_sums = {known}, "
                    "which all ranks go by"
                )
        home = everywhere.device
        nothing = torch.zeros((), dtype=double(home), device=home)
        mine = [sums.get(name, {}).get(key, nothing).to(home, double(home)) for name, key in places]
        total = everywhere.total(torch.stack(mine)).unbind()
        found: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for (name, key), x in zip(places, total, strict=True):
            found[name][key] = x
        return found


def _names(step_size: StepSize, method: str) -> tuple[str, ...]:
    names: tuple[str, ...] = getattr(step_size, f"{method}_sums")
    return names


def kind(step_size: StepSize) -> str:
    """What step sizes must have in common to share numbers."""
    return type(step_size).__name__


def shared_by(group: dict[str, Any], rule: Rule) -> Shared:
    """The numbers of the whole optimizer that a param group holds; one that somebody has set becomes a tensor again."""
    found = {name: group[name] for name in rule.step_size.init_shared()}
    for name, x in found.items():
        if not isinstance(x, Tensor):
            device = group["params"][0].device if group["params"] else torch.device("cpu")
            found[name] = group[name] = torch.full((), float(x), dtype=double(device), device=device)
    return found


def share(groups: list[dict[str, Any]], concluded: Mapping[str, Shared], found_inf: Tensor | None) -> None:
    """Keep what has been concluded in all groups with such a step size, in the tensors that are there.

    The numbers stay what they are where the device has ``found_inf``.
    """
    for group in groups if concluded else ():
        step_size = rule_of(group).step_size
        for name in step_size.init_shared() if kind(step_size) in concluded else ():
            known, new = group[name], concluded[kind(step_size)][name]
            known.copy_(new if found_inf is None else torch.where(found_inf.to(known.device), known, new))
