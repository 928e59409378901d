"""What can be wrong with param groups, parameters and gradients; every check comes before anything has changed."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Set
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from normopt.ingredient.base import check_flag
from normopt.ingredient.registry import OTHER_NAMES, nearest
from normopt.ingredient.stage import is_of_inputs
from normopt.numerics.sharded import here
from normopt.polar.choice import from_text
from normopt.rule import INGREDIENTS, Rule, rule_of

#: What a param group's ``nonfinite`` may be.
POLICIES = ("raise", "skip", "propagate")

#: What a param group's ``state_dtype`` may be, beside ``None``.
STATE_DTYPES = ("bfloat16", "float32", "parameter")

#: Param-group entries that are no options of an ingredient: ours, and those that torch's schedulers and users write.
GROUP_KEYS = {"params", "param_names", "lr", "maximize", "role", "reasons", "rule", "name", "initial_lr", "lr_scale"}
GROUP_KEYS |= {"nonfinite", "capturable", "state_dtype", "state_version", "products"}
GROUP_KEYS |= {f"{bound}_{name}" for bound in ("base", "max", "min") for name in ("lr", "momentum")}
GROUP_KEYS |= {"foreach", "fused"}

#: What users may say in a param group whatever its rule.
SAID = {"lr", "lr_ratio", "maximize", "nonfinite", "capturable", "state_dtype", "bounds", "differentiable"}

#: What is wrong with parts of parameters, and what to do.
WHOLE = (
    "which is not supported: a norm needs the whole matrix. Shard by fully_shard (FSDP2), or train whole parameters, "
    "as under DistributedDataParallel"
)


def names_of(group: Mapping[str, Any]) -> list[str]:
    """The group's parameters by their names or their places, for error messages."""
    names = group.get("param_names")
    if "labels" in group:
        return [*group["labels"]]
    return [f"parameter {names[i]!r}" if names else f"parameter {i} of its group" for i in range(len(group["params"]))]


def name_of(group: Mapping[str, Any], p: Tensor) -> str:
    """The name of one parameter of the group, for error messages."""
    return next(name for name, q in zip(names_of(group), group["params"], strict=True) if q is p)


def check_policy(policy: Any) -> None:
    """Raise a ``ValueError`` with the nearest choice unless ``policy`` is among ``POLICIES``."""
    if policy not in POLICIES:
        raise ValueError(f"unknown nonfinite {policy!r}; {nearest(str(policy), POLICIES)}")


def dtype_name(dtype: Any) -> str | None:
    """What a param group says of the dtype of averages; a ``ValueError`` with the choices for all else."""
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    if name is not None and name not in STATE_DTYPES:
        hint = "float16 cannot hold second moments. " if name == "float16" else ""
        raise ValueError(f"unknown state_dtype {dtype!r}; {hint}{nearest(str(name), STATE_DTYPES)}")
    return name


def check_lr(lr: Any, name: str = "lr") -> None:
    """Raise a ``ValueError`` unless ``lr`` is a number, or a tensor with one entry, that is finite and not negative."""
    if type(lr) is float and 0 <= lr < math.inf:
        return
    is_number = lr.numel() == 1 if isinstance(lr, Tensor) else isinstance(lr, Real) and not isinstance(lr, bool)
    if not is_number or not 0 <= float(lr) < math.inf:
        raise ValueError(f"{name} must be a finite number that is not negative, got {lr!r}")


def check_numbers(options: Mapping[str, Any], rule: Rule) -> None:
    """Raise unless every number is in range and every option that the rule reads is there."""
    check_lr(options["lr"])
    check_policy(options["nonfinite"])
    for name in ("maximize", "capturable"):
        check_flag("param group", name, options[name])
    from_text(options["products"])
    resolved = rule.resolve(options)
    resolved.step_size.check_composes(resolved.norm)
    check_keeping(options, resolved)


def check_keeping(options: Mapping[str, Any], resolved: Rule) -> None:
    """Raise unless state can be kept as the param group wants: in that dtype, and out of the host's sight."""
    dtype_name(options["state_dtype"])
    if options["capturable"] and resolved.decides_on_host:
        culprit = next(part for part in resolved.parts() if part.decides_on_host)
        raise ValueError(
            f"capturable: {culprit} lets the host look at numbers or at the step's count, which a CUDA graph cannot; "
            "leave capturable False, or give these parameters another rule"
        )


def check_known(names: Set[str], rule: Rule, spare: Set[str]) -> None:
    """Raise a ``TypeError`` for param-group entries that nothing reads and that look like a known one misspelt.

    All others are the user's own, such as the ``rho`` of wrappers, and stay in the group. ``spare`` is known too.
    """
    if "use_muon" in names:
        raise TypeError(
            "param group: 'use_muon' is not read: what a group moves by is its norm. Pass the model, so that only "
            "hidden matrices move by Muon, or leave 'use_muon' out and give groups that are not for Muon a norm"
        )
    known = rule.options() | INGREDIENTS | SAID | spare
    for name in names - known - GROUP_KEYS:
        if _is_near(name.lower(), known | {other for other, meant in OTHER_NAMES.items() if meant in known}):
            raise TypeError(f"param group: no ingredient of {rule} reads {name!r}; {nearest(name, known)}")


def _is_near(name: str, known: Set[str]) -> bool:
    """Whether a name can be a known one with a slip: most letters in order, about as long, and no longer one of it."""
    if any(len(each) > 2 and name.startswith(f"{each}_") for each in known):
        return False  # as weight_decay_mult
    return any(abs(len(name) - len(each)) <= 2 for each in difflib.get_close_matches(name, known, n=3, cutoff=0.75))


