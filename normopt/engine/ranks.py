"""The processes that take each step together: sums over all of them, and one verdict or error for all."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from normopt.stepsize.base import double


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
        self._mark: tuple[Any, float] = ((), 0.0)

    def total(self, x: Tensor) -> Tensor:
        """The sum of ``x`` over all ranks, in place."""
        dist.all_reduce(x, group=self._group)
        return x

    def every(self, mine: Any) -> list[Any]:
        """What each rank has, in their order: for what goes wrong, not for every step."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, mine, group=self._group)
        return found

    def poll(self, number: Tensor | float, present: Sequence[Any], refuses: bool) -> Tensor:
        """One small all-reduce: ``(sum of the numbers, whether they differ in what is present, how many refuse)``.

        Args:
            number: finite on a rank that can go.
            present: which gradients there are, as anything with a repr.
            refuses: whether this rank has found something wrong.
        """
        if self._mark[0] != present:
            # 16 bits, so that the sums are exact: all ranks have one mark m if and only if (sum m)^2 = ranks sum m^2.
            self._mark = present, float(zlib.crc32(repr(present).encode()) & 0xFFFF)
        mark, dtype = self._mark[1], double(self.device)
        rest = torch.tensor([mark, mark * mark, float(refuses)], dtype=dtype, device=self.device)
        first = torch.as_tensor(number, dtype=dtype, device=self.device).reshape(1)
        sums = self.total(torch.cat([first, rest]))
        differ = (sums[1] * sums[1] != self.size * sums[2]).to(dtype)
        return torch.stack([sums[0], differ, sums[3]])

    def raise_refusal(self, mine: Exception | None) -> None:
        """Raise what some rank has found wrong, on all ranks."""
        texts = self.every("" if mine is None else str(mine))
        if mine is not None:
            raise mine
        rank = next(rank for rank, text in enumerate(texts) if text)
        raise ValueError(f"rank {rank}: {texts[rank]}")

    def raise_missing(self, names: Iterable[str]) -> None:
        """Raise a ``ValueError`` on all ranks that says which gradients only some of them have."""
        every = [set(each) for each in self.every([*names])]
        some = sorted(set.union(*every) - set.intersection(*every))
        lacking = [rank for rank, each in enumerate(every) if not each.issuperset(some)]
        more = f" and {len(some) - 5} more" if len(some) > 5 else ""
        raise ValueError(
            f"{', '.join(some[:5])}{more}: some ranks have a gradient, but not rank {', '.join(map(str, lacking))}; "
            "nothing has moved. Let every rank compute the same gradients, of zeros where a parameter was not used"
        )
