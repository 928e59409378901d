"""The trials of `sweep`: quasi-random points of an optimizer's space, and the options that they stand for."""

import copy
import hashlib
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import qmc

from benchmarks import controls, peers
from benchmarks.contenders import BARE
from benchmarks.language import spaces
from benchmarks.language.plan import Plan
from benchmarks.language.presets import CONSTRAINED_MODELS
from benchmarks.language.spaces import Range, Space
from benchmarks.language.train import UNDECAYED
from normopt import SteepestDescent
from normopt.ingredient import get
from normopt.stepsize import LearningRateFree, StepSize

#: Values this near to an end of a range, as a share of it, are at its edge.
EDGE = 0.05
#: The number of the usual options, which are tried beside the trials.
USUAL = -1
#: Hyperparameters of `benchmarks.language.spaces` that are no arguments of optimizers.
NO_ARGUMENTS = ("lr", "shrinkage", "rest_ratio", "rest_beta2", "warmup", "decay")


@dataclass(frozen=True)
class Trial:
    """A point of a cell's space: the value of every hyperparameter, and the entry for a file of tuned options."""

    cell: str
    number: int
    values: dict[str, float]
    entry: dict[str, Any]


def trials(plan: Plan, cell: str, count: int) -> list[Trial]:
    """The first trials of a cell."""
    subject = Subject(plan, cell)
    space = subject.space()
    found = []
    for number, point in enumerate(points(cell, len(space), count)):
        values = {name: span.at(float(share)) for (name, span), share in zip(space.items(), point, strict=True)}
        found.append(Trial(cell, number, values, subject.entry(values)))
    return found


def usual(plan: Plan, cell: str) -> Trial:
    """The usual options of a cell, as `benchmarks.language.spaces` has them."""
    subject = Subject(plan, cell)
    values = subject.usual()
    defaults = {_split(name)[0] for name in subject.space().keys() - values.keys()}
    entry = {name: value for name, value in subject.entry(values).items() if name not in defaults}
    return Trial(cell, USUAL, values, entry)


def points(name: str, dimensions: int, count: int) -> NDArray[np.float64]:
    """The first points of the scrambled Sobol sequence that belongs to a name: (count, dimensions), in [0, 1).

    More points of the same name begin with the same points.
    """
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    power = max(0, count - 1).bit_length()  # such sequences are balanced at powers of two
    found: NDArray[np.float64] = qmc.Sobol(dimensions, scramble=True, rng=seed).random_base2(power)[:count]
    return found


def at_edges(space: Space, values: Mapping[str, float]) -> dict[str, str]:
    """The hyperparameters whose value is within `EDGE` of an end of the range, each with "low" or "high"."""
    shares = {name: space[name].share(value) for name, value in values.items()}
    return {n: "low" if share < 0.5 else "high" for n, share in shares.items() if not EDGE <= share <= 1 - EDGE}


