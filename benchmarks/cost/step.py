"""`python -m benchmarks step`: the time of `optimizer.step()`, normopt's and the peers' in turn in one process."""

import argparse
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cost.contenders import Maker, installed
from benchmarks.cost.step_report import write_step
from benchmarks.harness import dtype_name, in_new_process, origin, state_bytes
from benchmarks.output.records import Row, append_row
from normopt.nn import GPT

#: Parameters of a GPT: vocabulary, width, layers, heads, width of the MLP. The model never runs.
SETS: dict[str, tuple[int, int, int, int, int]] = {
    "smoke": (16, 8, 2, 2, 32),
    "quick": (256, 96, 4, 3, 384),
    "small": (512, 64, 12, 2, 256),
    "wide": (8192, 512, 6, 8, 2048),
    "gpt2": (50304, 768, 12, 12, 2048),
}
WARMUPS, GRADIENTS = 3, 3


def benchmark_step(parsed: argparse.Namespace) -> int:
    """The command: time all contenders, in a new process for each set, then write the table and the plot."""
    sets, rounds = (["smoke"], 3) if parsed.smoke else (parsed.sets, parsed.rounds)
    parsed.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for name in sets:
        arguments = (name, parsed.families, parsed.compile, rounds, parsed.threads, parsed.out)
        rows += in_new_process(parsed.threads, measure_set, *arguments)
    write_step(rows, parsed.out)
    return 0


class Entry:
    """A contender with a model of its own, and the seconds of its steps."""

    def __init__(self, family: str, name: str, maker: Maker, sizes: tuple[int, ...]) -> None:
        torch.manual_seed(0)
        self.family, self.name, self.model = family, name, make_parameters(sizes)
        self.optimizer = maker(self.model)
        self.seconds: list[float] = []
        #: Seconds of the first step, in which state is made, products are measured and compiled steps are compiled.
        self.first = 0.0

    def step(self, gradients: list[Tensor]) -> float:
        """One step from new gradients, copied before the clock starts; returns its seconds."""
        for p, g in zip(self.model.parameters(), gradients, strict=True):
            p.grad = g.clone() if p.grad is None else p.grad.copy_(g)
        start = time.perf_counter()
        self.optimizer.step()
        return time.perf_counter() - start

    def flops(self, gradients: list[Tensor]) -> int:
        """Operations of the matrix products of one step; 0 for compiled steps, which torch cannot count."""
        if getattr(self.optimizer, "compiles", False):
            return 0
        with FlopCounterMode(display=False) as counter:
            self.step(gradients)
        return int(counter.get_total_flops())


def make_parameters(sizes: tuple[int, ...]) -> nn.Module:
    """The parameters of a GPT."""
    vocabulary, width, layers, heads, inner = sizes
    return GPT(vocabulary, width, layers, heads, d_ff=inner)


def settle_allocator() -> None:
    """Free a large tensor, as every backward pass does: from then on glibc reuses freed memory for the next tensors.

    Before that, glibc maps new pages for each temporary tensor of more than 128 kB, and the system clears every page.
    """
    torch.ones(7 << 20)


def measure_set(name: str, families: list[str], compiled: bool, rounds: int, threads: int, out: Path) -> list[Row]:
    """Body of the process: one row for each contender, timed in rounds of one step each, in random order."""
    torch.set_num_threads(threads)
    settle_allocator()
    entries = [Entry(*contender, SETS[name]) for contender in installed(families, compiled)]
    gradients = [[1e-2 * torch.randn_like(p) for p in entries[0].model.parameters()] for _ in range(GRADIENTS)]
    for i in range(WARMUPS):
        for entry in entries:
            took = entry.step(gradients[i])
            entry.first = took if i == 0 else entry.first
    flops = {entry.name: entry.flops(gradients[0]) for entry in entries}
    order, shuffle = list(entries), random.Random(0)
    for i in range(rounds):
        shuffle.shuffle(order)
        print(f"{name}: round {i + 1} of {rounds}", flush=True)
        for entry in order:
            entry.seconds.append(entry.step(gradients[i % GRADIENTS]))
    rate = product_rate(SETS[name][1])
    rows = [row_of(name, entry, flops[entry.name], rate, threads) for entry in entries]
    for row in rows:
        append_row(out / "step.jsonl", row)
    return rows


def row_of(set_name: str, entry: Entry, flops: int, rate: dict[str, float], threads: int) -> Row:
    """The results of one contender."""
    parameters = sum(p.numel() for p in entry.model.parameters())
    low, median, high = statistics.quantiles(entry.seconds, n=4, method="inclusive")
    state: Any = entry.optimizer
    return {
        "key": f"{set_name}-{entry.name}-{threads}",
        "set": set_name,
        "family": entry.family,
        "name": entry.name,
        "seconds": entry.seconds,
        "first": entry.first,
        "quartiles": [low, median, high],
        "mean": statistics.fmean(entry.seconds),
        "flops": flops,
        "product_rate": rate,
        "state_bytes_per_parameter": state_bytes(state) / parameters,
        "parameters": parameters,
        "threads": threads,
        **origin(),
    }


def product_rate(width: int, seconds: float = 0.3) -> dict[str, float]:
    """Operations a second of (width x width) by (width x 4 width) products, the best of those made in `seconds`."""
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(width, width).to(dtype), torch.randn(width, 4 * width).to(dtype)
        took, end = [], time.perf_counter() + seconds
        while time.perf_counter() < end or len(took) < 3:
            start = time.perf_counter()
            torch.mm(a, b)
            took.append(time.perf_counter() - start)
        rates[dtype_name(dtype)] = 8 * width**3 / min(took)
    return rates
