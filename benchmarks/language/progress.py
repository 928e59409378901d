"""The progress of a run, and the clock that times the run."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from benchmarks.language.diagnose import Norms


@dataclass
class Progress:
    """Steps, seconds and measurements of a run so far; checkpoints hold all of them.

    Seconds of gradients (forward and backward pass) and of the optimizer are measured with `clock`; `cpu` and `wall`
    cover the whole run with its evaluations. `curve` holds (step, seconds of training so far, held-out loss), `norms`
    (step, the result of `diagnose.measure`).
    """

    step: int = 0
    gradient_seconds: float = 0.0
    optimizer_seconds: float = 0.0
    cpu: float = 0.0
    wall: float = 0.0
    diverged: bool = False
    curve: list[tuple[int, float, float]] = field(default_factory=list)
    norms: list[tuple[int, Norms]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Seconds of training, without evaluation."""
        return self.gradient_seconds + self.optimizer_seconds

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Add the CPU and wall seconds of the block to the totals."""
        cpu, wall = time.process_time(), time.perf_counter()
        yield
        self.cpu += time.process_time() - cpu
        self.wall += time.perf_counter() - wall


def clock(device: str) -> float:
    """CPU seconds of this single-threaded process, of which other load makes more; on a GPU, wall seconds."""
    if device == "cpu":
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()