class Subject:
    """The optimizer of a cell, as `sweep` sees it: what it takes, what is given, and what can be searched."""

    def __init__(self, plan: Plan, cell: str) -> None:
        self.name, self.model = plan.cells[cell]
        contender = plan.contenders[self.name]
        self.given, self.schedule = dict(plan.entry(cell)), plan.arguments
        self.preset = plan.preset
        self.base, self.fixed = contender.base, contender.options
        self.made_of = str(self.given.get("optimizer", contender.base))
        self.made_of = controls.BASE if self.made_of in controls.NAMES else self.made_of
        self._forget_chosen()
        self.is_peer = peers.is_peer(self.made_of)
        in_spaces = contender.base in {**spaces.RATES, **spaces.OWN}
        self.known = contender.base if in_spaces else self.made_of.partition(":")[2].lower() or self.made_of
        self.is_tuned = plan.has_entry(contender.base)
        set_here = {n: value for n, value in self.given.items() if n != "lr" or self.is_tuned or n in self.fixed}
        self.arguments = {**self._defaults(), **set_here}

    def _forget_chosen(self) -> None:
        """Leave out of what is given the options for tensors that are no hidden matrices which a sweep has chosen."""
        table = self.given.get("geometry", {})
        of_roles = isinstance(table, dict) and {*table} == {*UNDECAYED} and "geometry" not in self.fixed
        if of_roles and all({*options} <= {"lr_ratio", "betas"} for options in table.values()):
            del self.given["geometry"]
        if "rest" not in self.fixed and self.given.get("rest", {}).get("optimizer") == self.made_of:
            del self.given["rest"]

    def _defaults(self) -> dict[str, Any]:
        """The arguments with their defaults; those of the AdamW beside another library's optimizer of matrices too."""
        registry = {**SteepestDescent.registry, BARE: SteepestDescent}
        cls: Any = peers.find(self.made_of) if self.is_peer else registry[self.made_of]
        parameters = inspect.signature(cls).parameters.values()
        rest = {"aux_lr": None, "aux_betas": self.given["rest"].get("betas")} if "rest" in self.given else {}
        return {p.name: p.default for p in parameters if p.default is not p.empty} | rest

    def space(self) -> Space:
        """The ranges of all hyperparameters that are searched, the learning rate first."""
        found: dict[str, Range | None] = {"lr": self._rates()}
        for argument, several in spaces.BY_ARGUMENT.items():
            if argument in self.arguments:
                found |= {n: span for n, span in several.items() if self._has(argument if n in NO_ARGUMENTS else n)}
        if self._finds_its_rate():
            found |= {"aux_lr": None, "shrinkage": None} | (
                {"weight_decay": spaces.FREE_DECAY} if "shrinkage" in found else {}
            )
        if "aux_lr" not in self.arguments and "geometry" not in self.given and self.made_of not in peers.FLAGS:
            found |= {"rest_ratio": spaces.REST_RATIO}
            found |= {"rest_beta2": spaces.SECOND} if "betas[1]" in found else {}
        found |= {n: span for n, span in spaces.OWN.get(self.known, {}).items() if n in NO_ARGUMENTS or self._has(n)}
        found |= spaces.OF_ALL
        left_out = {name for name in ("warmup", "decay") if getattr(self.schedule, name) is not None}
        left_out |= {"shrinkage", "weight_decay", "warmup"} if self.model in CONSTRAINED_MODELS else set()
        left_out |= {"shrinkage"} if "weight_decay" in self.fixed else set()
        left_out |= {name for name in found if _split(name)[0] in self.fixed}
        left_out |= {"aux_lr", "aux_betas[1]", "rest_ratio", "rest_beta2"} if "rest" in self.fixed else set()
        return {name: span for name, span in found.items() if span is not None and name not in left_out}

    def _rates(self) -> Range:
        if self._finds_its_rate():
            return spaces.FREE_RATE
        middle = spaces.RATES.get(self.known, float(self.arguments["lr"]))
        swept = self.known in spaces.RATES or self.is_tuned
        factor = 2 ** (spaces.OCTAVES if swept else spaces.UNKNOWN_OCTAVES)
        low, high = (float(f"{rate:.2g}") for rate in (middle / factor, middle * factor))
        return Range(low, high, "log", f"around {'the best of earlier sweeps' if swept else 'the default'}, {middle:g}")

    def usual(self) -> dict[str, float]:
        """The hyperparameters that are searched, in the usual options, without those whose default is no number."""
        space, rest = self.space(), peers.REST if "rest" in self.given else {}
        rate, decay = space["lr"].at(0.5), self._customary("weight_decay")
        known: dict[str, float | None] = {
            "lr": rate,
            "shrinkage": None if decay is None else decay * rate * self.preset.steps,
            "rest_ratio": 1.0,
            "rest_beta2": self._customary("betas[1]"),
            "warmup": self.preset.warmup / self.preset.steps,
            "decay": self.preset.decay,
            **({"aux_lr": _rounded(rate * rest["lr_ratio"]), "aux_betas[1]": rest["betas"][1]} if rest else {}),
        }
        found = {name: known[name] if name in known else self._customary(name) for name in space}
        return {name: value for name, value in found.items() if value is not None}

    def _customary(self, name: str) -> float | None:
        """The default of an argument, or of one of its entries, or what is customary in its place."""
        argument, index = _split(name)
        default = self._defaults().get(argument)
        default = default if index is None or default is None else default[index]
        return spaces.CUSTOMARY.get(name, {}).get(default, default)

    def _finds_its_rate(self) -> bool:
        """Whether a step size that finds the learning rate is the optimizer's own, or is given."""
        given = self.given.get("step_size")
        return self.known in spaces.FREE or (given is not None and isinstance(get(StepSize, given), LearningRateFree))

    def _has(self, name: str) -> bool:
        """Whether the argument has a value of the kind that is searched: a number, or a list with that entry."""
        argument, index = _split(name)
        value = self.arguments.get(argument)
        if index is not None:
            return isinstance(value, (list, tuple)) and index < len(value)
        return argument == "aux_lr" or (isinstance(value, (int, float)) and not isinstance(value, bool))

    def entry(self, values: Mapping[str, float]) -> dict[str, Any]:
        """The entry for a file of tuned options that these values of the hyperparameters stand for."""
        entry = copy.deepcopy(self.given) | {"lr": values.get("lr", self.arguments["lr"])}
        schedule = dict(entry.pop("schedule", {}))
        for name, value in values.items():
            argument, index = _split(name)
            if name == "shrinkage":
                entry["weight_decay"] = _rounded(value / (entry["lr"] * self.preset.steps))
            elif name in ("warmup", "decay"):
                schedule[name] = round(value * self.preset.steps) if name == "warmup" else value
            elif index is not None:
                entry[argument] = [
                    value if i == index else old for i, old in enumerate(entry.get(argument, self.arguments[argument]))
                ]
            elif name not in ("rest_ratio", "rest_beta2"):
                entry[name] = value
        entry |= self._rest(entry, values)
        return entry | ({"schedule": schedule} if schedule else {})

    def _rest(self, entry: dict[str, Any], values: Mapping[str, float]) -> dict[str, Any]:
        """The options for all tensors that are no hidden matrices, where these have no arguments of their own."""
        ratio = {"lr_ratio": values["rest_ratio"]} if "rest_ratio" in values else {}
        betas = {}
        if "rest_beta2" in values:
            betas = {"betas": [values["rest_beta2"] if i == 1 else beta for i, beta in enumerate(entry["betas"])]}
        if not self.is_peer:
            return {"geometry": {role: {**ratio, **betas} for role in UNDECAYED}} if ratio else {}
        if "rest" in entry:
            given = {name: entry.pop(name) for name in ("aux_lr", "aux_betas") if name in entry}
            ratio = {"lr_ratio": _rounded(given["aux_lr"] / entry["lr"])} if "aux_lr" in given else {}
            betas = {"betas": given["aux_betas"]} if "aux_betas" in given else {}
            return {"rest": {**entry["rest"], **ratio, **betas}}
        same = {n: value for n, value in entry.items() if n not in ("lr", "optimizer", "model_options")}
        same |= {"weight_decay": 0.0} if "weight_decay" in entry else {}
        return {"rest": {"optimizer": self.made_of, **same, **ratio, **betas}} if ratio else {}


