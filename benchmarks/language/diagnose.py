"""Norms inside a transformer: lengths of the residual stream, of the rows of matrices, and alpha."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Norms = dict[str, Any]


@torch.no_grad()
def measure(model: nn.Module, tokens: Tensor) -> Norms:
    """The norms of a transformer of `normopt.nn` on a batch of tokens (batch, time).

    `residual`: mean length of the residual stream at the embedding and after each layer. `rows`: for each kind of
    matrix, the mean length of the rows by layer (of the columns, where the constraint is on columns). `alpha`:
    for each kind of residual connection that has an alpha, the mean of |alpha| by layer.
    """
    streams: list[float] = []
    with _recorded(model, streams):
        model(tokens)
    rows, alphas = defaultdict(list), defaultdict(list)
    for block in model.blocks.children():  # type: ignore[union-attr]
        bounds: dict[str, str] = getattr(block, "normopt_bounds", {})
        for name, weight in block.named_parameters():
            if weight.ndim == 2:
                axis = 0 if "axis=-2" in bounds.get(name, "") else 1
                rows[name.removesuffix(".weight")].append(weight.norm(dim=axis).mean().item())
        for name, module in block.named_modules():
            if name.endswith(".alpha"):
                alphas[name.removesuffix("_residual.alpha")].append(module().abs().mean().item())
    return {"residual": streams, "rows": dict(rows), "alpha": dict(alphas)}


@contextmanager
def _recorded(model: nn.Module, streams: list[float]) -> Iterator[None]:
    """Collect the mean lengths of the outputs of the embedding and of every layer, while the block runs."""

    def record(module: nn.Module, inputs: Any, h: Tensor) -> None:
        streams.append(h.float().norm(dim=-1).mean().item())

    layers = [model.embed, *model.blocks.children()]  # type: ignore[union-attr]
    hooks = [layer.register_forward_hook(record) for layer in layers]  # type: ignore[union-attr]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