def check_unsaid(group: Mapping[str, Any], names: Set[str]) -> None:
    """Raise a ``TypeError`` for entries that are read when a group is added, and mean nothing afterwards."""
    late = names & group.keys() and sorted((names - rule_of(group).options()) & group.keys())
    if late:
        raise TypeError(
            f"param group: {late[0]!r} is read when a group is added and cannot be changed afterwards; make a new "
            "optimizer"
        )


def check_fixed(group: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Raise a ``ValueError`` for an entry of torch's param groups that has only one value here."""
    for name, value in fixed.items():
        if group.get(name, value) != value:
            raise ValueError(f"param group: {name}={group[name]!r} is not supported; leave {name} {value}")


def check_distinct(params: Iterable[Any]) -> None:
    """Raise a ``ValueError`` if a parameter comes twice; ``params`` may be (name, parameter) pairs."""
    seen: dict[int, str] = {}
    for i, item in enumerate(params):
        name, p = item if isinstance(item, tuple) and len(item) == 2 else (f"number {i}", item)
        if id(p) in seen:
            raise ValueError(f"parameters {seen[id(p)]} and {name} of a param group are the same tensor; give it once")
        seen[id(p)] = name


def check_parameters(group: Mapping[str, Any], rule: Rule) -> None:
    """Raise a ``ValueError`` for parameters that are not whole or not real, and for those that the rule is not for."""
    given = group.get("param_names") or group["params"]
    if len(given) != len(group["params"]) and not rule.elementwise:
        raise ValueError(
            f"the param group of parameter {given[0]!r} was given {len(given)} tensors and has {len(group['params'])}: "
            f"a wrapper such as DeepSpeed's ZeRO has flattened or partitioned them, {WHOLE}"
        )
    for name, p in zip(names_of(group), group["params"], strict=True):
        part = _part_of(p)
        if part:
            raise ValueError(f"{name} is {part}, {WHOLE}")
        if not p.is_floating_point():
            raise ValueError(f"{name} has dtype {p.dtype}; only real floating-point ones can be trained")
        if p.dtype == torch.float16 and group["state_dtype"] == "parameter":
            raise ValueError(f"{name} has dtype float16, which cannot hold second moments; give state_dtype 'bfloat16'")
        rule.check_fits(name, tuple(p.shape), group.get("role", ""))


def _part_of(p: Tensor) -> str:
    """What a parameter is if it is no whole tensor of a model, else nothing."""
    flat = type(p).__name__ == "FlatParameter" or hasattr(p, "_fqns")
    if flat or getattr(p, "_is_flat_param", False) or getattr(p, "_fsdp_flattened", False):
        return "flattened or sharded by FullyShardedDataParallel"
    if hasattr(p, "ds_id") and tuple(getattr(p, "ds_shape", ())) != tuple(p.shape):
        return "partitioned by DeepSpeed's ZeRO"
    return ""


def check_alone(groups: Iterable[Mapping[str, Any]], is_first: bool) -> None:
    """Raise a ``ValueError`` if a momentum looks back, which takes a closure unless the first step moves nothing."""
    for group in groups:
        momentum = rule_of(group).momentum
        if momentum.looks_back and not (is_first and group["lr"] == 0):
            raise ValueError(
                f"{momentum} compares the gradients of one sample at two points: give step a closure that "
                "computes the loss and the gradients, optimizer.step(closure)"
            )


def check_gradients(group: Mapping[str, Any]) -> None:
    """Raise a ``ValueError`` for a gradient that is not a dense real tensor like its parameter, or cannot move it."""
    for p in group["params"]:
        g = p.grad
        if g is None:
            continue
        if g.layout != torch.strided or not g.is_floating_point():
            kind = "complex" if g.is_complex() else "sparse" if g.layout != torch.strided else str(g.dtype)
            raise ValueError(f"{name_of(group, p)} has a {kind} gradient; only dense real gradients can be used")
        if g.shape != p.shape or g.device != p.device:
            here, there = (f"shape {tuple(x.shape)} on {x.device}" for x in (g, p))
            raise ValueError(f"{name_of(group, p)} has a gradient of {here}, but is of {there}; compute it anew")
        if not p.is_contiguous() and any(n > 1 and step == 0 for n, step in zip(p.shape, p.stride(), strict=True)):
            raise ValueError(
                f"{name_of(group, p)} is an expanded tensor of shape {tuple(p.shape)}, strides {p.stride()}: several "
                "of its entries are one number in memory and cannot move apart; copy it, p.data = p.data.contiguous()"
            )


def check_inputs(group: Mapping[str, Any], state: Mapping[Tensor, Mapping[str, Any]]) -> None:
    """Raise a ``ValueError`` for a parameter whose rule reads statistics of inputs that nobody has put in the state.

    A first step of gradients that are 0, at the learning rate 0, is none: torch.distributed.checkpoint takes it to make
    the state that it loads into.
    """
    rule = rule_of(group)
    may_lack = not state and group["lr"] == 0
    for p in group["params"] if rule.reads_inputs else ():
        if p.grad is None or (may_lack and not here(p.grad).any()):
            continue
        if not any(map(is_of_inputs, state.get(p, ()))):
            raise ValueError(
                f"{name_of(group, p)} moves by {rule.norm}, and there are no statistics of its layer's inputs: make "
                "normopt.InputStatistics(model, optimizer) before the forward pass, in training mode"
            )
