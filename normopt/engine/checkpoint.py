"""What is checked before a saved state is loaded, and how states of older versions become those of this one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from normopt.engine.checks import check_numbers, name_of
from normopt.engine.plan import state_shapes
from normopt.rule import INGREDIENTS, Rule, rule_of

#: Of what ``state_dict`` returns; it is in every param group as ``state_version``. States from before it have none.
VERSION = 1

#: What older states do not have, and what it was.
ADDED = {"nonfinite": "raise", "capturable": False, "state_dtype": None, "products": ""}


def accepted(groups: Sequence[dict[str, Any]], saved: Mapping[str, Any]) -> dict[str, Any]:
    """The saved state as this version would have written it; nothing is modified.

    What a group's step reads and the saved group does not have stays what it is. ``step`` may be a number.

    Args:
        groups: the param groups that it is for.
        saved: what ``state_dict`` returned.

    Raises:
        ValueError: a newer version, or other param groups, ingredients, parameters or shapes; the message says which.
    """
    if not {"state", "param_groups"} <= saved.keys():
        flat = any(str(key).startswith("state.") for key in saved)
        hint = (
            "; torch.distributed.checkpoint has flattened it, whose set_optimizer_state_dict loads it with the option "
            "flatten_optimizer_state_dict=True"
        )
        found = f"{sorted(map(str, saved))[:10]}{hint if flat else ''}"
        raise ValueError(f"a saved state has 'state' and 'param_groups', this one has {found}")
    check_whole(groups, saved)
    if len(groups) != len(saved["param_groups"]):
        raise ValueError(f"the saved state has {len(saved['param_groups'])} param groups, this optimizer {len(groups)}")
    own = [{name: group.get(name, ADDED.get(name)) for name in _numbers(group)} for group in groups]
    upgraded = [{**mine, **group} for mine, group in zip(own, saved["param_groups"], strict=True)]
    state = {key: _counted(held) for key, held in saved["state"].items()}
    homes = {name: i for i, group in enumerate(upgraded) for name in group.get("param_names") or ()}
    for i, (mine, theirs) in enumerate(zip(groups, upgraded, strict=True)):
        for name in mine.get("param_names") or ():
            if homes.get(name, i) != i:
                raise ValueError(
                    f"parameter {name!r} is in param group {i} here, and in group {homes[name]} of the saved state; "
                    "make the optimizer with its groups in the order in which they were saved"
                )
        _check_group(i, mine, theirs)
        for p, key in zip(mine["params"], theirs["params"], strict=True):
            _check_state(name_of(mine, p), p, rule_of(mine).resolve(theirs), state.get(key, {}))
        theirs["state_version"] = VERSION
    return {**saved, "state": state, "param_groups": upgraded}


def _numbers(group: Mapping[str, Any]) -> set[str]:
    """The names of what a step reads of a param group, save what optimizers find out by themselves."""
    return {"lr", "maximize", *ADDED, *rule_of(group).options()} & {*group, *ADDED}


def _counted(held: Mapping[str, Any]) -> Mapping[str, Any]:
    """One parameter's saved state, with the number of steps as a tensor."""
    step = held.get("step")
    if isinstance(step, Real) and not isinstance(step, bool):
        return {**held, "step": torch.tensor(float(step))}
    return held


