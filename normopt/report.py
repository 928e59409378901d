"""What an optimizer is about to do, as text and as data; the periodic table."""

from __future__ import annotations

import dataclasses
import math
import re
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby, pairwise, zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from normopt.directions import Chain, Eigenbasis, Rotated, Smoothed
from normopt.engine.products import chosen
from normopt.ingredient import Ingredient, Option, choices
from normopt.ingredient.stage import NO_MEMORY, ROTATED, SECOND_MOMENT, Direction
from normopt.ingredient.view import View
from normopt.metrics import Row, effective_lr, names_in
from normopt.norms.base import Norm
from normopt.optimizer import SteepestDescent
from normopt.rule import rule_of

#: How many characters wide reports are.
WIDTH = 100

#: The columns of a description; the first holds names.
HEADERS = ("", "shape", "matrices", "effective lr", "parameters", "state")

#: One more, where several processes step together.
WHERE = "moved by"

#: What tensors that are moved alike have in common, and what it is called.
ALIKE = {"norm": "norm", "momentum": "momentum", "step_size": "step size", "constraint": "constraint", "lr": "lr"}


def summary(optimizer: Optimizer) -> list[Row]:
    """What :func:`describe` says, as data: one dict for each parameter, of texts and numbers.

    ``parameter``: its name. ``shape``: its dimensions. ``role``, ``reason``: what it is taken for, and why; empty
    without a model. ``view``: the matrices that it is seen as, (matrices, out, in); ``out`` is a tuple where parts of a
    matrix are of unequal height. ``norm``, ``momentum``, ``step_size``, ``constraint``: what moves it, as text with the
    numbers of its param group. ``products``: the form and dtype of its matrix products that were fastest, like ``"gram
    float32"``; empty before the first step and where nothing was measured, see :func:`normopt.polar.choose`. ``lr``,
    and ``lr_ratio``, its ratio to the optimizer's. ``effective_lr``: the root mean square of the next update's entries
    for a full-rank gradient of the usual size, before constraints; NaN where the direction does not say. ``times``:
    what that is to be multiplied by, ``"dual norm"`` or ``"trust ratio"``, or empty. ``parameters``: how many numbers
    it has. ``state_bytes``: of its state, on this rank; 0 before the first step. ``where``: which ranks move it, if
    several step together: ``"all"`` of them, each the whole of it, ``"shards"``, each what it has of it, or all of it
    ``"rank 3"``.

    ``pandas.DataFrame(normopt.summary(optimizer))`` is a table; :func:`normopt.metrics.write_jsonl` writes it.

    Args:
        optimizer: any of this library, or what wraps one as :class:`~normopt.Averaged` does.

    Raises:
        TypeError: anything else.
    """
    inner = _ours(optimizer)
    groups = inner.param_groups
    return [row for group, names in zip(groups, names_in(groups), strict=True) for row in _rows(inner, group, names)]


def _ours(optimizer: Any) -> SteepestDescent:
    """The optimizer that moves the weights."""
    found = optimizer
    while not isinstance(found, SteepestDescent) and hasattr(found, "optimizer"):
        found = found.optimizer
    if not isinstance(found, SteepestDescent):
        raise TypeError(f"optimizer must be one of normopt, got {type(found).__name__}")
    return found


def describe(optimizer: Optimizer, full: bool = False) -> str:
    """What each tensor is taken for and why, what moves it, how far, and what that costs; at most 100 characters wide.

    Tensors that are moved alike stand together, under their norm, momentum, step size, constraints and learning rate,
    with the numbers of their param group. Names that differ in integers alone, where all else is equal, share a row:
    ``blocks.{0..11}.mlp.up.weight x12``, whose parameters and bytes of state are totals. The matrices are
    those that a tensor is seen as (matrices x out x in). :func:`summary` has the same as data, and what the numbers
    mean.

    Args:
        optimizer: any of this library, or what wraps one as :class:`~normopt.Averaged` does.
        full: a row for each parameter.

    Raises:
        TypeError: ``optimizer`` is anything else.
    """
    rows = summary(optimizer)
    parameters, state = sum(row["parameters"] for row in rows), sum(row["state_bytes"] for row in rows)
    inner = _ours(optimizer)
    name = type(inner).__name__ if inner is optimizer else f"{type(optimizer).__name__} {type(inner).__name__}"
    title = f"{name}: {len(rows)} tensors, {parameters:,} parameters, {state:,} bytes of state"
    parts = [title + ("" if inner.state else " (made at the first step)")]
    several = _grouped(rows if full else _folded(rows), *ALIKE, "lr_ratio")
    sections = [_grouped(section, "role", "reason") for section in several]
    cells = [_cells(row) for section in sections for alike in section for row in alike]
    headers = (*HEADERS, WHERE) if any(row["where"] for row in rows) else HEADERS
    cells = [row[: len(headers)] for row in cells]
    header, *lines = _aligned([headers, *cells], right=range(3, len(HEADERS)))
    following = iter(lines)
    for section in sections:
        text = [*_what_moves(section[0][0]), *_how_multiplied(section), header]
        for alike in section:
            text += _wrapped(": ".join(filter(None, (alike[0]["role"], alike[0]["reason"]))), "  ")
            text += [next(following) for _ in alike]
        parts.append("\n".join(text))
    return "\n\n".join(parts)


