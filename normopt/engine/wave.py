"""Parameters that are moved together, as a step sees them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from normopt.engine.batch import Batch
from normopt.engine.finite import FiniteGuard
from normopt.engine.plan import Plan, State
from normopt.engine.totals import Everywhere


class Wave:
    """All parameters of an optimizer that are here as they are; sharded ones come in waves of their own.

    Args:
        groups: their param groups.
        state: what ``optimizer.state`` is.
        plans: of the last step, by the group's place.
    """

    #: Other ranks, which have tensors that this one has not.
    everywhere: Everywhere | None = None

    def __init__(self, groups: list[dict[str, Any]], state: State, plans: dict[int, list[Plan]]) -> None:
        self.groups, self.state, self.plans = groups, state, plans

    def may_go(self, guard: FiniteGuard, batches: Sequence[Batch], *, again: bool = False) -> bool:
        """Whether gradients are finite, see :meth:`~normopt.engine.finite.FiniteGuard.may_go`."""
        return guard.may_go(batches, again=again)

    def run(self, closure: Callable[[], Any]) -> None:
        """Compute gradients at the weights as they are in this wave's tensors."""
        closure()
