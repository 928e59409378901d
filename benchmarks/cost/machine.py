"""What a time is worth: the processor, its threads and the rates of its matrix products, in every row and header."""

import os
import time
from itertools import pairwise
from typing import Any, Protocol

import torch

from benchmarks.harness import PlanError, cpu_field, dtype_name, origin
from benchmarks.output.records import Row
from benchmarks.output.rows import group

#: What a processor can have that decides how fast products of matrices are, as /proc/cpuinfo names it.
FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_fp16")
ARM_FLAGS = ("asimd", "asimdhp", "sve", "sve2", "bf16", "i8mm", "svebf16")
#: The environment variables that say how threads work and wait begin with one of these.
THREADING = ("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_")
#: What makes idle threads sleep, or hardly spin.
SLEEPING = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "GOMP_SPINCOUNT": "0"}
PRODUCT = 512  # width of the products whose rate is measured: (width x width) by (width x 4 width)


class Clock(Protocol):
    """Stamps between calls, and afterwards the seconds from each to the next."""

    def stamp(self) -> Any:
        """A mark of now."""

    def seconds(self, stamps: list[Any]) -> list[float]:
        """The seconds between neighbours."""


class WallClock:
    """For work that is done when a call returns."""

    def stamp(self) -> float:
        """Seconds since some start."""
        return time.perf_counter()

    def seconds(self, stamps: list[float]) -> list[float]:
        """The differences."""
        return [after - before for before, after in pairwise(stamps)]


class EventClock:
    """For work that a GPU does later: stamps are events in its queue."""

    def stamp(self) -> torch.cuda.Event:
        """An event that the GPU times when it gets there."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, stamps: list[torch.cuda.Event]) -> list[float]:
        """The differences, once the GPU has done all work."""
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in pairwise(stamps)]


def clock_of(device: str) -> Clock:
    """The clock for work on a device."""
    return EventClock() if device.startswith("cuda") else WallClock()


def refuse_sleeping_threads() -> None:
    """`PlanError` where the environment has one of `SLEEPING`: torch's calls are up to ten times slower then."""
    for name, sleeping in SLEEPING.items():
        if os.environ.get(name, "").strip().upper() == sleeping:
            raise PlanError(
                f"{name}={os.environ[name]} in the environment: idle threads sleep then, and waking threads costs time "
                f"at every call of torch, so an optimizer that makes few calls looks better than it is. Unset {name}"
            )


def machine(threads: int | None, device: str = "cpu") -> Row:
    """The columns that say on what, and with which threads, this process measures.

    `threads`: what was asked for; `None`, torch's default, is "default". `gemm`: operations a second of matrix
    products by dtype. `load`: the system's mean number of running processes over the last minute.
    """
    return {
        "load": os.getloadavg()[0],
        "asked": "default" if threads is None else str(threads),
        "threads": torch.get_num_threads(),
        "environment": environment(),
        "cores": os.cpu_count(),
        "flags": flags(),
        "gemm": product_rate(device),
        "device": device,
        **origin(device),
    }


def environment() -> dict[str, str]:
    """The variables on threads that are set."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(THREADING)}


def flags() -> list[str]:
    """Those of `FLAGS` and `ARM_FLAGS` that the processor has; none where the system does not say."""
    found = cpu_field("flags", "Features").split()
    return [flag for flag in (*FLAGS, *ARM_FLAGS) if flag in found]


def product_rate(device: str = "cpu", seconds: float = 0.3) -> dict[str, float]:
    """Operations a second of products of `PRODUCT` by dtype, the best of those made in `seconds`, at least 3."""
    rates, clock = {}, clock_of(device)
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(PRODUCT, n * PRODUCT, device=device).to(dtype) for n in (1, 4))
        took: list[float] = []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(took) < 3:
            stamps = [clock.stamp()]
            torch.mm(a, b)
            took += clock.seconds([*stamps, clock.stamp()])
        rates[dtype_name(dtype)] = 8 * PRODUCT**3 / min(took)
    return rates


def setting(rows: list[Row]) -> str:
    """The header of a table: the machine, torch and the code, and what each of the thread settings gave."""
    first = rows[0]
    on = f"{first['gpu']} beside {first['cpu']}" if "gpu" in first else first["cpu"]
    flagged = f" ({', '.join(first['flags'])})" if first["flags"] else ""
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    said = [f"{on}{flagged}, torch {first['torch']}, commit {commits}."]
    for asked, row in {row["asked"]: row for row in rows}.items():
        rates = ", ".join(f"{dtype} {rate / 1e9:.0f}" for dtype, rate in best_rates(rows, asked).items())
        said.append(f"Products of matrices on {threads_text(row)}: {rates} GFLOP/s.")
    kept = {name: value for row in rows for name, value in row["environment"].items()}
    values = ", ".join(f"{name}={value}" for name, value in sorted(kept.items()))
    said.append(
        f"Set in the environment, so perhaps unlike yours: {values}." if kept else "OpenMP as it is by default."
    )
    said.append(f"Load before each set: at most {max(row['load'] for row in rows):.1f} of {first['cores']} cores.")
    return " ".join(said)


def best_rates(rows: list[Row], asked: str) -> dict[str, float]:
    """The best rates of products over all processes of a thread setting."""
    rates = [row["gemm"] for row in rows if row["asked"] == asked]
    return {dtype: max(rate[dtype] for rate in rates) for dtype in rates[0]}


def by_threads(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of each thread setting by what its files' names end in: "" for the first, then "_" and the setting."""
    settings = group(rows, lambda row: str(row["asked"]))
    return {f"_{asked}" if i else "": members for i, (asked, members) in enumerate(settings.items())}


def threads_text(row: Row) -> str:
    """The thread setting of a row for people: "2 threads, the default"."""
    return f"{row['threads']} thread{'s' * (row['threads'] != 1)}{', the default' * (row['asked'] == 'default')}"