def _what_moves(row: Row) -> Iterator[str]:
    """The lines above the tensors that are moved alike."""
    for key, label in ALIKE.items():
        for text in row[key] if key == "constraint" else [row[key]]:
            yield from _wrapped(text if isinstance(text, str) else _rate(text, row["lr_ratio"]), f"{label:<12}")


def _rate(lr: float, ratio: float) -> str:
    """The learning rate, and where it is another than the optimizer's, its ratio to that."""
    return f"{lr:.3g}" + (f", {ratio:.3g} times the optimizer's" if ratio != 1 and math.isfinite(ratio) else "")


def _how_multiplied(section: Iterable[Iterable[Row]]) -> list[str]:
    """What was chosen for the products of each shape of matrices; nothing where nothing was measured."""
    rows = [row for alike in section for row in alike if row["products"]]
    texts = dict.fromkeys(f"{_shape(row['view'][1:])}: {row['products']}" for row in rows)
    return _wrapped("; ".join(texts), f"{'products':<12}") if texts else []


def _wrapped(text: str, label: str) -> list[str]:
    rest = " " * len(label)
    return textwrap.wrap(text, WIDTH, initial_indent=label, subsequent_indent=rest, break_on_hyphens=False)


def _cells(row: Row) -> tuple[str, ...]:
    size = f"{row['effective_lr']:.3g}" + (f" x {row['times']}" if row["times"] else "")
    count = f" x{row['tensors']}" if row.get("tensors", 1) > 1 else ""
    numbers = f"{row['parameters']:,}", f"{row['state_bytes']:,}"
    return f"    {row['parameter']}{count}", _shape(row["shape"]), _shape(row["view"]), size, *numbers, row["where"]


def _grouped(rows: Iterable[Row], *keys: str) -> list[list[Row]]:
    """Rows with equal entries under ``keys``, in the order of the first of each."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(repr([row[key] for key in keys]), []).append(row)
    return [*found.values()]


# Names that differ in integers ---------------------------------------------------------------------------------------

#: Integers in a name: without leading zeros, so that a name can be had back from its numbers.
INTEGER = re.compile(r"(?<!\d)(0|[1-9]\d*)(?!\d)")


def _folded(rows: Iterable[Row]) -> list[Row]:
    """One row, with ``tensors`` of them, for those that differ in the integers of their names alone.

    What is written of a row is true of every name that its braces stand for, and of no other.
    """
    found: dict[str, list[Row]] = {}
    for row in rows:
        key = repr((INTEGER.split(row["parameter"])[::2], {**row, "parameter": ""}))
        found.setdefault(key, []).append(row)
    folded = []
    for several in found.values():
        words = INTEGER.split(several[0]["parameter"])[::2]
        for sets in _products([tuple(map(int, INTEGER.findall(row["parameter"]))) for row in several]):
            count = math.prod(map(len, sets))
            name = words[0] + "".join(_braces(each) + word for each, word in zip(sets, words[1:], strict=True))
            totals = {key: several[0][key] * count for key in ("parameters", "state_bytes")}
            folded.append({**several[0], **totals, "parameter": name, "tensors": count})
    return folded


def _products(points: Sequence[tuple[int, ...]]) -> list[tuple[frozenset[int], ...]]:
    """The points as few products of sets: those that are equal but for one place are put together, place by place."""
    products = [tuple(frozenset({i}) for i in point) for point in points]
    for place in range(len(products[0])):
        merged: dict[Any, frozenset[int]] = {}
        for sets in products:
            others = sets[:place], sets[place + 1 :]
            merged[others] = merged.get(others, frozenset()) | sets[place]
        products = [(*before, union, *after) for (before, after), union in merged.items()]
    return products


def _braces(numbers: frozenset[int]) -> str:
    """``7``, ``{0,1}``, ``{0..11}``, ``{0..10..2}`` or ``{0,1,5..9}``."""
    ordered = sorted(numbers)
    steps = {b - a for a, b in pairwise(ordered)}
    if len(ordered) == 1:
        return str(ordered[0])
    if len(ordered) > 2 and len(steps) == 1:
        step = steps.pop()
        return f"{{{ordered[0]}..{ordered[-1]}{f'..{step}' if step > 1 else ''}}}"
    runs = [[i for _, i in run] for _, run in groupby(enumerate(ordered), lambda each: each[1] - each[0])]
    texts = [f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs]
    return f"{{{','.join(texts)}}}"


# The rows ------------------------------------------------------------------------------------------------------------


def _rows(optimizer: SteepestDescent, group: Mapping[str, Any], names: Sequence[str]) -> Iterator[Row]:
    written = rule_of(group)
    rule = written.resolve(group)
    ingredients = {key: _text(getattr(written, key), getattr(rule, key)) for key in ("norm", "momentum", "step_size")}
    constraint = [_text(*pair) for pair in zip(written.constraint, rule.constraint, strict=True)]
    reasons = group.get("reasons") or []
    layout = optimizer.layout()
    places = {} if layout is None else layout.where()
    for i, (name, p) in enumerate(zip(names, group["params"], strict=True)):
        shape, state = tuple(p.shape), optimizer.state.get(p, {})
        frozen = [] if p.requires_grad else ["frozen, moves once it gets gradients"]
        yield {
            "parameter": name,
            "shape": shape,
            "role": group.get("role", ""),
            "reason": "; ".join([*frozen, *(reasons[i : i + 1] if len(reasons) == len(names) else [])]),
            "view": _matrices(rule.view, shape),
            **ingredients,
            "products": chosen(group, shape),
            "constraint": constraint,
            "lr": float(group["lr"]),
            "lr_ratio": float(group.get("lr_ratio", 1.0)),
            "effective_lr": float(effective_lr(rule, group, shape, state)),
            "times": rule.step_size.times,
            "parameters": p.numel(),
            "state_bytes": state_bytes(state),
            "where": places.get(p, ""),
        }


def _text(written: Any, resolved: Any) -> str:
    """An ingredient with its numbers: those of the param group, those that are no defaults, and all fractions.

    Args:
        written: the ingredient with its options.
        resolved: the same with the numbers of the param group in their place.
    """
    if isinstance(resolved, Chain):
        return f"Chain({', '.join(map(_text, written.stages, resolved.stages))})"
    if not isinstance(resolved, Ingredient) or not dataclasses.is_dataclass(resolved):
        return f"{float(resolved):.6g}" if isinstance(resolved, (float, Tensor)) else repr(resolved)
    shown = []
    for field in dataclasses.fields(resolved):
        was, value = getattr(written, field.name), getattr(resolved, field.name)
        if isinstance(was, Option) or value != field.default or _is_fraction(value):
            shown.append(f"{field.name}={_text(was, value)}")
    return f"{type(resolved).__name__}({', '.join(shown)})"


def _is_fraction(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value) and not value.is_integer()


def state_bytes(state: Mapping[str, Any]) -> int:
    """The bytes of all tensors in one parameter's state."""
    return sum(value.numel() * value.element_size() for value in state.values() if isinstance(value, Tensor))


