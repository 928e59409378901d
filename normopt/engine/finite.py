"""Gradients with NaN or Inf: found before anything moves, on the host where that is free, on the device elsewhere."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from normopt.engine.batch import LARGEST, Batch, norm_on_host, sum_of_gathered_norms
from normopt.engine.checks import check_policy, name_of
from normopt.numerics import host

#: Devices whose results are read without waiting for whatever else has been queued.
_WITH_EVENTS = {"cuda", "xpu"}

#: A param group, some of its parameters, and their gradients.
Watched = tuple[dict[str, Any], list[Tensor], list[Tensor]]


def watched(groups: Iterable[dict[str, Any]]) -> Iterator[Watched]:
    """The gradients that must be finite: those of all param groups that do not propagate."""
    for group in groups:
        check_policy(group["nonfinite"])
        if group["nonfinite"] != "propagate":
            params = [p for p in group["params"] if p.grad is not None and not p.grad.is_meta]
            yield group, params, [p.grad for p in params]


def on_host(gradients: Iterable[Watched]) -> bool:
    """Whether all gradients live where reading a number costs nothing."""
    return not host.DEFERRED and all(
        g.device.type == "cpu" and not group["capturable"] for group, _, each in gradients for g in each
    )


def capturing() -> bool:
    """Whether a CUDA graph records what is launched now: the host can see none of it."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def check_capture(groups: Iterable[dict[str, Any]]) -> None:
    """Raise a ``ValueError`` if a CUDA graph is being captured and the host looks at numbers of some param group."""
    if capturing() and not all(group["capturable"] for group in groups):
        raise ValueError("a step is being captured in a CUDA graph: give the optimizer capturable=True")


def sum_of_norms(gradients: Iterable[Watched]) -> float:
    """The Euclidean norms of all gradients, added up; read by the host, in one pass. If it is finite, so are they."""
    return sum(norm_on_host(g) for _, params, each in gradients for g in _cast(params, each))


def all_finite(gradients: Iterable[Watched]) -> bool:
    """Whether the step can be taken, read by the host from every entry: norms can overflow where entries do not.

    Raises:
        ValueError: NaN or Inf in a param group with ``nonfinite="raise"``.
    """
    broken = [
        (group, p)
        for group, params, each in gradients
        for p, g in zip(params, _cast(params, each), strict=True)
        if not g.isfinite().all()
    ]
    culprits = [name_of(group, p) for group, p in broken if group["nonfinite"] == "raise"]
    if culprits:
        raise ValueError(message(culprits, "nothing has moved"))
    return not broken


def _cast(params: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    """The gradients as the step will see them: float64 ones of other parameters may overflow."""
    return [g.float() if g.dtype == torch.float64 != p.dtype else g for p, g in zip(params, gradients, strict=True)]


def message(culprits: list[str], outcome: str) -> str:
    """The error for these parameters."""
    names = ", ".join(culprits[:5]) + (f" and {len(culprits) - 5} more" if len(culprits) > 5 else "")
    return (
        f"NaN or Inf in the gradient of {names}; {outcome}. torch.autograd.set_detect_anomaly(True) finds where it "
        "comes from; nonfinite='skip' leaves such steps out, nonfinite='propagate' lets them through."
    )


class Verdict:
    """Whether gradients are finite, known to the device at once and to the host later.

    ``ok`` is a number of the device: whether all of them are.
    """

    def __init__(self, gradients: Iterable[Watched]) -> None:
        kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
        owners: dict[tuple[torch.device, torch.dtype], list[tuple[dict[str, Any], Tensor]]] = defaultdict(list)
        for group, params, each in gradients:
            for p, g in zip(params, _cast(params, each), strict=True):
                if g.numel():
                    kinds[g.device, g.dtype].append(g)
                    owners[g.device, g.dtype].append((group, p))
        self._owners = [owner for kind in owners.values() for owner in kind]
        found = [torch.stack(torch._foreach_norm(kind, math.inf)).isfinite() for kind in kinds.values()]
        home = found[0].device if found else torch.device("cpu")
        flags = torch.cat([flag.to(home) for flag in found]) if found else torch.ones(0, dtype=torch.bool)
        self.ok = flags.all()
        if capturing():
            self._owners, self._flags, self._event = [], flags.new_empty(0, device="cpu"), None
            return
        self._flags = flags.to("cpu", non_blocking=True)
        self._event = torch.Event(home) if home.type in _WITH_EVENTS else None
        if self._event is not None:
            self._event.record()

    def culprits(self) -> list[tuple[dict[str, Any], Tensor]]:
        """The param groups and parameters whose gradients are not finite; waits until that is known."""
        if self._event is not None:
            self._event.synchronize()
        return [owner for owner, is_finite in zip(self._owners, self._flags.tolist(), strict=True) if not is_finite]


class Watch:
    """What an optimizer knows of the gradients of its current or last step."""

    def __init__(self) -> None:
        self._verdicts: list[Verdict] = []
        self._counted: list[Batch] = []
        self._refused = ""
        #: Whether squares of gradients overflow, as far as the host knows.
        self.is_large = False
        #: Whether the host knows that all entries are so small that sums of their squares are finite.
        self.is_small = False

    def may_go(self, gradients: list[Watched], batches: list[Batch] | None) -> bool:
        """Whether gradients are finite as far as the host can tell; what a device finds is in ``ok``.

        Args:
            gradients: to be asked one by one, on accelerators or if need be.
            batches: those that will gather them for the step, and can be asked first.

        Raises:
            ValueError: see :func:`all_finite`.
        """
        if on_host(gradients):
            total = None if batches is None else sum_of_gathered_norms(batches)
            total = sum_of_norms(gradients) if total is None else total
            self.is_small = total <= LARGEST and (batches is not None or self.is_small)
            self.is_large |= not math.isfinite(total)
            return math.isfinite(total) or all_finite(gradients)
        self._verdicts.append(Verdict(gradients))
        return True

    def ok(self) -> Tensor | None:
        """Whether this step can be taken, as a number of the device; ``None`` if the host knows that it can."""
        if not self._verdicts:
            return None
        home = self._verdicts[0].ok.device
        return torch.stack([verdict.ok.to(home) for verdict in self._verdicts]).all()

    def count(self, batch: Batch) -> None:
        """Note that a batch counts this step; the count is taken back if the device leaves the step out."""
        if batch.ok is not None and not batch.captured:
            self._counted.append(batch)

    def settle(self) -> None:
        """Find out whether the device took the last step; if not, take back its count, and keep the error if any."""
        if capturing():
            self._verdicts, self._counted = [], []
        culprits = [culprit for verdict in self._verdicts for culprit in verdict.culprits()]
        if culprits:
            for batch in self._counted:
                batch.steps.sub_(1)
            names = dict.fromkeys(name_of(group, p) for group, p in culprits if group["nonfinite"] == "raise")
            self._refused = message([*names], "that step was left out") if names else ""
        self._verdicts, self._counted = [], []
        self.is_large = self.is_small = False

    def check(self) -> None:
        """Raise the error of the last step, once."""
        refused, self._refused = self._refused, ""
        if refused:
            raise ValueError(refused)
