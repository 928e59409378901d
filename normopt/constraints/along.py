"""The base of constraints that treat each row or each column by itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from normopt.constraints.base import Constraint
from normopt.ingredient.traits import trait
from normopt.ingredient.view import View


class AlongAxis(Constraint):
    """A constraint of each row (``axis=-1``) or column (``axis=-2``) by itself; subclasses have the field ``axis``."""

    _abstract = True
    axis: int

    @trait
    def reduces(self) -> str:
        """``"row"`` or ``"column"``."""
        return "row" if self.axis == -1 else "column"

    def __post_init__(self) -> None:
        if self.axis not in (-1, -2):
            raise ValueError(f"{type(self).__name__}: axis must be -1 (rows) or -2 (columns), got {self.axis!r}")

    def seen_through(self, view: View) -> Constraint:
        stored: Any = self
        seen = replace(stored, axis=-3 - self.axis) if view.transpose else stored
        if (view.equal_parts > 1 and seen.axis == -2) or (view.groups > 1 and self.axis == -2):
            several = view.equal_parts * view.groups
            raise ValueError(f"{self}: its vectors run across the {several} matrices of {view}; see them as one")
        found: Constraint = seen
        return found
