"""QK-clip (MuonClip): keep attention logits below a bound by rescaling the weights of queries and keys."""

from typing import Any

import torch
from torch import Tensor, nn


def record_logits(model: nn.Module, on: bool = True) -> None:
    """Let the attention modules of `model` keep their largest logit per head in training.

    Each then has `max_logits`, shape (heads,): the largest since the last `qk_clip_`. This costs as much as one more
    product of queries and keys a forward pass.

    Args:
        model: a model or an attention module.
        on: `False` stops the recording.

    Raises:
        ValueError: no module of `model` can record logits.
    """
    for module in _attentions(model).values():
        module.records_logits = on
        module.max_logits = None


@torch.no_grad()
def qk_clip_(model: nn.Module, tau: float = 100.0) -> dict[str, Tensor]:
    """Scale the logits of all heads whose largest one exceeds `tau`, to `tau`; call it after `optimizer.step()`.

    With S the largest logit of a head since the last call, its query and key rows are multiplied by sqrt(tau / S);
    under QK-norm, which makes them unit vectors, its gain by tau / S. Source: Kimi K2 (arXiv 2507.20534, MuonClip).

    Args:
        model: a model, or one module, whose logits are recorded, see `record_logits`. A module of your own takes part
            if it has `records_logits`, keeps `max_logits`, and rescales its logits in `scale_logits_(factors)`, one
            factor a head.
        tau: the bound, positive.

    Returns:
        The largest logits, shape (heads,), by module name. The records are cleared.

    Raises:
        ValueError: `tau` is not positive, no module can record logits, or no logits have been recorded.
    """
    if not tau > 0:
        raise ValueError(f"qk_clip_: tau must be positive, got {tau}")
    found: dict[str, Tensor] = {}
    attentions = _attentions(model)
    for name, module in attentions.items():
        if not isinstance(module.max_logits, Tensor):
            raise ValueError(f"qk_clip_: {name!r} has no logits; call record_logits(model) before the forward pass")
        found[name] = module.max_logits
    for name, largest in found.items():
        exceeds = (largest > tau) & largest.isfinite()
        attentions[name].scale_logits_(torch.where(exceeds, tau / largest, 1.0))
        attentions[name].max_logits = None
    return found


def _attentions(model: nn.Module) -> dict[str, Any]:
    """The modules of ``model`` that record logits, by name; a ``ValueError`` if there is none."""
    found = {name: module for name, module in model.named_modules() if hasattr(module, "scale_logits_")}
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no attention module that records its logits: it needs records_logits, "
            "max_logits and scale_logits_ as normopt.nn.layers.Attention has them"
        )
    return found


def largest_logits(query: Tensor, key: Tensor, block: int = 128) -> Tensor:
    """The largest causal `<query, key>` of each head, of (batch, heads, time, d_head), a block of queries at a time."""
    largest = []
    for start in range(0, query.shape[-2], block):
        rows = query[..., start : start + block, :]
        logits = rows @ key[..., : start + rows.shape[-2], :].mT
        future = torch.ones_like(logits[0, 0], dtype=torch.bool).triu(start + 1)
        largest.append(logits.masked_fill_(future, -torch.inf).amax(dim=(0, 2, 3)))
    found = torch.stack(largest).amax(dim=0)
    return found.to(torch.promote_types(found.dtype, torch.float32))
