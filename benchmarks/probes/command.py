"""`python -m benchmarks probes`: the probes asked of normopt's optimizers and of the peers that are installed."""

import argparse
import math
import re
import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from tabulate import tabulate
from torch.optim import Optimizer

import normopt
from benchmarks import peers
from benchmarks.contenders import BARE, Contender, read_contenders
from benchmarks.harness import PlanError, origin
from benchmarks.output.records import Row, append_row, replacing
from benchmarks.output.tables import command_line, set_aside
from benchmarks.probes.parts import Make
from benchmarks.probes.torch_contract import LIMITS, PROBES
from normopt import SteepestDescent

#: One optimizer of each family.
REPRESENTATIVES = ("sgd", "adamw", "lion", "adafactor", "adamp", "muon", "scion", "soap", "prodigy")
SMOKE = ("adamw", "torch:AdamW")
SLOW = {"compile_recompilations", "compile_fullgraph", "sharded_step"}
NOTES = (
    "Each optimizer with the defaults of its library, on two small matrices; ✓ and ✗ for passed and failed, and the "
    "number where the probe measures one (recompilations after the third step; the part of the way in float64 that "
    "bfloat16 weights go). An exception counts as a failure. What each failure costs a user:"
)


#: Optimizers of other libraries, of which those that are installed are asked by default.
PEERS = (
    "torch:AdamW",
    "torch:Muon",
    "torch:Adafactor",
    "pytorch_optimizer:Muon",
    "pytorch_optimizer:SCION",
    "pytorch_optimizer:SOAP",
    "pytorch_optimizer:Prodigy",
    "pytorch_optimizer:Lion",
    "prodigyopt:Prodigy",
    "lion_pytorch:Lion",
    "adamp:AdamP",
    "schedulefree:AdamWScheduleFree",
    "dadaptation:DAdaptAdam",
)


def probe_all(parsed: argparse.Namespace) -> int:
    """The command: run every probe on every optimizer, write a row for each answer, then the tables."""
    torch.set_num_threads(1)
    names = parsed.optimizers or [*(["all"] if parsed.all else REPRESENTATIVES), *installed(PEERS)]
    asked = [*contenders(SMOKE if parsed.smoke else names)]
    probes = [name for name in PROBES if not (parsed.smoke and name in SLOW)]
    measured_with = origin()
    set_aside(parsed.out / "probes.md", "probes.jsonl")
    (parsed.out / "probes.jsonl").unlink(missing_ok=True)
    rows = []
    for contender, make in asked:
        print(contender.name, flush=True)
        for probe in probes:
            rows.append(ask(contender.name, make, probe) | {"base": contender.base} | measured_with)
            append_row(parsed.out / "probes.jsonl", rows[-1])
    write_probes(rows, parsed.out)
    return 0


def contenders(texts: Iterable[str]) -> Iterator[tuple[Contender, Make]]:
    """What `--optimizers` names, as for `compare`, and the maker of each.

    Raises:
        PlanError: an unknown name; an option `rest`, which is for whole models.
    """
    for contender in read_contenders(texts, ()):
        if "rest" in contender.options:
            raise PlanError(f"--optimizers {contender.name}: rest is for whole models; probes have two matrices")
        yield contender, partial(_made, contender)


def installed(names: Iterable[str]) -> list[str]:
    """Those optimizers `library:Class` whose library is installed."""
    return [name for name in names if find_spec(name.partition(":")[0])]


def _made(contender: Contender, params: Any, **options: Any) -> Optimizer:
    base, options = contender.base, {**peers.tuples(contender.options), **options}
    if not peers.is_peer(base):
        return (SteepestDescent if base == BARE else partial(normopt.create, base))(params, **options)
    if base in peers.FLAGS:
        groups = params if isinstance(params[0], dict) else [{"params": params}]
        params = [{peers.FLAGS[base]: True, **group} for group in groups]
    cls: Any = peers.find(base)
    optimizer = cls(params, **options)
    if hasattr(optimizer, "train"):
        optimizer.train()  # schedule-free optimizers require this call before a step
    return cast(Optimizer, optimizer)


def ask(name: str, make: Make, probe: str) -> Row:
    """The answer of one optimizer to one probe."""
    value, detail = None, ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            value = PROBES[probe](make)
            value, detail = (None, "not a number") if math.isnan(value) else (value, "")
        except Exception as error:
            detail = re.sub(r"\x1b\[\d*m", "", f"{type(error).__name__}: {error}").split("\n")[0][:200]
    passed = False if value is None else LIMITS.get(probe, bool)(value)
    row = {"key": f"{name}-{probe}", "optimizer": name, "probe": probe, "passed": passed, "value": value}
    return row | ({"detail": detail} if detail else {})


def write_probes(rows: list[Row], out: Path) -> None:
    """Print a table of normopt's optimizers and one of the peers, and write both to `probes.md`."""
    ours, theirs = ([r for r in rows if peers.is_peer(r["base"]) == is_theirs] for is_theirs in (False, True))
    tables = [table(part, title) for part, title in ((ours, "normopt"), (theirs, "other libraries")) if part]
    print("\n" + "\n\n".join(tables))
    meaning = "\n".join(f"* `{probe}`: {PROBES[probe].__doc__}" for probe in dict.fromkeys(r["probe"] for r in rows))
    failures = "\n".join(f"* `{row['key']}`: {row['detail']}" for row in rows if "detail" in row)
    parts = [
        f"`{command_line()}`",
        f"torch {rows[0]['torch']}. {NOTES}",
        meaning,
        *tables,
        f"Exceptions:\n\n{failures}",
    ]
    with replacing(out / "probes.md") as unfinished:
        unfinished.write_text("\n\n".join(parts) + "\n")
    print(f"Written to {out}: probes.md and probes.jsonl")


def table(rows: list[Row], title: str) -> str:
    """A row for each probe, a column for each optimizer, and the number of probes passed."""
    names, probes = list(dict.fromkeys(r["optimizer"] for r in rows)), list(dict.fromkeys(r["probe"] for r in rows))
    cells = {(row["probe"], row["optimizer"]): row for row in rows}
    lines = [[probe, *(cell(cells[probe, name]) for name in names)] for probe in probes]
    passed = [sum(cells[probe, name]["passed"] for probe in probes) for name in names]
    lines.append([f"passed, of {len(probes)}", *map(str, passed)])
    headers, align = [title, *(name.replace(":", ": ") for name in names)], ["left", *["center"] * len(names)]
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True, colalign=align)


def cell(row: Row) -> str:
    """A mark, with the measured number if there is one."""
    mark = "✓" if row["passed"] else "✗"
    return f"{mark} {row['value']:.2g}" if row["probe"] in LIMITS and row["value"] is not None else mark