def _matrices(view: View, shape: tuple[int, ...]) -> tuple[int | tuple[int, ...], ...]:
    """The matrices that a parameter is seen as, (matrices, out, in); ``out`` is a tuple for parts of unequal height."""
    number, rows, columns = view.shape(shape)
    return number, view.heights if rows == sum(view.heights) else rows, columns


def _shape(shape: tuple[int | tuple[int, ...], ...]) -> str:
    return "x".join(str(n) if isinstance(n, int) else f"({'+'.join(map(str, n))})" for n in shape) or "scalar"


def _aligned(
    rows: Sequence[Sequence[str]], right: Iterable[int] = (), most: int | None = None, *, is_ruled: bool = False
) -> list[str]:
    """Each row as text, in columns two spaces apart.

    Args:
        rows: cells of text.
        right: the columns whose cells stand at the right.
        most: how many characters a cell may have before it is broken into lines; ``None``: the first column has what
            the others leave of ``WIDTH``.
        is_ruled: whether a line of dashes follows the first row.
    """
    columns = range(len(rows[0]))
    others = sum(max(len(row[i]) for row in rows) + 2 for i in columns if i)
    limits = [most or (max(20, WIDTH - others) if i == 0 else WIDTH) for i in columns]
    cells = [[_broken(cell, limit) for cell, limit in zip(row, limits, strict=True)] for row in rows]
    widths = [max(len(line) for row in cells for line in row[i]) for i in columns]
    texts = ["\n".join(_lines(row, widths, {*right})) for row in cells]
    return [texts[0], "  ".join("-" * width for width in widths), *texts[1:]] if is_ruled else texts


def _lines(row: Sequence[Sequence[str]], widths: Sequence[int], right: set[int]) -> Iterator[str]:
    """The lines of a row whose cells have several."""
    for texts in zip_longest(*row, fillvalue=""):
        sides = [text.rjust if i in right else text.ljust for i, text in enumerate(texts)]
        yield "  ".join(side(width) for side, width in zip(sides, widths, strict=True)).rstrip()


def _broken(cell: str, limit: int) -> list[str]:
    indent = " " * (len(cell) - len(cell.lstrip()))
    rest = indent and f"{indent}  "
    lines = textwrap.wrap(cell.lstrip(), limit, initial_indent=indent, subsequent_indent=rest, break_on_hyphens=False)
    return lines or [""]


# The periodic table --------------------------------------------------------------------------------------------------

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
    return "\n".join(_aligned([("norm", *MEMORIES), *rows], most=44, is_ruled=True))


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
