"""How an optimizer is declared: its arguments are fields, and one method, ``rule()``, says what they do."""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Mapping, Set
from dataclasses import replace
from typing import Any, ClassVar, ForwardRef, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.optimizer import ParamsT

from normopt.engine.checks import check_lr
from normopt.ingredient import check_flag, check_range, get, nearest, option, plain
from normopt.optimizer import SteepestDescent
from normopt.roles.options import Geometry, entry
from normopt.rule import INGREDIENTS, Rule, rule_of
from normopt.stepsize import LearningRateFree, StepSize

if sys.version_info >= (3, 11):
    from typing import dataclass_transform
else:
    from typing_extensions import dataclass_transform  # comes with torch

__all__ = ["Declared", "DeclaredOptimizer", "FixedStepOptimizer", "arg"]

T = TypeVar("T", bound="Declared")
P = inspect.Parameter


class Arg(NamedTuple):
    """What is declared of an argument, beside its name."""

    default: Any = P.empty
    doc: str = ""
    kw_only: bool = False
    type: Any = Any
    module: str = ""


def arg(*, default: Any = P.empty, doc: str = "", kw_only: bool = False) -> Any:
    """The value of a field whose argument is given by keyword only, or differs from what its name says elsewhere.

    Args:
        default: the argument's default; without one it must be given.
        doc: what the argument means; by default what it means in the class above, or in other optimizers.
        kw_only: whether it can be given by keyword only.
    """
    return Arg(default, doc, kw_only)


#: What an argument means in every optimizer that says nothing else of it. What ``SteepestDescent`` takes too is
#: documented there, and read from its docstring.
ARGUMENTS: dict[str, str] = {
    "params": "parameters, param groups or a whole model.",
    "lr": "learning rate.",
    "weight_decay": "decoupled weight decay.",
    "momentum": "decay rate of the average of gradients, in [0, 1].",
    "beta2": "decay rate of ``v``.",
    "betas": "decay rates of the averages of the gradient and of its square.",
    "eps": "added to the root of the second moment.",
    "dampening": "how much of each gradient is left out.",
    "nesterov": "use Nesterov momentum.",
    "cautious": "decay only entries that the update does not move away from 0 (arXiv 2510.12402).",
    "decoupled_weight_decay": "shrink the weights instead.",
    "scale": "see :class:`~normopt.norms.Norm`.",
    "orthogonalize": "the method of :func:`normopt.polar.polar`.",
    "orthogonalize_dtype": (
        'the dtype of the iteration that ``orthogonalize`` names; ``"auto"``: the accuracy of bfloat16 or better, '
        "whichever is fastest for the shape on this machine."
    ),
    "ns_steps": 'steps of the iteration; ``None``: the method\'s own (5 for ``"newton-schulz"``).',
    "precondition_frequency": "steps from one change of basis to the next.",
    "staggered": (
        "give each matrix a step of its own for that, spread over those steps, so that no step is slow; ``False``: all "
        "at once, as other implementations do."
    ),
    "gamma": "length of the argument of cosh.",
    "delta": (
        "where ``|cos|`` of weights and gradient is below this, in units of that of random vectors, the update is "
        "projected."
    ),
    "wd_ratio": "factor of the decay of projected matrices.",
    "d0": "the first estimate of the learning rate.",
    "growth_rate": "the most that the estimate may grow by in one step.",
    "use_bias_correction": "multiply the step by Adam's bias correction.",
    "decouple": "decouple the weight decay from the gradient.",
    "fsdp_in_use": "accepted for compatibility; has no effect: sharded parameters are found without it.",
    "aux_lr": "learning rate of AdamW for all other tensors; ``None``: ``lr``.",
    "aux_betas": "AdamW's betas.",
    "aux_eps": "AdamW's eps.",
    "aux_weight_decay": "AdamW's decoupled weight decay.",
    "step_size": (
        'how far to go, such as ``"prodigy"``, which finds the learning rate (``lr`` is its factor, then 1 unless it '
        'is given), or ``"dual"``; ``None``: ``lr``, unless the optimizer says something else.'
    ),
}

#: Weight decay as most optimizers of torch have it.
L2_DECAY = "L2 regularization, added to the gradient."

#: Arguments of ``SteepestDescent`` that are handed on as they are.
HANDED_ON = [
    name
    for name, parameter in inspect.signature(SteepestDescent.__init__).parameters.items()
    if parameter.kind is P.KEYWORD_ONLY and name not in ("options", "view")
]


