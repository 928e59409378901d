"""From an optimizer of torch.optim to one of this library in the middle of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from normopt.constraints import L2, Constraint, WeightDecay
from normopt.directions import Identity, Smoothed
from normopt.engine.checkpoint import VERSION, check_whole, difference
from normopt.engine.checks import name_of
from normopt.engine.names import plain
from normopt.engine.plan import state_shapes
from normopt.momentum import EMA, HeavyBall, LionMomentum, Momentum, WarmNesterov
from normopt.norms import Max, Spectral
from normopt.norms.base import Scale
from normopt.optimizer import SteepestDescent
from normopt.polar import JORDAN, PolarCoefficients
from normopt.rule import Rule, rule_of
from normopt.stepsize import Constant

Options = Mapping[str, Any]

#: torch.optim.Muon's names for the scale of an update, and ours.
MUON_SCALES: dict[str | None, Scale] = {None: "max1", "original": "max1", "match_rms_adamw": "adamw"}


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
    rule: Callable[[Options, Rule], Rule]


#: Momenta whose state is an average or a sum of gradients, with factors that decay by a constant.
AVERAGES = (EMA, LionMomentum, HeavyBall, WarmNesterov)


def from_torch_state(
    optimizer: SteepestDescent, state_dict: Mapping[str, Any], model: nn.Module | None = None
) -> dict[str, str]:
    """Load the state of an optimizer of torch.optim: AdamW, Adam, Muon or SGD.

    Without ``model``, the next steps are those that torch's optimizer would have taken. The new optimizer must be the
    equivalent one: :class:`~normopt.zoo.AdamW`, :class:`~normopt.zoo.Adam`, :class:`~normopt.zoo.Muon` or
    :class:`~normopt.zoo.SGD`, with all their options but ``differentiable``, and ``capturable``, which stays the new
    optimizer's own. Learning rates, betas, decays and what schedulers have written are taken over. How Muon's polar
    factor is computed is not, where torch has its defaults: ``orthogonalize`` is the new optimizer's own.

    With ``model``, any optimizer takes over, in whatever param groups, and every parameter gets by its name what means
    the same: averages of gradients (an :class:`EMA` and a heavy ball are turned into each other), Adam's second moments
    where the new rule divides by them, and the count of steps where nothing is missing beside them. All numbers of
    param groups are the new optimizer's own. What is missing starts anew as at the first step, and so does an average
    with bias correction beside it, which would be corrected as if it were new.

    Args:
        optimizer: without ``model`` the equivalent one, on the same parameters in the same order and in the same param
            groups; else any one, on parameters of ``model``. What it held before is replaced.
        state_dict: what ``state_dict`` of torch's optimizer returned; it is not modified.
        model: whose parameters both optimizers were given. Where the state has no names (``param_names``, of an
            optimizer made from ``model.named_parameters()``, or names in place of numbers), it must have one param
            group with all parameters of the model in order, or all that are trained.

    Returns:
        Parameter name -> what starts anew and why; empty if nothing does.

    Raises:
        ValueError: another class than these, other parameters or param groups, sharded or flattened state; without
            ``model``, an optimizer that does something else; the message says what. Nothing has been loaded.
    """
    if model is not None:
        return _by_name(optimizer, state_dict, model)
    theirs, groups = state_dict["param_groups"], optimizer.param_groups
    check_whole(groups, state_dict)
    sizes = [[len(group["params"]) for group in each] for each in (groups, theirs)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"from_torch_state: param groups of {sizes[1]} parameters cannot go to groups of {sizes[0]}: build the "
            "optimizer on the same parameters in the same order, not on the model, or give from_torch_state the model, "
            "which carries by name what means the same"
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
    return {}


def _by_name(optimizer: SteepestDescent, state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, str]:
    names = {p: plain(name) for name, p in model.named_parameters()}
    check_whole([{"params": list(names)}], state_dict)
    saved = _named_groups(state_dict, model)
    if not saved.keys() & names.values():
        raise ValueError(
            f"from_torch_state: no parameter of the saved state is one of the model's: it has {sorted(saved)[:5]}, the "
            f"model {sorted(names.values())[:5]}; give the model that the state was saved for"
        )
    empty = optimizer.state_dict()
    state: dict[Any, dict[str, Tensor]] = {}
    anew: dict[str, str] = {}
    for mine, group in zip(optimizer.param_groups, empty["param_groups"], strict=True):
        rule = rule_of(mine).at(mine)
        for p, key in zip(mine["params"], group["params"], strict=True):
            if p not in names:
                raise ValueError(
                    f"from_torch_state: {name_of(mine, p)} is no parameter of the model; give its own model"
                )
            name = names[p]
            needed = state_shapes(p, rule).keys()
            if not needed:
                continue
            if name not in saved or not saved[name][1]:
                anew[name] = f"{', '.join(sorted(needed))}: the saved state has nothing for it"
                continue
            theirs, held = saved[name]
            found, reason = _carried(theirs, _state(name, held, _kind(theirs)), mine, rule, needed)
            if found:
                state[key] = found
            if needed - found.keys():
                anew[name] = f"{', '.join(sorted(needed - found.keys()))}: {reason}"
    optimizer.load_state_dict({"state": state, "param_groups": empty["param_groups"]})
    return anew


def _named_groups(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, tuple[Options, Mapping[str, Any]]]:
    """Each parameter's saved param group and state, by name."""
    groups = state_dict["param_groups"]
    found: dict[str, tuple[Options, Mapping[str, Any]]] = {}
    for group in groups:
        keys = group["params"]
        names = group.get("param_names") or (keys if all(isinstance(key, str) for key in keys) else None)
        if names is None:
            every = [
                [name for name, p in model.named_parameters() if p.requires_grad or also] for also in (True, False)
            ]
            names = next((each for each in every if len(each) == len(keys)), None) if len(groups) == 1 else None
        if names is None:
            raise ValueError(
                f"from_torch_state: the saved state has no names for its {[len(each['params']) for each in groups]} "
                "parameters, and is not one param group with all of the model's: make torch's optimizer from "
                "model.named_parameters(), or put the names into each saved group, as a list param_names"
            )
        for name, key in zip(names, keys, strict=True):
            found[plain(name)] = group, state_dict["state"].get(key) or {}
    return found


