"""What one step has done to each tensor, in numbers: measured only when asked, written where people look at them."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer
from torch.utils.hooks import RemovableHandle

from normopt.directions import Chain, Complement, Rotated, Smoothed
from normopt.ingredient.stage import Direction, Rate, Stage
from normopt.norms.base import Norm
from normopt.norms.entrywise import Euclidean
from normopt.norms.spectral import Spectral
from normopt.numerics.autocast import _without_autocast
from normopt.numerics.lengths import euclidean
from normopt.numerics.sharded import whole
from normopt.numerics.singular import largest_singular_value
from normopt.rule import Rule, rule_of
from normopt.stepsize.base import double

__all__ = ["Metrics", "ScalarWriter", "write_jsonl", "write_scalars"]

#: What is measured, in this order.
MEASURES = ("effective_lr", "update_rms", "weight_norm", "update_norm", "dual_norm", "update_ratio", "stable_rank")

#: One row of a report: numbers by name, and the words that say of what.
Row = dict[str, Any]


class Metrics:
    """What ``step`` does to each tensor, as a context manager around it; ``optimizer.metrics()`` makes one.

    ``with optimizer.metrics() as measured: optimizer.step()``, then ``measured.rows()``. The block may hold more than
    the step: a closure's backward, a ``GradScaler``, ``zero_grad``. Of several steps the last one counts. Of
    a step that nobody takes, as under a ``GradScaler`` that has found Inf, there are no rows, and one that
    ``nonfinite="skip"`` leaves out has updates of 0. Before the step every weight is copied, after it the numbers are
    computed and the copies are gone; outside of the block nothing is done and nothing is held. Results of the step are
    the same to the bit.

    The update is the difference of the weights as they are stored, after the step and before it: decay, projections
    and rounding included. With ``W`` the weights after the step, ``U`` the update, ``G`` the gradient, seen as the
    matrices that the rule sees, and ``||.||`` the rule's own norm with its scale:

    * ``effective_lr``: the root mean square of the update that the rule promises, see :func:`normopt.summary`.
    * ``update_rms``: the root mean square of the entries of ``U``.
    * ``weight_norm``, ``update_norm``: ``||W||`` and ``||U||``, the largest over a tensor's matrices.
    * ``dual_norm``: the dual norm of ``G``, the sum over a tensor's matrices.
    * ``update_ratio``: the root mean square of ``U`` over that of the weights before the step.
    * ``stable_rank``: ``||W||_F^2 / ||W||_2^2``, the mean over a tensor's matrices; NaN for vectors and scalars.

    On the CPU norms are exact. On accelerators nothing waits for the device before ``rows`` is called, unless the
    norm is one that the step itself waits for (nuclear, Schatten, Ky Fan): the spectral norm is at most 0.1% too large,
    and dual norms are those that step sizes go by (``steepness``). Sharded tensors are brought together one by one, on
    every rank: all must measure together.

    Args:
        optimizer: whose steps are measured.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._hooks: list[RemovableHandle] = []
        self._before: dict[Tensor, Tensor] = {}
        self._promised: dict[Tensor, Rate] = {}
        self._words: list[Row] = []
        self._numbers: list[list[Any]] = []

    def __enter__(self) -> Metrics:
        hooks = self._optimizer.register_step_pre_hook, self._optimizer.register_step_post_hook
        self._hooks = [hooks[0](self._look_before), hooks[1](self._look_after)]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._before.clear()
        self._promised.clear()

    def rows(self, by: str = "parameter") -> list[Row]:
        """One dict for each tensor that had a gradient: ``parameter``, ``role``, ``norm``, and the numbers.

        The host reads all numbers now, once. ``norm`` is the rule's own norm: a norm itself, or the one under
        ``Smoothed``, at the end of a ``Chain``, or inside a rotation that it does not notice. Where a direction has
        none it is the Frobenius norm, ``Euclidean(scale='unit')``.

        Args:
            by: ``"parameter"``, or ``"role"``: one dict for each role with ``role``, ``tensors`` (how many), and the
                means of the numbers over them, those that are NaN left out. Without a model the roles are the param
                groups, ``"group 0"``.

        Raises:
            ValueError: another ``by``.
        """
        if by not in ("parameter", "role"):
            raise ValueError(f"metrics: by must be 'parameter' or 'role', got {by!r}")
        self._numbers = _on_host(self._numbers)
        rows = [
            {**words, **dict(zip(MEASURES, numbers, strict=True))}
            for words, numbers in zip(self._words, self._numbers, strict=True)
        ]
        return rows if by == "parameter" else _by_role(rows)

    @torch.no_grad()
    def _look_before(self, *_: object) -> None:
        for group in self._optimizer.param_groups:
            rule = rule_of(group).resolve(group)
            for p in group["params"]:
                self._before[p] = p.detach().clone()
                self._promised[p] = effective_lr(rule, group, tuple(p.shape), self._optimizer.state.get(p, {}))

    @torch.no_grad()
    def _look_after(self, *_: object) -> None:
        self._words, self._numbers = [], []
        groups = self._optimizer.param_groups
        for place, (group, names) in enumerate(zip(groups, names_in(groups), strict=True)):
            rule = rule_of(group).resolve(group)
            norm = own_norm(rule.norm)
            for name, p in zip(names, group["params"], strict=True):
                before, promised = self._before.pop(p), self._promised.pop(p)
                if p.grad is None or not p.numel():
                    continue
                self._words.append(
                    {"parameter": name, "role": group.get("role") or f"group {place}", "norm": str(norm)}
                )
                with _without_autocast():
                    self._numbers.append([promised, *_measured(rule, norm, before, p, p.grad)])


