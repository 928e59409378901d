"""What the constructors of the zoo share."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypedDict

import torch

from normopt.directions.smoothed import Smoothed
from normopt.ingredient import get, option
from normopt.momentum.averages import EMA
from normopt.norms import Max
from normopt.roles.options import Geometry
from normopt.stepsize.base import StepSize
from normopt.stepsize.free import LearningRateFree

if sys.version_info >= (3, 11):
    from typing import Unpack
else:
    from typing_extensions import Unpack  # comes with torch

__all__ = ["NO_DECAY", "Common", "Fixed", "Unpack", "adamw", "second", "with_radius"]


class Fixed(TypedDict, total=False):
    """Keyword arguments that every optimizer hands on to :class:`~normopt.SteepestDescent`."""

    geometry: str | Geometry | None
    overrides: Mapping[str, Any] | None
    maximize: bool
    nonfinite: str
    state_dtype: str | torch.dtype | None
    foreach: bool | None
    fused: bool | None
    capturable: bool
    compile: bool
    differentiable: bool


class Common(Fixed, total=False):
    """The same for optimizers without a step size of their own: ``step_size="prodigy"`` finds their learning rate."""

    step_size: str | StepSize


#: With a whole model: every tensor moves by the optimizer's own rule, but vectors and scalars are not decayed.
NO_DECAY: Geometry = {"vector": {"weight_decay": 0.0}, "scalar": {"weight_decay": 0.0}, "*": {}}


def with_radius(step_size: str | StepSize) -> StepSize:
    """The step size of that name; one that finds the learning rate reads ``radius`` from the param group."""
    found = get(StepSize, step_size)
    return replace(found, radius=option("radius")) if isinstance(found, LearningRateFree) else found


def second(betas: tuple[float, float]) -> float:
    """The second beta; a ``ValueError`` unless there are two."""
    beta: float = option("betas", 1).value({"betas": betas})
    if not 0 <= beta <= 1:
        raise ValueError(f"betas must lie in [0, 1], got {betas!r}")
    return beta


def adamw(betas: tuple[float, float], eps: float, weight_decay: float, lr: dict[str, float]) -> dict[str, Any]:
    """AdamW as the options of a param group."""
    return {
        "norm": Smoothed(Max(), option("betas", 1), option("eps")),
        "momentum": EMA(option("betas", 0), bias_correction=True),
        "betas": betas,
        "eps": eps,
        "weight_decay": weight_decay,
        **lr,
    }
