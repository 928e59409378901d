"""Accuracy and speed of the methods for polar factors, beside torch.optim.Muon's own Newton-Schulz."""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cost.machine import machine, refuse_sleeping_threads, threads_text
from benchmarks.cost.polar_report import MUON, write_polar
from benchmarks.harness import dtype_name, in_new_process
from benchmarks.output.records import Row, append_row
from normopt.polar import FOUR_STEPS, METHODS, PolarCoefficients, choose, polar

SIZES, RATIOS, COUNTS = (64, 128, 256, 512), (1, 2, 4, 8), (1, 2, 4, 8, 16, 32)
SMOKE_SIZES, SMOKE_COUNTS = (8, 16), (1, 2)
DTYPES = (torch.float32, torch.bfloat16)
BASELINE = "torch.optim.Muon"
#: `low` and `high` are over directions whose singular value is at least this fraction of the largest one.
KEPT = 1e-2

Case = tuple[int, int, int]
Key = TypeVar("Key")


@dataclass(frozen=True)
class Contender:
    """A method for polar factors: name, dtype of the matrix products, form, and the function that runs the method."""

    name: str
    dtype: str
    form: str
    run: Callable[[Tensor], Tensor]


def benchmark_polar(parsed: argparse.Namespace) -> int:
    """The command: measure all cases in a new process for each thread setting, then write the tables and the plots."""
    refuse_sleeping_threads()
    sizes = tuple(parsed.sizes or (SMOKE_SIZES if parsed.smoke else SIZES))
    repeats, counts = (2, SMOKE_COUNTS) if parsed.smoke else (parsed.repeats, COUNTS)
    rows: list[Row] = []
    for threads in parsed.threads:
        rows += in_new_process(threads, measure_all, cases(sizes, counts), repeats, threads, parsed.out)
    write_polar(rows, parsed.out)
    return 0


def cases(sizes: tuple[int, ...], counts: tuple[int, ...]) -> list[Case]:
    """Shapes (matrices, short, long): one matrix of each size and aspect ratio, and many of the second size, 4:1."""
    one = [(1, size, ratio * size) for size in sizes for ratio in RATIOS]
    many = sorted(sizes)[min(1, len(sizes) - 1)]
    return list(dict.fromkeys(one + [(count, many, 4 * many) for count in counts]))


def measure_all(shapes: list[Case], repeats: int, threads: int | None, out: Path) -> list[Row]:
    """Body of the process: the rows of all cases, each appended to `polar.jsonl` as soon as it is measured."""
    columns, rows = machine(threads), []
    with torch.no_grad():
        for shape in shapes:
            print(f"{threads_text(columns)}: {' x '.join(map(str, shape))}", flush=True)
            for row in measure(shape, repeats, columns):
                append_row(out / "polar.jsonl", row)
                rows.append(row)
    return rows


def measure(shape: Case, repeats: int, columns: Row) -> list[Row]:
    """One row for each contender on matrices of one shape, with `columns` of the machine."""
    torch.manual_seed(0)
    g = torch.randn(shape)
    contenders = contenders_for(shape)
    timed: dict[Contender | torch.dtype, Callable[[], Tensor]] = {c: functools.partial(c.run, g) for c in contenders}
    for dtype in DTYPES:
        timed[dtype] = _product(g.to(dtype))
    seconds = interleaved(timed, repeats)
    test_matrices = spectra(*shape[1:])
    baseline = seconds[contenders[0]]
    product = 2 * shape[0] * shape[1] ** 2 * shape[2]
    rows = []
    for contender in contenders:
        took = seconds[contender]
        rows.append(
            {
                "key": f"{contender.name}-{contender.dtype}-{shape}-{columns['asked']}",
                "method": contender.name,
                "dtype": contender.dtype,
                "form": contender.form,
                "shape": list(shape),
                "seconds": statistics.median(took),
                "ratio": statistics.median(ours / theirs for ours, theirs in zip(took, baseline, strict=True)),
                "flops": count_flops(contender, g),
                "product_rate": product / min(seconds[getattr(torch, contender.dtype)]),
                **accuracy(contender, test_matrices),
                "repeats": repeats,
                **columns,
            }
        )
    return rows


