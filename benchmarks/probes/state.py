"""Probes of compiled steps, of weights in bfloat16, of sharded weights, of saving and loading; see `torch_contract`."""

import contextlib
import copy
import io
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.probes.parts import Make, parameters, same, set_gradients, take_steps, values
from benchmarks.probes.sharding import sharded_and_whole_updates

#: The largest change of an entry in a step; between 1 and 2, bfloat16 rounds away changes three times as large.
SMALL = 1.25e-3
SETTLED = 3  # steps after which a compiled step has seen every kind of step


# Recompilation ------------------------------------------------------------------------------------------------------


def compile_recompilations(make: Make) -> float:
    """A compiled step that is compiled anew at each change of lr or of the step counter is slower than an eager one."""
    from torch._dynamo.utils import counters

    with _compiler():
        params = parameters()[:1]
        optimizer = make(params)
        step, settled = torch.compile(optimizer.step, backend="eager"), 0
        for i in range(SETTLED + 3):
            settled = counters["frames"]["total"] if i == SETTLED else settled
            set_gradients(params, i)
            for group in optimizer.param_groups:
                group["lr"] *= 0.9
            step()
        return float(counters["frames"]["total"] - settled)


def compile_fullgraph(make: Make) -> bool:
    """A step that is no single graph cannot be fused into few kernels, nor captured with the rest of the training."""
    with _compiler():
        params = parameters()[:1]
        step = torch.compile(make(params).step, backend="eager", fullgraph=True)
        for i in range(2):
            set_gradients(params, i)
            step()
    return True


@contextlib.contextmanager
def _compiler() -> Iterator[None]:
    """torch.compile without caches of other optimizers and without logs of graph breaks, while the block runs."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        torch._dynamo.reset()


# Half precision -----------------------------------------------------------------------------------------------------


def bf16_small_updates(make: Make) -> float:
    """Weights in bfloat16 stall at small learning rates; the number is their progress as a fraction of float64's."""
    lr = 1e-4
    lr *= SMALL / max(_fastest(_path(make, lr, torch.float64)), 1e-12)
    path = _path(make, lr, torch.float64)
    while not _fastest(path) <= 2 * SMALL:  # if an optimizer sets its own rate, lengths do not follow lr, or overflow
        lr /= 4
        path = _path(make, lr, torch.float64)
    whole, half = path[-1] - path[0], _path(make, lr, torch.bfloat16)
    return float(whole @ (half[-1] - half[0]) / (whole @ whole))


def _path(make: Make, lr: float, dtype: torch.dtype) -> Tensor:
    """Weights between 1 and 2, where bfloat16 has steps of 1/128, on their way along one gradient: (steps, entries)."""
    params = [nn.Parameter((1 + p.detach().mul(10).abs()).bfloat16().to(dtype)) for p in parameters()]
    optimizer, path = make(params, lr=lr), [_entries(params)]
    for _ in range(24):
        set_gradients(params, 0)
        optimizer.step()
        path.append(_entries(params))
    return torch.stack(path)


def _fastest(path: Tensor) -> float:
    """The largest change of an entry in one step."""
    return float(path.diff(dim=0).abs().max())


def _entries(params: Sequence[Tensor]) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in params])


def bf16_momentum(make: Make) -> bool:
    """Averages that are overwritten or rounded away in bfloat16 silently turn an optimizer into another one."""
    halves = parameters(torch.bfloat16)
    twins = [nn.Parameter(p.detach().float()) for p in halves]
    optimizer, twin = _without_nesterov(make, halves), _without_nesterov(make, twins)
    for i in range(5):
        for params in (halves, twins):
            set_gradients(params, i // 3, torch.bfloat16)
        optimizer.step()
        twin.step()
        torch._foreach_copy_([p.detach() for p in twins], [p.detach().float() for p in halves])
    sizes = [(_sizes(optimizer.state[p]), _sizes(twin.state[q])) for p, q in zip(halves, twins, strict=True)]
    return all(
        abs(half[name] - whole[name]) <= 0.1 * whole[name]
        for half, whole in sizes
        for name in whole.keys() & half.keys()
    )


def _without_nesterov(make: Make, params: list[nn.Parameter]) -> Optimizer:
    try:
        return make(params, nesterov=False)
    except (TypeError, ValueError):
        return make(params)


def _sizes(state: dict[str, Any]) -> dict[str, float]:
    return {name: float(x.double().norm()) for name, x in state.items() if isinstance(x, Tensor) and x.numel() > 1}


# Sharding, saving and loading ---------------------------------------------------------------------------------------


def sharded_step(make: Make) -> bool:
    """Under FSDP2 and tensor parallelism parameters are DTensors, and a shard's own update is not that of the whole."""
    sharded, whole = sharded_and_whole_updates(make, parameters()[0].detach())
    return float((sharded - whole).norm()) <= 0.05 * float(whole.norm())


def distributed_checkpoint(make: Make) -> bool:
    """torch.distributed.checkpoint loads by name into a fresh optimizer, after a dry step; else big runs start anew."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model, other = (nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 4, bias=False)) for _ in range(2))
    params, others = list(model.parameters()), list(other.parameters())
    optimizer, twin = make(params), make(others)
    take_steps(optimizer, params, 3)
    set_optimizer_state_dict(other, twin, copy.deepcopy(get_optimizer_state_dict(model, optimizer)))
    other.load_state_dict(model.state_dict())
    take_steps(optimizer, params, 3, first=3)
    take_steps(twin, others, 3, first=3)
    return same(values(params), values(others))


def resume_float32(make: Make) -> bool:
    """A run that is saved, read back with `weights_only=True` and continued must be the run that never stopped."""
    return _resumes(make, torch.float32)


def resume_bfloat16(make: Make) -> bool:
    """The same with bfloat16 weights, where loading can round the state to the weights' dtype."""
    return _resumes(make, torch.bfloat16)


def _resumes(make: Make, dtype: torch.dtype) -> bool:
    params = parameters(dtype)
    optimizer, file = make(params), io.BytesIO()
    take_steps(optimizer, params, 3)
    torch.save({"weights": values(params), "state": optimizer.state_dict()}, file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    others = [nn.Parameter(w) for w in saved["weights"]]
    twin = make(others)
    twin.load_state_dict(saved["state"])
    take_steps(optimizer, params, 3, first=3)
    take_steps(twin, others, 3, first=3)
    return same(values(params), values(others))
