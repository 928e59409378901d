"""What is known of modules: the role of each of their parameters, and how it is seen as matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from normopt.ingredient.view import View

CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

CONV_TRANSPOSE = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

EMBEDDING = (nn.Embedding, nn.EmbeddingBag)

#: Names of layers that compute query, key and value at once, stacked in this order.
QKV = ("qkv", "qkv_proj", "c_attn", "Wqkv")

#: Names of the layers beside them, which take as many inputs as there are queries.
ATTENTION_OUT = ("o_proj", "out_proj", "c_proj", "proj", "Wo")

#: Attention modules whose fused rows are ordered by head, or by device, under one of the names above.
INTERLEAVED = ("CodeGenAttention", "GPTBigCodeAttention")

#: The end of the reason of matrices that nothing is known of.
UNKNOWN = "a module type without a known role"


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


def is_unknown(role: Role) -> bool:
    """Whether nothing is known of how the parameter is used: role and view are what is left."""
    return role.name == "other" and role.reason.endswith(UNKNOWN)


def kind_of(module: nn.Module) -> str:
    """The name of the class that a module was made of, which ``fully_shard`` has derived another one from."""
    classes = type(module).__mro__
    return next(each for each in classes if not each.__module__.startswith("torch.distributed.")).__name__


def kinds_of(module: nn.Module) -> set[str]:
    """The names of the class that a module was made of and of all classes that it is derived from."""
    return {each.__name__ for each in type(module).__mro__}


def role_of(module: nn.Module, key: str, parameter: Tensor, *, path: str, owner: nn.Module, is_head: bool) -> Role:
    """The role of one parameter.

    Args:
        module: the module that computes with it.
        key: its name there.
        parameter: the parameter.
        path: the module's name in the model.
        owner: the module that holds ``module``, such as the attention of a fused projection.
        is_head: whether ``module`` is the model's output layer.
    """
    kind, leaf = kind_of(module), path.rpartition(".")[2]
    if parameter.ndim < 2:
        name, dimensions = ("vector", "one dimension") if parameter.ndim else ("scalar", "no dimension")
        return Role(name, View(), f"{kind}.{key}: {dimensions}")
    if isinstance(module, EMBEDDING):
        return Role("embedding", View(transpose=True), f"{kind}: one column a token")
    if is_head:
        return Role("unembedding", View(), f"{kind}: the output layer, {parameter.shape[0]} outputs")
    if isinstance(module, nn.Linear):
        split, parts = _fused(leaf, owner, *parameter.shape)
        return Role("linear", View(split=split), f"{kind}: {parts or 'a hidden layer'}")
    if isinstance(module, (*CONV, *CONV_TRANSPOSE)):
        is_transposed = isinstance(module, CONV_TRANSPOSE)
        seen = "(out * kernel, in)" if is_transposed else "(out, in * kernel)"
        several = f", one matrix for each of {module.groups} groups" if module.groups > 1 else ""
        return Role("conv", View(True, is_transposed, groups=module.groups), f"{kind}: seen as {seen}{several}")
    found = _known(module, key, parameter, leaf, owner) or _of_experts(module, key, parameter, leaf)
    return found or Role("other", View(True), f"{kind}.{key}: {UNKNOWN}")


def gains(parameter: Tensor) -> Role:
    """The role of the lengths that ``weight_norm`` keeps apart from the directions: one row, whatever their shape."""
    if parameter.ndim < 2:
        return Role("vector" if parameter.ndim else "scalar", View(), "weight_norm: gains")
    return Role("vector", View(flatten=True, transpose=parameter.shape[0] > 1), "weight_norm: gains, seen as one row")


def _known(module: nn.Module, key: str, parameter: Tensor, leaf: str, owner: nn.Module) -> Role | None:
    """The role of matrices that torch and transformers keep in other modules than nn.Linear; ``None`` for others."""
    kind, kinds = kind_of(module), kinds_of(module)
    if isinstance(module, nn.MultiheadAttention) and key.endswith("proj_weight"):
        return Role("linear", View(split=3 if key == "in_proj_weight" else 1), f"{kind}: query, key and value")
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and key.startswith("weight"):
        gates = (
            4 if isinstance(module, (nn.LSTM, nn.LSTMCell)) else 3 if isinstance(module, (nn.GRU, nn.GRUCell)) else 1
        )
        return Role("linear", View(split=1 if "_hr" in key else gates), f"{kind}: {gates} stacked gates")
    if "Conv1D" in kinds and hasattr(module, "nf") and key == "weight":
        split, parts = _fused(leaf, owner, *reversed(parameter.shape))
        also = f", {parts}" if parts else ""
        return Role("linear", View(transpose=True, split=split), f"{kind}: a linear layer that stores (in, out){also}")
    if any(each.endswith("Router") for each in kinds) and key == "weight" and parameter.ndim == 2:
        return Role("linear", View(), f"{kind}: one row an expert")
    return None


def _fused(leaf: str, owner: nn.Module, rows: int, columns: int) -> tuple[int | tuple[int, ...], str]:
    """How a projection of that name is split into what it stacks, and what that is; (1, "") for others."""
    if leaf == "gate_up_proj" and rows % 2 == 0:
        return 2, "gate and up, split into 2 matrices"
    by_head = not kinds_of(owner).isdisjoint(INTERLEAVED) and not getattr(owner, "multi_query", False)
    if leaf == "query_key_value" or (leaf in QKV and by_head):
        return 1, "query, key and value in an order of the model's own, kept as one matrix"
    if leaf not in QKV:
        return 1, ""
    if leaf == "c_attn" and rows == 2 * columns and not getattr(owner, "multi_query", False):
        return 2, "key and value, split into 2 matrices"
    keys = _key_rows(owner, rows)
    if rows == 3 * (keys or columns):
        return 3, "query, key and value, split into 3 matrices"
    if keys:
        return (rows - 2 * keys, keys, keys), (
            f"query ({rows - 2 * keys} rows), key and value ({keys} rows each), a matrix each"
        )
    return 1, "a fused projection whose parts are not known, kept as one matrix"


def _key_rows(owner: nn.Module, rows: int) -> int:
    """How many of the rows of query, key and value are keys, and as many values; 0 where the attention does not say.

    Attention says so by its number of key heads, or its output layer by its inputs, which are as many as queries.
    """
    heads, width = (getattr(owner, name, None) for name in ("num_key_value_heads", "head_dim"))
    if isinstance(heads, int) and isinstance(width, int):
        keys = heads * width
    else:
        found = (getattr(owner, name, None) for name in ATTENTION_OUT)
        queries = next((_inputs(layer) for layer in found if isinstance(layer, nn.Module)), 0)
        keys = (rows - queries) // 2 if queries and (rows - queries) % 2 == 0 else 0
    is_whole = not isinstance(width, int) or (width > 0 and keys % width == 0)
    return keys if is_whole and 0 < keys <= rows - 2 * keys else 0


def _inputs(layer: nn.Module) -> int:
    return layer.in_features if isinstance(layer, nn.Linear) else int(getattr(layer, "nx", 0))


def _of_experts(module: nn.Module, key: str, parameter: Tensor, leaf: str) -> Role | None:
    """The role of what the experts of a mixture hold: stacks with one matrix, or one bias, for each expert."""
    kind = kind_of(module)
    if not any("expert" in each.lower() for each in {leaf, *kinds_of(module)}):
        return None
    number = parameter.shape[0]
    if parameter.ndim == 2 and key.endswith("bias"):
        return Role("vector", View(split=number), f"{kind}.{key}: one bias for each of {number} experts")
    if parameter.ndim != 3:
        return None
    transpose = _stores_inputs_first(module, key, parameter)
    reason = f"{kind}: one matrix for each of {number} experts" + (", stored (in, out)" if transpose else "")
    if "gate_up" not in key or parameter.shape[2 if transpose else 1] % 2:
        return Role("linear", View(flatten=False, transpose=transpose), reason)
    if not getattr(module, "is_concatenated", True):
        return Role("linear", View(False, transpose), f"{reason}; gate and up alternate, kept as one")
    return Role("linear", View(False, transpose, split=2), f"{reason}; gate and up, split into 2 matrices")


def _stores_inputs_first(module: nn.Module, key: str, parameter: Tensor) -> bool:
    """Whether experts are stored (experts, in, out): the module says so, or the widths do."""
    told = getattr(module, "is_transposed", None)
    if isinstance(told, bool):
        return told
    fused, down = (getattr(module, name, None) for name in ("gate_up_proj", "down_proj"))
    if isinstance(fused, Tensor) and isinstance(down, Tensor) and fused.ndim == down.ndim == 3:
        return fused.shape[1] != 2 * down.shape[2] and fused.shape[2] == 2 * down.shape[1]
    width = getattr(module, "hidden_size", getattr(module, "hidden_dim", None))
    first, second = (size == width for size in parameter.shape[1:])
    return first != second and first != ("down" in key or key == "w2")
