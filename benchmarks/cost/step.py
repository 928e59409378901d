"""`python -m benchmarks step`: the time of `optimizer.step()`, normopt's and the peers' in turn in one process."""

import argparse
import math
import random
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cost.contenders import REFRESH, REFRESHED, SCALE, SIDE, Maker, Parameters, Replay, installed, tensors
from benchmarks.cost.machine import Clock, clock_of, machine, refuse_sleeping_threads, threads_text
from benchmarks.cost.step_report import write_step
from benchmarks.harness import PlanError, in_new_process, state_bytes
from benchmarks.output.records import Row, append_row, read_rows
from normopt.nn import GPT


def gpt(vocabulary: int, width: int, layers: int, heads: int, inner: int) -> nn.Module:
    """A GPT, for its parameters: the model never runs."""
    return GPT(vocabulary, width, layers, heads, d_ff=inner)


def matrices(count: int, m: int, n: int) -> list[nn.Parameter]:
    """A plain list of `count` matrices, m x n."""
    return [nn.Parameter(torch.randn(m, n) / math.sqrt(n)) for _ in range(count)]


#: Makers of the parameters by the name of the set.
SETS: dict[str, Callable[[], Parameters]] = {
    "two": partial(matrices, 2, 8, 6),
    "many": partial(matrices, 200, 16, 16),
    "matrices": partial(matrices, 48, 64, 64),
    "quick": partial(gpt, 256, 96, 4, 3, 384),
    "small": partial(gpt, 512, 64, 12, 2, 256),
    "wide": partial(gpt, 8192, 512, 6, 8, 2048),
    "gpt2": partial(gpt, 50304, 768, 12, 12, 2048),
    "smoke": partial(gpt, 16, 8, 2, 2, 32),
}
#: The families and the numbers of matrices of the set `SCALE`.
SCALE_FAMILIES = ("adamw", "sgd", "muon", "lion")
COUNTS, SMOKE_COUNTS = (10, 100, 1000, 5000), (2, 20)
GRADIENTS = 3
#: Seconds: shorter steps are timed in blocks of at least that length; what a contender's turns take together, unless
#: these are the fewest; and the most steps of a block.
SHORT, BUDGET, LONGEST_BLOCK = 1e-3, 2.0, 100
FEWEST = 5  # turns of a contender, of one with refreshes a period


#: The file of rows.
ROWS = "step.jsonl"


def benchmark_step(parsed: argparse.Namespace) -> int:
    """The command: a new process for each thread setting and set; then the tables and the plots."""
    refuse_sleeping_threads()
    if parsed.device.startswith("cuda") and not torch.cuda.is_available():
        raise PlanError(f"--device {parsed.device}: torch sees no GPU here. Leave the option out to time the CPU")
    sets, rounds = (["smoke", SCALE], REFRESH) if parsed.smoke else (parsed.sets, parsed.rounds)
    counts = SMOKE_COUNTS if parsed.smoke else COUNTS
    if set(sets) == {SCALE} and not set(parsed.families) & set(SCALE_FAMILIES):
        given, known = ", ".join(parsed.families), ", ".join(SCALE_FAMILIES)
        raise PlanError(f"--families {given}: the set {SCALE} is of {known}. Name one of these, or another set")
    parsed.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for threads in parsed.threads:
        for name in sets:
            arguments = (parsed.families, counts, parsed.compile, rounds, threads, parsed.device, parsed.out)
            rows += in_new_process(threads, measure_set, name, *arguments)
    write_step(with_earlier(rows, parsed.out), parsed.out)
    return 0


def with_earlier(rows: list[Row], out: Path) -> list[Row]:
    """All rows on file from the machine and the torch of these: a family that was measured alone joins the others."""
    same = [(name, rows[0][name]) for name in ("cpu", "flags", "torch", "device")]
    return [row for row in read_rows(out / ROWS).values() if all(row.get(name) == value for name, value in same)]


class Entry:
    """A contender with parameters of its own, and the seconds of its steps."""

    def __init__(self, family: str, name: str, maker: Maker, make: Callable[[], Parameters], device: str = "cpu"):
        torch.manual_seed(0)
        with torch.device(device):
            made = make()
        self.family, self.name, self.tensors = family, name, tensors(made)
        self.optimizer = maker(made)
        self.clock: Clock = clock_of(device)
        #: Seconds of the first step, in which state is made, products are measured and compiled steps are compiled, and
        #: of an ordinary one; operations of the products of one; and the steps of a turn.
        self.first, self.ordinary, self.operations, self.block = 0.0, 0.0, 0, 1
        #: Steps that were made, and the seconds of those that count, a list for each turn.
        self.made, self.turns = 0, list[list[float]]()
        #: The same seconds by the step's place between two refreshes.
        self.by_place: list[list[float]] = [[] for _ in range(REFRESH)]

    def steps(self, count: int) -> list[float]:
        """The seconds of steps, one after the other from the same gradients."""
        stamps = [self.clock.stamp()]
        for _ in range(count):
            self.optimizer.step()
            stamps.append(self.clock.stamp())
        self.made += count
        return self.clock.seconds(stamps)

    def warm_up(self) -> None:
        """The first steps; an ordinary one takes as long as the shortest of four, or of what 1 second allows."""
        (self.first,) = self.steps(1)
        took = self.steps(1)
        while len(took) < 4 and sum(took) < 1.0:
            took += self.steps(1)
        self.ordinary = min(took)
        self.block = block_of(self.ordinary)
        self.operations = self.flops()

    def turn(self) -> None:
        """Time a block of steps. One of several steps is a warm one: a step that does not count goes before."""
        if self.block > 1:
            self.steps(1)
        place, took = self.made, self.steps(self.block)
        self.turns.append(took)
        for i, seconds in enumerate(took):
            self.by_place[(place + i) % REFRESH].append(seconds)

    def flops(self) -> int:
        """Operations of the matrix products of one step; 0 for compiled ones and graphs, which torch cannot count."""
        if getattr(self.optimizer, "compiles", False) or isinstance(self.optimizer.step, Replay):
            return 0
        with FlopCounterMode(display=False) as counter:
            self.steps(1)
        return int(counter.get_total_flops())


