"""What is checked before a saved state is loaded, and how states of older versions become those of this one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from normopt.engine.checks import check_numbers, name_of
from normopt.engine.plan import state_shapes
from normopt.rule import INGREDIENTS, Rule, rule_of

#: Of what ``state_dict`` returns; it is in every param group as ``state_version``. States from before it have none.
VERSION = 1

#: What older states do not have, and what it was; an optimizer that has another value keeps it.
ADDED = {"nonfinite": "raise", "capturable": False, "state_dtype": None}


def accepted(groups: Sequence[dict[str, Any]], saved: Mapping[str, Any]) -> dict[str, Any]:
    """The saved state as this version would have written it; nothing is modified.

    Args:
        groups: the param groups that it is for.
        saved: what ``state_dict`` returned.

    Raises:
        ValueError: a newer version, or other param groups, ingredients, parameters or shapes; the message says which.
    """
    if not {"state", "param_groups"} <= saved.keys():
        raise ValueError(f"a saved state has 'state' and 'param_groups', this one has {sorted(map(str, saved))}")
    if len(groups) != len(saved["param_groups"]):
        raise ValueError(f"the saved state has {len(saved['param_groups'])} param groups, this optimizer {len(groups)}")
    own = [{name: group.get(name, value) for name, value in ADDED.items()} for group in groups]
    upgraded = [{**mine, **group} for mine, group in zip(own, saved["param_groups"], strict=True)]
    for i, (mine, theirs) in enumerate(zip(groups, upgraded, strict=True)):
        _check_group(i, mine, theirs)
        for p, key in zip(mine["params"], theirs["params"], strict=True):
            _check_state(name_of(mine, p), p, rule_of(mine).resolve(theirs), saved["state"].get(key, {}))
        theirs["state_version"] = VERSION
    return {**saved, "param_groups": upgraded}


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