def inclusion_of(container: Subject, contained: Subject) -> tuple[str, bool] | None:
    """At which options an optimizer is another one, and whether these were searched; None if it is not.

    Beside the declared pairs, an own combination is contained in its optimizer if it only sets what is searched there.
    """
    if container.model != contained.model:
        return None
    for each in spaces.INCLUSIONS:
        if (each.container, each.contained) == (container.name, contained.name):
            return each.at, each.inside
    space = container.space()
    inside = all(_is_in(space, argument, value) for argument, value in contained.fixed.items())
    if contained.fixed and not container.fixed and contained.base == container.name and inside:
        return ", ".join(f"{name} = {value}" for name, value in contained.fixed.items()), True
    return None


def _is_in(space: Space, argument: str, value: Any) -> bool:
    """Whether the space has a value of an argument; a list, if it has every entry."""
    entries = dict(enumerate(value)) if isinstance(value, (list, tuple)) else {}
    named = {f"{argument}[{i}]": entry for i, entry in entries.items()} or {argument: value}
    return all(
        name in space and isinstance(v, (int, float)) and 0 <= space[name].share(v) <= 1 for name, v in named.items()
    )


def _split(name: str) -> tuple[str, int | None]:
    """The argument, and which of its entries: `betas[1]`."""
    found = re.fullmatch(r"(\w+)(?:\[(\d+)\])?", name)
    assert found, name
    return found[1], int(found[2]) if found[2] else None


def _rounded(value: float) -> float:
    """Three significant digits."""
    return float(f"{value:.3g}")
