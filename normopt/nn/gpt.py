"""The baseline of the benchmarks: a modern GPT (pre-RMSNorm, SwiGLU, rotary positions, QK-norm, untied head)."""

from torch import Tensor, nn

from normopt.nn.layers import Attention, SwiGLU, mlp_width
from normopt.nn.norms import make_norm


class Block(nn.Module):
    """One transformer layer: `h += attention(norm(h))`, then `h += mlp(norm(h))`, on (batch, time, d_model)."""

    def __init__(self, d_model: int, n_heads: int, d_ff: int, rope_fraction: float, qk_norm: bool, norm: str) -> None:
        super().__init__()
        self.attention_norm = make_norm(norm, d_model)
        self.attention = Attention(d_model, n_heads, rope_fraction, qk_norm=qk_norm)
        self.mlp_norm = make_norm(norm, d_model)
        self.mlp = SwiGLU(d_model, d_ff)

    def forward(self, h: Tensor) -> Tensor:
        """Map the residual stream (batch, time, d_model) to the next layer's."""
        h = h + self.attention(self.attention_norm(h))
        return h + self.mlp(self.mlp_norm(h))


class GPT(nn.Module):
    """Decoder-only transformer: tokens (batch, time) to logits (batch, time, vocab_size).

    Pre-RMSNorm with gain, SwiGLU with three matrices of width d_ff, rotary positions on a fraction of each head,
    QK-norm with one learnable gain per head, final RMSNorm, untied head, no biases: the GPT+ baseline of Franke et
    al. 2025 (arXiv 2505.22014), with `16 d^2 L + 2 V d + 2 d L + d` parameters plus one gain per head when
    d_ff = 4 d. It works for any sequence length and can be built under `torch.device("meta")`.

    Args:
        vocab_size: number of tokens V.
        d_model: width d of the residual stream.
        n_layers: number of layers L.
        n_heads: heads per layer; must divide d_model.
        d_ff: width of the MLP, by default 4 * d_model.
        rope_fraction: fraction of each head's dimensions that carries rotary positions.
        qk_norm: normalize queries and keys; without it there are no gains per head.
        norm: the normalization layers, a name of `normopt.nn.norms.NORMS`: "rmsnorm", "layernorm", "dyt", "seednorm",
            "power", "unified" or "gated".

    Raises:
        ValueError: if a size is not positive, n_heads does not divide d_model, rope_fraction does not fit the head or
            norm is unknown.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        n_layers: int,
        n_heads: int,
        *,
        d_ff: int | None = None,
        rope_fraction: float = 0.5,
        qk_norm: bool = True,
        norm: str = "rmsnorm",
    ) -> None:
        super().__init__()
        d_ff = mlp_width(d_ff, vocab_size=vocab_size, d_model=d_model, n_layers=n_layers, n_heads=n_heads)
        self.embed = nn.Embedding(vocab_size, d_model)
        options = (rope_fraction, qk_norm, norm)
        self.blocks = nn.ModuleList(Block(d_model, n_heads, d_ff, *options) for _ in range(n_layers))
        self.norm = make_norm(norm, d_model)
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the matrices from N(0, 1/fan_in); divide those that write to the residual stream by sqrt(2 L).

        The embedding is drawn from N(0, 1), the size at which the norms keep the stream.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
            elif name.endswith(("norm", "attention")):
                module.reset_parameters()
        for name, weight in self.named_parameters():
            if name.endswith(("attention.out.weight", "mlp.down.weight")):
                nn.init.normal_(weight, std=(2 * len(self.blocks) * weight.shape[1]) ** -0.5)
        nn.init.normal_(self.embed.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, time, vocab_size) of the next token at every position of `tokens` (batch, time)."""
        h = self.embed(tokens)
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))
