"""From an optimizer of torch.optim to one of this library in the middle of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from normopt.constraints import L2, Constraint, WeightDecay
from normopt.directions import Identity, Smoothed
from normopt.engine.checkpoint import VERSION, difference
from normopt.engine.checks import name_of
from normopt.momentum import EMA, HeavyBall
from normopt.norms import Max, Spectral
from normopt.norms.base import Scale
from normopt.optimizer import SteepestDescent
from normopt.polar import JORDAN, PolarCoefficients
from normopt.rule import Rule, rule_of
from normopt.stepsize import Constant

Numbers = Mapping[str, Any]

#: torch.optim.Muon's names for the scale of an update, and ours.
SCALES: dict[str | None, Scale] = {None: "max1", "original": "max1", "match_rms_adamw": "adamw"}


@dataclass(frozen=True)
class Kind:
    """A class of torch.optim.

    Args:
        marks: param-group entries that only it has.
        numbers: those that are taken over.
        state: its names of the state, and ours; both are scaled alike.
        rule: what a param group does, in ingredients; the second argument is ours, for what torch does not say.
    """

    marks: frozenset[str]
    numbers: tuple[str, ...]
    state: Mapping[str, str]
    rule: Callable[[Numbers, Rule], Rule]


def from_torch_state(optimizer: SteepestDescent, state_dict: Mapping[str, Any]) -> None:
    """Load the state of an optimizer of torch.optim, so that the next steps are those that it would have taken.

    For AdamW and Adam (:class:`~normopt.zoo.AdamW`, :class:`~normopt.zoo.Adam`), Muon (:class:`~normopt.zoo.Muon`) and
    SGD (:class:`~normopt.zoo.SGD`), with all their options but ``differentiable``, and ``capturable``, which stays the
    new optimizer's own. Learning rates, betas, decays and what schedulers have written are taken over. How Muon's polar
    factor is computed is not, where torch has its defaults: ``orthogonalize`` is the new optimizer's own.

    Args:
        optimizer: the equivalent one, on the same parameters in the same order and in the same param groups.
        state_dict: what ``state_dict`` of torch's optimizer returned; it is not modified.

    Raises:
        ValueError: another class than these, other parameters or param groups, or an optimizer that does something
            else; the message says what. Nothing has been loaded.
    """
    theirs, groups = state_dict["param_groups"], optimizer.param_groups
    sizes = [[len(group["params"]) for group in each] for each in (groups, theirs)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"from_torch_state: param groups of {sizes[1]} parameters cannot go to groups of {sizes[0]}: build the "
            "optimizer on the same parameters in the same order, not on the model"
        )
    state: dict[Any, dict[str, Tensor]] = {}
    converted = []
    for i, (mine, group) in enumerate(zip(groups, theirs, strict=True)):
        kind = _kind(group)
        _check_names(mine, group)
        numbers = _numbers(mine, group, kind)
        _check_rule(i, rule_of(mine).resolve({**mine, **numbers}), kind.rule(group, rule_of(mine)))
        converted.append({**mine, **numbers, "params": group["params"], "state_version": VERSION})
        for p, key in zip(mine["params"], group["params"], strict=True):
            if state_dict["state"].get(key):
                state[key] = _state(name_of(mine, p), state_dict["state"][key], kind)
    optimizer.load_state_dict({"state": state, "param_groups": converted})


def _kind(group: Numbers) -> Kind:
    for kind in KINDS:
        if kind.marks <= group.keys():
            return kind
    raise ValueError(
        "from_torch_state: only states of torch.optim's AdamW, Adam, Muon and SGD can be loaded, not one whose param "
        f"groups have {sorted(group.keys() - {'params'})}"
    )


def _check_names(mine: Numbers, theirs: Numbers) -> None:
    names = mine.get("param_names") or [], theirs.get("param_names") or []
    for a, b in zip(*names, strict=False):
        if a != b:
            raise ValueError(f"from_torch_state: the parameter {a!r} stands where the saved state has {b!r}")


def _numbers(mine: Numbers, theirs: Numbers, kind: Kind) -> dict[str, Any]:
    """What a param group takes over: what it reads, and what schedulers have left."""
    cycled = {"initial_lr", *(f"{bound}_{name}" for bound in ("base", "max", "min") for name in ("lr", "momentum"))}
    taken = theirs.keys() & ({"lr"} | cycled | ({*kind.numbers} & mine.keys()))
    return {"maximize": theirs.get("maximize", False), **{name: theirs[name] for name in taken}}


def _check_rule(i: int, mine: Rule, theirs: Rule) -> None:
    mine, theirs = (replace(rule, constraint=tuple(filter(_decays, rule.constraint))) for rule in (mine, theirs))
    if mine != theirs:
        raise ValueError(
            f"from_torch_state: param group {i} would not go on as before: {difference(mine, theirs)}; nothing has "
            "been loaded"
        )


def _decays(constraint: Constraint) -> bool:
    return not isinstance(constraint, (WeightDecay, L2)) or constraint.weight_decay != 0


def _state(name: str, theirs: Mapping[str, Any], kind: Kind) -> dict[str, Tensor]:
    """One parameter's state under our names; those that do not count steps have taken one, no matter how many."""
    known = {key: value for key, value in theirs.items() if value is not None and key != "step"}
    for key in known.keys() - kind.state.keys():
        raise ValueError(f"from_torch_state: {name} has an unknown state {key!r}; nothing has been loaded")
    step = torch.tensor(float(theirs.get("step", 1)))
    return {"step": step, **{kind.state[key]: value for key, value in known.items()}} if known else {}


