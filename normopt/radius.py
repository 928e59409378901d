"""Steps no longer than the softmax's radius of convergence."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.optimizer import Optimizer

from normopt.numerics.sharded import is_sharded, whole


def softmax_limited_step(
    optimizer: Optimizer, model: nn.Module, *inputs: Any, target: float = 1.0, process_group: Any = None
) -> float:
    """Take a step of ``optimizer``, shortened to where the softmax of the model's logits is still analytic.

    With ``p`` the step of all parameters and ``a = J p`` the derivative of the logits along it, the loss along the step
    has complex singularities no nearer than ``pi / (max a - min a)`` steps, the smallest over all samples and
    positions. ``w <- w + min(1, target pi / spread) p``, ``spread`` the largest ``max a - min a`` (Sao, Ghosts of
    Softmax, arXiv 2603.13552, Prop. 5.2). Steps that a learning rate has made much too long are cut to a length that
    the logits bear, which clipping gradients does not do for rules that normalize them.

    The optimizer's own state (momentum, second moments) is that of the whole step. Bounds of the weights that are
    convex hold. It costs one forward-mode derivative of the model, in evaluation mode, and two copies of the weights.
    Sharded models have no forward-mode derivative: there it is a difference of two forward passes, accurate to about
    1e-3 in float32, and the spread is the largest over all ranks, which must call together.

    Args:
        optimizer: any but :class:`~normopt.Averaged`; gradients have been computed.
        model: the last dimension of what it returns are the logits of a softmax.
        inputs: of the model, usually those that the gradients are of; each rank may have its own.
        target: the largest ratio of step to radius, positive.
        process_group: of plain parameters that several ranks move alike, as under DistributedDataParallel: the ranks
            that must take the same step. That of sharded parameters is found.

    Returns:
        The ratio of the whole step to the radius, ``spread / pi``: above 1 without the limit the step might diverge.

    Raises:
        ValueError: ``target`` is not positive, the optimizer keeps iterates of its own, or no parameter of the
            optimizer is one of the model; nothing has moved.
    """
    if not 0 < target < math.inf:
        raise ValueError(f"softmax_limited_step: target must be positive and finite, got {target!r}")
    if getattr(optimizer, "keeps_iterates", False):
        raise ValueError(
            f"softmax_limited_step: {type(optimizer).__name__} keeps iterates of its own, so that its next step would "
            "undo the limit; limit the steps of the optimizer that it wraps, without it"
        )
    moved = {id(p) for group in optimizer.param_groups for p in group["params"]}
    params = {name: p for name, p in model.named_parameters() if id(p) in moved}
    if not params:
        raise ValueError("softmax_limited_step: the optimizer moves no parameter of the model")
    any_sharded = any(map(is_sharded, params.values()))
    before = {name: p.detach().clone() for name, p in params.items()}
    optimizer.step()
    with torch.no_grad():
        step = {name: p - before[name] for name, p in params.items()}
        slopes = (_differences if any_sharded else _slopes)(model, params, before, step, inputs)
        largest = (slopes.amax(dim=-1) - slopes.amin(dim=-1)).max().double()
        spread = float(_largest_of_all(largest, params, process_group))
        share = min(1.0, target * math.pi / spread) if spread > 0 else 1.0
        if share < 1 or any_sharded:
            _put(params, before, step, share)
    return spread / math.pi


Named = Mapping[str, Tensor]


def _put(params: Named, before: Named, step: Named, share: float) -> None:
    """Let the parameters be ``before + share step``."""
    for name, p in params.items():
        p.copy_(before[name] + share * step[name])


def _slopes(model: nn.Module, params: Named, before: Named, step: Named, inputs: tuple[Any, ...]) -> Tensor:
    """The derivatives of the logits along the step."""

    def logits(weights: Named) -> Any:
        return functional_call(model, dict(weights), inputs)

    with _evaluating(model), sdpa_kernel(SDPBackend.MATH):  # the others have no forward-mode derivative
        slopes: Tensor = jvp(logits, (before,), (step,))[1]
    return slopes


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """All modules in evaluation mode, and then each in its own again: some may be frozen."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _differences(model: nn.Module, params: Named, before: Named, step: Named, inputs: tuple[Any, ...]) -> Tensor:
    """The same from the logits a little way along the step, forwards and backwards.

    The way is ``eps^(1/3)`` of the weights' length, where errors of rounding and of curvature are of one size; whole
    steps that are shorter are taken whole.
    """
    eps = max(torch.finfo(p.dtype).eps for p in params.values())
    length, travelled = (sum(float(whole(x.double().square().sum())) for x in each.values()) for each in (before, step))
    share = min(1.0, eps ** (1 / 3) * math.sqrt(length / travelled)) if travelled else 1.0
    with _evaluating(model):
        found = []
        for way in (share, -share):
            _put(params, before, step, way)
            found.append(whole(model(*inputs)).clone())
            _reshard(model)
    return (found[0] - found[1]).double() / (2 * share)


def _reshard(model: nn.Module) -> None:
    """Let modules under ``fully_shard`` forget what they have gathered: weights change before the next pass."""
    from torch.distributed.fsdp import FSDPModule  # which takes a while to import

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _largest_of_all(x: Tensor, params: Named, process_group: Any) -> Tensor:
    """The largest number of all ranks that move these parameters together."""
    meshes = [mesh for p in params.values() if (mesh := getattr(p, "device_mesh", None)) is not None]
    if process_group is None and meshes:
        from normopt.engine.mesh import covering, group_of  # which takes a while to import

        process_group = group_of(covering(meshes))
    if process_group is not None:
        dist.all_reduce(x, dist.ReduceOp.MAX, process_group)
    return x
