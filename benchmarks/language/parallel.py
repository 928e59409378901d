"""Several processes that train one model: how it is laid out, their shares of a batch, and their common checkpoints."""

import math
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from benchmarks.harness import PlanError
from benchmarks.output.records import WriteError, replacing

#: Of `--parallel fsdp2+tp`: how many neighbouring processes share the matrices of a layer.
TENSOR_PARALLEL = 2
#: The models that `fsdp2+tp` can cut: learnable scales inside a linear layer would have to be cut with it.
CUT_MODELS = ("gpt",)
#: The file in a checkpoint for what is no tensor of the model and of the optimizer.
REST = "rest.pt"
#: The file that torch.distributed.checkpoint writes last.
METADATA = ".metadata"


class Alone:
    """One process, which has all of the model and of every batch."""

    #: Whether this process writes rows and tables.
    is_first = True
    #: How many processes train one model, and into how many shares a batch is cut.
    ranks, shares = 1, 1
    #: What normopt's optimizers are told of the other processes.
    options: dict[str, Any] = {}  # noqa: RUF012

    def place(self, model: nn.Module) -> nn.Module:
        """Lay the model's parameters out; returns the module to call in place of `model`."""
        return model

    def share(self, windows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of a batch's windows that this process trains on."""
        return windows

    def mean(self, loss: float) -> float:
        """The mean of a number over the shares of the batch."""
        return loss

    def clip(self, parameters: Iterable[Tensor], limit: float) -> float:
        """Clip the gradients to a global norm; returns the norm before."""
        return nn.utils.clip_grad_norm_(parameters, limit).item()

    def exists(self, path: Path) -> bool:
        """Whether there is a checkpoint."""
        return path.exists()

    def save(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, rest: dict[str, Any]) -> None:
        """Write a checkpoint atomically; raises `WriteError` when that fails, and keeps the previous checkpoint."""
        states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        _write(path, {**states, **rest})

    def load(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Continue from a checkpoint that `save` wrote; returns what was the `rest`."""
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=False)
        model.load_state_dict(state.pop("model"))
        optimizer.load_state_dict(state.pop("optimizer"))
        return state

    def forget(self, path: Path) -> None:
        """Delete the checkpoint."""
        path.unlink(missing_ok=True)


class Together(Alone):
    """All processes of a job. Each trains on an equal share of the batch, and gradients are averaged.

    Checkpoints are folders, one for each step, that torch.distributed.checkpoint reads on any number of ranks; the
    newest that is complete counts. All must call `place`, `mean`, `clip`, `agreed`, `save` and `load` together.

    Args:
        kind: "ddp", every process has the whole model; "fsdp2", parameters, gradients and state are sharded over all
            of them, layer by layer; "fsdp2+tp", pairs of neighbours also share each matrix, and one share of the batch.
        device: "cpu" or "cuda".
    """

    def __init__(self, kind: str, device: str) -> None:
        self.kind, self.ranks = kind, dist.get_world_size()
        inner = TENSOR_PARALLEL if kind == "fsdp2+tp" else 1
        if self.ranks % inner:
            raise PlanError(f"--parallel {kind} needs a multiple of {inner} processes, this job has {self.ranks}")
        self._mesh = init_device_mesh(device, (self.ranks // inner, inner), mesh_dim_names=("data", "tensor"))
        self.is_first, self.shares = dist.get_rank() == 0, self.ranks // inner
        self._place = self._mesh.get_local_rank("data")
        self.options = {"process_group": dist.group.WORLD} if kind == "ddp" else {}

    def check(self, models: Sequence[str], batch: int) -> None:
        """Raise `PlanError` for a batch without equal shares, or a model that cannot be cut."""
        if batch % self.shares:
            raise PlanError(f"--batch {batch} cannot be cut into {self.shares} equal shares, one for each process")
        if self.kind == "fsdp2+tp" and (others := sorted({*models} - {*CUT_MODELS})):
            raise PlanError(
                f"--parallel fsdp2+tp cuts {', '.join(CUT_MODELS)} only, not {', '.join(others)}: try fsdp2"
            )

    def place(self, model: nn.Module) -> nn.Module:
        if self.kind == "ddp":
            return DistributedDataParallel(model)
        if self.kind == "fsdp2+tp":
            parallelize_module(model, self._mesh["tensor"], tensor_parallel_plan())
        for block in model.blocks.children():  # type: ignore[union-attr]
            fully_shard(block, mesh=self._mesh["data"])
        return fully_shard(model, mesh=self._mesh["data"])

    def share(self, windows: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.split(windows, self.shares)[self._place]

    def mean(self, loss: float) -> float:
        total = torch.tensor(loss, dtype=torch.float64, device=self._mesh.device_type)
        dist.all_reduce(total, group=self._mesh.get_group("data"))
        return total.item() / self.shares

    @torch.no_grad()
    def clip(self, parameters: Iterable[Tensor], limit: float) -> float:
        # torch's adds up norms on one mesh only.
        square = torch.zeros((), dtype=torch.float64, device=self._mesh.device_type)
        gradients = []
        for p in parameters:
            if p.grad is not None:
                gradients.append(_local(p.grad))
                copies = [self._mesh[name].size() for name in ("data", "tensor") if _is_whole_along(p, name)]
                square += torch.linalg.vector_norm(gradients[-1], dtype=torch.float64).square() / math.prod(copies)
        dist.all_reduce(square)
        norm = square.sqrt()
        torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0).float())
        return norm.item()

    def agreed(self, value: Any) -> Any:
        """What the first process says."""
        said = [value]
        dist.broadcast_object_list(said)
        return said[0]

    def exists(self, path: Path) -> bool:
        return any(path.glob(f"*/{METADATA}"))

    def save(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, rest: dict[str, Any]) -> None:
        folder = path / f"{rest['progress']['step']:08d}"
        if self.is_first:
            _write(folder / REST, rest)
        try:
            dcp.save(_states(model, optimizer), checkpoint_id=folder)
        except dcp.api.CheckpointException as error:
            raise WriteError(f"cannot write {folder}: {error}") from error
        if self.is_first:
            for older in set(path.iterdir()) - {folder}:
                shutil.rmtree(older)

    def load(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        folder = max(path.glob(f"*/{METADATA}")).parent
        states = _states(model, optimizer)
        dcp.load(states, checkpoint_id=folder)
        found = {"model_state_dict": states["model"], "optim_state_dict": states["optimizer"]}
        set_state_dict(model, _parts(optimizer), **found)
        rest: dict[str, Any] = torch.load(folder / REST, map_location="cpu", weights_only=False)
        return rest

    def forget(self, path: Path) -> None:
        if self.is_first:
            shutil.rmtree(path, ignore_errors=True)


@cache
def team(kind: str, device: str) -> Alone:
    """Those who train one model, by `--parallel`; "" is one process alone."""
    return Together(kind, device) if kind else Alone()


@contextmanager
def joined(kind: str) -> Iterator[None]:
    """A block in which the processes that torchrun has started can talk, and all but the first print nothing.

    Raises:
        PlanError: torchrun has not started this process.
    """
    if not kind:
        yield
        return
    if "RANK" not in os.environ:
        command = "torchrun --nproc-per-node 2 -m benchmarks compare --parallel"
        raise PlanError(f"--parallel {kind} needs several processes: {command} {kind} ...")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if dist.get_rank() else sys.stdout):
            yield
    finally:
        team.cache_clear()
        dist.destroy_process_group()


@contextmanager
def first_goes_first() -> Iterator[None]:
    """A block that the first process passes through before the others do; alone, nobody waits."""
    is_alone = not dist.is_initialized()
    if not is_alone and dist.get_rank():
        dist.barrier()
    yield
    if not is_alone and not dist.get_rank():
        dist.barrier()


def tensor_parallel_plan() -> dict[str, Any]:
    """How the GPT's matrices are cut. Attention computes with whole heads, on all ranks; its matrices are cut too."""
    return {
        "embed": RowwiseParallel(input_layouts=Replicate()),
        "blocks.*.attention.qkv": ColwiseParallel(output_layouts=Replicate()),
        "blocks.*.attention.out": RowwiseParallel(input_layouts=Replicate()),
        "blocks.*.mlp.gate": ColwiseParallel(),
        "blocks.*.mlp.up": ColwiseParallel(),
        "blocks.*.mlp.down": RowwiseParallel(),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }


def _local(x: Tensor) -> Tensor:
    """What this process has of a tensor."""
    return x.to_local() if isinstance(x, DTensor) else x


def _is_whole_along(p: Tensor, dimension: str) -> bool:
    """Whether ranks along a dimension of the mesh have equal copies."""
    if not isinstance(p, DTensor) or dimension not in (p.device_mesh.mesh_dim_names or ()):
        return True
    place = (p.device_mesh.mesh_dim_names or ()).index(dimension)
    return isinstance(p.placements[place], Replicate)


def _states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    of_model, of_optimizer = get_state_dict(model, _parts(optimizer))
    return {"model": of_model, "optimizer": of_optimizer}


def _parts(optimizer: torch.optim.Optimizer) -> Any:
    """The optimizers that it is made of, see `benchmarks.peers.Several`."""
    return getattr(optimizer, "optimizers", optimizer)


def _write(path: Path, value: Any) -> None:
    try:
        with replacing(path) as partial, partial.open("wb") as file:
            torch.save(value, file)
    except RuntimeError as error:  # torch's message for a failed write does not give the cause
        raise WriteError(f"cannot write {path}: {error.__context__ or error}") from error