def check_whole(groups: Sequence[Mapping[str, Any]], saved: Mapping[str, Any]) -> None:
    """Raise a ``ValueError`` for a state whose tensors are sharded or flattened, as FSDP and ZeRO keep them."""
    advice = (
        "Save the whole state, by torch.distributed.checkpoint.state_dict.get_optimizer_state_dict with "
        "StateDictOptions(full_state_dict=True); nothing has been loaded"
    )
    shapes: dict[Any, torch.Size] = {}
    params = [p for group in groups for p in group["params"]]
    keys = [key for group in saved["param_groups"] for key in group["params"]]
    sharded = {key for p, key in zip(params, keys, strict=False) if type(p).__name__ == "DTensor"}
    for key, held in saved["state"].items():
        for name, value in held.items() if isinstance(held, Mapping) else ():
            kind = type(value).__name__
            if kind == "ShardedTensor" or (kind == "DTensor" and key not in sharded):
                raise ValueError(f"the saved state {name!r} of parameter {key!r} is sharded, a {kind}. {advice}")
            if isinstance(value, Tensor) and name != "step" and value.numel() > 1:
                shapes[key] = value.shape
    other = len(keys) != len(params) or any(
        key in shapes and len(shapes[key]) == 1 and p.ndim > 1 for p, key in zip(params, keys, strict=True)
    )
    if other and shapes and any(p.ndim > 1 for p in params) and all(len(shape) == 1 for shape in shapes.values()):
        raise ValueError(
            f"the saved state has only vectors, for {len(keys)} parameters, where this optimizer has {len(params)} "
            f"with matrices among them: a wrapper such as FSDP or ZeRO has flattened it. {advice}"
        )


def _check_group(i: int, mine: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    where = f"param group {i} does not match the saved one"
    version = saved.get("state_version", 0)
    if not isinstance(version, int) or version > VERSION:
        raise ValueError(f"{where}: it was saved with state version {version}, this is {VERSION}; upgrade normopt")
    if "rule" not in saved:
        raise ValueError(
            f"{where}: it was saved by another library and has no ingredients; this one has {rule_of(mine)}. "
            "normopt.from_torch_state loads states of torch.optim"
        )
    if rule_of(mine) != rule_of(saved):
        raise ValueError(f"{where}: {difference(rule_of(mine), rule_of(saved))}")
    if len(mine["params"]) != len(saved["params"]):
        raise ValueError(f"{where}: it has {len(mine['params'])} parameters here, {len(saved['params'])} there")
    here, there = mine.get("param_names") or [], saved.get("param_names") or []
    if here != there and sorted(here) == sorted(there):
        a, b = next((a, b) for a, b in zip(here, there, strict=True) if a != b)
        raise ValueError(f"{where}: its parameters come in another order, {a!r} here where {b!r} was")
    try:
        check_numbers(saved, rule_of(saved))
        for name in rule_of(saved).step_size.init_shared():
            if not isinstance(saved.get(name), Tensor) or saved[name].numel() != 1:
                raise ValueError(f"{name} must be a tensor with one entry, got {saved.get(name)!r}")
    except ValueError as error:
        raise ValueError(f"{where}, which is no good: {error}") from None


def _check_state(name: str, p: Tensor, rule: Rule, saved: Mapping[str, Any]) -> None:
    if saved and "step" not in saved:
        raise ValueError(f"{name}: its saved state has no 'step', only {sorted(saved)}; nothing has been loaded")
    for key, shape in ({"step": (), **state_shapes(p, rule)} if saved else {}).items():
        value = saved.get(key, torch.empty(shape, device="meta"))
        if not isinstance(value, Tensor) or value.shape != shape:
            found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"no shape, it is {value!r},"
            raise ValueError(
                f"{name}: the saved state {key!r} has {found} where it needs {tuple(shape)}: it was saved for another "
                "model; nothing has been loaded"
            )


def difference(mine: Rule, saved: Rule) -> str:
    """Which ingredients two rules do not share, for an error message."""
    names = [name for name in sorted(INGREDIENTS) if getattr(mine, name) != getattr(saved, name)]
    return "; ".join(
        f"{name} is {getattr(mine, name)!r} here, {getattr(saved, name)!r} in the saved state" for name in names
    )


def to_home(group: dict[str, Any]) -> None:
    """Take the numbers of the whole optimizer to the device of the group's parameters."""
    for name in rule_of(group).step_size.init_shared() if group["params"] else ():
        group[name] = group[name].to(group["params"][0].device)


def restored(value: Any, loaded: Any) -> Any:
    """A saved tensor in its own dtype, where torch has put ``loaded``; shares no memory with either."""
    return value.detach().to(loaded.device, copy=True) if isinstance(value, Tensor) else loaded
