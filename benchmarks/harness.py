"""What all benchmarks share: processes with a fixed number of threads, imports of peers, columns, and `PlanError`."""

import importlib
import multiprocessing
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

import normopt
from benchmarks.output.records import Row, git_commit, source_hash

Answer = TypeVar("Answer")
#: What Linux says of the processors, lines of "name : value".
CPUINFO = Path("/proc/cpuinfo")


class PlanError(ValueError):
    """Arguments that do not make a benchmark."""


def limit_threads(count: int) -> None:
    """Processes started after this call have `count` threads, which sleep while idle.

    For training runs side by side, which would wait for each other's cores. The seconds of those runs are taken so;
    `step` and `polar` refuse threads that sleep, since users' threads spin.
    """
    os.environ.update({"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(count)})


def in_new_process(threads: int | None, function: Callable[..., Answer], *arguments: Any) -> Answer:
    """The answer of a function that is called in a new process with `threads` threads, `None` for torch's default.

    The environment is the caller's.
    """
    set_threads: dict[str, Any] = (
        {} if threads is None else {"initializer": torch.set_num_threads, "initargs": (threads,)}
    )
    with multiprocessing.get_context("spawn").Pool(1, **set_threads) as pool:
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


def origin(device: str = "cpu") -> Row:
    """The columns that say with which code and on what a row was measured."""
    return {
        "torch": torch.__version__,
        "normopt": normopt.__version__,
        "python": platform.python_version(),
        "commit": git_commit() or f"normopt {normopt.__version__}",
        "source": source_hash(),
        "cpu": processor(),
        **({"gpu": torch.cuda.get_device_name(device)} if device.startswith("cuda") else {}),
    }


def processor() -> str:
    """The name of the processor, or what the system says of the machine."""
    return cpu_field("model name") or platform.processor() or platform.machine()


def cpu_field(*names: str) -> str:
    """The first field of `CPUINFO` that has one of the names; "" where the system does not say."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    fields = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in fields if name.strip() in names), "")