def _measured(rule: Rule, norm: Norm, before: Tensor, p: Tensor, gradient: Tensor) -> list[Tensor]:
    """The numbers of one tensor after ``effective_lr``, in the order of ``MEASURES``."""
    working = torch.promote_types(p.dtype, torch.float32)
    old, w, g = (rule.view.apply(whole(x.detach()).to(working)) for x in (before, p, gradient))
    u = w - old
    duals = [norm.dual_norm(x) if x.is_cpu else norm.steepness(x, {}) for x in rule.view.cut(_finite(g))]
    sizes = [torch.stack([_size(norm, part).amax() for part in rule.view.cut(_finite(x))]).amax() for x in (w, u)]
    sizes.append(torch.stack([dual.sum() for dual in duals]).sum())
    sizes = [torch.where(x.isfinite().all(), size, math.nan) for x, size in zip((w, u, g), sizes, strict=True)]
    rank = torch.full_like(sizes[0], math.nan)
    if p.ndim > 1:
        ranks = [(euclidean(x, (-2, -1)) / largest_singular_value(x)).square() for x in rule.view.cut(_finite(w))]
        rank = torch.where(w.isfinite().all(), torch.stack(ranks).mean(), math.nan)
    return [_rms(u), *sizes, _rms(u) / _rms(old), rank]


def _size(norm: Norm, x: Tensor) -> Tensor:
    """``norm(x)``; on accelerators the spectral norm up to 0.1% too large, so that nothing waits for the device."""
    if isinstance(norm, Spectral) and not x.is_cpu:
        return largest_singular_value(x) / norm.factor(x.shape)
    return norm.norm(x)


def _finite(x: Tensor) -> Tensor:
    """``x`` with 0 for NaN and Inf, at which decompositions would raise errors."""
    return torch.where(x.isfinite(), x, 0.0)


def _rms(x: Tensor) -> Tensor:
    return euclidean(x, tuple(range(x.ndim))) / math.sqrt(x.numel())


def _on_host(numbers: list[list[Any]]) -> list[list[float]]:
    """The numbers as floats; each device is read once."""
    found = [[*row] for row in numbers]
    places: dict[torch.device, list[tuple[int, int]]] = defaultdict(list)
    for i, row in enumerate(numbers):
        for j, x in enumerate(row):
            if isinstance(x, Tensor):
                places[x.device].append((i, j))
    for device, where in places.items():
        read = torch.stack([numbers[i][j].reshape(()).to(double(device)) for i, j in where]).tolist()
        for (i, j), value in zip(where, read, strict=True):
            found[i][j] = value
    return [[float(x) for x in row] for row in found]


