"""Gradients with NaN or Inf: found before anything moves, on the host where that is free, on the device elsewhere."""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normopt.engine import plan
from normopt.engine.batch import LARGEST, Batch, norm_on_host
from normopt.engine.checks import name_of
from normopt.engine.ranks import Poll, Present, Ranks
from normopt.numerics import host

#: Devices whose results are read without waiting for whatever else has been queued.
_WITH_EVENTS = {"cuda", "xpu"}


def capturing() -> bool:
    """Whether a CUDA graph records what is launched now: the host can see none of it."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def check_capture(groups: Iterable[Mapping[str, Any]]) -> None:
    """Raise a ``ValueError`` if a CUDA graph is being captured and the host looks at numbers of some param group."""
    if capturing() and not all(group["capturable"] for group in groups):
        raise ValueError("a step is being captured in a CUDA graph: give the optimizer capturable=True")


def on_host(batches: Sequence[Batch]) -> bool:
    """Whether all gradients live where reading a number costs nothing."""
    return not host.DEFERRED and all(batch.params[0].is_cpu and not batch.captured for batch in batches)


def sum_of_norms(batches: Sequence[Batch]) -> float:
    """The sum of the Euclidean norms of all gradients, read by the host. If it is finite, so are the gradients."""
    return sum(norm_on_host(g) for batch in batches for g in _gradients(batch))


def sum_of_gathered_norms(batches: Sequence[Batch]) -> float | None:
    """The same from gradients as the step gathers them; ``None`` if that took the memory of all batches at once.

    Nothing is gathered for this sum alone, so that it costs next to nothing.
    """
    if sum([batch.plan.shape.numel() for batch in batches]) > plan.MAX_ENTRIES:
        return None
    return sum([batch.norm_of_gradient() for batch in batches])


class Watched(NamedTuple):
    """Gradients that must be finite, with their param group and parameters."""

    group: Mapping[str, Any]
    params: Sequence[Tensor]
    gradients: Sequence[Tensor]


def all_finite(watched: Iterable[Watched]) -> bool:
    """Whether the step can be taken, read by the host from every entry: norms can overflow where entries do not.

    Raises:
        ValueError: NaN or Inf in a param group with ``nonfinite="raise"``.
    """
    broken = [
        (group, p)
        for group, params, gradients in watched
        for p, g in zip(params, gradients, strict=True)
        if not g.isfinite().all()
    ]
    culprits = [name_of(group, p) for group, p in broken if group["nonfinite"] == "raise"]
    if culprits:
        raise ValueError(message(culprits, "nothing has moved"))
    return not broken


def _watched(batches: Iterable[Batch]) -> Iterator[Watched]:
    return (Watched(batch.group, batch.params, _gradients(batch)) for batch in batches)


def _gradients(batch: Batch) -> list[Tensor]:
    """The gradients as the step will see them: float64 ones of other parameters may overflow."""
    double = torch.float64 if batch.params[0].dtype != torch.float64 else None
    return [g.float() if g.dtype == double else g for g in (batch.past or batch.gradients)]


def message(culprits: list[str], outcome: str) -> str:
    """The error for these parameters."""
    names = ", ".join(culprits[:5]) + (f" and {len(culprits) - 5} more" if len(culprits) > 5 else "")
    return (
        f"NaN or Inf in the gradient of {names}; {outcome}. torch.autograd.set_detect_anomaly(True) finds where it "
        "comes from; nonfinite='skip' leaves such steps out, nonfinite='propagate' lets them through."
    )


class FiniteGuard:
    """Keeps steps whose gradients hold NaN or Inf from changing anything.

    Where reading a number is free (CPU), such gradients are found before the step. On accelerators the device finds
    them: ``found_inf`` masks the update, and the error is raised by the next call of ``step``, when the host knows.
    Between steps it holds flags of the device and weak references to parameters.
    """

    def __init__(self) -> None:
        #: Whether squares of gradients overflow, as far as the host knows.
        self.is_large = False
        #: Whether the host knows that all entries are so small that sums of their squares are finite.
        self.is_small = False
        self._flags: list[_Flags] = []
        self._counted: list[tuple[weakref.ref[Tensor], float]] = []
        self._refused = ""

    def may_go(self, batches: Sequence[Batch], *, again: bool = False) -> bool:
        """Whether gradients are finite as far as the host can tell; what a device finds is in ``found_inf``.

        Args:
            batches: of the step; where momenta look back, their ``past`` gradients are asked.
            again: whether the batches' own gradients have been asked before.

        Raises:
            ValueError: see :func:`all_finite`.
        """
        asked = [batch for batch in batches if batch.is_watched and not (again and batch.past is None)]
        if not on_host(asked):
            self._flags.append(_Flags([*_watched(asked)]))
            return True
        total = None if again else sum_of_gathered_norms(asked)
        total = sum_of_norms(asked) if total is None else total
        self.is_small = total <= LARGEST and (not again or self.is_small)
        self.is_large |= not math.isfinite(total)
        return math.isfinite(total) or all_finite(_watched(asked))

    def are_finite(self, batches: Sequence[Batch]) -> bool:
        """Whether the host can tell at a glance that a step can go: if not, ``may_go`` finds out why."""
        asked = [batch for batch in batches if batch.is_watched]
        total = math.inf if host.DEFERRED else sum_of_gathered_norms(asked)
        self.is_small = total is not None and total <= LARGEST
        return self.is_small

    def may_all_go(
        self,
        ranks: Ranks,
        watched: Sequence[Watched],
        present: Present,
        refusal: Exception | None,
        *,
        again: bool = False,
    ) -> bool:
        """The same for all ranks together, which get one answer or one error: one small all-reduce.

        Args:
            ranks: that step together.
            watched: what this rank has of the gradients.
            present: which parameters have gradients, which must be the same everywhere.
            refusal: what this rank has found wrong so far.
            again: see :meth:`may_go`.
        """
        every = [g for each in watched for g in each.gradients]
        if host.DEFERRED or not all(g.is_cpu for g in every) or any(each.group["capturable"] for each in watched):
            flags = _Flags(watched, Poll(ranks, present, refusal))
            if refusal is not None:
                raise refusal  # the others do not wait for the device, and time out where they need this rank
            self._flags.append(flags)
            return True
        poll = Poll(ranks, present, refusal)
        poll.take(sum(map(norm_on_host, every)))
        total = poll.numbers()[0]
        self.is_small = total <= LARGEST and (not again or self.is_small)
        self.is_large |= not math.isfinite(total)
        poll.raise_error()
        return math.isfinite(total) or self._all_finite_everywhere(ranks, watched)

    def _all_finite_everywhere(self, ranks: Ranks, watched: Sequence[Watched]) -> bool:
        mine, text = False, ""
        try:
            mine = all_finite(watched)
        except ValueError as error:
            text = str(error)
        answers = ranks.every((mine, text))
        for rank, (_, text) in enumerate(answers):
            if text:
                raise ValueError(f"rank {rank}: {text}")
        return all(is_finite for is_finite, _ in answers)

    def found_inf(self) -> Tensor | None:
        """Whether this step must change nothing, as a flag of the device; ``None`` if the host knows that it can go."""
        if not self._flags:
            return None
        home = self._flags[0].found_inf.device
        return torch.stack([flags.found_inf.to(home) for flags in self._flags]).any()

    def note_count(self, batch: Batch) -> None:
        """Remember that a batch counts this step; the count is taken back if the device leaves the step out."""
        if batch.found_inf is not None and not batch.captured:
            self.note_steps(batch.entries("step"))

    def note_steps(self, entries: Iterable[Tensor]) -> None:
        """Remember that these entries of the state, which the host reads, are about to count one more step."""
        self._counted += [(weakref.ref(entry), entry.item() + 1) for entry in entries]

    def settle(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Find out whether the device took the last step; if not, take back its count, and keep the error if any."""
        self.is_large = self.is_small = False
        if not self._flags:
            return
        if capturing():
            self._flags, self._counted = [], []
        if any([flags.left_out() for flags in self._flags]):
            for entry, number in ((reference(), number) for reference, number in self._counted):
                if entry is not None and entry.item() == number:  # somebody may have set it since
                    entry -= 1
            ids = {id(p) for flags in self._flags for p in flags.culprits()}
            refusing = [(group, p) for group in groups if group["nonfinite"] == "raise" for p in group["params"]]
            names = dict.fromkeys(name_of(group, p) for group, p in refusing if id(p) in ids)
            mine = message([*names], "that step was left out") if names else ""
            polls = [flags.poll for flags in self._flags if flags.poll is not None]
            self._refused = next(filter(None, (poll.late_error(mine) for poll in polls)), "") if polls else mine
        self._flags, self._counted = [], []

    def raise_late(self) -> None:
        """Raise the error of the last step, once."""
        refused, self._refused = self._refused, ""
        if refused:
            raise ValueError(refused)


