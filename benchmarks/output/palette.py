"""One colour for each family of optimizers, in every picture: a family is what descends under one norm."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch

from normopt.optimizer import SteepestDescent
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
    "Nuclear": "#3a7d44",
    "PerBlock": "#4f86c6",
}
NO_NORM = "#6a4c93"


@cache
def family(optimizer: str) -> str:
    """The norm, or the direction that is none, under which an optimizer of that name moves a matrix; "" if unknown.

    ``"muon@angpt"`` and ``"muonplus-soap lr=1"`` are members of the families of ``muon`` and ``muonplus``.
    """
    name = re.split(r"[@ -]", optimizer.lower())[0]
    if name not in SteepestDescent.registry:
        return ""
    group = SteepestDescent.registry[name]([torch.zeros(2, 2, requires_grad=True)]).param_groups[0]
    return rule_of(group).norm.cell[0]


def color(optimizer: str) -> str:
    """The colour of the optimizer's family."""
    found = family(optimizer)
    return COLORS.get(found, NO_NORM) if found else OTHER


#: How lines of one colour are told apart.
DASHES = ("-", "--", ":", "-.")


def lines(optimizers: Iterable[str]) -> dict[str, dict[str, Any]]:
    """How each optimizer's line is drawn: its family's colour, dashed by its place in the family, paler after four."""
    seen: Counter[str] = Counter()
    found: dict[str, dict[str, Any]] = {}
    for name in optimizers:
        place = seen[color(name)]
        seen[color(name)] += 1
        alpha = 1.0 if place < len(DASHES) else 0.55
        found[name] = {"color": color(name), "linestyle": DASHES[place % len(DASHES)], "alpha": alpha}
    return found
