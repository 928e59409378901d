"""Ingredients by name, and from text."""

from __future__ import annotations

import ast
import difflib
import inspect
import re
from collections.abc import Iterable
from typing import Any

from normopt.ingredient.base import Ingredient, T

#: How many texts ``parse`` remembers: optimizers parse the rules of their param groups at every step.
MOST_PARSED = 4096

#: What other libraries and habit call options that have another name here, too unlike it to be a near miss.
OTHER_NAMES = {"learning_rate": "lr", "learn_rate": "lr", "lr_mult": "lr_ratio", "wd": "weight_decay"}


def choices(kind: type[T]) -> dict[str, type[T]]:
    """The concrete ingredients of a kind by name, such as ``{"heavy-ball": HeavyBall, ...}``."""
    return {
        _dashed(name): cls
        for name, cls in Ingredient._classes.items()
        if issubclass(cls, kind) and "__dataclass_fields__" in vars(cls) and not vars(cls).get("_abstract", False)
    }


def get(kind: type[T], spec: str | T) -> T:
    """An ingredient of ``kind`` from itself, its name (``"heavy-ball"``) or its repr (``"HeavyBall(beta=0.9)"``).

    Raises:
        ValueError: the name is not known; the message holds the nearest one.
        TypeError: ``spec`` is neither a string nor an ingredient of ``kind``.
    """
    found: Any = spec
    if isinstance(spec, str):
        found = parse(spec) if "(" in spec else _by_name(kind, spec)
    if not isinstance(found, kind):
        hint = f"; did you mean {found.__name__}()?" if isinstance(found, type) and issubclass(found, kind) else ""
        raise TypeError(f"expected a {kind.__name__} or the name of one, got {found!r}{hint}")
    return found


def _by_name(kind: type[T], name: str) -> T:
    known = choices(kind)
    cls = known.get(_dashed(name).replace("_", "-"))
    if cls is None:
        raise ValueError(f"unknown {kind.__name__.lower()} {name!r}; {nearest(name, known)}")
    needed = [p.name for p in inspect.signature(cls).parameters.values() if p.default is p.empty]
    if needed:
        fields = ", ".join(f"{field}=..." for field in needed)
        raise ValueError(f"{name!r} needs {' and '.join(needed)}: give {cls.__name__}({fields}), or that as text")
    return cls()


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an error message: the known name most like ``name``, if one is, and all known names.

    Most like ``"learning_rate"`` is its abbreviation ``"lr"``, and the other way round; else what is spelled alike,
    under its name here or one of ``OTHER_NAMES``: ``"lr"`` for ``"learnrate"``.
    """
    known = sorted(known)
    named = {name: name for name in known} | {other: name for other, name in OTHER_NAMES.items() if name in known}
    close = [other for other in known if other == name.lower()]
    close += [other for other in known if _abbreviates(other, name) or _abbreviates(name, other)]
    close += [named[other] for other in difflib.get_close_matches(name, named, n=1)]
    return (f"did you mean {close[0]!r}? " if close else "") + f"Known: {', '.join(known)}"


def _abbreviates(short: str, long: str) -> bool:
    """Whether ``short`` is the initials of the several words of ``long``: ``lr`` of ``learning_rate``."""
    words = re.split(r"[_-]", long)
    return len(words) > 1 and short == "".join(word[:1] for word in words)


def _dashed(name: str) -> str:
    """``"heavy-ball"`` for ``"HeavyBall"``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).lower()


def parse(text: str) -> Ingredient:
    """Rebuild an ingredient from its ``repr``: calls of ingredient classes on literals; nothing else is evaluated.

    Raises:
        ValueError: ``text`` is not such a call, or names a class or field that is not known.
    """
    known = Ingredient._parsed.get(text)
    if known is not None:
        return known
    try:
        found = _build(ast.parse(text, mode="eval").body)
    except SyntaxError as error:
        raise ValueError(f"cannot read the ingredient {text!r}: {error.msg}") from None
    if not isinstance(found, Ingredient):
        raise ValueError(f"cannot read the ingredient {text!r}: it is not the call of one")
    if len(Ingredient._parsed) >= MOST_PARSED:
        Ingredient._parsed.clear()  # whatever is still in use is parsed again at its next step
    Ingredient._parsed[text] = found
    return found


def _build(node: ast.expr) -> Any:
    match node:
        case ast.Call(func=ast.Name(id=name), args=args, keywords=words) if all(word.arg for word in words):
            known = {cls.__name__: cls for cls in choices(Ingredient).values()}
            if name not in known:
                raise ValueError(f"unknown ingredient {name!r}; {nearest(name, known)}")
            fields = {str(word.arg): _build(word.value) for word in words}
            try:
                return known[name](*map(_build, args), **fields)
            except TypeError as error:  # written by a version with other fields
                raise ValueError(f"cannot read the ingredient {ast.unparse(node)!r}: {error}") from None
        case ast.Tuple():
            return tuple(map(_build, node.elts))
        case ast.Name(id="inf"):
            return float("inf")
        case ast.UnaryOp(op=ast.USub(), operand=ast.Name(id="inf")):
            return float("-inf")
        case _:
            try:
                return ast.literal_eval(node)
            except ValueError:
                text = ast.unparse(node)
                hint = f'; a name inside of a call needs quotes, "{text}"' if isinstance(node, ast.Name) else ""
                raise ValueError(f"cannot read {text!r} in an ingredient: it is no literal{hint}") from None


def read(owner: Ingredient, name: str, kind: type[Ingredient]) -> None:
    """In ``__post_init__``: let field ``name`` be given by name or text too, as in ``Smoothed("max")``.

    Raises:
        ValueError, TypeError: those of :func:`get`; the message begins with the class of ``owner`` and the field.
    """
    try:
        object.__setattr__(owner, name, get(kind, getattr(owner, name)))
    except (TypeError, ValueError) as error:
        raise type(error)(f"{type(owner).__name__}: {name}: {error}") from None
