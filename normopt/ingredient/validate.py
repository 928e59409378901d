"""Checks of arguments: every error names the ingredient, the argument and the value that was given."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Real
from typing import Any

from torch import Tensor

from normopt.ingredient.base import Option
from normopt.ingredient.registry import nearest


def check_range(owner: object, name: str, value: Any, low: float, high: float, *, closed: bool = False) -> None:
    """Raise a ``ValueError`` that names ``owner`` unless ``low <= value < high`` (``<= high`` when ``closed``).

    Here and below, an :class:`Option` passes: its value is checked in the param group. A value that is not a number is
    a ``TypeError``.
    """
    if isinstance(value, Option):
        return
    if not isinstance(value, (Real, Tensor)) or isinstance(value, bool):
        raise TypeError(f"{type(owner).__name__}: {name} must be a number, got {value!r}")
    number = float(value)
    if not (low <= number < high or (closed and number == high)):
        end = "]" if closed else ")"
        raise ValueError(f"{type(owner).__name__}: {name} must lie in [{low}, {high}{end}, got {value!r}")
    if isinstance(value, Tensor) and getattr(owner, name, None) is value:
        object.__setattr__(owner, name, number)  # reprs of tensors cannot be parsed


def check_positive(owner: object, name: str, value: Any) -> None:
    """Raise a ``ValueError`` that names ``owner`` unless ``value`` is positive and finite."""
    check_range(owner, name, value, 0, float("inf"))
    if not isinstance(value, Option) and float(value) == 0:
        raise ValueError(f"{type(owner).__name__}: {name} must be positive, got {value!r}")


def check_choice(owner: object, name: str, value: str, known: Iterable[str]) -> None:
    """Raise a ``ValueError`` that names ``owner`` and the nearest choice unless ``value`` is among ``known``."""
    if value not in known:
        raise ValueError(f"{type(owner).__name__}: unknown {name} {value!r}; {nearest(str(value), known)}")


def check_count(owner: object, name: str, value: Any) -> None:
    """Raise a ``ValueError`` that names ``owner`` unless ``value`` is an integer, 1 or more."""
    if not isinstance(value, Option) and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError(f"{type(owner).__name__}: {name} must be a whole number from 1 up, got {value!r}")
