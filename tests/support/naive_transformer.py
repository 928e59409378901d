"""Parts of a transformer on raw tensors, position by position, for the tests of the models."""

import torch
from torch import Tensor, nn


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(dim=-1, keepdim=True).sqrt()


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def rotated(x: Tensor, width: int) -> Tensor:
    """Rotary positions on the first `width` entries of (time, d_head), pairs (i, i + width / 2)."""
    rows = []
    for position, row in enumerate(x):
        angle = torch.tensor([position * 10000.0 ** (-2 * i / width) for i in range(width // 2)], dtype=x.dtype)
        turned = torch.complex(row[: width // 2], row[width // 2 : width]) * torch.polar(torch.ones_like(angle), angle)
        rows.append(torch.cat((turned.real, turned.imag, row[width:])))
    return torch.stack(rows)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One head: softmax of the inner products over the past, (time, d_head)."""
    rows = []
    for t in range(len(query)):
        weights = torch.exp(key[: t + 1] @ query[t])
        rows.append(weights @ value[: t + 1] / weights.sum())
    return torch.stack(rows)


def matrices(model: nn.Module) -> dict[str, Tensor]:
    """All parameters with two dimensions."""
    return {name: weight for name, weight in model.named_parameters() if weight.ndim == 2}


def declared(model: nn.Module, attribute: str) -> dict[str, str]:
    """What the modules say of their parameters, by whole names."""
    return {
        f"{prefix}.{name}".lstrip("."): value
        for prefix, module in model.named_modules()
        for name, value in getattr(module, attribute, {}).items()
    }


def disturbed(model: nn.Module) -> nn.Module:
    """In float64, every parameter multiplied entry by entry by numbers between 1/2 and 3/2."""
    model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5 + torch.rand_like(parameter))
    return model


def stream(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The residual stream after every attention and every MLP."""
    seen: list[Tensor] = []
    hooks = [
        residual.register_forward_hook(lambda module, arguments, result: seen.append(result.detach()))
        for block in model.blocks
        for residual in (block.attention_residual, block.mlp_residual)
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    return seen
