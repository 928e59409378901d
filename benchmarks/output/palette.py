"""One colour for each family of optimizers, in every picture: a family is what descends under one norm."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch

from normopt.optimizer import SteepestDescent
from normopt.roles.geometries import GEOMETRIES
from normopt.roles.options import entry
from normopt.rule import rule_of

#: What is no optimizer of the library, or not known to be one.
OTHER = "#4c566a"

#: The colour of each family by the norm of its periodic table's row; rows that are no norm have ``NO_NORM``.
COLORS = {
    "Max": "#d1495b",
    "Euclidean": "#8d99ae",
    "Spectral": "#00798c",
    "Row": "#edae49",
    "Column": "#c9822b",
    "Schatten": "#5aa9a4",
    "KyFan": "#7fb77e",
    "DualKyFan": "#a3c14a",
    "Nuclear": "#3a7d44",
    "PerBlock": "#4f86c6",
    "Lp": "#e58fb0",
}
NO_NORM = "#6a4c93"


@cache
def family(optimizer: str) -> str:
    """The norm, or the direction that is none, under which an optimizer of that name moves a matrix; "" if unknown.

    ``"muon@angpt"`` and ``"muonplus-soap lr=1"`` are members of the families of ``muon`` and ``muonplus``; a geometry
    has the family of its hidden matrices.
    """
    name = re.split(r"[@ -]", optimizer.lower())[0]
    weight = torch.zeros(2, 2, requires_grad=True)
    if name in SteepestDescent.registry:
        group = SteepestDescent.registry[name]([weight]).param_groups[0]
    elif name in GEOMETRIES:
        group = SteepestDescent([{"params": [weight], **entry(GEOMETRIES[name], "linear")}]).param_groups[0]
    else:
        return ""
    return rule_of(group).norm.cell[0]


def color(optimizer: str) -> str:
    """The colour of the optimizer's family."""
    found = family(optimizer)
    return COLORS.get(found, NO_NORM) if found else OTHER


#: How lines of one colour are told apart.
DASHES = ("-", "--", ":", "-.")
#: The optimizer that all other optimizers are compared with: black, and above the other lines.
BASELINE, BLACK = "adamw", "#000000"
#: Of more lines than `MANY`, those after the first `MANY` are grey and below the others.
MANY, GREY = 12, "#c3c8d0"


def lines(optimizers: Iterable[str], shade_of: Callable[[str], str] = color) -> dict[str, dict[str, Any]]:
    """How each optimizer's line is drawn: its colour, dashed by its place among those of that colour, paler after four.

    The baseline is black. Give the best first: where lines are many, the rest is grey.
    """
    seen: Counter[str] = Counter()
    found: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(optimizers):
        shade = BLACK if name == BASELINE else shade_of(name) if i < MANY else GREY
        place = seen[shade]
        seen[shade] += 1
        alpha = 1.0 if place < len(DASHES) or shade == GREY else 0.55
        dash = "-" if shade == GREY else DASHES[place % len(DASHES)]
        found[name] = {"color": shade, "linestyle": dash, "alpha": alpha, "zorder": 1 if shade == GREY else 2}
        if shade == BLACK:
            found[name]["zorder"] = 3
    return found


#: The colours of libraries, where optimizers of one family are compared across them; any other is `OTHER`.
LIBRARIES = {"normopt": "#d1495b", "torch": "#1d3557", "pytorch-optimizer": "#2a9d8f"}
