"""Geometries: tables from roles to norms."""

from __future__ import annotations

import math
from typing import Any

from normopt.directions.smoothed import Smoothed
from normopt.ingredient.base import option
from normopt.ingredient.registry import nearest
from normopt.momentum.averages import EMA
from normopt.norms.entrywise import Euclidean, Max
from normopt.norms.rows_columns import Column, Row
from normopt.norms.spectral import Spectral
from normopt.roles.options import ROLES, Geometry, check_table, entry, merged


def adam_ingredients(beta1: float, beta2: float, eps: float = 1e-8) -> dict[str, Any]:
    """Adam's norm and momentum, for these numbers or options."""
    return {"norm": Smoothed(Max(), beta2, eps), "momentum": EMA(beta1, bias_correction=True)}


def adam_options(betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8) -> dict[str, Any]:
    """Adam as the options of a param group, its numbers among them."""
    ingredients = adam_ingredients(option("betas", 0), option("betas", 1), option("eps"))
    return {**ingredients, "betas": betas, "eps": eps}


#: Adam's ingredients, as options of a param group.
ADAM = adam_ingredients(0.9, 0.95)

#: The geometries by name. They say nothing of the momentum of matrices. ``adam``: Adam everywhere. ``muon``: spectral
#: for hidden matrices, by Polar Express at the scale ``"rms"`` (``zoo.Muon`` has a table of its own), Adam elsewhere.
#: ``scion``: arXiv 2502.07529, table 3, for one-hot input. ``modula``: arXiv 2410.21265, where the readout is a linear
#: layer too. ``anthology``: the norms that arXiv 2409.20325, section 4, recommends, with the RMS -> linf norm for the
#: readout.
GEOMETRIES: dict[str, Geometry] = {
    "adam": {"*": ADAM},
    "muon": {"linear": Spectral(), "conv": Spectral(), "*": ADAM},
    "scion": {
        "embedding": Column(),
        "linear": Spectral(),
        "conv": Spectral(),
        "unembedding": Max(scale="fan_in"),
        "vector": Euclidean(),
        "scalar": Euclidean(),
        "*": Max(),
    },
    "modula": {
        "embedding": Column(),
        "linear": Spectral(),
        "conv": Spectral(),
        "unembedding": Spectral(),
        "vector": Euclidean(),
        "scalar": Euclidean(),
        "*": Max(),
    },
    "anthology": {
        "embedding": Column(),
        "linear": Spectral(),
        "conv": Spectral(),
        "unembedding": Row(),
        "vector": Euclidean(),
        "scalar": Euclidean(),
        "*": Max(),
    },
}


def width_scaled(width: int, tuned_at: int, weight_decay: float) -> Geometry:
    """A geometry that takes the learning rate and the decay of one width to another (Fan et al., arXiv 2510.15262).

    Hidden matrices: ``lr * tuned_at / width`` and ``weight_decay * sqrt(width / tuned_at)``, under which the largest
    singular value in AdamW's steady state, ``sqrt(lr / weight_decay) width^(3/4)``, does not change. All other
    parameters keep ``lr`` and are not decayed. ``AdamW(model, lr, geometry=width_scaled(1024, 256, 0.1))``.

    Args:
        width: the model's width.
        tuned_at: the width that learning rate and decay were tuned at.
        weight_decay: the weight decay of hidden matrices at the width ``tuned_at``.

    Raises:
        ValueError: a width that is not positive.
    """
    for name, value in {"width": width, "tuned_at": tuned_at}.items():
        if value <= 0:
            raise ValueError(f"width_scaled: {name} must be positive, got {value!r}")
    hidden = {"lr_ratio": tuned_at / width, "weight_decay": weight_decay * math.sqrt(width / tuned_at)}
    return {"linear": hidden, "conv": hidden, "*": {"weight_decay": 0.0}}


def overlaid(own: Geometry, given: str | Geometry | None) -> Geometry:
    """The user's geometry laid over the optimizer's own, role by role; its ``"*"`` is for all roles it does not name.

    Raises:
        ValueError: ``given`` is not the name of a geometry.
        TypeError: it is no dict, or has ``None`` for a role.
    """
    if isinstance(given, str) and given not in GEOMETRIES:
        raise ValueError(f"unknown geometry {given!r}; {nearest(given, GEOMETRIES)}")
    table = GEOMETRIES[given] if isinstance(given, str) else {} if given is None else given
    check_table(table)
    return {role: merged(entry(own, role), entry(table, role)) for role in dict.fromkeys(("*", *ROLES, *own, *table))}
