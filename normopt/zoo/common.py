"""What the constructors of the zoo share."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TypedDict

from normopt.roles import Geometry

if sys.version_info >= (3, 11):
    from typing import Unpack
else:
    from typing_extensions import Unpack  # comes with torch

__all__ = ["NO_DECAY", "Common", "Unpack"]


class Common(TypedDict, total=False):
    """Keyword arguments that every optimizer hands on to :class:`~normopt.SteepestDescent`."""

    geometry: str | Geometry | None
    overrides: Mapping[str, Any] | None
    maximize: bool
    foreach: bool | None
    fused: bool | None
    capturable: bool
    differentiable: bool


#: With a whole model: every tensor moves by the optimizer's own rule, but vectors and scalars are not decayed.
NO_DECAY: Geometry = {"vector": {"weight_decay": 0.0}, "scalar": {"weight_decay": 0.0}, "*": {}}
