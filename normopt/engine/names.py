"""Names of parameters that stay right when somebody changes ``group["params"]``."""

from __future__ import annotations

from collections.abc import MutableMapping
from functools import cache
from typing import Any

from torch import Tensor

#: What a param group has for each of its parameters, in their order.
ALONGSIDE = ("param_names", "reasons")

#: What DistributedDataParallel, torch.compile, FSDP and activation checkpointing put into names.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


@cache
def plain(name: str) -> str:
    """A parameter's name without what wrappers of modules put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def learn_names(known: MutableMapping[Tensor, list[Any]], group: dict[str, Any]) -> None:
    """Remember in ``known`` what a group says of each of its parameters: the name, and the reason for the role."""
    lists = [group[key] for key in ALONGSIDE if group.get(key) is not None]
    agree = {len(each) for each in (group["params"], *lists)} == {len(group["params"])}
    for p, *each in zip(group["params"], *lists, strict=True) if lists and agree else ():
        known[p] = each


def follow_names(known: MutableMapping[Tensor, list[Any]], group: dict[str, Any]) -> None:
    """Where parameters were taken out of the group or added to it by hand, let the names follow.

    Tensors that nobody has seen in place of those that were given stay without names of their own: a wrapper has
    flattened or partitioned them.
    """
    names, params = group.get("param_names"), group["params"]
    if names is None or len(names) == len(params):
        return
    if len(params) < len(names) and not all(p in known for p in params):
        return
    added = [[f"added.{i}", "added to its param group by hand"] for i in range(len(params))]
    found = [known.get(p, other) for p, other in zip(params, added, strict=True)]
    for i, key in enumerate(key for key in ALONGSIDE if group.get(key) is not None):
        group[key] = [each[i] for each in found]
    learn_names(known, group)
