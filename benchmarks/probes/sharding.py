"""Steps on a sharded tensor in two processes of this machine, beside steps on the whole tensor."""

import multiprocessing
import tempfile
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

WORLD = 2
TIMEOUT = timedelta(seconds=30)


def sharded_and_whole_updates(make: Callable[..., Optimizer], weight: Tensor) -> tuple[Tensor, Tensor]:
    """The change of `weight` in two steps with its rows sharded over two processes, and in one process.

    Raises:
        RuntimeError: with the type and text of an error in the processes.
    """
    import torch.distributed.tensor  # once here, before the fork, and not in each process

    whole = nn.Parameter(weight.clone())
    _steps(make([whole]), whole, lambda gradient: gradient)
    context = multiprocessing.get_context("fork")  # `make` may be a closure
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        meeting = Path(folder) / "meeting"
        processes = [context.Process(target=_work, args=(rank, meeting, make, weight, theirs)) for rank in range(WORLD)]
        for process in processes:
            process.start()
        try:
            answer = ours.recv() if ours.poll(2 * TIMEOUT.total_seconds()) else RuntimeError("no answer")
        finally:
            for process in processes:
                process.join(5)
                process.kill()
    if isinstance(answer, Exception):
        raise answer
    return torch.tensor(answer) - weight, whole.detach() - weight


def _work(rank: int, meeting: Path, make: Callable[..., Optimizer], weight: Tensor, pipe: Connection) -> None:
    """Body of a process; the first one answers."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=WORLD, timeout=TIMEOUT)
    answer: Any
    try:
        answer = _sharded(make, weight).tolist()  # a tensor would be sent as a handle to this process's memory
    except Exception as error:
        answer = RuntimeError(f"{type(error).__name__}: {error}")
    if rank == 0:
        pipe.send(answer)
    dist.barrier()
    dist.destroy_process_group()


def _sharded(make: Callable[..., Optimizer], weight: Tensor) -> Tensor:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (WORLD,))
    p = nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]))
    _steps(make([p]), p, lambda gradient: distribute_tensor(gradient, mesh, [Shard(0)]))
    assert isinstance(p, DTensor)
    return p.full_tensor().detach()


def _steps(optimizer: Optimizer, p: nn.Parameter, placed: Callable[[Tensor], Tensor]) -> None:
    for seed in range(2):
        gradient = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
        p.grad = placed(gradient)
        optimizer.step()
