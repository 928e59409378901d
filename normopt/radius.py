"""Steps no longer than the softmax's radius of convergence."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.optimizer import Optimizer


def softmax_limited_step(optimizer: Optimizer, model: nn.Module, *inputs: Any, target: float = 1.0) -> float:
    """Take a step of ``optimizer``, shortened to where the softmax of the model's logits is still analytic.

    With ``p`` the step of all parameters and ``a = J p`` the derivative of the logits along it, the loss along the step
    has complex singularities no nearer than ``pi / (max a - min a)`` steps, the smallest over all samples and
    positions. ``w <- w + min(1, target pi / spread) p``, ``spread`` the largest ``max a - min a`` (Sao, Ghosts of
    Softmax, arXiv 2603.13552, Prop. 5.2). Steps that a learning rate has made much too long are cut to a length that
    the logits bear, which clipping gradients does not do for rules that normalize them.

    The optimizer's own state (momentum, second moments) is that of the whole step. Bounds of the weights that are
    convex hold. It costs one forward-mode derivative of the model, in evaluation mode, and two copies of the weights.

    Args:
        optimizer: any; gradients have been computed.
        model: the last dimension of what it returns are the logits of a softmax.
        inputs: of the model, usually those that the gradients are of.
        target: the largest ratio of step to radius, positive.

    Returns:
        The ratio of the whole step to the radius, ``spread / pi``: above 1 without the limit the step might diverge.

    Raises:
        ValueError: ``target`` is not positive, or no parameter of the optimizer is one of the model.
    """
    if not 0 < target < math.inf:
        raise ValueError(f"softmax_limited_step: target must be positive and finite, got {target!r}")
    moved = {id(p) for group in optimizer.param_groups for p in group["params"]}
    params = {name: p for name, p in model.named_parameters() if id(p) in moved}
    if not params:
        raise ValueError("softmax_limited_step: the optimizer moves no parameter of the model")
    before = {name: p.detach().clone() for name, p in params.items()}
    optimizer.step()
    with torch.no_grad():
        step = {name: p - before[name] for name, p in params.items()}
        spread = _spread(model, before, step, inputs)
        share = min(1.0, target * math.pi / spread) if spread > 0 else 1.0
        if share < 1:
            for name, p in params.items():
                p.copy_(before[name] + share * step[name])
    return spread / math.pi


def _spread(model: nn.Module, weights: dict[str, Tensor], step: dict[str, Tensor], inputs: tuple[Any, ...]) -> float:
    """The largest difference of two logits' derivatives along the step, over all samples and positions."""

    def logits(weights: dict[str, Tensor]) -> Any:
        return functional_call(model, weights, inputs)

    was_training = model.training
    model.eval()
    try:
        with sdpa_kernel(SDPBackend.MATH):  # the others have no forward-mode derivative
            slopes: Tensor = jvp(logits, (weights,), (step,))[1]
    finally:
        model.train(was_training)
    return float((slopes.amax(dim=-1) - slopes.amin(dim=-1)).max())
