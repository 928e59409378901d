"""The role of every tensor, inferred from module types, tying and position."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from normopt.ingredient.registry import choices, nearest
from normopt.ingredient.stage import Direction
from normopt.ingredient.view import View, view_of
from normopt.roles.modules import CONV, EMBEDDING, Role, gains, is_unknown, kind_of, role_of
from normopt.roles.options import ROLES, _options, merged


def infer_roles(model: nn.Module, overrides: Mapping[str, Any] | None = None) -> dict[str, Role]:
    """The role of every parameter of ``model``, frozen ones included, by name, in the model's order.

    Roles come from module types, from names, from tying and from position, never from the number of dimensions alone:

    * ``nn.Embedding``: ``embedding``, seen transposed (one column a token). A weight shared with the output layer keeps
      this role.
    * ``nn.Linear``: ``linear``, except the output layer, ``unembedding``: the last ``nn.Linear`` with as many outputs
      as an embedding has tokens, unless a later layer has as many inputs; if there is none (a classifier), the last
      ``nn.Linear``, unless it is as wide as an embedding or the only layer. An override that names the head decides.
    * convolutions: ``conv``, seen as (out, in * k * k); transposed ones as (out * k * k, in). Grouped ones are
      block-diagonal: one matrix a group.
    * ``nn.MultiheadAttention`` and recurrent layers: ``linear``, their fused matrices split into the 3 or 4 they hold.
    * layers named ``qkv``, ``qkv_proj``, ``Wqkv``, ``c_attn`` or ``gate_up_proj``: ``linear``, split into the 3 or 2
      matrices that they stack. Query, key and value of grouped-query attention are of unequal height,
      ``View(split=(64, 16, 16))``; ``{"view": {"split": n}}`` with one matrix a head cuts them further.
    * tensors with three dimensions in a module named after experts: ``linear``, a stack with one matrix an expert;
      their biases are vectors. A router's matrix is ``linear``.
    * ``weight_norm``: its gains (``weight_g``, ``original0``) are vectors, its directions have the layer's role.
    * any tensor with one dimension: ``vector``; with none: ``scalar``.
    * matrices of other modules: ``other``, with a warning if they are trained. Name their role in ``overrides``, or
      declare it in the module, ``normopt_roles = {"weight": "linear"}`` and
      ``normopt_views = {"weight": {"split": 3}}`` (names relative to the module).

    Where such a matrix has three dimensions or more and gets a norm of matrices by its new role or norm, its view must
    say whether it is a stack, ``{"role": "linear", "view": {"flatten": False}}``.

    Modules also declare the bounds of their weights, ``normopt_bounds = {"weight": "RowBound(radius=1.0)"}``, for
    parameters as they are stored; they are applied after the optimizer's own constraints.

    Args:
        model: any module.
        overrides: a table from glob patterns over parameter names to role names, norms or dicts of param-group options
            (``"role"``, ``"view"``, ``"norm"``, ``"lr"`` ...). Later patterns win. A ``"lr_ratio"`` multiplies the rate
            or the ratio that the role has. A dict for ``"view"`` is laid over
            the view that the parameter has, ``{"split": 1}`` undoes a split; a ``View`` takes its place.

    Raises:
        ValueError: a pattern matches no parameter, or a module's declaration names something that is not one of its
            parameters; a view with a number out of range.
        TypeError: a view with an unknown field or a value of another type.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a model, whose modules say what its parameters are, got {type(model).__name__}")
    if not isinstance(overrides, Mapping | None):
        raise TypeError(f"overrides must be a dict of patterns, {{'0.weight': ...}}, got {overrides!r}")
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
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    unknown = [name for name, role in found.items() if is_unknown(role) and name in trained]
    if unknown:
        warnings.warn(
            f"no role known for {', '.join(unknown)}: the module type says nothing about how they are used. They get "
            "what the geometry has for '*'; name their role in overrides to change or confirm that.",
            stacklevel=2,
        )
    return found


def _overridden(role: Role, pattern: str, override: Any) -> Role:
    if isinstance(override, str) and override not in ROLES:
        hint = f"; for the norm give {{'norm': {override!r}}}" if override.lower() in choices(Direction) else ""
        raise ValueError(f"overrides[{pattern!r}]: unknown role {override!r}{hint}; {nearest(override, ROLES)}")
    options: dict[str, Any] = {"role": override} if isinstance(override, str) else _options(override)
    if options.get("norm", "") is None:
        raise TypeError(f"overrides[{pattern!r}]: expected a role, a norm or a dict, got None")
    says_how = bool({"role", "view", "norm"} & options.keys())
    name = options.pop("role", role.name)
    view = _view_as(name, role, has_norm="norm" in options)
    try:
        view = view_of(options.pop("view", view), view)
    except (TypeError, ValueError) as error:
        raise type(error)(f"overrides[{pattern!r}]: {error}") from None
    reason = f"override {pattern!r}" if says_how else role.reason
    return replace(role, name=name, view=view, options=merged(role.options, options), reason=reason)