def _adam(group: Numbers, mine: Rule) -> Rule:
    beta1, beta2 = group["betas"]
    decays = any(isinstance(each, WeightDecay) for each in mine.constraint)  # what older versions of torch do not say
    decay = (WeightDecay if group.get("decoupled_weight_decay", decays) else L2)(group["weight_decay"])
    norm = Smoothed(Max(), beta2, group["eps"], maximum=group["amsgrad"])
    return Rule(norm, EMA(beta1, bias_correction=True), Constant(), (decay,), mine.view)


def _sgd(group: Numbers, mine: Rule) -> Rule:
    momentum = HeavyBall(group["momentum"], group["dampening"], group["nesterov"])
    return Rule(Identity(), momentum, Constant(), (L2(group["weight_decay"]),), mine.view)


def _muon(group: Numbers, mine: Rule) -> Rule:
    a, b, c = group["ns_coefficients"]
    usual = ((a, b, c),) == JORDAN.coefficients and group["ns_steps"] == JORDAN.steps
    norm = mine.norm if usual and isinstance(mine.norm, Spectral) else _iterated((a, b, c), group["ns_steps"], mine)
    norm = replace(norm, scale=SCALES[group["adjust_lr_fn"]])
    momentum = EMA(group["momentum"], group["nesterov"])
    return Rule(norm, momentum, Constant(), (WeightDecay(group["weight_decay"]),), mine.view)


def _iterated(coefficients: tuple[float, float, float], steps: int, mine: Rule) -> Spectral:
    method = "newton-schulz" if (coefficients,) == JORDAN.coefficients else PolarCoefficients((coefficients,))
    return Spectral("max1", method, steps, mine.norm.dtype if isinstance(mine.norm, Spectral) else None)


KINDS = (
    Kind(
        frozenset({"betas", "eps", "amsgrad"}),
        ("betas", "eps", "weight_decay", "amsgrad"),
        {"exp_avg": "momentum", "exp_avg_sq": "second_moment", "max_exp_avg_sq": "max_second_moment"},
        _adam,
    ),
    Kind(
        frozenset({"ns_steps", "ns_coefficients", "adjust_lr_fn"}),
        ("momentum", "nesterov", "weight_decay"),
        {"momentum_buffer": "momentum"},
        _muon,
    ),
    Kind(
        frozenset({"momentum", "dampening", "nesterov"}),
        ("momentum", "dampening", "nesterov", "weight_decay"),
        {"momentum_buffer": "momentum"},
        _sgd,
    ),
)
