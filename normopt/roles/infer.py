"""The role of every tensor, inferred from module types, tying and position."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from normopt.ingredient.registry import nearest
from normopt.ingredient.view import View
from normopt.roles.options import ROLES, _options, merged

_UNKNOWN = "a module type without a known role"

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

_CONV_TRANSPOSE = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

_EMBEDDING = (nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True)
class Role:
    """The role of a parameter: its name, how the parameter is seen as a matrix, and the reason.

    Args:
        name: one of ``ROLES``, or a name of the user's.
        view: how the parameter is seen as (out x in) matrices.
        reason: why it has this role, as ``describe`` shows it.
        options: param-group options from an override, such as ``{"lr": 1e-3}`` or ``{"norm": "max"}``.
    """

    name: str
    view: View = View()
    reason: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


def infer_roles(model: nn.Module, overrides: Mapping[str, Any] | None = None) -> dict[str, Role]:
    """The role of every parameter of ``model`` that requires a gradient, by name, in the model's order.

    Roles come from module types, from tying and from position, never from the number of dimensions alone:

    * ``nn.Embedding``: ``embedding``, seen transposed (one column a token). A weight shared with the output layer keeps
      this role.
    * ``nn.Linear``: ``linear``, except the output layer, ``unembedding``: the last ``nn.Linear`` with as many outputs
      as an embedding has tokens, unless a later layer has as many inputs; if there is none (a classifier), the last
      ``nn.Linear``, unless it is as wide as an embedding or the only layer. An override that names the head decides.
    * convolutions: ``conv``, seen as (out, in * k * k); transposed ones as (out * k * k, in).
    * ``nn.MultiheadAttention`` and recurrent layers: ``linear``, their fused matrices split into the 3 or 4 they hold.
    * any tensor with one dimension: ``vector``; with none: ``scalar``.
    * matrices of other modules: ``other``, with a warning. Name their role in ``overrides``, or declare it in the
      module, ``normopt_roles = {"weight": "linear"}`` and ``normopt_views = {"weight": {"split": 3}}`` (names relative
      to the module).

    Modules also declare the bounds of their weights, ``normopt_bounds = {"weight": "RowBound(radius=1.0)"}``, for
    parameters as they are stored; they are applied after the optimizer's own constraints.

    Args:
        model: any module.
        overrides: a table from glob patterns over parameter names to role names, norms or dicts of param-group options
            (``"role"``, ``"view"``, ``"norm"``, ``"lr"`` ...). Later patterns win.

    Raises:
        ValueError: a pattern matches no parameter, or a module's declaration names something that is not one of its
            parameters.
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
        for name, role in found.items():  # the user has named the head, so the layer inferred to be it is not
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
    """The view of a parameter whose role becomes ``name``: only embeddings are stored one row a token."""
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
    """Every parameter that requires a gradient, under each of its names (tied ones have several)."""
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
    """The declarations of all modules in ``attribute``, by the model's names of the parameters."""
    found: dict[str, Any] = {}
    for prefix, module in model.named_modules():
        # Not hasattr(module): a wrapper that forwards attribute access would repeat the wrapped module's declaration.
        has_own = attribute in vars(module) or hasattr(type(module), attribute)
        for path, value in getattr(module, attribute).items() if has_own else ():
            if not _is_parameter(module, path):
                where = f"{attribute} of {type(module).__name__}" + (f" ({prefix})" if prefix else "")
                known = [name for name, _ in module.named_parameters()]
                raise ValueError(f"{where}: {path!r} is not one of its parameters; {nearest(path, known)}")
            found[f"{prefix}.{path}" if prefix else path] = value
    return found


def _is_parameter(module: nn.Module, path: str) -> bool:
    """Whether ``path`` names a parameter of ``module``, even one that is ``None`` or is now computed from others."""
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
    """The output layer, as :func:`infer_roles` defines it."""
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
    """The role of matrices that torch and transformers keep in other modules than nn.Linear; ``None`` for others."""
    if isinstance(module, nn.MultiheadAttention) and key.endswith("proj_weight"):
        return Role("linear", View(split=3 if key == "in_proj_weight" else 1), f"{kind}: query, key and value")
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and key.startswith("weight"):
        gates = 4 if "LSTM" in kind else 3 if "GRU" in kind else 1
        return Role("linear", View(split=1 if "_hr" in key else gates), f"{kind}: {gates} stacked gates")
    if kind == "Conv1D" and hasattr(module, "nf") and key == "weight":
        return Role("linear", View(transpose=True), f"{kind}: a linear layer that stores (in, out)")
    return None