def _view_as(name: str, role: Role, has_norm: bool = False) -> View:
    """The view of a parameter whose role becomes ``name``: only embeddings are stored one row a token.

    Nobody has said yet how many matrices a parameter of unknown use holds, if it has three dimensions; some roles do.
    """
    if is_unknown(role) and (has_norm or name != role.name):
        return View({"conv": True, "embedding": False}.get(name), transpose=name == "embedding")
    if name == role.name:
        return role.view
    is_table = "embedding" in (name, role.name)
    return View(role.view.flatten, transpose=name == "embedding") if is_table else role.view


def _inferred(model: nn.Module) -> dict[str, Role]:
    head = _head(model)
    declared_roles, declared_views = _declared(model, "normopt_roles"), _declared(model, "normopt_views")
    declared_bounds = _declared(model, "normopt_bounds")
    found: dict[str, Role] = {}
    names: dict[Tensor, str] = {}
    for name, module, key, parameter in _parameters(model):
        of, module, key, is_gain = _as_computed(model, name, module, key)
        path = of.removesuffix(key).removesuffix(".")
        owner = model.get_submodule(path.rpartition(".")[0])
        is_head = module is head
        role = role_of(module, key, parameter, path=path, owner=owner, is_head=is_head)
        role = gains(parameter) if is_gain else role
        if of in declared_roles:
            kind = declared_roles[of]
            role = replace(role, name=kind, view=_view_as(kind, role), reason=f"declared by {kind_of(module)}")
        if of in declared_views:
            role = replace(role, view=_declared_view(module, of, declared_views[of], role.view))
        if name in declared_bounds:
            role = replace(role, options={"bounds": declared_bounds[name]})
        first = names.setdefault(parameter, name)
        found[first] = role if first == name else _tied(found[first], role, name)
    return found


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Every parameter that can get a gradient, under each of its names (tied ones have several)."""
    for prefix, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter.requires_grad or parameter.is_floating_point():
                yield (f"{prefix}.{key}" if prefix else key), module, key, parameter


def _as_computed(model: nn.Module, name: str, module: nn.Module, key: str) -> tuple[str, nn.Module, str, bool]:
    """The name, module and key that a parameter had before it was reparametrized, and whether it is now its gain.

    ``torch.nn.utils.parametrize`` keeps what a weight is computed from in a module of its own; the older
    ``weight_norm`` keeps ``weight_g`` and ``weight_v`` beside it.
    """
    weight, kind = key[:-2], key[-2:]
    if kind in ("_g", "_v") and {f"{weight}_g", f"{weight}_v"} <= module._parameters.keys():
        return (name, module, key, True) if kind == "_g" else (name.removesuffix("_v"), module, weight, False)
    if isinstance(module, ParametrizationList):
        path, _, weight = name.removesuffix(f".{key}").rpartition("parametrizations.")
        is_normed = kind_of(module[0]) == "_WeightNorm"
        if key == "original" or (is_normed and key == "original1"):
            return path + weight, model.get_submodule(path.removesuffix(".")), weight, False
        return name, module, key, is_normed and key == "original0"
    return name, module, key, False


def _declared_view(module: nn.Module, name: str, given: Any, inferred: View) -> View:
    try:
        return view_of(given, inferred)
    except (TypeError, ValueError) as error:
        raise type(error)(f"normopt_views of {kind_of(module)} for {name}: {error}") from None


def _declared(model: nn.Module, attribute: str) -> dict[str, Any]:
    """The declarations of all modules in ``attribute``, by the model's names of the parameters."""
    found: dict[str, Any] = {}
    for prefix, module in model.named_modules():
        # Not hasattr(module): a wrapper that forwards attribute access would repeat the wrapped module's declaration.
        has_own = attribute in vars(module) or hasattr(type(module), attribute)
        for path, value in getattr(module, attribute).items() if has_own else ():
            if not _is_parameter(module, path):
                where = f"{attribute} of {kind_of(module)}" + (f" ({prefix})" if prefix else "")
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
    tables = [module for module in model.modules() if isinstance(module, EMBEDDING)]
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if tables:
        sizes = {table.num_embeddings for table in tables}
        consumed = [{later.in_features for later in linears[i + 1 :]} for i in range(len(linears))]
        readouts = [m for m, inputs in zip(linears, consumed, strict=True) if m.out_features in sizes - inputs]
        hidden = linears and linears[-1].out_features in {table.embedding_dim for table in tables}
        return readouts[-1] if readouts else linears[-1] if linears and not hidden else None
    return (
        linears[-1]
        if len(linears) > 1 or (linears and any(isinstance(module, CONV) for module in model.modules()))
        else None
    )
