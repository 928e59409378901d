"""What all ingredients share: frozen dataclasses that are looked up by name, written as text and read back."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Real
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

T = TypeVar("T", bound="Ingredient")


class Ingredient:
    """A frozen dataclass without state of its own: a norm, a momentum, a direction, a step size, a constraint, a view.

    Every subclass registers itself under its class name, so that :func:`get` finds it as ``"heavy-ball"`` and
    :func:`parse` rebuilds it from its ``repr``. Classes that are no dataclasses or that set ``_abstract`` are abstract.
    """

    _classes: ClassVar[dict[str, type[Ingredient]]] = {}
    _parsed: ClassVar[dict[str, Ingredient]] = {}
    _place: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._place = f"{cls.__module__}.{cls.__qualname__}"
        known = Ingredient._classes.get(cls.__name__)
        if known is not None and known._place != cls._place:
            raise TypeError(f"{known.__module__} has an ingredient named {cls.__name__} already; choose another name")
        if "<locals>" in cls.__qualname__:
            cls.__qualname__ = cls.__name__  # the repr begins with it, and must read back
        Ingredient._classes[cls.__name__] = cls
        Ingredient._parsed.clear()

    def resolve(self: T, options: Mapping[str, Any]) -> T:
        """The same ingredient with every :class:`Option` replaced by its value in ``options`` (a param group)."""
        changes = {name: _resolve(value, options) for name, value in _fields(self) if _options(value)}
        return dataclasses.replace(self, **changes) if changes else self  # type: ignore[type-var]

    def options(self) -> frozenset[str]:
        """The names of the param-group options that this ingredient reads."""
        return frozenset(option.name for _, value in _fields(self) for option in _options(value))

    @property
    def decides_on_host(self) -> bool:
        """Whether the host looks at numbers to know what to do, so that a step cannot be captured as a CUDA graph."""
        return any(part.decides_on_host for part in self.parts())

    def parts(self) -> list[Ingredient]:
        """The ingredients that this one is made of."""
        return _parts(self)

    def every_part(self) -> list[Ingredient]:
        """Those, and what they are made of."""
        return [each for part in self.parts() for each in (part, *part.every_part())]

    def __str__(self) -> str:
        """The repr without what is left at its default."""
        shown = [
            f"{f.name}={_text(value)}"
            for f, (_, value) in zip(dataclasses.fields(self), _fields(self), strict=True)  # type: ignore[arg-type]
            if value != f.default
        ]
        return f"{type(self).__name__}({', '.join(shown)})"


@dataclass(frozen=True)
class Option(Ingredient):
    """A number kept in the param group rather than in the ingredient, so that a scheduler or a group can change it.

    ``EMA(beta=Option("betas", 0))`` reads ``group["betas"][0]`` at every step.
    """

    name: str
    index: int | None = None

    def value(self, options: Mapping[str, Any]) -> Any:
        """What ``options`` (a param group) holds under this name; a missing name is a ``ValueError``."""
        if self.name not in options:
            raise ValueError(f"option {self.name!r} is missing from the param group")
        found = options[self.name]
        if self.index is not None and not (isinstance(found, (tuple, list)) and len(found) > self.index):
            raise ValueError(f"{self.name} must be a tuple of at least {self.index + 1} numbers, got {found!r}")
        return found if self.index is None else found[self.index]

    def __str__(self) -> str:
        return self.name if self.index is None else f"{self.name}[{self.index}]"


def option(name: str, index: int | None = None) -> Any:
    """An :class:`Option`, typed to stand where an ingredient wants a number."""
    return Option(name, index)


def _fields(ingredient: Ingredient) -> list[tuple[str, Any]]:
    if not dataclasses.is_dataclass(ingredient):
        return []
    return [(field.name, getattr(ingredient, field.name)) for field in dataclasses.fields(ingredient)]


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


def _resolve(value: Any, options: Mapping[str, Any]) -> Any:
    if isinstance(value, Option):
        return value.value(options)
    if isinstance(value, tuple):
        return tuple(_resolve(item, options) for item in value)
    return value.resolve(options) if isinstance(value, Ingredient) else value


def _text(value: Any) -> str:
    return str(value) if isinstance(value, Ingredient) else repr(value)


@dataclass
class Context:
    """What the ingredients of one batch can see at one step, beside what they are handed.

    Args:
        g: the gradient as memories should see it: after L2 and the step size's weight; inside a ``Chain``, the result
            of the stage before.
        raw: the gradient as it came.
        step: the number of this step, counted from 1; a 0-dimensional tensor of the device in ``capturable`` steps.
        rate: the learning rate, as the step size sees it.
        direction: the rule's direction, resolved.
        weights: how to get the weights.
        scale: what the step size has multiplied ``g`` by, so that an ``eps`` can follow.
        shared: what the step size has concluded from all batches: floats where the host may look, else 0-dimensional
            tensors.
        shrink: what the weights are multiplied by before the update is added, a number or a tensor that broadcasts to
            them; constraints may multiply it in their ``update``.
        is_vector: whether these are vectors or scalars, seen as matrices with one row.
        past: how to get ``previous``; ``None`` if there is none.
        dtype: that of the parameters; ``None`` if it is that of the weights here.
        first: the place of the first entry in the parameter, where a large one is worked through in pieces.
    """

    g: Tensor
    raw: Tensor
    step: Any
    rate: float | Tensor
    direction: Any
    weights: Callable[[], Tensor]
    scale: float | Tensor = 1.0
    shared: dict[str, Any] = field(default_factory=dict)
    shrink: float | Tensor = 1.0
    is_vector: bool = False
    past: Callable[[], Tensor] | None = None
    dtype: torch.dtype | None = None
    first: int = 0
    _w: Tensor | None = field(default=None, init=False, repr=False)

    @cached_property
    def previous(self) -> Tensor:
        """The gradient of this step's sample at the weights before the last step, for momenta that look back."""
        if self.past is None:
            raise ValueError("there is no gradient at the previous weights: only a rule's momentum can look back")
        return self.past()

    @property
    def w(self) -> Tensor:
        """The weights before the step, shape ``(..., out, in)``, gathered when first asked for; never modified."""
        if self._w is None:  # compilers do not see through functools.cached_property
            self._w = self.weights()
        return self._w

    def unscaled(self, x: Tensor) -> Tensor:
        """``x``, a gradient or an average of them, without the step size's factor ``scale``."""
        return x if isinstance(self.scale, float) and self.scale == 1.0 else x / self.scale

    def seeing(self, x: Tensor) -> Context:
        """The same for the next stage of a chain, whose gradient is ``x``."""
        return dataclasses.replace(self, g=x, weights=lambda: self.w, scale=1.0)

    def through(self, view: Callable[[Tensor], Tensor]) -> Context:
        """The same in other coordinates: gradient and weights as ``view`` shows them."""
        g = view(self.g)
        return dataclasses.replace(self, g=g, raw=g, weights=lambda: view(self.w))