def contenders_for(shape: Case) -> list[Contender]:
    """torch's loop over single matrices, then every method in every dtype that its matrix products can have."""
    found = [Contender(BASELINE, "bfloat16", "direct", _torchs)]
    methods: dict[str, str | PolarCoefficients] = {name: name for name in METHODS if name not in ("exact", "auto")}
    for name, method in {**methods, "four steps": FOUR_STEPS}.items():
        form = "gram" if name == "gram" else "direct"
        for dtype in DTYPES:
            run = lambda g, method=method, dtype=dtype: polar(g, method, dtype=dtype)  # noqa: E731
            found.append(Contender(name, dtype_name(dtype), form, run))
    for name, method in (("auto", "auto"), (MUON, "newton-schulz")):
        choice = choose(shape, torch.float32, "cpu", method, None, "auto")
        run = lambda g, method=method: polar(g, method, dtype="auto")  # noqa: E731
        found.append(Contender(name, dtype_name(choice.dtype), choice.form, run))
    return [*found, Contender("exact", "float32", "exact", lambda g: polar(g, "exact"))]


def _torchs(g: Tensor) -> Tensor:
    factors = [_zeropower_via_newtonschulz(matrix, (3.4445, -4.7750, 2.0315), 5, 1e-7) for matrix in g]
    return torch.stack(factors).to(g.dtype)


def _product(x: Tensor) -> Callable[[], Tensor]:
    square = x[..., : x.shape[-2]].contiguous()
    return lambda: torch.bmm(square, x)


def interleaved(timed: dict[Key, Callable[[], Tensor]], repeats: int) -> dict[Key, list[float]]:
    """Seconds of each call; a round times every call once, and the first round is not counted."""
    seconds: dict[Key, list[float]] = {key: [] for key in timed}
    for counted in range(repeats + 1):
        for key, call in timed.items():
            start = time.perf_counter()
            call()
            if counted:
                seconds[key].append(time.perf_counter() - start)
    return seconds


def count_flops(contender: Contender, g: Tensor) -> int:
    """Operations of the matrix products of a call, and, for eigenvalues, 9 m^3 (Golub & Van Loan, section 8.3)."""
    with FlopCounterMode(display=False) as counter:
        contender.run(g)
    matrices, short, _ = g.shape
    return int(counter.get_total_flops()) + (9 * matrices * short**3 if contender.form == "exact" else 0)


def spectra(m: int, n: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Matrices in float32 with their float64 decompositions: Gaussian, and spectra 1/k and log-uniform in [1e-3, 1]."""
    torch.manual_seed(1)
    values = [1 / torch.arange(1, m + 1, dtype=torch.float64), 10 ** (-3 * torch.rand(m, dtype=torch.float64))]
    left, right = (torch.linalg.qr(torch.randn(side, m, dtype=torch.float64)).Q for side in (m, n))
    matrices = [torch.randn(m, n), *(((left * s) @ right.mT).float() for s in values)]
    return [(g, *torch.linalg.svd(g.double(), full_matrices=False)) for g in matrices]


def accuracy(contender: Contender, matrices: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> dict[str, float]:
    """How close the results are to polar factors, the worst case over the spectra.

    `low` and `high`: the result's extreme singular values over the kept directions; `ascent`: the least
    <g, d> / nuclear norm of g; `distance`: relative distance to the exact factor, for the Gaussian matrix.
    """
    lows, highs, ascents, distances = [], [], [], []
    for g, u, s, vh in matrices:
        d = contender.run(g.unsqueeze(0)).squeeze(0).double()
        kept = s >= KEPT * s[0]
        ends = torch.linalg.svdvals(u[:, kept].mT @ d @ vh[kept].mT)
        lows.append(float(ends.min()))
        highs.append(float(ends.max()))
        ascents.append(float((g.double() * d).sum() / s.sum()))
        distances.append(float((d - u @ vh).norm() / len(s) ** 0.5))
    return {"low": min(lows), "high": max(highs), "ascent": min(ascents), "distance": distances[0]}
