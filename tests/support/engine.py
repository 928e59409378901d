"""What the engine would do with the gradients that are there now."""

from __future__ import annotations

from normopt import SteepestDescent
from normopt.engine.batch import Batch
from normopt.engine.prepare import prepared


def batches(optimizer: SteepestDescent) -> list[Batch]:
    """The batches of the next step, which is not taken."""
    given = optimizer.param_groups, optimizer._plans, optimizer.state, optimizer.defaults, optimizer.compiles
    return [batch for each in prepared(*given) for batch in each]
