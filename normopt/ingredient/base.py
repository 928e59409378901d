"""What an ingredient is: a frozen dataclass that is looked up by name, written as text and read back."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

T = TypeVar("T", bound="Ingredient")

#: What needs no look.
_IMMUTABLE = {bool, int, float, str, type(None)}


class Ingredient:
    """A frozen dataclass without state of its own: a norm, a momentum, a direction, a step size, a constraint, a view.

    Every subclass registers itself under its class name, so that :func:`get` finds it as ``"heavy-ball"`` and
    :func:`parse` rebuilds it from its ``repr``. A class that is not a dataclass, or that sets ``_abstract``, is
    abstract.
    """

    _classes: ClassVar[dict[str, type[Ingredient]]] = {}
    _parsed: ClassVar[dict[str, Ingredient]] = {}
    _place: ClassVar[str]
    _abstract: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._place = f"{cls.__module__}.{cls.__qualname__}"
        known = Ingredient._classes.get(cls.__name__)
        if known is not None and known._place != cls._place:
            raise TypeError(f"{known.__module__} has an ingredient named {cls.__name__} already; choose another name")
        if "<locals>" in cls.__qualname__:
            cls.__qualname__ = cls.__name__  # the repr begins with the qualified name, and must read back
        if "__post_init__" in vars(cls):
            cls.__post_init__ = _after_plain(vars(cls)["__post_init__"])  # type: ignore[assignment, method-assign]
        Ingredient._classes[cls.__name__] = cls
        Ingredient._parsed.clear()

    def __new__(cls: type[T], *args: Any, **fields: Any) -> T:
        """Refuse what only an optimizer takes: some ingredients have the name of one, such as ``Prodigy``."""
        if _are_parameters(next(iter((*args, *fields.values())), None)):
            raise TypeError(
                f"{cls.__name__}: expected its fields, got parameters or a model. This is an ingredient; an optimizer "
                "is made by normopt.create('muon', model), by a class of normopt.zoo or by normopt.SteepestDescent"
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Give the fields values that the repr can say, before a class checks them: NumPy's numbers become Python's."""
        for field in _declared(self):
            value = getattr(self, field.name)
            known = _tuples(value)
            if known is not value:
                object.__setattr__(self, field.name, known)
            if field.type in ("bool", bool):
                check_flag(type(self).__name__, field.name, known)

    def resolve(self: T, options: Mapping[str, Any]) -> T:
        """This ingredient with every :class:`Option` replaced by its value in ``options`` (a param group)."""
        changes = {name: _resolve(value, options) for name, value in _fields(self) if _options(value)}
        return _replace(self, changes) if changes else self

    def fitted(self: T, shape: tuple[int, ...]) -> T:
        """This ingredient for parts of an (out x in) matrix of ``shape``: what depends on a shape is the whole's."""
        changes = {name: _fitted(value, shape) for name, value in _fields(self) if _parts((value,))}
        return _replace(self, changes) if changes else self

    def options(self) -> frozenset[str]:
        """The names of the param-group options that this ingredient reads."""
        return frozenset(option.name for _, value in _fields(self) for option in _options(value))

    @property
    def decides_on_host(self) -> bool:
        """Whether a step reads values of tensors on the host, and so cannot be captured as a CUDA graph or compiled."""
        return any(part.decides_on_host for part in self.parts())

    def parts(self) -> list[Ingredient]:
        """The ingredients in the fields of this one."""
        return _parts(self)

    def every_part(self) -> list[Ingredient]:
        """All ingredients inside this one, recursively."""
        return [each for part in self.parts() for each in (part, *part.every_part())]

    def __str__(self) -> str:
        """The repr without the fields that have their defaults."""
        defaults = {field.name: field.default for field in _declared(self)}
        shown = [f"{name}={_text(value)}" for name, value in _fields(self) if value != defaults[name]]
        return f"{type(self).__name__}({', '.join(shown)})"


