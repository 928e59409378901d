"""Run many configurations in single-thread worker processes, one per core, with a progress bar for each."""

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.harness import limit_threads
from benchmarks.language.plugins import import_again
from benchmarks.language.presets import RunConfig
from benchmarks.language.train import train
from benchmarks.output.records import (
    RESULTS,
    Row,
    WriteError,
    alone,
    append_row,
    partial_path,
    read_rows,
    source_hash,
    unreadable,
)
from benchmarks.output.rows import split_of

REPORT_SECONDS = 0.2


@dataclass
class Worker:
    """A running process with its configuration, its pipe for messages, and its progress bar."""

    config: RunConfig
    process: BaseProcess
    pipe: Connection
    bar: "tqdm[Any]"


class Pool:
    """Runs configurations in worker processes, and appends the row of each finished run to `out/results.jsonl`."""

    def __init__(self, out: Path, size: int) -> None:
        self.out, self.size = out, size
        self.workers: dict[int, Worker] = {}
        self.failures: list[str] = []

    def run(self, configs: list[RunConfig]) -> list[Row]:
        """The rows of the configurations, in order, without failed runs; a configuration on file is not run again.

        Raises `WriteError`, and ends all workers, when a row or a checkpoint cannot be written; `BusyError` when
        another command is at work in the same folder.
        """
        with alone(self.out):
            return self._run(list({config.key: config for config in configs}.values()))

    def _run(self, configs: list[RunConfig]) -> list[Row]:
        done = read_rows(self.results)
        if lost := unreadable(self.results):
            print(lost, file=sys.stderr)
        announce([done[config.key] for config in configs if config.key in done], len(configs), self.results)
        waiting = [config for config in configs if config.key not in done]
        for config in configs:
            if config.key in done:
                self._forget(config)
        limit_threads(1)
        try:
            while waiting or self.workers:
                while waiting and len(self.workers) < self.size:
                    self._start(waiting.pop(0))
                for pipe in wait([worker.pipe for worker in self.workers.values()]):
                    self._listen(next(slot for slot, worker in self.workers.items() if worker.pipe is pipe))
        finally:
            self._stop()
        done = read_rows(self.results)
        return [done[config.key] for config in configs if config.key in done]

    @property
    def results(self) -> Path:
        """The file of finished rows."""
        return self.out / RESULTS

    def _checkpoint(self, config: RunConfig) -> Path:
        return self.out / "checkpoints" / f"{config.key}.pt"

    def _start(self, config: RunConfig) -> None:
        slot = next(slot for slot in range(self.size) if slot not in self.workers)
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(config, self._checkpoint(config), theirs), daemon=True)
        with _interrupts_ignored():
            process.start()
        theirs.close()
        total, interval = config.preset.steps, 0.2 if sys.stderr.isatty() else 10
        bar = tqdm(total=total, desc=config.label, position=slot, leave=False, unit="step", mininterval=interval)
        self.workers[slot] = Worker(config, process, ours, bar)

    def _listen(self, slot: int) -> None:
        """Handle one message of a worker: progress, a row, an error; or the end of the process without a message."""
        worker = self.workers[slot]
        try:
            kind, content = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join()
            kind, content = "error", _death(worker.process.exitcode)
        if kind == "progress":
            step, loss, speed = content
            worker.bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s", refresh=False)
            worker.bar.update(step - worker.bar.n)
            return
        self._finish(slot, content if kind == "row" else None)
        if kind == "error":
            self.failures.append(worker.config.label)
            tqdm.write(f"{worker.config.label} failed: {content}", file=sys.stderr)
        if kind == "unwritable":
            raise WriteError(content)

    def _finish(self, slot: int, row: Row | None) -> None:
        worker = self.workers.pop(slot)
        worker.process.join()
        worker.pipe.close()
        worker.bar.close()
        if row:
            append_row(self.results, row)
            self._forget(worker.config)
            tqdm.write(f"{worker.config.label}: {summary(row)}")

    def _forget(self, config: RunConfig) -> None:
        """Delete the checkpoint of a run whose row is on file, and any partial file of a killed process."""
        self._checkpoint(config).unlink(missing_ok=True)
        partial_path(self._checkpoint(config)).unlink(missing_ok=True)

    def _stop(self) -> None:
        """End all workers that still run; the checkpoints stay."""
        for worker in self.workers.values():
            worker.process.terminate()
            worker.process.join()
            worker.bar.close()
        self.workers.clear()


def summary(row: Row) -> str:
    """The outcome of a run in a few words."""
    if row["status"] == "diverged":
        return f"diverged at step {row['steps_done']}"
    return f"{split_of(row)} loss {row['final_loss']:.4f}, {row['tokens_per_second']:,.0f} tokens/s"


def default_size(device: str) -> int:
    """One worker per usable core, or a single one on a GPU."""
    if device != "cpu":
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _death(exitcode: int | None) -> str:
    """The message for a process that ended without a row and without an error."""
    how = "died"
    if exitcode is not None and exitcode < 0:
        how = f"was killed by signal {-exitcode}, perhaps for want of memory"
    return f"the worker process {how}; the same command runs it again"


def announce(reused: list[Row], total: int, path: Path) -> None:
    """Say how many runs are on file, and whether the code has changed since."""
    if not reused:
        return
    print(f"{len(reused)} of {total} runs are already in {path}.")
    if any(row["source"] != source_hash() for row in reused):
        print("Some of them were made by other versions of the code; to do them again, give another --out.")


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Processes started in this block ignore Ctrl-C; the parent process ends them."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _work(config: RunConfig, checkpoint: Path, pipe: Connection) -> None:
    """Body of a worker process: do the run, and send progress, then a row or an error."""
    torch.set_num_threads(1)
    with suppress(BrokenPipeError):
        try:
            import_again(config.plugins)
            pipe.send(("row", train(config, checkpoint, _throttled(pipe))))
        except BrokenPipeError:
            raise
        except WriteError as error:
            pipe.send(("unwritable", str(error)))
        except Exception:
            pipe.send(("error", traceback.format_exc()))


def _throttled(pipe: Connection) -> Callable[[int, float, float], None]:
    """A progress callback that writes to the pipe a few times a second."""
    last = 0.0

    def report(step: int, loss: float, speed: float) -> None:
        nonlocal last
        if time.monotonic() - last > REPORT_SECONDS:
            last = time.monotonic()
            pipe.send(("progress", (step, loss, speed)))

    return report
