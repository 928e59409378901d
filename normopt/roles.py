"""Which tensor plays which role, how it is seen as a matrix, and which norm that role gets."""

from __future__ import annotations

import fnmatch
import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from normopt.constraints import L2, Constraint, WeightDecay
from normopt.directions import Smoothed
from normopt.ingredient import nearest, option
from normopt.momentum import EMA, Momentum
from normopt.norms import Column, Euclidean, Max, Row, Spectral
from normopt.stepsize import Constant, LearningRateFree, StepSize
from normopt.view import View

#: The roles that are inferred. Users may name their own, in overrides as ``{"role": "expert"}``.
ROLES = ("embedding", "linear", "unembedding", "conv", "vector", "scalar", "other")

_UNKNOWN = "a module type without a known role"
_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONV_TRANSPOSE = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_EMBEDDING = (nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True)
class Role:
    """The part that a parameter plays: a name, how it is seen as a matrix, and why.

    Args:
        name: one of ``ROLES``, or the user's own.
        view: how the parameter is seen as (out x in) matrices.
        reason: why it has this role, for people to read.
        options: param-group options from an override, such as ``{"lr": 1e-3}`` or ``{"norm": "max"}``.
    """

    name: str
    view: View = View()
    reason: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


def roles(model: nn.Module, overrides: Mapping[str, Any] | None = None) -> dict[str, Role]:
    """The role of every parameter of ``model`` that requires a gradient, by name, in the model's order.

    Roles come from module types, from tying and from position, never from the number of dimensions alone:

    * ``nn.Embedding``: ``embedding``, seen transposed (one column a token). A weight shared with the output layer keeps
      this role.
    * ``nn.Linear``: ``linear``, except the output layer, ``unembedding``: the last ``nn.Linear`` with as many outputs
      as an embedding has tokens and no later layer as many inputs; where there is none (a classifier), the last
      ``nn.Linear``, unless it is as wide as an embedding or the only layer. An override that names the head settles it.
    * convolutions: ``conv``, seen as (out, in * k * k); transposed ones as (out * k * k, in).
    * ``nn.MultiheadAttention`` and recurrent layers: ``linear``, their fused matrices split into the 3 or 4 they hold.
    * anything with one dimension: ``vector``; with none: ``scalar``.
    * matrices of other modules: ``other``, with a warning: say what they are in ``overrides``, or let the module say
      it of its parts, ``normopt_roles = {"weight": "linear"}`` and ``normopt_views = {"weight": {"split": 3}}``
      (names relative to the module).

    Modules also declare what bounds their weights, ``normopt_bounds = {"weight": "RowBound(radius=1.0)"}``, for
    parameters as they are stored: such constraints come after those of any optimizer.

    Args:
        model: any module.
        overrides: glob pattern over parameter names -> role name, norm or dict of param-group options (``"role"``,
            ``"view"``, ``"norm"``, ``"lr"`` ...). Later patterns win.

    Raises:
        ValueError: a pattern matches no parameter, or a module declares something of what is none of its parameters.
    """
    inferred = _inferred(model)
    found = dict(inferred)
    for pattern, override in (overrides or {}).items():
        names = fnmatch.filter(found, pattern)
        if not names:
            raise ValueError(f"overrides: the pattern {pattern!r} matches no parameter; {nearest(pattern, found)}")
        for name in names:
            found[name] = _overridden(found[name], pattern, override)
    if any(role.name == "unembedding" and inferred[name].name != "unembedding" for name, role in found.items()):
        for name, role in found.items():  # the user has named the head, so what was taken for it is none
            if role == inferred[name] and role.name == "unembedding":
                found[name] = replace(role, name="linear", reason="another layer is named the head")
    unknown = [name for name, role in found.items() if role.name == "other" and role.reason.endswith(_UNKNOWN)]
    if unknown:
        warnings.warn(
            f"no role known for {', '.join(unknown)}: the module type says nothing about how they are used. They get "
            "what the geometry has for '*'; name their role in overrides to change or confirm that.",
            stacklevel=2,
        )
    return found


