"""What schedules change: the learning rates of all param groups, and momentum, whatever each group calls it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from normopt.engine.checks import check_lr
from normopt.rule import Rule

#: Where a rule reads its decay rate: the first of these that it reads at all.
WEIGHTS = ("momentum", "mu", "betas")


def set_lr(optimizer: torch.optim.Optimizer, lr: float | Tensor) -> None:
    """Set the learning rate of every param group: ``group["lr"] = lr * group["lr_ratio"]``, for schedules by hand.

    Assigning one number to all groups would level them; ``lr_ratio`` is what each group's rate was, over the
    optimizer's ``lr``, when the group was added, and is in checkpoints. Groups without one, as those of torch.optim,
    get ``lr`` itself. A rate that is a tensor is filled in place.

    Args:
        optimizer: any whose param groups are dicts.
        lr: what the ``lr`` of the constructor is to become.

    Raises:
        ValueError: ``lr`` is negative or not finite; or the optimizer was made with ``lr=0``, beside which a group's
            rate has no ratio. Nothing has changed.
    """
    check_lr(lr)
    ratios = [group.get("lr_ratio", 1.0) for group in optimizer.param_groups]
    for i, ratio in enumerate(ratios):
        if not ratio < float("inf"):
            raise ValueError(
                f"set_lr: the optimizer was made with lr=0, so that the rate of param group {i} has no ratio to it; "
                f"give the optimizer its largest lr, or set param_groups[{i}]['lr_ratio']"
            )
    for group, ratio in zip(optimizer.param_groups, ratios, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr * ratio)
        else:
            group["lr"] = lr * ratio


def rates(group: Mapping[str, Any], lr: float | Tensor) -> dict[str, Any]:
    """A group's learning rate, where it names its own, and the ratio of it to the optimizer's ``lr``.

    Without a rate of its own the group's ``lr_ratio`` multiplies ``lr``; with one it multiplies that.
    """
    check_lr(lr)
    own, ratio = group.get("lr", lr), group.get("lr_ratio", 1.0)
    check_lr(own)
    check_lr(ratio, "lr_ratio")
    ratio, base = float(ratio), float(lr)
    rate = {"lr": own * ratio} if "lr_ratio" in group else {}
    if "lr" in group:
        ratio = ratio * float(own) / base if base else 1.0 if float(own) * ratio == 0 else float("inf")
    return {**rate, "lr_ratio": ratio}


def own_rates(groups: Iterable[dict[str, Any]]) -> None:
    """Give every group whose learning rate is a tensor that an earlier group holds a tensor of its own.

    Schedulers that multiply in place would change it once for each group.
    """
    seen = set[int]()
    for group in groups:
        if isinstance(group["lr"], Tensor) and id(group["lr"]) in seen:
            group["lr"] = group["lr"].detach().clone()
        seen.add(id(group["lr"]))


def forward(group: dict[str, Any], rule: Rule, defaults: Mapping[str, Any]) -> None:
    """Hand a cycled momentum on to where the group's rule reads it.

    Such schedulers write ``betas[0]`` of every group if the optimizer's defaults have betas, else ``momentum``, and
    leave ``base_momentum`` in the group. Groups of one optimizer may read different ones, as Muon's and its AdamW's.
    """
    name = _read(rule) if "base_momentum" in group else None
    if name is None:
        return
    value = group["betas"][0] if "betas" in defaults else group["momentum"]
    group[name] = (value, *group["betas"][1:]) if name == "betas" else value


def first_weight(groups: Iterable[tuple[Mapping[str, Any], Rule]]) -> float | None:
    """The decay rate in the first group that has one among its options."""
    for group, rule in groups:
        name = _read(rule)
        if name is not None:
            return group[name][0] if name == "betas" else group[name]
    return None


def _read(rule: Rule) -> str | None:
    return next((name for name in WEIGHTS if name in rule.options()), None)
