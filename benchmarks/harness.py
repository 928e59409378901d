"""What all benchmarks share: processes with a fixed number of threads, imports of peers, columns, and `PlanError`."""

import importlib
import multiprocessing
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from benchmarks.output.records import Row, source_hash

Answer = TypeVar("Answer")


class PlanError(ValueError):
    """Arguments that do not make a benchmark."""


def limit_threads(count: int) -> None:
    """Processes started after this call have `count` threads, which sleep while idle."""
    os.environ.update({"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(count)})


def in_new_process(threads: int, function: Callable[..., Answer], *arguments: Any) -> Answer:
    """The answer of a function that is called in a new process with `threads` threads."""
    limit_threads(threads)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def imported(package: str, name: str) -> Any:
    """A name of a package; `ImportError` if the package is not installed."""
    return getattr(importlib.import_module(package), name)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in the optimizer's state, of sharded ones those of this process."""
    values = (value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value))
    return sum(getattr(value, "to_local", lambda value=value: value)().nbytes for value in values)


def dtype_name(dtype: torch.dtype) -> str:
    """The name without `torch.`."""
    return str(dtype).removeprefix("torch.")


def origin() -> Row:
    """The columns that say with which code a row was measured."""
    return {"torch": torch.__version__, "source": source_hash()}