def _overridden(role: Role, pattern: str, override: Any) -> Role:
    if isinstance(override, str) and override not in ROLES:
        raise ValueError(f"overrides[{pattern!r}]: unknown role {override!r}; {nearest(override, ROLES)}")
    options: dict[str, Any] = {"role": override} if isinstance(override, str) else _options(override)
    says_how = bool({"role", "view", "norm"} & options.keys())
    name = options.pop("role", role.name)
    view = options.pop("view", _view_as(name, role))
    view = View(**view) if isinstance(view, Mapping) else view
    reason = f"override {pattern!r}" if says_how else role.reason
    return replace(role, name=name, view=view, options=merged(role.options, options), reason=reason)


def _view_as(name: str, role: Role) -> View:
    """How a parameter is seen once it plays the role ``name``: only embeddings are stored one row a token."""
    if name == role.name or "embedding" not in (name, role.name):
        return role.view
    return View(transpose=name == "embedding")


def _inferred(model: nn.Module) -> dict[str, Role]:
    head = _head(model)
    declared_roles, declared_views = _declared(model, "normopt_roles"), _declared(model, "normopt_views")
    declared_bounds = _declared(model, "normopt_bounds")
    found: dict[str, Role] = {}
    names: dict[Tensor, str] = {}
    for name, module, key, parameter in _parameters(model):
        of, module, key = _parametrized(model, name, module, key)
        role = _role(module, key, parameter, is_head=module is head)
        if of in declared_roles:
            kind = declared_roles[of]
            role = replace(role, name=kind, view=_view_as(kind, role), reason=f"declared by {type(module).__name__}")
        if of in declared_views:
            role = replace(role, view=View(**declared_views[of]))
        if name in declared_bounds:
            role = replace(role, options={"bounds": declared_bounds[name]})
        first = names.setdefault(parameter, name)
        found[first] = role if first == name else _tied(found[first], role, name)
    return found


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Every trained parameter under every name that it has."""
    for prefix, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter.requires_grad:
                yield (f"{prefix}.{key}" if prefix else key), module, key, parameter


def _parametrized(model: nn.Module, name: str, module: nn.Module, key: str) -> tuple[str, nn.Module, str]:
    """The name, module and key that a parameter had before ``torch.nn.utils.parametrize``."""
    path, found, rest = name.rpartition("parametrizations.")
    if not (found and rest.endswith(".original") and isinstance(module, ParametrizationList)):
        return name, module, key
    key = rest.removesuffix(".original")
    return path + key, model.get_submodule(path.removesuffix(".")), key


def _declared(model: nn.Module, attribute: str) -> dict[str, Any]:
    """What modules say of parameters, by the names that the model has for them."""
    found: dict[str, Any] = {}
    for prefix, module in model.named_modules():
        has_own = attribute in vars(module) or hasattr(type(module), attribute)  # wrappers hand on what they wrap
        for path, value in getattr(module, attribute).items() if has_own else ():
            if not _is_parameter(module, path):
                where = f"{attribute} of {type(module).__name__}" + (f" ({prefix})" if prefix else "")
                known = [name for name, _ in module.named_parameters()]
                raise ValueError(f"{where}: {path!r} is none of its parameters; {nearest(path, known)}")
            found[f"{prefix}.{path}" if prefix else path] = value
    return found


def _is_parameter(module: nn.Module, path: str) -> bool:
    """Whether that is the name of a parameter, also of one that is ``None`` or is computed from others by now."""
    owner, _, key = path.rpartition(".")
    try:
        part = module.get_submodule(owner)
    except AttributeError:
        return False
    plain = vars(part).get(key, "")
    return key in part._parameters or is_parametrized(part, key) or plain is None or isinstance(plain, Tensor)


def _tied(first: Role, second: Role, name: str) -> Role:
    """A shared weight keeps the embedding's role and view, whichever name comes first."""
    kept = second if second.name == "embedding" else first
    options = first.options if first.options == second.options else merged(first.options, second.options)
    return replace(kept, options=options, reason=f"{kept.reason}; tied with {name}")


