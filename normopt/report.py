"""What an optimizer is about to do, for people to read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from normopt.directions import Eigenbasis, Rotated, Smoothed
from normopt.ingredient import choices, parse
from normopt.ingredient.stage import NO_MEMORY, ROTATED, SECOND_MOMENT, Direction
from normopt.norms.base import Norm
from normopt.optimizer import SteepestDescent
from normopt.rule import Rule, rule_of

COLUMNS = (
    "parameter",
    "shape",
    "role",
    "matrix view",
    "norm",
    "momentum",
    "step size",
    "constraint",
    "lr",
    "effective lr",
    "reason",
    "state bytes",
)


def describe(optimizer: SteepestDescent) -> str:
    """A table with one row for each parameter: what it is taken for, what moves it, how far, and what that costs.

    Columns: parameter, shape, role, matrix view (matrices x out x in), norm, momentum, step size, constraint, lr,
    effective lr (the root mean square of the update's entries for a full-rank gradient of the usual size, before
    constraints; times the dual norm or the trust ratio where the step size says so), reason for the role, and whether
    the parameter is frozen, state bytes (0 before the first step). Drawn by tabulate where it is installed.
    """
    return _table(COLUMNS, [row for group in optimizer.param_groups for row in _rows(optimizer, group)])


#: The memories of the periodic table, and how each is put on a norm.
MEMORIES: dict[str, Callable[[Norm], Direction]] = {
    NO_MEMORY: lambda norm: norm,
    SECOND_MOMENT: Smoothed,
    ROTATED: lambda norm: Rotated(Smoothed(norm), Eigenbasis()),
}


def periodic_table() -> str:
    """The grid of norms and memories, from the registry, with the optimizers that stand in each cell.

    An optimizer stands where its direction for a matrix does; one that cannot be made with its default arguments stands
    nowhere, nor has a norm that cannot be made a row. A cell without one holds, in brackets, the ingredient
    that runs it (``SteepestDescent(params, norm="Smoothed(Column())")``), or a dash where there is none: norms without
    a second moment, and rotations that change nothing. Directions that are no norm's duality map have rows of their
    own, below.
    """
    names: dict[tuple[str, str], list[str]] = defaultdict(list)
    for cls in SteepestDescent.registry.values():
        cell = _default(_cell_of, cls)
        if cell is not None:
            names[cell].append(cls.__name__)
    norms = {cls.__name__: norm for cls in choices(Norm).values() if isinstance(norm := _default(cls), Norm)}

    def rank(name: str) -> tuple[int, str]:  # most optimizers first
        return -sum(len(names[name, memory]) for memory in MEMORIES), name

    rows = [
        (name, *(", ".join(sorted(names[name, memory])) or _hole(norms[name], memory) for memory in MEMORIES))
        for name in sorted(norms, key=rank)
    ]
    others = sorted({name for name, _ in names} - norms.keys())
    rows += [(name, *(", ".join(sorted(names[name, memory])) for memory in MEMORIES)) for name in others]
    return _table(("norm", *MEMORIES), rows, width=44)


def _cell_of(cls: type[SteepestDescent]) -> tuple[str, str]:
    """Where an optimizer with its default arguments puts a matrix."""
    return rule_of(cls([torch.zeros(2, 2, requires_grad=True)]).param_groups[0]).norm.cell


def _default(make: Callable[..., Any], *arguments: Any) -> Any:
    """What ``make`` returns, which may be a user's unfinished class; ``None`` if it fails, whatever the reason."""
    try:
        return make(*arguments)
    except Exception:
        return None


def _hole(norm: Norm, memory: str) -> str:
    found = _default(MEMORIES[memory], norm)
    return "-" if found is None else f"({found})"


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]], width: int | None = None) -> str:
    """A table as text; cells longer than ``width`` are broken where tabulate is installed."""
    try:
        from tabulate import tabulate  # type: ignore[import-untyped]
    except ImportError:
        return _plain([headers, *rows])
    return str(tabulate(rows, headers=headers, disable_numparse=True, maxcolwidths=width))


def _rows(optimizer: SteepestDescent, group: Mapping[str, Any]) -> list[tuple[str, ...]]:
    written = parse(group["rule"])
    rule = written.resolve(group)
    assert isinstance(written, Rule) and isinstance(rule, Rule)
    names = group.get("param_names", [f"#{i}" for i in range(len(group["params"]))])
    reasons = group.get("reasons", [""] * len(names))
    return [
        (
            name,
            _shape(tuple(p.shape)),
            group.get("role", ""),
            _shape(rule.view.shape(tuple(p.shape))),
            str(rule.norm),
            str(rule.momentum),
            str(rule.step_size),
            ", ".join(map(str, rule.constraint)),
            f"{float(group['lr']):.3g}",
            _effective_lr(rule, group, tuple(p.shape)),
            reason if p.requires_grad else f"frozen, moves once it gets gradients; {reason}".removesuffix("; "),
            str(state_bytes(optimizer.state.get(p, {}))),
        )
        for name, p, reason in zip(names, group["params"], reasons, strict=True)
    ]


def _effective_lr(rule: Rule, group: Mapping[str, Any], shape: tuple[int, ...]) -> str:
    rms = rule.norm.rms(rule.view.shape(shape))
    shared = {name: group[name] for name in rule.step_size.init_shared()}
    size = float(rule.step_size.rate(group["lr"], 1, shared)) * rms * getattr(rule.step_size, "radius", 1.0)
    return f"{size:.3g}" + (f" x {rule.step_size.times}" if rule.step_size.times else "")


def state_bytes(state: Mapping[str, Any]) -> int:
    """The bytes of all tensors in one parameter's state."""
    return sum(value.numel() * value.element_size() for value in state.values() if isinstance(value, Tensor))


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _plain(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in padded)
