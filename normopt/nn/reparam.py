"""SigmaReparam: a parametrization of weights in which the spectral norm is a learnable number."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normopt.nn.scaled import require_positive

_LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


class SigmaReparam(nn.Module):
    """The parametrization `W_hat = gamma / sigma(W) W`, gamma learnable, sigma the spectral norm of W as a matrix.

    `sigma = u^T W v` is differentiable in W, and u and v, buffers, are constants to the gradient. Each forward pass
    in training takes one step of power iteration, `u = N(W v)` and `v = N(W^T u)`; in evaluation they stay as they
    are. Computed in float32 or better, also under autocast. Tensors of more than two dimensions are matrices of
    shape (first, all others).

    Args:
        weight: the tensor W, for its shape, dtype and device.
    """

    gamma: Tensor
    u: Tensor
    v: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        empty = _matrix(weight).detach()
        self.gamma = nn.Parameter(empty.new_ones(()))
        self.register_buffer("u", empty.new_zeros(empty.shape[0]))
        self.register_buffer("v", empty.new_zeros(empty.shape[1]))

    @torch.no_grad()
    def right_inverse(self, weight: Tensor) -> Tensor:
        """The stored tensor for which W_hat is `weight`: `weight` itself; sets gamma, u and v from its decomposition.

        torch calls it when a layer is parametrized, and when its weight is assigned to.
        """
        left, sigma, right = torch.linalg.svd(_matrix(weight), full_matrices=False)
        self.gamma.copy_(sigma[0])
        self.u.copy_(left[:, 0])
        self.v.copy_(right[0])
        return weight

    def forward(self, weight: Tensor) -> Tensor:
        """W_hat, of the shape and dtype of W."""
        matrix, kind = _matrix(weight), weight.device.type
        autocast = torch.amp.is_autocast_available(kind)
        with torch.autocast(kind, enabled=False) if autocast else nullcontext():
            u, v = self._step(matrix.detach()) if self.training else self._stored(matrix)
            sigma = u @ (matrix @ v)
            return (matrix * (self.gamma.to(matrix) / sigma)).view_as(weight).to(weight.dtype)

    def _stored(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of u and v, which a later forward pass in training changes in place."""
        return self.u.to(matrix, copy=True), self.v.to(matrix, copy=True)

    @torch.no_grad()
    def _step(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """One step of power iteration; returns new tensors, so that earlier forward passes stay differentiable."""
        u = F.normalize(matrix @ self.v.to(matrix), dim=0)
        v = F.normalize(matrix.mT @ u, dim=0)
        self.u.copy_(u)
        self.v.copy_(v)
        return u, v


def sigma_reparam(module: nn.Module, gamma_init: float | None = None) -> nn.Module:
    """Parametrize the weight of `module`, or of every linear and convolutional layer in it, by `SigmaReparam`.

    What is trained is `parametrizations.weight.original` and `parametrizations.weight.0.gamma` of each layer, and
    `layer.weight` is computed whenever it is read, with one step of power iteration each time in training: read it
    once a forward pass, or in `torch.nn.utils.parametrize.cached()`. Assigning to `layer.weight` sets gamma to the new
    spectral norm. `torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")` undoes it. Matrices that are
    not the `weight` of such a layer, such as the fused ones of `nn.MultiheadAttention`, are left alone.

    Source: Zhai et al. 2023, Stabilizing Transformer Training by Preventing Attention Entropy Collapse (arXiv
    2303.06296; apple/ml-sigma-reparam).

    Args:
        module: a model or layer; changed in place.
        gamma_init: first value of every gamma. By default the spectral norm, so that the model's output does not
            change; 1 in the paper's speech models.

    Returns:
        `module`.

    Raises:
        ValueError: no such layer, a layer whose weight is already parametrized or is zero, or gamma_init not positive.
    """
    if gamma_init is not None:
        require_positive(gamma_init=gamma_init)
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, _LAYERS)}
    if not layers:
        raise ValueError(f"sigma_reparam: {type(module).__name__} has no linear or convolutional layer")
    for name, layer in layers.items():
        label = repr(name) if name else "the layer"
        if parametrize.is_parametrized(layer, "weight"):
            raise ValueError(f"sigma_reparam: the weight of {label} is parametrized already; leave it out")
        if not (layer.weight.is_meta or layer.weight.any()):
            raise ValueError(f"sigma_reparam: the weight of {label} is zero; initialize it first")
    for layer in layers.values():
        reparam = SigmaReparam(layer.weight)
        parametrize.register_parametrization(layer, "weight", reparam)
        if gamma_init is not None:
            nn.init.constant_(reparam.gamma, gamma_init)
    return module


def _matrix(weight: Tensor) -> Tensor:
    """The weight as a matrix, in float32 or better."""
    return weight.flatten(1).to(torch.promote_types(weight.dtype, torch.float32))
