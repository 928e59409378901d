"""Negative controls: Muon with one thing about it spoiled, named `control:shuffled-roles` and so on.

If Muon were good for another reason than the one that is given for it, a control would do as well as Muon. Each has the
tuned options of Muon and the length of its updates, within the accuracy of Newton-Schulz; what is spoiled is for hidden
matrices, and all other tensors move as under Muon, but for `shuffled-roles`.
"""

import random
import struct
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import normopt

#: The optimizer that is spoiled.
BASE = "muon"

Options = dict[str, Any]
#: New gradients for the hidden matrices, from the number of the matrix and the gradient.
Replacement = Callable[[int, Tensor], Tensor]


def shuffled_roles(model: nn.Module, options: Options) -> Options:
    """Options under which the roles of the model's matrices are dealt out anew, the same for equal models.

    Embedding and head are then moved by Muon, and two other matrices by AdamW in their places.
    """
    roles = {name: normopt.infer_roles(model)[name].name for name, p in model.named_parameters() if p.ndim >= 2}
    dealt = list(roles.values())
    generator = random.Random(0)
    while any(role != "linear" and roles[name] == role for name, role in zip(roles, dealt, strict=True)):
        generator.shuffle(dealt)
    overrides = {name: {"role": role} for name, role in zip(roles, dealt, strict=True)}
    return {**options, "overrides": {**options.get("overrides", {}), **overrides}}


def adamw_at_muon_length(model: nn.Module, options: Options) -> Options:
    """Options under which hidden matrices move along AdamW's update, as far as Muon's is long."""
    adamw = "Smoothed(Max(), beta=0.95, eps=1e-8, bias_correction=True)"
    norm = f"Grafted({adamw}, Spectral('max1', 'newton-schulz'))"
    momentum = "EMA(beta=0.9, bias_correction=True)"
    return {**options, "geometry": {**options.get("geometry", {}), "linear": {"norm": norm, "momentum": momentum}}}


def random_orthogonal(place: int, gradient: Tensor) -> Tensor:
    """An orthogonal matrix that is drawn once for each hidden matrix, with the sign that makes it descend."""
    fixed = torch.empty(gradient.shape)
    nn.init.orthogonal_(fixed, generator=torch.Generator().manual_seed(place))
    fixed = fixed.to(gradient)
    return fixed * torch.where((fixed * gradient).sum() < 0, -1.0, 1.0)


def polar_of_noise(place: int, gradient: Tensor) -> Tensor:
    """Gaussian noise, drawn anew at every step, whose polar factor Muon then takes.

    The gradient is the seed of the noise, so that a run that is continued draws what it would have drawn.
    """
    bits = struct.pack("d", gradient.double().sum().item())
    generator = torch.Generator().manual_seed(int.from_bytes(bits, "big") % 2**63)
    return torch.randn(gradient.shape, generator=generator).to(gradient)


CHANGES: dict[str, Callable[[nn.Module, Options], Options]] = {
    "control:shuffled-roles": shuffled_roles,
    "control:adamw-at-muon-length": adamw_at_muon_length,
}
REPLACEMENTS: dict[str, Replacement] = {
    "control:random-orthogonal": random_orthogonal,
    "control:polar-of-noise": polar_of_noise,
}
NAMES = (*CHANGES, *REPLACEMENTS)


def options_of(name: str, model: nn.Module, options: Mapping[str, Any]) -> Options:
    """Muon's options for a control. Noise is not averaged over steps, which would leave less of it."""
    changed = CHANGES[name](model, dict(options)) if name in CHANGES else dict(options)
    return {**changed, "momentum": 0.0} if name == "control:polar-of-noise" else changed


def spoil(name: str, model: nn.Module, optimizer: Optimizer) -> None:
    """Let the optimizer see other gradients of the hidden matrices, if the control is of that kind."""
    if name not in REPLACEMENTS:
        return
    roles = normopt.infer_roles(model)
    hidden = [p for n, p in model.named_parameters() if roles[n].name == "linear"]

    def replace(*_: Any) -> None:
        for place, p in enumerate(hidden):
            if p.grad is not None:
                p.grad = REPLACEMENTS[name](place, p.grad)

    optimizer.register_step_pre_hook(replace)
