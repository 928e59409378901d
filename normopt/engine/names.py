"""Names of parameters that stay right when somebody changes ``group["params"]``."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

#: What a param group has for each of its parameters, in their order.
ALONGSIDE = ("param_names", "reasons")


class Names:
    """What each parameter was called when it came; keeps no parameter alive."""

    def __init__(self) -> None:
        self._known: MutableMapping[Tensor, list[Any]] = WeakTensorKeyDictionary()

    def learn(self, group: dict[str, Any]) -> None:
        """Remember the names of a new group's parameters, and the reasons for their roles."""
        lists = [group[key] for key in ALONGSIDE if group.get(key) is not None]
        agree = {len(each) for each in (group["params"], *lists)} == {len(group["params"])}
        for p, *known in zip(group["params"], *lists, strict=True) if lists and agree else ():
            self._known[p] = known

    def follow(self, group: dict[str, Any]) -> None:
        """Where parameters were taken out of the group or added to it by hand, let the names follow.

        Tensors that nobody has seen in place of those that were given stay without names of their own: a wrapper has
        flattened or partitioned them.
        """
        keys = [key for key in ALONGSIDE if group.get(key) is not None]
        params = group["params"]
        if not keys or len(group[keys[0]]) == len(params):
            return
        grown = len(params) > len(group[keys[0]])
        if not grown and not all(p in self._known for p in params):
            return
        added = [[f"added.{i}", "added to its param group by hand"] for i in range(len(params))]
        known = [self._known.get(p, other) for p, other in zip(params, added, strict=True)]
        for i, key in enumerate(keys):
            group[key] = [each[i] for each in known]
        self.learn(group)