def block_of(seconds: float) -> int:
    """How many steps of that length are timed together: one, or as many tens as take `SHORT`, up to `LONGEST_BLOCK`."""
    return 1 if seconds >= SHORT else min(LONGEST_BLOCK, REFRESH * math.ceil(SHORT / (REFRESH * seconds)))


def rounds_within(seconds: float, rounds: int, refreshes: bool) -> int:
    """How many turns of that length are made: `rounds`, or what `BUDGET` allows; with refreshes, whole periods."""
    within = min(rounds, int(BUDGET / seconds))
    return max(1, within // REFRESH) * REFRESH if refreshes else max(FEWEST, within)


def settle_allocator() -> None:
    """Free a large tensor, as every backward pass does: from then on glibc reuses freed memory for the next tensors.

    Before that, glibc maps new pages for each temporary tensor of more than 128 kB, and the system clears every page.
    """
    torch.ones(7 << 20)


def measure_set(
    name: str,
    families: list[str],
    counts: tuple[int, ...],
    compiled: bool,
    rounds: int,
    threads: int | None,
    device: str,
    out: Path,
) -> list[Row]:
    """Body of the process: one row for each contender, written when its family is done; `counts` are of the scale."""
    settle_allocator()
    columns, rows = {"set": name, **machine(threads, device)}, []
    makers = [partial(matrices, count, SIDE, SIDE) for count in counts] if name == SCALE else [SETS[name]]
    for make in makers:
        for family in families:
            if name == SCALE and family not in SCALE_FAMILIES:
                continue
            for entry in measure_family(family, make, compiled, rounds, device):
                rows.append(row_of(entry, columns))
                append_row(out / ROWS, rows[-1])
            print(f"{threads_text(columns)}, {name}, {rows[-1]['tensors']} tensors: {family}", flush=True)
    return rows


def measure_family(
    family: str, make: Callable[[], Parameters], compiled: bool, rounds: int, device: str
) -> list[Entry]:
    """The contenders of a family, after rounds in which each has a turn, in random order."""
    found = installed([family], compiled, graphs=device.startswith("cuda"))
    entries = [Entry(*contender, make, device) for contender in found]
    shared = [torch.empty_like(p) for p in entries[0].tensors]
    for entry in entries:
        for p, gradient in zip(entry.tensors, shared, strict=True):
            p.grad = gradient
    given = [[1e-2 * torch.randn_like(g) for g in shared] for _ in range(GRADIENTS)]
    for entry in entries:
        renew(shared, given[0])
        entry.warm_up()
    longest = max(entry.block * entry.ordinary for entry in entries)
    order, shuffle = list(entries), random.Random(0)
    for i in range(rounds_within(longest, rounds, family in REFRESHED)):
        shuffle.shuffle(order)
        for entry in order:
            renew(shared, given[i % GRADIENTS])
            entry.turn()
    return entries


def renew(shared: list[Tensor], gradients: list[Tensor]) -> None:
    """Copy new gradients to where the gradients of all contenders are."""
    for g, new in zip(shared, gradients, strict=True):
        g.copy_(new)


def row_of(entry: Entry, columns: Row) -> Row:
    """The results of one contender.

    `seconds`: the mean step of each turn; `quartiles` and `mean`: of all steps that count; `worst`: the step at the
    slowest place between two refreshes, by medians over the periods.
    """
    took = [seconds for turn in entry.turns for seconds in turn]
    parameters = sum(p.numel() for p in entry.tensors)
    state: Any = entry.optimizer
    return {
        "key": "-".join([columns["set"], str(len(entry.tensors)), entry.name, columns["asked"], columns["device"]]),
        "family": entry.family,
        "name": entry.name,
        "seconds": [statistics.fmean(turn) for turn in entry.turns],
        "block": entry.block,
        "first": entry.first,
        "quartiles": statistics.quantiles(took, n=4, method="inclusive"),
        "mean": statistics.fmean(took),
        "worst": max(statistics.median(place) for place in entry.by_place if place),
        "flops": entry.operations,
        "state_bytes_per_parameter": state_bytes(state) / parameters,
        "parameters": parameters,
        "tensors": len(entry.tensors),
        **columns,
    }