#: Arguments that are no numbers, nor made of numbers.
NOT_PLAIN = {"params", "geometry", "overrides", "mesh", "process_group"}


@dataclass_transform(field_specifiers=(arg,))
class Declared(SteepestDescent):
    """An optimizer whose annotated class attributes are its arguments, in this order, as those of dataclasses are.

    ``rule()``, ``table()`` and ``rest()`` find them on ``self``, and may change them, ``self.beta3 = ...``. Numbers
    that the rule reads by ``option("name")`` go to the param groups, where schedulers can change them. Of the other
    arguments of a rule a param group may name its own value, from which its rule is declared anew, such as
    ``ns_steps``. After that no argument is an attribute: what is needed for groups that are added later is in
    ``arguments``. Attributes that are no arguments are annotated as ``ClassVar`` or not at all, or begin with ``_``. To
    the class's docstring are added the docstring of ``table`` and a section on the arguments. A class without a rule is
    abstract, and an ``__init__`` that is written by hand is left as it is.
    """

    _abstract: ClassVar[bool] = True
    _arguments: ClassVar[dict[str, Arg]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        above: dict[str, Arg] = {}
        for base in reversed(cls.__bases__):
            above |= getattr(base, "_arguments", {})
        own = _declared_in(cls) | _defaults_in(cls, above)
        if own and "__init__" not in vars(cls):
            _check_constructors(cls)
        for name, a in own.items():
            if type(a.default).__hash__ is None:
                kind = type(a.default).__name__
                raise TypeError(
                    f"{cls.__name__}: the default of {name!r} is a {kind}, which all optimizers of the class would "
                    "share and could change; declare a tuple, or None and make it in rule()"
                )
        own = {name: a._replace(doc=a.doc or above.get(name, a).doc) for name, a in own.items()}
        words = {name for name, a in (above | own).items() if a.kw_only}
        order = [name for name in above | own if name not in words] + [name for name in own | above if name in words]
        cls._arguments = {name: (above | own)[name] for name in order}
        if "__init__" not in vars(cls) and (own or is_declared(cls)):
            cls.__init__ = _constructor(cls)  # type: ignore[method-assign]
        if is_declared(cls):
            cls.__doc__ = _documentation(cls)
        super().__init_subclass__(**kwargs)  # the last, so that the registry has no class that was refused

    @classmethod
    def _is_abstract(cls) -> bool:
        return super()._is_abstract() or cls.rule is Declared.rule

    @classmethod
    def declared(cls: type[T], *args: Any, **kwargs: Any) -> T:
        """The optimizer with its arguments, but without param groups."""
        found = cls.__new__(cls)
        vars(found).update(_bound(cls, args, kwargs))
        return found

    def rule(self) -> Rule:
        """What the arguments mean."""
        raise NotImplementedError(f"{type(self).__name__} is no optimizer: it has no rule()")

    def completed_rule(self) -> Rule:
        """The rule, with the step size that the user wants in place of its own."""
        rule, wanted = self.rule(), vars(self).get("step_size")
        if not isinstance(rule, Rule):
            raise TypeError(f"{type(self).__name__}: rule() must return a Rule, got {rule!r}")
        return rule if wanted is None else rule.updated({"step_size": wanted})

    def _rule_of(self, group: dict[str, Any]) -> Rule:
        """The group's rule; a ``TypeError`` for an argument that the group names and that changes nothing of it."""
        given = {**group}
        found = super()._rule_of(group)
        of_tables = {name for role in self.own_table for name in entry(self.own_table, role)}  # for another norm there
        for name in self._said(given) - found.options() - of_tables:
            without = {other: value for other, value in given.items() if other != name}
            if given[name] != self.arguments[name] and super()._rule_of(without) == found:
                instead = name.removeprefix("aux_")
                raise TypeError(
                    f"param group: {name!r} changes nothing for parameters that move by {found.norm}; "
                    + (f"say {instead!r}" if instead != name else f"give it to {type(self).__name__} itself")
                )
        return found

    def _said(self, group: Mapping[str, Any]) -> Set[str]:
        """The arguments that a group names and that no option of the rule stands for."""
        names = self.arguments.keys() - rule_of(self.defaults).options() - INGREDIENTS
        return (names - {*HANDED_ON, "lr"}) & group.keys()

    def _own_rule(self, group: Mapping[str, Any]) -> Rule:
        """The optimizer's own rule, declared anew where the group names arguments that no option of it stands for."""
        rule = super()._own_rule(group)
        said = {name: group[name] for name in self._said(group)}
        return self.declared((), **{**self.arguments, **said}).completed_rule() if said else rule

    def _construct(self, kept: set[str], given: Mapping[str, Any]) -> None:
        """Make the param groups, then forget all attributes but those ``kept``; ``given`` is what ``declared`` took."""
        others = ("params", "overrides", "mesh", "process_group")
        self.arguments = {name: value for name, value in given.items() if name not in others}
        kept = kept | {"arguments"}
        rule, found = self.completed_rule(), vars(self)
        numbers = {name: found[name] for name in rule.options() & found.keys()}
        handed_on = {name: found[name] for name in HANDED_ON if name in found}
        arguments = found.keys() - kept
        ingredients = (rule.norm, rule.momentum, rule.step_size, rule.constraint)
        lr, params = found["lr"], found["params"]
        check_lr(lr)
        SteepestDescent.__init__(self, params, lr, *ingredients, view=rule.view, options=numbers, **handed_on)
        for name in arguments:
            delattr(self, name)


def is_declared(cls: type[SteepestDescent]) -> bool:
    """Whether the constructor was made from what the class declares."""
    return hasattr(cls.__init__, "_is_of_declaration")


def with_radius(step_size: str | StepSize) -> StepSize:
    """The step size of that name; one that finds the learning rate reads ``radius`` from the param group."""
    found = get(StepSize, step_size)
    return replace(found, radius=option("radius")) if isinstance(found, LearningRateFree) else found


def check_beta1(optimizer: object, betas: tuple[float, float]) -> None:
    """Raise a ``ValueError`` unless the first beta lies in [0, 1), for averages whose start is not corrected for."""
    check_range(optimizer, "betas", option("betas", 0).value({"betas": betas}), 0, 1)


def beta2_of(betas: tuple[float, float]) -> float:
    """The second beta; a ``ValueError`` unless there are two."""
    beta: float = option("betas", 1).value({"betas": betas})
    if not 0 <= beta <= 1:
        raise ValueError(f"betas must lie in [0, 1], got {betas!r}")
    return beta


def _declared_in(cls: type[Declared]) -> dict[str, Arg]:
    """The arguments that a class itself declares, which cease to be attributes of it."""
    found = {}
    for name, kind in inspect.get_annotations(cls).items():
        if name.startswith("_") or "ClassVar" in str(kind):
            continue
        has_method = any(callable(vars(base).get(name)) for base in cls.__mro__[1:])
        if has_method or hasattr(SteepestDescent, name) or name in ("state", "defaults", "param_groups"):
            raise TypeError(f"{cls.__name__}: an argument cannot be called {name!r}, which every optimizer has")
        value = vars(cls).get(name, P.empty)
        found[name] = (value if isinstance(value, Arg) else Arg(value))._replace(type=kind, module=cls.__module__)
        if name in vars(cls):
            delattr(cls, name)
    return found


def _defaults_in(cls: type[Declared], above: Mapping[str, Arg]) -> dict[str, Arg]:
    """New defaults of arguments of the bases, given without a type: ``momentum = 0.9``."""
    names = vars(cls).keys() & above.keys() - inspect.get_annotations(cls).keys()
    found = {name: above[name]._replace(default=vars(cls)[name]) for name in names}
    for name in names:
        delattr(cls, name)
    return found


def _check_constructors(cls: type[Declared]) -> None:
    """Raise a ``TypeError`` if a constructor that is made from arguments would bypass one that is written by hand."""
    for base in cls.__mro__[1 : cls.__mro__.index(Declared)]:
        init = vars(base).get("__init__")
        if init is not None and not hasattr(init, "_is_of_declaration"):
            raise TypeError(
                f"{cls.__name__}: {base.__name__} has an __init__ of its own, which arguments declared here would "
                "bypass; write an __init__ here too, or declare the arguments there"
            )


def _signature(cls: type[Declared]) -> inspect.Signature:
    kinds = {False: P.POSITIONAL_OR_KEYWORD, True: P.KEYWORD_ONLY}
    arguments = [P(n, kinds[a.kw_only], default=a.default, annotation=a.type) for n, a in cls._arguments.items()]
    try:
        return inspect.Signature(arguments)
    except ValueError as error:
        raise TypeError(f"{cls.__name__}: {error}") from None


def _bound(cls: type[Declared], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The value of every argument."""
    for name in kwargs.keys() - cls._arguments.keys():
        hint = nearest(name, cls._arguments)
        raise TypeError(f"{cls.__name__}() got an unexpected keyword argument {name!r}; {hint}")
    try:
        bound = _signature(cls).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{cls.__name__}() {error}") from None
    wanted = bound.arguments.get("step_size")
    if "lr" not in bound.arguments and wanted is not None and isinstance(get(StepSize, wanted), LearningRateFree):
        bound.arguments["lr"] = 1.0
    bound.apply_defaults()
    for name in bound.arguments.keys() - NOT_PLAIN:
        bound.arguments[name] = plain(bound.arguments[name])
        if cls._arguments[name].type in ("bool", bool):
            check_flag(cls.__name__, name, bound.arguments[name])
    return bound.arguments


def _constructor(cls: type[Declared]) -> Callable[..., None]:
    """``__init__``, with a signature of its own."""

    def __init__(self: Declared, *args: Any, **kwargs: Any) -> None:
        kept = {*vars(self)}
        given = _bound(cls, args, kwargs)
        vars(self).update(given)
        self._construct(kept, given)

    signature, made = _signature(cls), vars(__init__)
    first = P("self", P.POSITIONAL_OR_KEYWORD)
    made["__signature__"] = signature.replace(parameters=[first, *signature.parameters.values()])
    made["_is_of_declaration"] = True
    __init__.__annotations__ = {name: _reference(a) for name, a in cls._arguments.items()} | {"return": None}
    __init__.__qualname__, __init__.__module__ = f"{cls.__qualname__}.__init__", cls.__module__
    return __init__


def _reference(a: Arg) -> Any:
    """The type as ``typing.get_type_hints`` can read it, wherever the argument was declared."""
    return ForwardRef(a.type, module=a.module) if isinstance(a.type, str) else a.type


def _documentation(cls: type[Declared]) -> str:
    """The class's docstring, what its table does with a model, and every argument."""
    text = inspect.cleandoc(vars(cls).get("__doc__") or "")
    text, raises, errors = text.partition("\n\nRaises:")
    paragraphs = [text, inspect.cleandoc(cls.table.__doc__ or "")]
    meanings = _arguments_in(SteepestDescent.__doc__) | ARGUMENTS
    lines = [f"{name}: {a.doc or meanings.get(name, '')}" for name, a in cls._arguments.items()]
    wrapped = textwrap.TextWrapper(110, initial_indent="    ", subsequent_indent="        ", break_long_words=False)
    section = "\n".join(map(wrapped.fill, lines))
    return "\n\n".join([*filter(None, paragraphs), f"Args:\n{section}\n"]) + (raises and f"{raises[1:]}{errors}")


def _arguments_in(text: str | None) -> dict[str, str]:
    """What a docstring says of each argument."""
    section = inspect.cleandoc(text or "").partition("Args:\n")[2].partition("\n\n")[0]
    found = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    return {name: re.sub(r"\s+", " ", meaning) for name, meaning in found}


class FixedStepOptimizer(Declared):
    """A declared optimizer that has a step size of its own, and takes no other."""

    params: ParamsT | nn.Module
    lr: float | Tensor = 1e-3
    geometry: str | Geometry | None = arg(default=None, kw_only=True)
    overrides: Mapping[str, Any] | None = arg(default=None, kw_only=True)
    maximize: bool = arg(default=False, kw_only=True)
    nonfinite: str = arg(default="raise", kw_only=True)
    state_dtype: str | torch.dtype | None = arg(default=None, kw_only=True)
    foreach: bool | None = arg(default=None, kw_only=True)
    fused: bool | None = arg(default=None, kw_only=True)
    capturable: bool = arg(default=False, kw_only=True)
    compile: bool = arg(default=False, kw_only=True)
    deterministic: bool = arg(default=False, kw_only=True)
    differentiable: bool = arg(default=False, kw_only=True)
    mesh: DeviceMesh | None = arg(default=None, kw_only=True)
    process_group: Any = arg(default=None, kw_only=True)

    def table(self) -> Geometry:
        """Given a whole model, vectors and scalars are not decayed."""
        return {role: {"weight_decay": 0.0} for role in ("vector", "scalar") if "weight_decay" in self._arguments}


class DeclaredOptimizer(FixedStepOptimizer):
    """A declared optimizer that can have any step size: with ``step_size="prodigy"`` it finds its learning rate."""

    step_size: str | StepSize | None = arg(default=None, kw_only=True)