def _head(model: nn.Module) -> nn.Module | None:
    tables = [module for module in model.modules() if isinstance(module, _EMBEDDING)]
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if tables:
        sizes = {table.num_embeddings for table in tables}
        consumed = [{later.in_features for later in linears[i + 1 :]} for i in range(len(linears))]
        readouts = [m for m, inputs in zip(linears, consumed, strict=True) if m.out_features in sizes - inputs]
        hidden = linears and linears[-1].out_features in {table.embedding_dim for table in tables}
        return readouts[-1] if readouts else linears[-1] if linears and not hidden else None
    return linears[-1] if len(linears) > 1 or (linears and _has(model, _CONV)) else None


def _has(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    return any(isinstance(module, kinds) for module in model.modules())


def _role(module: nn.Module, key: str, parameter: Tensor, *, is_head: bool) -> Role:
    kind = type(module).__name__
    if parameter.ndim < 2:
        name, dimensions = ("vector", "one dimension") if parameter.ndim else ("scalar", "no dimension")
        return Role(name, View(), f"{kind}.{key}: {dimensions}")
    if isinstance(module, _EMBEDDING):
        return Role("embedding", View(transpose=True), f"{kind}: one column a token")
    if is_head:
        return Role("unembedding", View(), f"{kind}: the output layer, {parameter.shape[0]} outputs")
    if isinstance(module, nn.Linear):
        return Role("linear", View(), f"{kind}: a hidden layer")
    if isinstance(module, _CONV):
        return Role("conv", View(flatten=True), f"{kind}: seen as (out, in * kernel)")
    if isinstance(module, _CONV_TRANSPOSE):
        return Role("conv", View(flatten=True, transpose=True), f"{kind}: seen as (out * kernel, in)")
    return _fused(module, key, kind) or Role("other", View(True), f"{kind}.{key}: {_UNKNOWN}")


def _fused(module: nn.Module, key: str, kind: str) -> Role | None:
    """Matrices that torch and transformers keep in other modules than nn.Linear."""
    if isinstance(module, nn.MultiheadAttention) and key.endswith("proj_weight"):
        return Role("linear", View(split=3 if key == "in_proj_weight" else 1), f"{kind}: query, key and value")
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and key.startswith("weight"):
        gates = 4 if "LSTM" in kind else 3 if "GRU" in kind else 1
        return Role("linear", View(split=1 if "_hr" in key else gates), f"{kind}: {gates} stacked gates")
    if kind == "Conv1D" and hasattr(module, "nf") and key == "weight":
        return Role("linear", View(transpose=True), f"{kind}: a linear layer that stores (in, out)")
    return None


#: A geometry is a table role -> norm, or role -> dict of param-group options ("norm", "momentum", "constraint",
#: numbers, and "lr_ratio", which multiplies the optimizer's learning rate). ``"*"`` stands for all roles that are not
#: named, and ``{}`` for the optimizer's own ingredients.
Geometry = Mapping[str, Any]


def adam_ingredients(beta1: float, beta2: float, eps: float = 1e-8) -> dict[str, Any]:
    """Adam's norm and momentum, for these numbers or options."""
    return {"norm": Smoothed(Max(), beta2, eps), "momentum": EMA(beta1, bias_correction=True)}


def adam_options(betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8) -> dict[str, Any]:
    """Adam as the options of a param group, its numbers among them."""
    ingredients = adam_ingredients(option("betas", 0), option("betas", 1), option("eps"))
    return {**ingredients, "betas": betas, "eps": eps}


#: The geometries by name. ``adam``: the max norm everywhere. ``muon``: spectral for hidden matrices, max elsewhere
#: (with Adam's memory when the optimizer is ``normopt.zoo.Muon``). ``scion``: arXiv 2502.07529, table 3, for one-hot
#: input. ``modula``: arXiv 2410.21265, where the readout is a linear layer too. ``anthology``: the norms that arXiv
#: 2409.20325, section 4, recommends, with the RMS -> linf norm for the readout.
ADAM = adam_ingredients(0.9, 0.95)
GEOMETRIES: dict[str, Geometry] = {
    "adam": {"*": ADAM},
    "muon": {"linear": Spectral(), "conv": Spectral(), "*": ADAM},
    "scion": {
        "embedding": Column(),
        "linear": Spectral(),
        "conv": Spectral(),
        "unembedding": Max(scale="fan_in"),
        "vector": Euclidean(),
        "scalar": Euclidean(),
        "*": Max(),
    },
    "modula": {
        "embedding": Column(),
        "linear": Spectral(),
        "conv": Spectral(),
        "unembedding": Spectral(),
        "vector": Euclidean(),
        "scalar": Euclidean(),
        "*": Max(),
    },
    "anthology": {
        "embedding": Column(),
        "linear": Spectral(),
        "conv": Spectral(),
        "unembedding": Row(),
        "vector": Euclidean(),
        "scalar": Euclidean(),
        "*": Max(),
    },
}


def width_scaled(width: int, tuned_at: int, weight_decay: float) -> Geometry:
    """A geometry that takes the learning rate and the decay of one width to another (Fan et al., arXiv 2510.15262).

    Hidden matrices: ``lr * tuned_at / width`` and ``weight_decay * sqrt(width / tuned_at)``, which keeps the largest
    singular value that AdamW settles at, ``sqrt(lr / weight_decay) width^(3/4)``, what it is. Everything else keeps
    ``lr`` and is not decayed. ``AdamW(model, lr, geometry=width_scaled(1024, 256, 0.1))``.

    Args:
        width: the model's width.
        tuned_at: the width that learning rate and decay were tuned at.
        weight_decay: that of hidden matrices at that width.

    Raises:
        ValueError: a width that is not positive.
    """
    for name, value in {"width": width, "tuned_at": tuned_at}.items():
        if value <= 0:
            raise ValueError(f"width_scaled: {name} must be positive, got {value!r}")
    hidden = {"lr_ratio": tuned_at / width, "weight_decay": weight_decay * math.sqrt(width / tuned_at)}
    return {"linear": hidden, "conv": hidden, "*": {"weight_decay": 0.0}}


def param_groups(
    model: nn.Module, geometry: str | Geometry = "muon", overrides: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """One torch param group for each role of ``model`` (and each view and override), ready for ``SteepestDescent``.

    Args:
        model: any module; parameters that do not require a gradient are left out.
        geometry: a name of ``GEOMETRIES`` or a table role -> norm, name of a norm or dict of param-group options;
            ``"*"`` covers the roles that are not named.
        overrides: see :func:`roles`.

    Returns:
        Dicts with ``params`` (name, parameter), ``role``, ``view``, ``reasons`` and what the geometry says of the role.

    Raises:
        ValueError: an unknown geometry, a role that it does not cover or that no parameter plays (other than those of
            ``ROLES``), or a pattern that matches nothing.
    """
    if isinstance(geometry, str) and geometry not in GEOMETRIES:
        raise ValueError(f"unknown geometry {geometry!r}; {nearest(geometry, GEOMETRIES)}")
    table = GEOMETRIES[geometry] if isinstance(geometry, str) else geometry
    parameters = dict(model.named_parameters())
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    members: dict[tuple[Any, ...], list[tuple[str, Role]]] = defaultdict(list)
    found = roles(model, overrides)
    played = {*ROLES, "*", *(role.name for role in found.values())}
    for unknown in table.keys() - played:
        raise ValueError(f"the geometry names the role {unknown!r}, which none plays; {nearest(unknown, played)}")
    for name, role in found.items():
        if role.name not in table and "*" not in table:
            raise ValueError(f"the geometry says nothing of the role {role.name!r} (parameter {name!r}); add it or '*'")
        options = merged(entry(table, role.name), role.options)
        key = (role.name, role.view, repr(sorted(options.items(), key=lambda item: item[0])))
        groups.setdefault(key, options)
        members[key].append((name, role))
    return [
        {
            "params": [(name, parameters[name]) for name, _ in members[key]],
            "role": key[0],
            "view": key[1],
            "reasons": [role.reason for _, role in members[key]],
            **options,
        }
        for key, options in groups.items()
    ]


def vectors_by_adam(
    groups: Iterable[dict[str, Any]], step_size: StepSize, constraint: tuple[Constraint, ...]
) -> Iterator[dict[str, Any]]:
    """A model's param groups, for an optimizer whose direction takes matrices only.

    Vectors and scalars whose group names no norm move by Adam, ``lr`` far or, where the optimizer finds the learning
    rate, as far as it says. Of the optimizer's constraints they keep weight decay.
    """
    decay = tuple(each for each in constraint if isinstance(each, (WeightDecay, L2)))
    adam = {
        **adam_options(),
        "step_size": step_size if isinstance(step_size, LearningRateFree) else Constant(),
        "constraint": decay,
    }
    for group in groups:
        is_small = [p.ndim < 2 for _, p in group["params"]]
        for small in [None] if "norm" in group else sorted(set(is_small)):
            kept = [i for i, each in enumerate(is_small) if small is None or each == small]
            part = {**group, **{name: [group[name][i] for i in kept] for name in ("params", "reasons")}}
            yield merged(adam, part) if small else part


def entry(table: Geometry, role: str) -> dict[str, Any]:
    """The param-group options that a geometry gives to a role."""
    return _options(table.get(role, table.get("*", {})))


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Param-group options laid over one another, the last on top.

    ``lr`` and ``lr_ratio`` replace each other, a number for ``momentum`` becomes the beta of a momentum below it, and
    bounds add up, save that ``()`` or ``None`` leaves none of those below.
    """
    options: dict[str, Any] = {}
    for layer in layers:
        below = options.get("momentum")
        rates = {"lr", "lr_ratio"} if {"lr", "lr_ratio"} & layer.keys() else set()
        before, options = options, {name: value for name, value in options.items() if name not in rates} | dict(layer)
        if options.get("bounds"):
            options["bounds"] = _several(before.get("bounds")) + _several(layer.get("bounds"))
        if isinstance(below, Momentum) and isinstance(options["momentum"], (int, float)):
            options["momentum"] = with_beta(below, options["momentum"])
    return options


def _several(bounds: Any) -> tuple[Any, ...]:
    return () if bounds is None else tuple(bounds) if isinstance(bounds, (tuple, list)) else (bounds,)


def with_beta(momentum: Momentum, beta: float) -> Momentum:
    """The same momentum with another ``beta``; a ``ValueError`` where it has none."""
    if not hasattr(momentum, "beta"):
        raise ValueError(f"momentum={beta!r} has no meaning for {momentum}; give a momentum such as EMA({beta!r})")
    return replace(momentum, beta=beta)  # type: ignore[type-var]


def overlaid(own: Geometry, given: str | Geometry | None) -> Geometry:
    """The user's geometry laid over the optimizer's own, role by role; its ``"*"`` is for all roles it does not name.

    Raises:
        ValueError: the name of no geometry.
    """
    if isinstance(given, str) and given not in GEOMETRIES:
        raise ValueError(f"unknown geometry {given!r}; {nearest(given, GEOMETRIES)}")
    table = GEOMETRIES[given] if isinstance(given, str) else given or {}
    return {role: merged(entry(own, role), entry(table, role)) for role in dict.fromkeys(("*", *ROLES, *own, *table))}


def _options(spec: Any) -> dict[str, Any]:
    return dict(spec) if isinstance(spec, Mapping) else {"norm": spec}
