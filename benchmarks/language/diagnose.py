"""Norms inside a transformer: of the residual stream, of activations, of the rows of matrices, and alpha."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Norms = dict[str, Any]


@torch.no_grad()
def measure(model: nn.Module, tokens: Tensor) -> Norms:
    """The norms of a transformer of `normopt.nn` on a batch of tokens (batch, time).

    `residual`: mean length of the residual stream at the embedding and after each layer. `rms`: the root mean square
    of the outputs, by layer, of the embedding, of attention, of the MLPs, of whole layers (the residual stream), and
    of the head (the logits); weights whose changes do not depend on the width leave it alone. `rows`: for each kind of
    matrix, the mean length of the rows by layer (of the columns, where the constraint is on columns). `alpha`:
    for each kind of residual connection that has an alpha, the mean of |alpha| by layer.
    """
    streams: list[float] = []
    squares: dict[str, list[float]] = {}
    with _recorded(model, streams, squares):
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
    return {"residual": streams, "rms": squares, "rows": dict(rows), "alpha": dict(alphas)}


@contextmanager
def _recorded(model: nn.Module, streams: list[float], rms: dict[str, list[float]]) -> Iterator[None]:
    """Collect lengths and root mean squares of the outputs of the model's parts, while the block runs.

    `streams`: mean lengths at the embedding and after every layer; `rms`: root mean squares by kind, see `measure`.
    """
    blocks = list(model.blocks.children())  # type: ignore[union-attr]
    parts: dict[str, list[Any]] = {
        "embedding": [model.embed],
        "attention": [block.attention for block in blocks],
        "mlp": [block.mlp for block in blocks],
        "stream": blocks,
        "logits": [model.head],
    }
    rms.update({kind: [] for kind in parts})

    def recorder(kind: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def record(module: nn.Module, inputs: Any, output: Tensor) -> None:
            rms[kind].append(output.float().square().mean().sqrt().item())
            if kind in ("embedding", "stream"):
                streams.append(output.float().norm(dim=-1).mean().item())

        return record

    hooks = [part.register_forward_hook(recorder(kind)) for kind, found in parts.items() for part in found]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
