"""Numbers of the whole optimizer: what step sizes conclude from sums over all tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from normopt.rule import Rule, rule_of
from normopt.stepsize.base import Shared, StepSize, double


class Totals:
    """Sums over all batches of one step, and what step sizes conclude from them.

    Step sizes of one kind (class) share sums and numbers in all param groups; the first group's own numbers count.
    """

    def __init__(self) -> None:
        #: What has been concluded, by kind of step size.
        self.concluded: dict[str, Shared] = {}
        self._summands: dict[str, list[dict[str, Tensor]]] = defaultdict(list)
        self._first: dict[str, tuple[StepSize, Shared]] = {}

    def of(self, rule: Rule, known: Shared) -> Shared:
        """The numbers for a batch of this rule: those concluded in this step, else those ``known`` before."""
        return self.concluded.get(kind(rule.step_size)) or known

    def add(self, rule: Rule, known: Shared, summands: dict[str, Tensor]) -> None:
        """Add what a batch of this rule contributes, by name."""
        name = kind(rule.step_size)
        self._summands[name].append(summands)
        if name not in self._first:
            self._first[name] = rule.step_size, self.of(rule, known)

    def conclude(self) -> None:
        """Let each kind of step size say what follows from the sums that were added since the last time."""
        for name, several in self._summands.items():
            step_size, before = self._first[name]
            sums = {
                key: torch.stack([summands[key].to(summand.device) for summands in several]).sum()
                for key, summand in several[0].items()
            }
            self.concluded[name] = step_size.conclude(sums, before)
        self._summands.clear()
        self._first.clear()


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
