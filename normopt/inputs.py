"""Statistics of the inputs of linear layers, for ingredients that read them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from normopt.engine.checks import name_of
from normopt.engine.plan import state_shapes
from normopt.ingredient import check_range
from normopt.ingredient.stage import is_of_inputs
from normopt.numerics.autocast import _without_autocast
from normopt.numerics.eigen import average_
from normopt.numerics.sharded import is_sharded
from normopt.optimizer import SteepestDescent
from normopt.rule import rule_of


class _Watched(NamedTuple):
    """A parameter whose rule reads the inputs of its layers: the pieces of state that they are in, and their shapes."""

    p: Tensor
    shapes: dict[str, tuple[int, ...]]


class InputStatistics:
    """Averages of ``X^T X / N`` of the inputs ``X`` of linear layers, kept in the optimizer's state.

    Hooks on the ``nn.Linear`` layers whose weights move by a rule that reads inputs, such as
    :class:`~normopt.InputWhitened`, add up ``X^T X`` over all rows, ``N`` of them, of all forward passes that are in
    training mode and record gradients; the next ``step`` takes ``C <- beta C + (1 - beta) X^T X / N`` into its average,
    which starts with the first one, in float32 or better. Passes of several micro-batches count as one. An average is a
    part of ``optimizer.state``, so that ``state_dict`` saves it; after loading make this object anew.

    Args:
        model: whose layers are watched.
        optimizer: with rules that read inputs.
        beta: decay rate of the average, in [0, 1).
        process_group: where several ranks have a part of each batch, as under DistributedDataParallel: the ranks whose
            inputs are averaged together.

    Raises:
        ValueError: no rule reads inputs; a parameter with such a rule is the weight of no ``nn.Linear`` of the model,
            is seen otherwise than as ``(out, in)``, or is sharded; several processes without a ``process_group``.
    """

    def __init__(
        self, model: nn.Module, optimizer: SteepestDescent, beta: float = 0.95, process_group: Any = None
    ) -> None:
        if not isinstance(optimizer, SteepestDescent):
            raise TypeError(f"InputStatistics: optimizer must be one of normopt, got {type(optimizer).__name__}")
        check_range(self, "beta", beta, 0, 1)
        self.beta, self.process_group = beta, process_group
        layers: dict[Tensor, list[nn.Linear]] = defaultdict(list)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                layers[module.weight].append(module)
        self._optimizer = optimizer
        self._watched = [
            _watched(group, p, layers) for group in optimizer.param_groups if rule_of(group).reads_inputs
            for p in group["params"]
        ]  # fmt: skip
        if not self._watched:
            raise ValueError("InputStatistics: no ingredient of the optimizer reads inputs, as InputWhitened does")
        if process_group is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError(
                "InputStatistics: each of several processes would keep statistics of its own inputs; name the "
                "process_group of the ranks that have parts of one batch"
            )
        self._sums: dict[Tensor, tuple[Tensor, int]] = {}
        disable: Callable[..., Any] = torch.compiler.disable
        see = disable(self._see)  # a compiled model is cut here
        self._hooks = [
            module.register_forward_pre_hook(see) for watched in self._watched for module in layers[watched.p]
        ]
        optimizer._learners.append(self._learn)

    def remove(self) -> None:
        """Watch the layers no longer; the averages stay what they are."""
        for hook in self._hooks:
            hook.remove()
        if self._learn in self._optimizer._learners:
            self._optimizer._learners.remove(self._learn)

    def _see(self, module: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
        is_watched = any(module.weight is watched.p for watched in self._watched)  # and not that of a copy
        if is_watched and module.training and torch.is_grad_enabled():
            with torch.no_grad(), _without_autocast():
                x = inputs[0].flatten(0, -2)
                x = x.to(torch.promote_types(module.weight.dtype, torch.float32))
                total, rows = self._sums.get(module.weight, (0.0, 0))
                self._sums[module.weight] = total + x.mT @ x, rows + len(x)

    @torch.no_grad()
    def _learn(self) -> None:
        """Take what the layers have seen since the last step into the averages."""
        for p, shapes in self._watched:
            size = p.shape[-1]
            wide = torch.promote_types(p.dtype, torch.float32)
            none = torch.zeros(size, size, dtype=wide, device=p.device), 0
            total, rows = self._sums.pop(p, none)
            count = torch.full((), rows, dtype=torch.float64, device="cpu" if self.process_group is None else p.device)
            if self.process_group is not None:
                dist.all_reduce(total, group=self.process_group)
                dist.all_reduce(count, group=self.process_group)
            if not count:
                continue
            state, mean = self._optimizer.state[p], total / float(count)
            for name, shape in shapes.items():
                new = mean.expand(math.prod(shape) // mean.numel(), size, size).reshape(shape)  # one for each matrix
                if name in state:
                    average_(state[name], new, self.beta)
                elif bool(new.isfinite().all()):
                    state.setdefault("step", torch.tensor(0.0))
                    state[name] = new.clone()


def _watched(group: dict[str, Any], p: Tensor, layers: dict[Tensor, list[nn.Linear]]) -> _Watched:
    name, rule = name_of(group, p), rule_of(group).at(group)
    if is_sharded(p):
        raise ValueError(f"{name} is sharded; statistics of inputs are kept for whole parameters alone")
    if p not in layers:
        raise ValueError(
            f"{name} moves by {rule.norm}, which reads the inputs of a linear layer; it is the weight of no nn.Linear"
        )
    shapes = {n: shape for n, shape in state_shapes(p, rule).items() if is_of_inputs(n)}
    if rule.view.transpose or any(shape[-1] != p.shape[-1] for shape in shapes.values()):
        raise ValueError(f"{name} is seen through {rule.view}; statistics of inputs are for weights seen as (out, in)")
    return _Watched(p, shapes)