class _Flags:
    """Whether each of many gradients is finite, known to the device at once and to the host later.

    Args:
        watched: the gradients.
        poll: of all ranks, if several step together.
    """

    def __init__(self, watched: Iterable[Watched], poll: Poll | None = None) -> None:
        self.poll = poll
        kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
        owners: dict[tuple[torch.device, torch.dtype], list[weakref.ref[Tensor]]] = defaultdict(list)
        for _, params, gradients in watched:
            for p, g in zip(params, gradients, strict=True):
                if g.numel():
                    kinds[g.device, g.dtype].append(g)
                    owners[g.device, g.dtype].append(weakref.ref(p))
        self._owners = [owner for alike in owners.values() for owner in alike]
        found = [torch.stack(torch._foreach_norm(alike, math.inf)).isfinite() for alike in kinds.values()]
        home = found[0].device if found else torch.device("cpu")
        flags = torch.cat([flag.to(home) for flag in found]) if found else torch.ones(0, dtype=torch.bool)
        #: Whether one of them is not finite, or something else is wrong on some rank, a number of the device.
        self.found_inf = ~flags.all() if poll is None else poll.take(~flags.all())
        if capturing():
            self._owners, self._flags, self._event = [], flags.new_empty(0, device="cpu"), None
            return
        self._flags = torch.cat([self.found_inf.to(home).reshape(1), flags]).to("cpu", non_blocking=True)
        self._event = torch.Event(home) if home.type in _WITH_EVENTS else None
        if self._event is not None:
            self._event.record()

    def left_out(self) -> bool:
        """Whether the step was left out; waits until that is known."""
        if self._event is not None:
            self._event.synchronize()
        return bool(self._flags[0]) if self._flags.numel() else False

    def culprits(self) -> list[Tensor]:
        """The parameters whose gradients here are not finite, if they are still there; after ``left_out``."""
        flags = zip(self._owners, self._flags[1:].tolist(), strict=True)
        return [p for p in (owner() for owner, is_finite in flags if not is_finite) if p is not None]