@dataclass(frozen=True)
class Option(Ingredient):
    """A number kept in the param group rather than in the ingredient, so that a scheduler or a group can change it.

    ``EMA(beta=Option("betas", 0))`` reads ``group["betas"][0]`` at every step.

    Args:
        name: the key of the param group.
        index: which entry of a tuple is meant; ``None`` if the option is a number.
    """

    name: str
    index: int | None = None

    def value(self, options: Mapping[str, Any]) -> Any:
        """The value in ``options`` (a param group).

        Raises:
            ValueError: the option is missing, or is not a tuple with an entry ``index``.
        """
        if self.name not in options:
            raise ValueError(f"option {self.name!r} is missing from the param group")
        found = options[self.name]
        if self.index is not None and not (isinstance(found, (tuple, list)) and len(found) > self.index):
            raise ValueError(f"{self.name} must be a tuple of at least {self.index + 1} numbers, got {found!r}")
        return found if self.index is None else found[self.index]

    def __str__(self) -> str:
        return self.name if self.index is None else f"{self.name}[{self.index}]"


def option(name: str, index: int | None = None) -> Any:
    """An :class:`Option`, typed ``Any`` so that type checkers take it where a field is a number."""
    return Option(name, index)


def _after_plain(check: Callable[[Ingredient], None]) -> Callable[[Ingredient], None]:
    @functools.wraps(check)
    def checked(self: Ingredient) -> None:
        Ingredient.__post_init__(self)
        check(self)

    return checked


def plain(value: Any) -> Any:
    """The same as a Python number, bool or list if it is NumPy's, also inside of tuples and lists."""
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return value.tolist()
    return type(value)(map(plain, value)) if type(value) in (list, tuple) else value


def check_flag(owner: str, name: str, value: Any) -> None:
    """Raise a ``TypeError`` that names ``owner`` unless ``value`` is True or False, or an :class:`Option`."""
    if not isinstance(value, (bool, Option)):
        raise TypeError(f"{owner}: {name} must be True or False, got {value!r}")


def _tuples(value: Any) -> Any:
    """The same with tuples for lists, which have no hash; itself if there is nothing to change."""
    if type(value) in _IMMUTABLE:
        return value
    value = plain(value)
    return tuple(map(_tuples, value)) if type(value) in (list, tuple) else value


def _are_parameters(value: Any) -> bool:
    some = value[:1] if isinstance(value, (list, tuple)) else ()
    return isinstance(value, (nn.Module, Iterator)) or any(isinstance(each, (Tensor, nn.Module, dict)) for each in some)


def _replace(ingredient: Any, changes: dict[str, Any]) -> Any:
    return dataclasses.replace(ingredient, **changes)


def _declared(ingredient: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(ingredient) if dataclasses.is_dataclass(ingredient) else ()


def _fields(ingredient: Ingredient) -> list[tuple[str, Any]]:
    return [(field.name, getattr(ingredient, field.name)) for field in _declared(ingredient)]


def _parts(value: Any) -> list[Ingredient]:
    if isinstance(value, tuple):
        return [part for item in value for part in ([item] if isinstance(item, Ingredient) else _parts(item))]
    return _parts(tuple(item for _, item in _fields(value))) if isinstance(value, Ingredient) else []


def _options(value: Any) -> list[Option]:
    if isinstance(value, Option):
        return [value]
    if isinstance(value, tuple):
        return [option for item in value for option in _options(item)]
    return [option for _, item in _fields(value) for option in _options(item)] if isinstance(value, Ingredient) else []


def _fitted(value: Any, shape: tuple[int, ...]) -> Any:
    if isinstance(value, tuple):
        return tuple(_fitted(item, shape) for item in value)
    return value.fitted(shape) if isinstance(value, Ingredient) else value


def _resolve(value: Any, options: Mapping[str, Any]) -> Any:
    if isinstance(value, Option):
        return value.value(options)
    if isinstance(value, tuple):
        return tuple(_resolve(item, options) for item in value)
    return value.resolve(options) if isinstance(value, Ingredient) else value


def _text(value: Any) -> str:
    return str(value) if isinstance(value, Ingredient) else repr(value)
