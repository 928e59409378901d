"""Pre-LN transformers as Pre-RMSNorm transformers: the same function, with a residual stream of mean 0."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normopt.nn.gpt import GPT


class StreamNorm(nn.Module):
    """An RMSNorm that stands for a LayerNorm of a stream whose mean is 0: `weight * x / sqrt(mean(x^2) + eps) + bias`.

    Args:
        norm: the LayerNorm, whose parameters and eps it takes over.
        compressed: x lacks its last entry, minus the sum of the others (CRMSNorm); the result has all of them.
    """

    def __init__(self, norm: nn.LayerNorm, compressed: bool) -> None:
        super().__init__()
        self.eps, self.compressed, self.width = norm.eps, compressed, norm.normalized_shape
        self.weight, self.bias = norm.weight, norm.bias

    def reset_parameters(self) -> None:
        """Set weight to 1, bias to 0."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width), or (..., width - 1) if compressed, to (..., width)."""
        x = torch.cat([x, -x.sum(dim=-1, keepdim=True)], dim=-1) if self.compressed else x
        y = F.rms_norm(x, self.width, self.weight, self.eps)
        return y if self.bias is None else y + self.bias


class Centred(nn.Module):
    """The parametrization `W - mean(W)` over one dimension, and without its last entry there if compressed."""

    def __init__(self, dim: int, compressed: bool) -> None:
        super().__init__()
        self.dim, self.compressed = dim, compressed

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that is used, from the one that is trained."""
        centred = weight - weight.mean(dim=self.dim, keepdim=True)
        return centred.narrow(self.dim, 0, weight.shape[self.dim] - 1) if self.compressed else centred


def to_rmsnorm(model: nn.Module, compressed: bool = False) -> nn.Module:
    """Turn the LayerNorms of Pre-LN transformers into RMSNorms, without changing output or gradients but by rounding.

    LayerNorms read the residual stream up to a constant, so that its mean can be taken out where it is written:
    embeddings and the projections that write to it are centred by a parametrization, and stay so in training. The
    gradient of what is trained is that of the Pre-LN model. Source: Jiang et al. 2023, Pre-RMSNorm and Pre-CRMSNorm
    transformers (arXiv 2305.14858).

    Args:
        model: a `GPT(norm="layernorm")`, a `torch.nn.TransformerEncoder` with `norm_first` and a final `norm`, or a
            module that has such; changed in place.
        compressed: Pre-CRMSNorm: the stream goes without its last entry, which is minus the sum of the others.

    Returns:
        `model`.

    Raises:
        ValueError: no such transformer, one with norms after its sublayers or without a final norm, or dropout after a
            projection, which gives the stream a mean; nothing has changed.
    """
    found = [module for module in model.modules() if isinstance(module, (GPT, nn.TransformerEncoder))]
    if not found:
        raise ValueError(f"to_rmsnorm: {type(model).__name__} has no GPT and no torch.nn.TransformerEncoder")
    for transformer in found:
        _check(transformer)
    for transformer in found:
        _convert(transformer, compressed)
    return model


def _check(transformer: Any) -> None:
    if isinstance(transformer, GPT):
        norms = [
            transformer.norm,
            *(norm for block in transformer.blocks for norm in (block.attention_norm, block.mlp_norm)),
        ]
        if not all(isinstance(norm, nn.LayerNorm) for norm in norms):
            raise ValueError('to_rmsnorm: the GPT has no LayerNorms; make it with norm="layernorm"')
        return
    if not isinstance(transformer.norm, nn.LayerNorm):
        raise ValueError(
            "to_rmsnorm: the TransformerEncoder needs a final norm=LayerNorm(d_model), or its output has a mean"
        )
    for layer in transformer.layers:
        if not getattr(layer, "norm_first", False) or not isinstance(layer.norm1, nn.LayerNorm):
            raise ValueError(
                "to_rmsnorm: a layer of the TransformerEncoder is not Pre-LN; make it with norm_first=True"
            )
        if layer.dropout1.p > 0 or layer.dropout2.p > 0:
            raise ValueError(
                "to_rmsnorm: dropout after the projections gives the residual stream a mean; set dropout1 and dropout2 "
                "of every layer to p=0"
            )


def _convert(transformer: Any, compressed: bool) -> None:
    for layer, parameter, dim in _writers(transformer):
        parametrize.register_parametrization(layer, parameter, Centred(dim, compressed), unsafe=compressed)
    for module in [*transformer.modules()]:
        for name, norm in module.named_children():
            if isinstance(norm, nn.LayerNorm):
                setattr(module, name, StreamNorm(norm, compressed))
    if isinstance(transformer, nn.TransformerEncoder):
        transformer.register_forward_pre_hook(_entrance(compressed), with_kwargs=True)
        for layer in transformer.layers:
            layer.activation_relu_or_gelu = 0  # torch's fast path in evaluation computes LayerNorms whatever is there


def _writers(transformer: Any) -> Iterator[tuple[nn.Module, str, int]]:
    """What writes to the residual stream: module, parameter, and the dimension that is the stream's."""
    if isinstance(transformer, GPT):
        yield transformer.embed, "weight", 1
        blocks: Any = transformer.blocks
        for block in blocks:
            yield block.attention.out, "weight", 0
            yield block.mlp.down, "weight", 0
        return
    for layer in transformer.layers:
        for linear in (layer.self_attn.out_proj, layer.linear2):
            yield linear, "weight", 0
            if linear.bias is not None:
                yield linear, "bias", 0


def _entrance(compressed: bool) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]:
    """Take the mean out of what comes into an encoder, by its place or as ``src``."""

    def centre(module: nn.Module, inputs: tuple[Any, ...], words: dict[str, Any]) -> Any:
        x = inputs[0] if inputs else words["src"]
        x = x - x.mean(dim=-1, keepdim=True)
        x = x[..., :-1] if compressed else x
        return ((x, *inputs[1:]), words) if inputs else ((), {**words, "src": x})

    return centre