def _carried(
    theirs: Options, held: Mapping[str, Tensor], mine: Options, rule: Rule, needed: Set[str]
) -> tuple[dict[str, Tensor], str]:
    """What of one parameter's state, under our names, means the same under ``rule``; and why the rest does not."""
    found: dict[str, Tensor] = {}
    their_rule = _kind(theirs).rule(theirs, rule)
    factor, reason = _factor(their_rule, rule, bool(theirs.get("maximize", False)) != bool(mine["maximize"]))
    if "momentum" in needed & held.keys() and factor is not None:
        found["momentum"] = held["momentum"] if factor == 1.0 else held["momentum"] * factor
    counts = _adams(their_rule)
    if counts and _adams(rule) and not rule.step_size.overrides("weigh") and _l2(rule) == _l2(their_rule):
        found |= {name: held[name] for name in needed & {"second_moment", "max_second_moment"} & held.keys()}
    if needed <= found.keys():
        if counts or isinstance(rule.momentum, HeavyBall) or not _corrects(rule.momentum):
            return {**found, "step": held["step"]}, ""
        return {}, "the saved state does not count steps, which a bias correction needs"
    if "momentum" in found and not _corrects(rule.momentum):
        return {"momentum": found["momentum"], "step": torch.tensor(0.0)}, "the saved state has nothing of the kind"
    return {}, reason or "the saved state lacks some of it, and a bias correction would take the rest for new"


