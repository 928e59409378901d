"""SignSGD, Signum and Lion beside their references."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor
from torch.optim import Optimizer

from normopt import zoo
from tests.support.paths import SHAPES, assert_same_path


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sign_descent_is_pytorch_optimizers_signsgd(momentum: float) -> None:
    from pytorch_optimizer import SignSGD

    def ours(p: list[Tensor]) -> Optimizer:
        if momentum:
            return zoo.Signum(p, lr=0.02, momentum=momentum, weight_decay=0.1)
        return zoo.SignSGD(p, lr=0.02, weight_decay=0.1)

    assert_same_path(ours, lambda p: SignSGD(p, lr=0.02, momentum=momentum, weight_decay=0.1), SHAPES, 2e-5)


LION: list[dict[str, Any]] = [
    {},
    {"lr": 0.02, "betas": (0.8, 0.9), "weight_decay": 0.1},
    {"lr": 0.02, "weight_decay": 0.002, "decoupled_weight_decay": True},
]


@pytest.mark.parametrize("options", LION, ids=str)
def test_lion_is_lion_pytorchs(options: dict[str, Any]) -> None:
    from lion_pytorch import Lion

    assert_same_path(lambda p: zoo.Lion(p, **options), lambda p: Lion(p, **options), SHAPES, 2e-5)
