"""The registry."""

from __future__ import annotations

from torch import nn

import normopt
from normopt import SteepestDescent, zoo


def test_the_bases_of_the_zoo_are_no_optimizers() -> None:
    assert not {"hidden", "normdescent"} & set(normopt.list_optimizers())


def test_every_optimizer_with_memory_is_registered() -> None:
    for name in ("nadam", "adamax", "ademamix", "adafactor", "lars", "lamb", "novograd"):
        optimizer = normopt.create(name, nn.Linear(4, 3))
        assert isinstance(optimizer, SteepestDescent) and type(optimizer).__name__ in zoo.__all__