def _corrects(momentum: Momentum) -> bool:
    """Whether the first steps of this momentum count on a start from 0."""
    if isinstance(momentum, HeavyBall):
        return momentum.decides_on_host
    return isinstance(momentum, WarmNesterov) or bool(getattr(momentum, "bias_correction", False))


def _adams(rule: Rule) -> bool:
    """Whether the state ``second_moment`` is Adam's: the average of the squares of each entry of the gradient."""
    norm = rule.norm
    if not isinstance(norm, Smoothed) or not isinstance(norm.norm, Max):
        return False
    return norm.accumulate == "ema" and not norm.centered and norm.initial == 0.0


def _l2(rule: Rule) -> float:
    """What is added to the gradient for each unit of weight, before averages see it."""
    return sum(float(each.weight_decay) for each in rule.constraint if isinstance(each, L2))


def _factor(theirs: Rule, mine: Rule, turned: bool) -> tuple[float | None, str]:
    """By what their average of gradients is multiplied to be ours, or ``None`` and why there is no such number."""
    if not isinstance(mine.momentum, AVERAGES):
        return None, f"{mine.momentum} keeps no average of gradients"
    if mine.step_size.overrides("weigh"):
        return None, f"{mine.step_size} weighs gradients before they are averaged"
    if _l2(theirs) != _l2(mine):
        return None, f"the averaged gradients had L2 decay {_l2(theirs)}, here they have {_l2(mine)}"
    gains = [_gain(rule.momentum) for rule in (theirs, mine)]
    if not all(0 < gain < math.inf for gain in gains):
        return None, f"{theirs.momentum} and {mine.momentum} are no averages in the same sense"
    return (-1.0 if turned else 1.0) * (1.0 if gains[0] == gains[1] else gains[1] / gains[0]), ""


def _gain(momentum: Momentum) -> float:
    """What the state tends to for gradients that are all 1."""
    if not isinstance(momentum, HeavyBall):
        return 1.0
    return (1 - momentum.dampening) / (1 - momentum.beta) if momentum.beta < 1 else math.inf


def _kind(group: Options) -> Kind:
    for kind in KINDS:
        if kind.marks <= group.keys():
            return kind
    raise ValueError(
        "from_torch_state: only states of torch.optim's AdamW, Adam, Muon and SGD can be loaded, not one whose param "
        f"groups have {sorted(group.keys() - {'params'})}"
    )


def _check_names(mine: Options, theirs: Options) -> None:
    names = mine.get("param_names") or [], theirs.get("param_names") or []
    for a, b in zip(*names, strict=False):
        if a != b:
            raise ValueError(f"from_torch_state: the parameter {a!r} stands where the saved state has {b!r}")


def _numbers(mine: Options, theirs: Options, kind: Kind) -> dict[str, Any]:
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


def _adam(group: Options, mine: Rule) -> Rule:
    beta1, beta2 = group["betas"]
    decays = any(isinstance(each, WeightDecay) for each in mine.constraint)  # what older versions of torch do not say
    decay = (WeightDecay if group.get("decoupled_weight_decay", decays) else L2)(group["weight_decay"])
    norm = Smoothed(Max(), beta2, group["eps"], maximum=group["amsgrad"])
    return Rule(norm, EMA(beta1, bias_correction=True), Constant(), (decay,), mine.view)


def _sgd(group: Options, mine: Rule) -> Rule:
    momentum = HeavyBall(group["momentum"], group["dampening"], group["nesterov"])
    return Rule(Identity(), momentum, Constant(), (L2(group["weight_decay"]),), mine.view)


def _muon(group: Options, mine: Rule) -> Rule:
    a, b, c = group["ns_coefficients"]
    usual = ((a, b, c),) == JORDAN.coefficients and group["ns_steps"] == JORDAN.steps
    norm = mine.norm if usual and isinstance(mine.norm, Spectral) else _iterated((a, b, c), group["ns_steps"], mine)
    norm = replace(norm, scale=MUON_SCALES[group["adjust_lr_fn"]])
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
