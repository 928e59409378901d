"""Command line of the benchmarks."""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from benchmarks.arguments import (
    among,
    list_of,
    options,
    positive_float,
    positive_int,
    rates_by_name,
    share,
    tens,
    threads,
    whole,
)
from benchmarks.output.records import BusyError, WriteError

DEFAULT_OPTIMIZERS = "adamw,muon,scion,signum"
MODEL_NAMES = ("gpt", "angpt", "ngpt")
PRESET_NAMES = ("quick", "standard", "gpt2")
PARALLEL = ("ddp", "fsdp2", "fsdp2+tp")
STEP_SETS = ("two", "many", "matrices", "quick", "small", "wide", "scale", "gpt2")
WIRE_MODELS = ("gpt2-124m", "gpt2-1.5b", "llama3-8b")
WIRE_RANKS = (2, 4, 8, 16, 64, 256, 1024)
OPTIMIZERS = """names, separated by commas, of: all (those of normopt); patterns like '*muon*'; optimizers of torch and
of other installed libraries, like torch:AdamW, torch:*, lion_pytorch:Lion; own combinations, like
mine=muon(momentum=0.9,nesterov=False) or new=SteepestDescent(norm="Chain(Row(), Spectral())",momentum=0.95).
control:* are negative controls, Muon with one thing spoiled.
torch:Muon takes matrices only: all other tensors get torch's AdamW at half its rate, as under normopt's Muon
(rest={{"lr_ratio":1.0}} sets options of that AdamW, and pairs any other library's optimizer with it).
Default: {}"""
GEOMETRY_NAMES = ("adam", "muon-max1", "muon-adamw", "muon-rms", "scion", "modula", "muonh")
FAMILIES = (
    *("adamw", "sgd", "signum", "rmsprop", "muon", "normuon", "scion", "soap", "shampoo", "prodigy", "lion", "adamp"),
    "adafactor",
)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns its exit code: 0, 1 when a run failed or a file could not be written, 130 when
    interrupted.
    """
    parser = make_parser()
    parsed = parser.parse_args(arguments)
    missing = [name for name in ("matplotlib", "scipy", "tabulate", "tqdm") if find_spec(name) is None]
    if missing:
        parser.error(f"{', '.join(missing)} not installed: pip install -e '.[bench]'")
    parsed.out = parsed.out or Path("runs") / ("smoke" if parsed.smoke else parsed.preset)
    try:
        return _run(parser, parsed)
    except KeyboardInterrupt:
        print(f"\nInterrupted. Finished runs are in {parsed.out}; the same command continues.", file=sys.stderr)
        return 130
    except WriteError as error:
        remedy = f"Finished runs are in {parsed.out}; make room there, and the same command continues."
        print(f"\n{error}. {remedy}", file=sys.stderr)
        return 1


def _run(parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> int:
    from benchmarks.cost.polar import benchmark_polar
    from benchmarks.cost.step import benchmark_step
    from benchmarks.cost.wire import benchmark_wire
    from benchmarks.harness import PlanError
    from benchmarks.language.compare import compare
    from benchmarks.language.data import DataError
    from benchmarks.language.grid import grid
    from benchmarks.language.norms import norms
    from benchmarks.language.page import page
    from benchmarks.language.report import report
    from benchmarks.language.sweep import sweep
    from benchmarks.language.transfer import transfer
    from benchmarks.probes.command import probe_all

    trained = {"compare": compare, "grid": grid, "sweep": sweep, "norms": norms, "transfer": transfer}
    run = {
        **trained,
        "report": page if getattr(parsed, "html", False) else report,
        "polar": benchmark_polar,
        "step": benchmark_step,
        "probes": probe_all,
    }
    run["wire"] = benchmark_wire
    try:
        return run[parsed.command](parsed)
    except (BusyError, DataError, PlanError) as error:
        parser.error(str(error))


def make_parser() -> argparse.ArgumentParser:
    """The parser with its commands."""
    description = "Train a small GPT on real text with several optimizers."
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=description)
    commands = parser.add_subparsers(dest="command", required=True)
    compare = commands.add_parser("compare", help="same batches, same initial weights, each at its tuned rate")
    _add_shared(compare, seeds=1)
    compare.add_argument("--lr", type=rates_by_name, default={}, help="learning rates, like muon=0.01,adamw=3e-3")
    lengths = "other lengths to run too, for the steps to a target, like 150,300"
    compare.add_argument("--horizons", type=list_of(positive_int, "150,300"), default=[], help=lengths)
    jobs = "how processes train one model: torchrun --nproc-per-node 4 -m benchmarks compare --parallel fsdp2"
    compare.add_argument("--parallel", choices=PARALLEL, default="", help=jobs)
    which = "the held-out text that losses are taken on; test (default) is for reports, validation for choices"
    compare.add_argument("--split", choices=("test", "validation"), default="test", help=which)
    grid = commands.add_parser("grid", help="a fixed grid of learning rates for each optimizer")
    _add_shared(grid, seeds=2)
    grid.add_argument("--rates", type=list_of(positive_float, "1e-3,1e-2"), help="default: tuned x 1/4, 1/2, 1, 2")
    sweep = commands.add_parser("sweep", help="tune every optimizer by one protocol, with the same number of trials")
    _add_shared(sweep, seeds=None)
    sweep.add_argument("--trials", type=positive_int, default=16, help="of each optimizer; default: 16")
    length = "their length; default: a quarter of the full one, the shortest of compare --horizons 150,300"
    sweep.add_argument("--trial-steps", type=positive_int, help=length)
    norms = commands.add_parser("norms", help="norms inside the models over training: residual stream, rows, alpha")
    _add_shared(norms, seeds=1, optimizers="adamw", models=",".join(MODEL_NAMES))
    norms.add_argument("--lr", type=rates_by_name, default={}, help="learning rates, like adamw@angpt=3e-3")
    _add_transfer(commands.add_parser("transfer", help="does the best learning rate hold when models grow?"))
    _add_report(commands.add_parser("report", help="tables and plots of runs on file, whatever commands made them"))
    _add_polar(commands.add_parser("polar", help="accuracy and speed of polar factors, without any training"))
    _add_step(commands.add_parser("step", help="what a step costs, beside other libraries, without any training"))
    _add_wire(commands.add_parser("wire", help="bytes that sharded steps send, counted for any number of ranks"))
    _add_probes(commands.add_parser("probes", help="what users take for granted, asked of ours and of other libraries"))
    return parser


def _add_transfer(parser: argparse.ArgumentParser) -> None:
    _add_shared(parser, seeds=2, models="gpt,angpt", sized=False)
    add = parser.add_argument
    known = f"of {', '.join(GEOMETRY_NAMES)}, or what --optimizers of compare takes; default: all of these names"
    add("--geometries", type=list_of(str, "adam,scion"), default=list(GEOMETRY_NAMES), help=known)
    add(
        "--widths",
        type=list_of(positive_int, "64,128"),
        help="d_model, with heads of one size; default: 64,128,256,512",
    )
    depths = "numbers of layers, at --depth-width; 0: none; default: 2,4,8"
    add("--depths", type=list_of(whole, "2,4"), help=depths)
    add("--depth-width", type=positive_int, help="d_model of all depths; default: 128")
    rates = "the same for all; default: the tuned rate and octaves around it, until the best has neighbours"
    add("--rates", type=list_of(positive_float, "1e-3,2e-3"), help=rates)


def _add_report(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--runs", type=list_of(Path, "runs/one,runs/two"), required=True, help="folders of results, separated by commas"
    )
    add("--data", default="shakespeare", help="their text; default: shakespeare")
    add("--readme", type=Path, help="a Markdown file: put the headline between the two comments that mark its place")
    add("--html", action="store_true", help="one page, report.html, in place of the tables; any texts, all commands")
    add("--out", type=Path, help="folder for tables and plots; default: runs/report")
    parser.set_defaults(preset="report", smoke=False)


def _add_probes(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    default = "one of each family, and those of other libraries that are installed"
    add("--optimizers", type=list_of(str, "muon,torch:Muon"), help=OPTIMIZERS.format(default))
    add("--all", action="store_true", help="all of normopt's optimizers in place of one of each family")
    add("--out", type=Path, help="folder for the results; default: runs/probes")
    add("--smoke", action="store_true", help="two optimizers, without the slow probes: does everything work?")
    parser.set_defaults(preset="probes")


def _add_step(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    some = f"of {', '.join(STEP_SETS)} (see docs/benchmark.md); default: all but gpt2"
    add("--sets", type=among(STEP_SETS), default=STEP_SETS[:-1], help=some)
    add("--families", type=among(FAMILIES), default=FAMILIES, help=f"of {', '.join(FAMILIES)}; default: all")
    most = (
        "turns of each optimizer at most, a multiple of 10; where steps are long, 5, or 10 with refreshes; default: 30"
    )
    add("--rounds", type=tens, default=30, help=most)
    add("--compile", action="store_true", help="time normopt's compiled too, which takes minutes to compile")
    _add_threads(parser)
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add("--out", type=Path, help="folder for the results; default: runs/step")
    add("--smoke", action="store_true", help="tiny sets and ten rounds: does everything work?")
    parser.set_defaults(preset="step")


def _add_wire(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--models", type=among(WIRE_MODELS), default=WIRE_MODELS, help=f"of {', '.join(WIRE_MODELS)}; default: all")
    counts = ",".join(map(str, WIRE_RANKS))
    add("--ranks", type=list_of(positive_int, "2,4,8"), default=WIRE_RANKS, help=f"default: {counts}")
    add("--out", type=Path, help="folder for the results; default: runs/wire")
    add("--smoke", action="store_true", help="a tiny model on few ranks: does everything work?")
    parser.set_defaults(preset="wire")


def _add_polar(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--sizes", type=list_of(positive_int, "64,128"), help="shorter sides; default: 64,128,256,512")
    add("--repeats", type=positive_int, default=15, help="timings of each method; default: 15")
    _add_threads(parser)
    add("--out", type=Path, help="folder for the results; default: runs/polar")
    add("--smoke", action="store_true", help="small matrices and two repeats: does everything work?")
    parser.set_defaults(preset="polar")


def _add_threads(parser: argparse.ArgumentParser) -> None:
    said = "numbers of threads, each measured in processes of its own; default is torch's; default: default,1"
    parser.add_argument("--threads", type=list_of(threads, "default,1"), default=[None, 1], help=said)


def _add_shared(
    parser: argparse.ArgumentParser,
    seeds: int | None,
    optimizers: str = DEFAULT_OPTIMIZERS,
    models: str = "gpt",
    sized: bool = True,
) -> None:
    """Arguments of the commands that train; not `sized`: the command has names for optimizers and sizes of its own."""
    add = parser.add_argument
    if sized:
        read = list_of(str, DEFAULT_OPTIMIZERS)
        add("--optimizers", type=read, default=optimizers, help=OPTIMIZERS.format(optimizers))
        add("--width", type=positive_int, help="d_model, with heads of the preset's size; default: the preset's")
    imported = "a Python file that is imported first, like my_norm.py; may be given several times"
    add("--plugin", type=Path, action="append", default=[], metavar="FILE", help=imported)
    tuned = "options by name, in the place of or beside those of tuned.json; sweep's chosen.json is such a file"
    add("--tuned", type=Path, metavar="FILE", help=tuned)
    add(
        "--model",
        type=among(MODEL_NAMES),
        default=models,
        help=f"one or more of {', '.join(MODEL_NAMES)}; default: {models}",
    )
    add("--preset", choices=PRESET_NAMES, default="quick")
    add("--model-options", type=options, default={}, help="arguments of the model, like gate_scale=1.0,lerp=False")
    add("--batch", type=positive_int, help="sequences a step; default: the preset's")
    known = "shakespeare (default), sympy, stdlib, a text file, or a pattern of .bin shards"
    add("--data", default="shakespeare", help=known)
    add("--steps", type=positive_int, help="length of the runs; default: the preset's")
    add("--warmup", type=whole, help="steps of warm-up; default: the preset's, none for angpt and ngpt")
    add("--decay", type=share, help="the part of a run over which the rate falls to 0; default: the preset's")
    add("--evaluations", type=positive_int, help="points of the loss curve; default: the preset's")
    if seeds:
        add("--seeds", type=positive_int, default=seeds, help=f"runs per setting; default: {seeds}")
    add("--out", type=Path, help="folder for results and checkpoints; default: runs/PRESET")
    add("--device", default="auto", help="auto (default: CUDA when there is one), cpu, cuda")
    add("--workers", type=positive_int, help="runs at a time; default: one per core, one on a GPU")
    add("--smoke", action="store_true", help="a tiny model and few steps: does everything work?")
    parser.set_defaults(parallel="", split="validation")


if __name__ == "__main__":
    sys.exit(main())