class Stage(Ingredient):
    """A tensor in, a tensor out, with state in between: what momenta and directions have in common.

    ``reduces`` says what one entry of the result depends on: ``"entry"``, ``"row"``, ``"column"``, ``"all"`` (sums over
    the whole matrix) or ``"matrix"`` (anything, the default). Entry-wise stages are run on many tensors laid end to
    end, the others on stacks of matrices of one shape.
    """

    reduces: str = "matrix"
    #: Whether matrices are what it works on: it needs to know how a tensor with more dimensions is seen as some.
    needs_matrix: bool = False
    #: 1 if twice the input gives twice the result, 0 if the result is the same, ``None`` if neither.
    degree: int | None = 1
    #: Whether it keeps squares of gradients, which overflow where gradients do not.
    squares: bool = False
    #: Whether the first gradient only prepares the state: ``look`` is called, nothing moves, no step is counted.
    looks_first: bool = False

    @property
    def averages(self) -> frozenset[str]:
        """Names of its state, without a number at the end, that ``state_dtype`` may keep in fewer bits.

        Those are averages whose rounding errors fade: no sums of a whole run, nothing that is subtracted from another
        or compared with it, no matrices that roots are taken of, no bases.
        """
        return frozenset()

    @property
    def takes_vectors(self) -> bool:
        """Whether vectors and scalars, seen as one row, are taken too."""
        return not self.needs_matrix

    def init_state(self, x: Tensor) -> dict[str, Tensor]:
        """The state before the first step for a batch ``x`` of shape ``(..., out, in)``; leading dimensions stay."""
        return {}

    def look(self, g: Tensor, state: dict[str, Tensor]) -> None:
        """Prepare the state from the first gradient; only called if ``looks_first``."""

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        """Map ``x`` to the next stage's input.

        Args:
            x: what the stage before returned, shape ``(..., out, in)``; never modified.
            state: this stage's tensors, updated in place.
            context: what else there is to see; nothing in it may be modified.
        """
        raise NotImplementedError

    def apply(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        """Map ``x`` with the state as it stands, which is left as it is. A stage with state must say how."""
        return self(x, state, context)


def coarsest(levels: Iterable[str]) -> str:
    """What a composition of stages ``reduces``: the common level of all that are not entry-wise, else ``"matrix"``."""
    distinct = {level for level in levels if level != "entry"}
    return distinct.pop() if len(distinct) == 1 else "matrix" if distinct else "entry"


def substate(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The part of ``state`` whose names begin with ``prefix``, under the names without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def choices(kind: type[Ingredient]) -> dict[str, type[Ingredient]]:
    """The concrete ingredients of a kind by their names, such as ``{"heavy-ball": HeavyBall, ...}``."""
    return {
        _dashed(name): cls
        for name, cls in Ingredient._classes.items()
        if issubclass(cls, kind) and "__dataclass_fields__" in vars(cls) and not vars(cls).get("_abstract", False)
    }


def get(kind: type[T], spec: str | T) -> T:
    """An ingredient of ``kind`` from itself, its name (``"heavy-ball"``) or its repr (``"HeavyBall(beta=0.9)"``).

    Raises:
        ValueError: the name is not known; the message holds the nearest one.
        TypeError: ``spec`` is neither a string nor of that kind.
    """
    found: Any = spec
    if isinstance(spec, str):
        found = parse(spec) if "(" in spec else _by_name(kind, spec)
    if not isinstance(found, kind):
        raise TypeError(f"expected a {kind.__name__} or the name of one, got {found!r}")
    return found


def _by_name(kind: type[T], name: str) -> T:
    known = choices(kind)
    cls = known.get(_dashed(name).replace("_", "-"))
    if cls is None:
        raise ValueError(f"unknown {kind.__name__.lower()} {name!r}; {nearest(name, known)}")
    return cls()  # type: ignore[return-value]


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an error message: the known name most like ``name``, and all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return (f"did you mean {close[0]!r}? " if close else "") + f"Known: {', '.join(known)}"


def _dashed(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).lower()


def parse(text: str) -> Ingredient:
    """Rebuild an ingredient from its ``repr``: calls of ingredient names on literals, nothing else is evaluated."""
    if text not in Ingredient._parsed:
        try:
            found = _build(ast.parse(text, mode="eval").body)
        except SyntaxError as error:
            raise ValueError(f"cannot read the ingredient {text!r}: {error.msg}") from None
        if not isinstance(found, Ingredient):
            raise ValueError(f"cannot read the ingredient {text!r}: it is not the call of one")
        Ingredient._parsed[text] = found
    return Ingredient._parsed[text]


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
            return ast.literal_eval(node)


def read(owner: Ingredient, name: str, kind: type[Ingredient]) -> None:
    """Let the field ``name`` be given as :func:`get` takes it, ``Smoothed("max")``; its errors name ``owner`` too."""
    try:
        object.__setattr__(owner, name, get(kind, getattr(owner, name)))
    except (TypeError, ValueError) as error:
        raise type(error)(f"{type(owner).__name__}: {name}: {error}") from None


def check_range(owner: object, name: str, value: Any, low: float, high: float, *, closed: bool = False) -> None:
    """Raise a ``ValueError`` that names ``owner`` unless ``low <= value < high`` (``<= high`` when ``closed``)."""
    if isinstance(value, Option):
        return
    if not isinstance(value, (Real, Tensor)):
        raise TypeError(f"{type(owner).__name__}: {name} must be a number, got {value!r}")
    number = float(value)
    if not (low <= number < high or (closed and number == high)):
        end = "]" if closed else ")"
        raise ValueError(f"{type(owner).__name__}: {name} must lie in [{low}, {high}{end}, got {value!r}")
    if type(value).__module__ != "builtins":
        object.__setattr__(owner, name, number)  # numpy's numbers and tensors have reprs that do not read back


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
    """Raise a ``ValueError`` that names ``owner`` unless ``value`` is a whole number from 1 up."""
    if not isinstance(value, Option) and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError(f"{type(owner).__name__}: {name} must be a whole number from 1 up, got {value!r}")
