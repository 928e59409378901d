"""The common part of anGPT and nGPT: no norms around the layers, and matrices on or in a ball from the start."""

from collections.abc import Iterable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normopt.nn.layers import Attention, SwiGLU
from normopt.nn.scaled import Scale, ScaledLinear


class ResidualBlock(nn.Module):
    """One layer: attention and MLP read the residual stream h without a norm; a module each adds their results to h.

    Args:
        attention: the attention layer, on (batch, time, d_model).
        mlp: the MLP, on (batch, time, d_model).
        residuals: two modules, for attention and MLP, called with h and the layer's result; they return the new h.
    """

    def __init__(self, attention: Attention, mlp: SwiGLU, residuals: Iterable[nn.Module]) -> None:
        super().__init__()
        self.attention, self.mlp = attention, mlp
        self.attention_residual, self.mlp_residual = residuals

    def forward(self, h: Tensor) -> Tensor:
        """Map the residual stream (batch, time, d_model) to the next layer's."""
        h = self.attention_residual(h, self.attention(h))
        return self.mlp_residual(h, self.mlp(h))


class NormalizedTransformer(nn.Module):
    """Embedding, blocks, and a head whose logits have a learnable scale each; tokens (batch, time) to logits.

    Every matrix starts with rows of length 1, the matrices in `unit_columns` with columns of length 1.

    Args:
        vocab_size: number of tokens V.
        d_model: width d of the residual stream.
        blocks: the layers, on (batch, time, d_model).
        logit_scale: the scale of the logits, of size V.
    """

    #: Suffixes of the names of the layers whose matrices are normalized along dimension 0.
    unit_columns: ClassVar[tuple[str, ...]] = ()

    def __init__(self, vocab_size: int, d_model: int, blocks: Iterable[nn.Module], logit_scale: Scale) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, d_model)
        self.blocks = nn.ModuleList(blocks)
        self.head = ScaledLinear(d_model, vocab_size, logit_scale)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the matrices from N(0, 1), then normalize their rows or columns; reset scales and gains."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight)
                dim = 0 if name.endswith(self.unit_columns) else 1
                with torch.no_grad():
                    module.weight.copy_(F.normalize(module.weight, dim=dim))
            elif hasattr(module, "reset_parameters") and module is not self:
                module.reset_parameters()

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, time, vocab_size) of the next token at every position of `tokens` (batch, time)."""
        h = self.embed(tokens)
        for block in self.blocks:
            h = block(h)
        return self.head(h)
