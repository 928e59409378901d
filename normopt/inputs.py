"""Statistics of the inputs of linear layers, for ingredients that read them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from normopt.engine.checks import name_of
from normopt.engine.plan import state_shapes
from normopt.ingredient import check_range
from normopt.ingredient.stage import is_of_inputs
from normopt.numerics.autocast import _without_autocast
from normopt.numerics.sharded import is_sharded, whole
from normopt.optimizer import SteepestDescent
from normopt.rule import rule_of

if TYPE_CHECKING:
    from normopt.engine.home import Home
    from normopt.engine.layout import Layout


class _Watched(NamedTuple):
    """A parameter whose rule reads the inputs of its layers: the pieces of state that they are in, and their shapes."""

    p: Tensor
    name: str
    shapes: dict[str, tuple[int, ...]]


class InputStatistics:
    """Averages of ``X^T X / N`` of the inputs ``X`` of linear layers, kept in the optimizer's state.

    Hooks on the ``nn.Linear`` layers whose weights move by a rule that reads inputs, such as
    :class:`~normopt.InputWhitened`, add up ``X^T X`` over all rows, ``N`` of them, of all forward passes that are in
    training mode and record gradients; the next ``step`` takes ``C <- beta C + (1 - beta) X^T X / N`` into its average,
    which starts with the first one, in float32 or better. Passes of several micro-batches count as one. An average is a
    part of ``optimizer.state``, so that ``state_dict`` saves it; after loading make this object anew.

    Of sharded weights, and of plain ones that are moved under the optimizer's ``mesh``, all ranks of their device mesh
    add up what they have seen, also where only some have seen anything, and the rank that moves the weight keeps the
    average. Ranks that see the same input, as in tensor parallelism, count it several times, which no average shows;
    an input that is cut along its features, as that of a row-wise layer is, is gathered for it.

    What has been seen counts although the step is left out or refused for its gradients: inputs that are not finite are
    left out by themselves.

    Args:
        model: whose layers are watched; sharded before.
        optimizer: with rules that read inputs.
        beta: decay rate of the average, in [0, 1).
        process_group: where several ranks have a part of each batch, as under DistributedDataParallel: the ranks whose
            inputs are averaged together; by default, of a weight on a device mesh, the ranks of the mesh.

    Memory: ``in^2`` numbers for each matrix on every rank from the forward pass to the step, beside the average.

    Raises:
        ValueError: no rule reads inputs; a parameter with such a rule is the weight of no ``nn.Linear`` of the model,
            or is seen otherwise than as ``(out, in)``; without a ``process_group``, several processes of which some
            have no part in a parameter.
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
        if process_group is None and dist.is_available() and dist.is_initialized():
            self._check_all_share(_homes(optimizer.layout()))
        #: Whose input each layer's is: while a layer is at work FSDP2 has another tensor in its weight's place.
        self._weights = {module: watched.p for watched in self._watched for module in layers[watched.p]}
        self._sums: dict[Tensor, tuple[Tensor, int]] = {}
        disable: Callable[..., Any] = torch.compiler.disable
        see = disable(self._see)  # a compiled model is cut here
        self._hooks = [module.register_forward_pre_hook(see) for module in self._weights]
        optimizer._learners.append(self._learn)

    def _check_all_share(self, homes: Mapping[Tensor, Home]) -> None:
        """Raise a ``ValueError`` for a parameter that some processes have no part in."""
        every = dist.get_world_size()
        for p, name, _ in self._watched:
            mesh = homes[p].mesh if p in homes else None
            several = 1 if mesh is None else mesh.size()
            if several < every:
                raise ValueError(
                    f"InputStatistics: the average of the inputs of {name} would hold those of {several} of {every} "
                    "processes; pass process_group=, the processes that have parts of one batch, to InputStatistics"
                )

    def remove(self) -> None:
        """Watch the layers no longer; the averages stay what they are."""
        for hook in self._hooks:
            hook.remove()
        if self._learn in self._optimizer._learners:
            self._optimizer._learners.remove(self._learn)

    def _see(self, module: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
        p = self._weights.get(module)  # of a copy of the layer, none
        if p is None or not (is_sharded(p) or module.weight is p):
            return
        if module.training and torch.is_grad_enabled():
            with torch.no_grad(), _without_autocast():
                x = whole(inputs[0])
                x = x.reshape(-1, x.shape[-1])
                x = x.to(torch.promote_types(p.dtype, torch.float32))
                total, rows = self._sums.get(p, (0.0, 0))
                self._sums[p] = total + x.mT @ x, rows + len(x)

    @torch.no_grad()
    def _learn(self, layout: Layout | None) -> None:
        """Take what the layers have seen since the last step into the averages."""
        homes = _homes(layout)
        together: dict[Any, list[_Watched]] = defaultdict(list)
        for watched in self._watched:
            together[self._group_of(homes.get(watched.p))].append(watched)
        for group, several in together.items():
            for watched, rows in zip(several, self._rows(several, group), strict=True):
                if rows:
                    self._take(watched, rows, group, homes.get(watched.p))

    def _group_of(self, home: Home | None) -> Any:
        """The process group whose inputs are averaged together; ``None`` where this process stands alone."""
        return self.process_group if home is None or self.process_group is not None else home.process_group

    def _rows(self, several: Sequence[_Watched], group: Any) -> list[float]:
        """How many rows the ranks of the process group have seen of each input."""
        mine = [self._sums[watched.p][1] if watched.p in self._sums else 0 for watched in several]
        rows = torch.tensor(mine, dtype=torch.float64, device="cpu" if group is None else several[0].p.device)
        if group is not None:
            dist.all_reduce(rows, group=group)
        return rows.tolist()

    def _take(self, watched: _Watched, rows: float, group: Any, home: Home | None) -> None:
        """Take what the ranks of the process group have seen of one input into its average, where that is kept."""
        p, size = watched.p, watched.p.shape[-1]
        if p in self._sums:
            total = self._sums.pop(p)[0]
        else:
            total = torch.zeros(size, size, dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
        if group is not None:
            dist.all_reduce(total, group=group)
        mean = total / rows
        if not mean.isfinite().all():
            return
        state = self._optimizer.state[p]
        state.setdefault("step", torch.tensor(0.0))
        for name, shape in watched.shapes.items():
            if home is not None and not home.is_here:
                state.setdefault(name, mean.new_empty(0))
                continue
            new = mean.expand(math.prod(shape) // mean.numel(), size, size).reshape(shape)  # one for each matrix
            # The first step may have been one without statistics, that makes room for a checkpoint.
            has_begun = name in state and (state["step"] > 1 or bool(state[name].any()))
            state[name] = state[name].lerp_(new, 1 - self.beta) if has_begun else new.clone()


def _homes(layout: Layout | None) -> dict[Tensor, Home]:
    return {} if layout is None else {home.p: home for home in layout.homes}


def _watched(group: dict[str, Any], p: Tensor, layers: dict[Tensor, list[nn.Linear]]) -> _Watched:
    name, rule = name_of(group, p), rule_of(group).at(group)
    if p not in layers:
        raise ValueError(
            f"{name} moves by {rule.norm}, which reads the inputs of a linear layer; it is the weight of no nn.Linear"
        )
    shapes = {n: shape for n, shape in state_shapes(p, rule).items() if is_of_inputs(n)}
    if rule.view.transpose or any(shape[-1] != p.shape[-1] for shape in shapes.values()):
        raise ValueError(f"{name} is seen through {rule.view}; statistics of inputs are for weights seen as (out, in)")
    return _Watched(p, name, shapes)
