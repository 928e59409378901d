"""Every optimizer of the registry, in several settings, and bare combinations, for tests that are asked of them all."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import signature

import pytest

import normopt
from normopt import SteepestDescent

Make = Callable[..., SteepestDescent]

#: Settings under which an optimizer keeps more state than by default.
MORE = {
    "sgd": {"momentum": 0.9, "weight_decay": 0.1},
    "adamw": {"amsgrad": True},
    "muon": {"orthogonalize": "exact", "orthogonalize_dtype": None},
    "scion": {"constrained": True, "radius": 1.0},
    "rmsprop": {"centered": True, "momentum": 0.3, "alpha": 0.9},
    "ademamix": {"beta3_warmup": 3, "alpha_warmup": 2, "weight_decay": 0.1},
    "novograd": {"grad_averaging": True, "weight_decay": 0.1},
    "lamb": {"max_grad_norm": None, "always_adapt": True, "trust_clip": True},
    "lion": {"cautious": True, "weight_decay": 0.1},
    "adamp": {"delta": 5.0, "weight_decay": 0.1, "nesterov": True},
    "sgdp": {"delta": 1.5, "weight_decay": 0.1, "momentum": 0.5},
    "adammini": {"rows": 2, "weight_decay": 0.1},
    "subsetnorm": {"subset_size": 2, "betas": (0.9, 1.0)},
    "muoneq": {"equilibrate": "both"},
    "muonplusplus": {"protect": 2, "power_iterations": None, "orthogonalize": "exact"},
}
BARE = {
    "shampoo": {"norm": "Smoothed(Spectral(), 0.9, 1e-6)", "momentum": 0.9},
    "chain": {"norm": "Chain(Row(), Spectral(method='exact'), EMA(0.5))", "step_size": "sharp"},
    "grafted": {"norm": "Grafted(Smoothed(Column()), Euclidean())", "momentum": "nesterov"},
    "l2": {"norm": "max", "constraint": "L2(0.1)", "momentum": "heavy-ball"},
}
JOINT = {
    "dual": {"norm": "Spectral(method='exact')", "step_size": "dual"},
    "free": {"norm": "Smoothed(Max())", "step_size": "prodigy"},
}
#: Those that need a closure.
LOOK_BACK = {"stormplus"}
NAMES = [name for name in normopt.list_optimizers() if name not in LOOK_BACK]
ZOO: dict[str, Make] = {name: partial(normopt.create, name) for name in NAMES}
ZOO |= {f"{name}+": partial(ZOO[name], **options) for name, options in MORE.items()}
#: Made of ingredients that others of the zoo have too: what the contract asks of all, exhaustive tests ask of them.
KIN = {"adammini", "subsetnorm", "htmuon", "numuon", "muon2", "olion", "splus", "rmnp", "muoneq", "spectra", "spel"}
KIN |= {"adago", "aurora", "hybridauon", "adamuon", "dasgo", "asgo", "muonplus"}
#: Those that look at all tensors before they move one.
COUPLED = {"lamb", "prodigy", "dadaptadam"}
LOCAL = {name: make for name, make in ZOO.items() if name not in COUPLED}
LOCAL |= {name: partial(SteepestDescent, **options) for name, options in BARE.items()}
EVERY = ZOO | LOCAL | {name: partial(SteepestDescent, **options) for name, options in JOINT.items()}
#: One optimizer of each file of the zoo.
FAMILIES = ("sgd", "lion", "adamw", "lars", "muon", "normuon", "scion", "soap", "scale")
FAMILIES += ("normalizedsgd", "adamh", "adamp", "prodigy", "adammini", "muon2", "numuon", "cosmos")
#: Every optimizer of the registry, in every setting: what trains a whole model.
WHOLE = ZOO | {name: partial(normopt.create, name) for name in LOOK_BACK}
#: Those and every bare combination.
ALL = EVERY | WHOLE


def at_once(makes: dict[str, Make]) -> dict[str, Make]:
    """All decompositions renewed at once: where each matrix has its turn depends on which others there are."""
    takes = {name for name, cls in SteepestDescent.registry.items() if "staggered" in signature(cls).parameters}
    of_zoo = {name for name in makes if name in ZOO and name.rstrip("+") in takes and name not in BARE}
    return {name: partial(make, staggered=False) if name in of_zoo else make for name, make in makes.items()}


zoo = pytest.mark.parametrize("make", ZOO.values(), ids=ZOO)
local = pytest.mark.parametrize("make", LOCAL.values(), ids=LOCAL)
local_at_once = pytest.mark.parametrize("make", at_once(LOCAL).values(), ids=LOCAL)
every = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
# For tests that give a closure, so that those which look back can take them too.
whole = pytest.mark.parametrize("make", WHOLE.values(), ids=WHOLE)
everyone = pytest.mark.parametrize("make", ALL.values(), ids=ALL)
everyone_at_once = pytest.mark.parametrize("make", at_once(ALL).values(), ids=ALL)
whole_at_once = pytest.mark.parametrize("make", at_once(WHOLE).values(), ids=WHOLE)
