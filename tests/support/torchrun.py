"""Programs that run as several processes on this machine, as torchrun starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


def command(processes: int, program: Sequence[str]) -> list[str]:
    """``torchrun`` for a program, ``["-m", module, ...]`` or ``[file, ...]``, on a free port."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    return [*torchrun, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", *program]


def environment() -> dict[str, str]:
    """One thread for each process, and the loopback device to talk over."""
    own = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    return {**os.environ, **own}


def run(processes: int, program: Sequence[str], folder: Path, seconds: float = 240) -> str:
    """Run to the end in ``folder``; returns the output. Alone, it runs without torchrun."""
    whole = command(processes, program) if processes else [sys.executable, *program]
    done = subprocess.run(whole, cwd=folder, env=environment(), capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
