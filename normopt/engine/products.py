"""The forms and dtypes of products that were chosen by measuring, kept in the param groups."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch

from normopt.engine.batch import Batch
from normopt.polar.choice import Choice, from_text, to_text, using
from normopt.rule import rule_of


def kept(groups: Sequence[MutableMapping[str, Any]], by_rule: bool) -> AbstractContextManager[None]:
    """Inside, products are as the groups' ``"products"`` say, and to those is added what is chosen meanwhile.

    Args:
        groups: the optimizer's param groups. What one of them says holds for all.
        by_rule: whether nothing may be measured.
    """
    concerned = [group for group in groups if rule_of(group).open_parts]
    return _kept(concerned, by_rule) if concerned else nullcontext()


@contextmanager
def _kept(concerned: Sequence[MutableMapping[str, Any]], by_rule: bool) -> Iterator[None]:
    own = _joined(concerned)
    before = dict(own)
    with using(own, by_rule):
        yield
    if own != before or len({group["products"] for group in concerned}) > 1:
        _write(concerned, own)


def settle(batches: Iterable[Batch]) -> None:
    """Choose now what the batches will ask for: a compiler cannot measure."""
    for batch in batches:
        for part in batch.rule.open_parts:
            part.choose(tuple(batch.plan.shape), batch.working, batch.params[0].device)


def choices(groups: Sequence[MutableMapping[str, Any]], by_rule: bool = False) -> dict[str, str]:
    """The choices for all matrices of the groups, measured where they are not known yet; they stay in the groups.

    Ranks must agree: one of them calls this before the first step, sends what is returned to the others, and those call
    :func:`adopt`. A parameter counts with its whole shape, wherever its parts are.
    """
    with kept(groups, by_rule):
        for group in groups:
            rule = rule_of(group).resolve(group)
            for p in group["params"]:
                working = torch.promote_types(p.dtype, torch.float32)
                for part in rule.open_parts:
                    part.choose(rule.view.shape(tuple(p.shape)), working, p.device)
    return {name: str(choice) for name, choice in _joined(groups).items()}


def adopt(groups: Sequence[MutableMapping[str, Any]], chosen: Mapping[str, str]) -> None:
    """Let the groups have these choices, which go before their own; a ``ValueError`` if one cannot be read."""
    given = from_text("; ".join(f"{name}: {choice}" for name, choice in chosen.items()))
    _write([group for group in groups if rule_of(group).open_parts], _joined(groups) | given)


def chosen(group: Mapping[str, Any], shape: tuple[int, ...]) -> str:
    """What has been chosen for a parameter of this shape, ``"gram float32"``; ``""`` if nothing was measured."""
    rule, own = rule_of(group), _read(group["products"])
    view = rule.view.shape(shape)
    return ", ".join(str(own[key]) for key in dict.fromkeys(part.key(view) for part in rule.open_parts) if key in own)


def _joined(groups: Iterable[Mapping[str, Any]]) -> dict[str, Choice]:
    found: dict[str, Choice] = {}
    for text in dict.fromkeys(group["products"] for group in groups):
        found |= _read(text)
    return found


@lru_cache(maxsize=64)
def _read(text: str) -> Mapping[str, Choice]:
    return from_text(text)


def _write(groups: Iterable[MutableMapping[str, Any]], own: Mapping[str, Choice]) -> None:
    text = to_text(own)
    for group in groups:
        group["products"] = text
