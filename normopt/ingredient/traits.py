"""Traits: constant properties of an ingredient, such as ``reduces`` or ``degree``.

The base class declares each trait with its default, ``reduces: ClassVar[str] = "matrix"``. A subclass assigns another
value, ``reduces = "row"``, takes the trait of one of its fields, ``reduces = like("norm")``, or computes it from its
fields in a method under ``@trait``. None of the three is a field of the dataclass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class _Like(property):
    """A property that returns the attribute of one field; it learns its own name from the class it is assigned in."""

    def __init__(self, field: str, name: str | None = None) -> None:
        self._field, self._name = field, name

    def __set_name__(self, owner: type, name: str) -> None:
        field, name = self._field, self._name or name
        super().__init__(lambda ingredient: getattr(getattr(ingredient, field), name))


def like(field: str, name: str | None = None) -> Any:
    """The trait of the ingredient in ``field``: after ``reduces = like("norm")``, it is ``self.norm.reduces``.

    Args:
        field: the name of the field.
        name: the name of the trait there, if it differs.
    """
    return _Like(field, name)


def trait(compute: Callable[[Any], Any]) -> Any:
    """A property in place of a class variable (typed ``Any``, since type checkers refuse the one for the other)."""
    return property(compute)


def overrides(ingredient: object, base: type, *methods: str) -> bool:
    """Whether the class of ``ingredient`` overrides one of the ``methods`` of ``base``."""
    return any(getattr(type(ingredient), method) is not getattr(base, method) for method in methods)
