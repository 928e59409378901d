"""The processes that take each step together: sums over all of them, and one verdict or error for all."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from normopt.stepsize.base import double


class Present(NamedTuple):
    """Which parameters have gradients, in the order of param groups, and what they are called."""

    flags: list[bool]
    names: Callable[[], list[str]]


class Ranks:
    """The ranks of one process group.

    Args:
        group: their process group.
        device: that its collectives work on.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        self._group, self.device = group, device
        self.size: int = dist.get_world_size(group)
        self.rank: int = dist.get_rank(group)

    def total(self, x: Tensor) -> Tensor:
        """The sum of ``x`` over all ranks, in place."""
        dist.all_reduce(x, group=self._group)
        return x

    def every(self, mine: Any) -> list[Any]:
        """What each rank has, in their order: for what goes wrong, not for every step."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, mine, group=self._group)
        return found


class Poll:
    """One small all-reduce before a step: whether all ranks can take it, with gradients of the same parameters.

    Args:
        ranks: that step together.
        present: which parameters have gradients.
        refusal: what this rank has found wrong.
    """

    def __init__(self, ranks: Ranks, present: Present, refusal: Exception | None) -> None:
        self._ranks, self._present, self._refusal = ranks, present, refusal
        self._sums = torch.empty(0)

    def take(self, number: Tensor | float) -> Tensor:
        """Whether something is wrong on any rank, a number of the device.

        Args:
            number: of this rank's gradients; 0 or more, and not finite, or not 0 if it is a flag, if they are bad.
        """
        ranks = self._ranks
        # 16 bits, so that the sums are exact: all ranks have one mark m if and only if (sum m)^2 = ranks sum m^2.
        mark, dtype = float(zlib.crc32(bytes(self._present.flags)) & 0xFFFF), double(ranks.device)
        mine = [mark, mark * mark, float(self._refusal is not None)]
        first = torch.as_tensor(number, device=ranks.device).to(dtype).reshape(1)
        sums = ranks.total(torch.cat([first, torch.tensor(mine, dtype=dtype, device=ranks.device)]))
        self._sums = torch.stack([sums[0], (sums[1] * sums[1] != ranks.size * sums[2]).to(dtype), sums[3]])
        return (self._sums != 0).any()

    def numbers(self) -> tuple[float, float, float]:
        """The sum of the numbers, whether ranks differ in what is present, how many refuse; waits for the device."""
        total, differ, refusing = self._sums.tolist()
        return total, differ, refusing

    def raise_error(self, outcome: str = "nothing has moved") -> None:
        """Raise what is wrong apart from the numbers, on all ranks alike; the rank that refuses raises its own."""
        _, differ, refusing = self.numbers()
        if refusing:
            texts = self._ranks.every("" if self._refusal is None else str(self._refusal))
            if self._refusal is not None:
                raise self._refusal
            rank = next(rank for rank, text in enumerate(texts) if text)
            raise ValueError(f"rank {rank}: {texts[rank]}")
        if differ:
            raise ValueError(self._missing(outcome))

    def late_error(self, mine: str) -> str:
        """The same for a step that the device has left out, as text, or what ranks say of their own gradients."""
        try:
            self.raise_error("that step was left out")
        except ValueError as error:
            return str(error)
        return next((f"rank {rank}: {text}" for rank, text in enumerate(self._ranks.every(mine)) if text), "")

    def _missing(self, outcome: str) -> str:
        names = self._present.names()
        flags = self._ranks.every(self._present.flags)
        every: list[set[str]] = [{name for name, flag in zip(names, each, strict=True) if flag} for each in flags]
        some = sorted(set().union(*every).difference(every[0].intersection(*every)))
        lacking = [rank for rank, each in enumerate(every) if not each.issuperset(some)]
        more = f" and {len(some) - 5} more" if len(some) > 5 else ""
        return (
            f"{', '.join(some[:5])}{more}: some ranks have a gradient, but not rank {', '.join(map(str, lacking))}; "
            f"{outcome}. Let every rank compute the same gradients, of zeros where a parameter was not used"
        )
