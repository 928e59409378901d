"""Norms of weight matrices: primal norm, dual norm, duality map, projection and initialization."""

from normopt.ingredient import choices
from normopt.ingredient import get as _get
from normopt.ingredient.stage import Direction
from normopt.norms.base import SCALES, Norm
from normopt.norms.blocks import PerBlock
from normopt.norms.entrywise import Euclidean, Lp, Max
from normopt.norms.kyfan import DualKyFan, KyFan
from normopt.norms.rows_columns import Column, Row
from normopt.norms.schatten import Nuclear, Schatten
from normopt.norms.spectral import Spectral

__all__ = [
    "SCALES",
    "Column",
    "Direction",
    "DualKyFan",
    "Euclidean",
    "KyFan",
    "Lp",
    "Max",
    "Norm",
    "Nuclear",
    "PerBlock",
    "Row",
    "Schatten",
    "Spectral",
    "get",
    "names",
]


def get(spec: str | Norm) -> Norm:
    """A norm from itself, its name (``"spectral"``) or its repr (``"Spectral(scale='unit')"``).

    Raises:
        ValueError: unknown name; the message holds the nearest one.
    """
    return _get(Norm, spec)


def names() -> list[str]:
    """The names of all registered norms, those of user-defined classes included."""
    return sorted(choices(Norm))
