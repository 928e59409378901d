"""Real processes that form one process group for a whole session of tests, and run what they are handed."""

from __future__ import annotations

import os
import queue
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

#: Seconds after which a collective that not all ranks have joined raises an error.
TIMEOUT = 30


class Ranks:
    """``size`` processes over gloo; ``run`` calls a function of a module, with the same arguments, on all of them."""

    def __init__(self, size: int, folder: Path, timeout: float = TIMEOUT) -> None:
        context = mp.get_context("spawn")
        self.size, self._timeout = size, timeout
        self._tasks = [context.Queue() for _ in range(size)]
        self._answers = context.Queue()
        # Threads that spin for work would keep the other ranks, and the other tests, from their cores.
        kept = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GLOO_SOCKET_IFNAME")}
        os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GLOO_SOCKET_IFNAME": "lo"}
        try:
            self.processes = [
                context.Process(target=_serve, args=(rank, size, folder, timeout, tasks, self._answers), daemon=True)
                for rank, tasks in enumerate(self._tasks)
            ]
            for process in self.processes:
                process.start()
        finally:
            for name, value in kept.items():
                os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What ``function(*args)`` returns on each rank; an ``AssertionError`` with what was raised, if anything."""
        for tasks in self._tasks:
            tasks.put((function, args))
        found = dict(self._answers.get(timeout=300) for _ in range(self.size))
        failed = {rank: text for rank, (is_fine, text) in sorted(found.items()) if not is_fine}
        assert not failed, "\n".join(f"rank {rank}: {text}" for rank, text in failed.items())
        return [found[rank][1] for rank in range(self.size)]

    def answer(self, seconds: float) -> tuple[int, tuple[bool, Any]]:
        """The next answer, for ranks of which some never answer."""
        return self._answers.get(timeout=seconds)

    def send(self, rank: int, function: Callable[..., Any], *args: Any) -> None:
        """Hand a function to one rank alone."""
        self._tasks[rank].put((function, args))

    def close(self) -> None:
        for process in self.processes:  # which have nothing to lose
            process.kill()
        for process in self.processes:
            process.join()


def _serve(rank: int, size: int, folder: Path, timeout: float, tasks: Any, answers: Any) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
    while True:
        try:
            task = tasks.get(timeout=3600)  # ranks whose tests are gone go too
        except queue.Empty:
            break
        function, args = task
        try:
            answer = True, function(*args)
        except BaseException:
            answer = False, traceback.format_exc()
        answers.put((rank, answer))
    dist.destroy_process_group()