def _by_role(rows: Iterable[Row]) -> list[Row]:
    roles: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        roles[row["role"]].append(row)
    return [
        {"role": role, "tensors": len(several), **{name: _mean([row[name] for row in several]) for name in MEASURES}}
        for role, several in roles.items()
    ]


def _mean(numbers: Sequence[float]) -> float:
    known = [x for x in numbers if x == x]
    return sum(known) / len(known) if known else math.nan


# What a rule promises ------------------------------------------------------------------------------------------------


def effective_lr(rule: Rule, group: Mapping[str, Any], shape: tuple[int, ...], state: Mapping[str, Any]) -> Rate:
    """The root mean square of the next update of a parameter, for a full-rank gradient of the usual size.

    Before constraints, and without the factor that ``rule.step_size.times`` names; NaN where a direction says nothing
    of its size. A tensor of the device where the learning rate is one, or is being found.

    Args:
        rule: with this step's numbers.
        group: the param group that it came from.
        shape: of the parameter.
        state: what ``optimizer.state`` has for it.
    """
    taken: Any = state.get("step", 0.0)
    taken = taken.item() if isinstance(taken, Tensor) and taken.is_cpu else taken
    step: Any = taken + 1 - rule.norm.looks_first
    step = step if isinstance(step, Tensor) else max(1.0, step)
    shared = {name: group[name] for name in rule.step_size.init_shared()}
    rate = rule.step_size.rate(group["lr"], step, shared)
    return rate * (rule.direction.rms(rule.view.shape(shape)) * getattr(rule.step_size, "radius", 1.0))


def own_norm(direction: Stage) -> Norm:
    """The norm in which a direction measures; the Frobenius norm where it has none."""
    if isinstance(direction, Norm):
        return direction
    if isinstance(direction, (Smoothed, Complement)):
        return direction.norm
    if isinstance(direction, Rotated) and own_norm(direction.direction).rotation_invariant:
        return own_norm(direction.direction)
    if isinstance(direction, Chain):
        stages = (stage for stage in reversed(direction.stages) if isinstance(stage, Direction) and stage.sets_length)
        return own_norm(next(stages, direction.stages[0]))
    return Euclidean(scale="unit")


def names_in(groups: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The names of each group's parameters; without names ``#0``, ``#1`` ..., of several groups ``#0.0``, ``#0.1``."""
    found = []
    for place, group in enumerate(groups):
        size, names = len(group["params"]), group.get("param_names")
        prefix = f"#{place}." if len(groups) > 1 else "#"
        found.append([*names] if names and len(names) == size else [f"{prefix}{i}" for i in range(size)])
    return found


# Where numbers go ----------------------------------------------------------------------------------------------------


class ScalarWriter(Protocol):
    """Whatever has TensorBoard's ``add_scalar``: ``SummaryWriter``, or a logger's ``experiment``."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> Any:
        """Write one number under a name."""


def write_scalars(writer: ScalarWriter, rows: Iterable[Mapping[str, Any]], step: int) -> None:
    """Write the numbers of ``rows`` to TensorBoard, NaN left out, under tags such as ``update_rms/blocks.0.up.weight``.

    Args:
        writer: anything with ``add_scalar(tag, value, step)``, such as ``torch.utils.tensorboard.SummaryWriter``.
        rows: what :meth:`Metrics.rows` returned, by parameter or by role.
        step: the number of the step.
    """
    for row in rows:
        for name in MEASURES:
            if row[name] == row[name]:
                writer.add_scalar(f"{name}/{row.get('parameter', row['role'])}", row[name], step)


def write_jsonl(path: str | PathLike[str], rows: Iterable[Mapping[str, Any]], step: int) -> None:
    """Append ``rows`` to a file, one JSON object a line with ``step`` first; NaN and Inf, which JSON lacks, as null.

    Args:
        path: the file; it is made if it is not there.
        rows: dicts, such as :meth:`Metrics.rows` or :func:`normopt.summary` returned.
        step: the number of the step.
    """
    with open(path, "a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({"step": step, **{name: _json(value) for name, value in row.items()}}) + "\n")


def _json(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
