"""`python -m benchmarks transfer`: does the best learning rate stay where it is when a model gets wider or deeper?

Rates lie on a grid of octaves. At every size the grid begins with the tuned rate and its two neighbours, and grows
until the best rate has a neighbour on both sides. A coordinate check follows: activations after a few steps, by width.
"""

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.harness import PlanError
from benchmarks.language.plan import TUNING_SEED, Plan
from benchmarks.language.presets import PRESETS, Preset, RunConfig
from benchmarks.language.workers import Pool
from benchmarks.output.plots import plot_coordinates, plot_transfer
from benchmarks.output.records import Row
from benchmarks.output.rows import check_corpus, mean_loss, unit
from benchmarks.output.tables import drawn, publish, set_aside, write_table
from benchmarks.output.transfer import (
    AXES,
    Size,
    coordinate_table,
    coordinates,
    drifts,
    is_coordinates,
    numbers,
    transfer_table,
)

#: The optimizers of `--geometries` by name, without weight decay. Muon's scales are those of `normopt.norms`: "max1" is
#: "original", "adamw" is "match_rms_adamw" and "rms" is "spectral_unclamped" in torch.
GEOMETRIES = {
    "adam": "adam",
    "muon-max1": 'muon-max1=muon(adjust_lr_fn="original",weight_decay=0.0)',
    "muon-adamw": 'muon-adamw=muon(adjust_lr_fn="match_rms_adamw",weight_decay=0.0,lr=0.01)',
    "muon-rms": 'muon-rms=muon(adjust_lr_fn="spectral_unclamped",weight_decay=0.0)',
    "scion": "scion",
    "modula": 'modula=SteepestDescent(geometry="modula",momentum=0.9,lr=0.02)',
    "muonh": "muonh",
}
DEFAULTS = {"widths": [64, 128, 256, 512], "depths": [2, 4, 8], "depth_width": 128, "rates": []}
SMOKE = {"widths": [32, 64], "depths": [], "depth_width": 32, "rates": [1e-3, 2e-3, 4e-3], "steps": 6}
START = (-1, 0, 1)  # octaves from the tuned rate
MAX_RATES = 12
COORDINATE_STEPS = 10


@dataclass
class Grid:
    """One optimizer on a model of one size: the rates to try, and the mean losses by octave from the tuned rate.

    `fixed`: rates that take the place of the octaves.
    """

    cell: str
    preset: Preset
    plan: Plan
    fixed: list[float] = field(default_factory=list)
    losses: dict[int, float] = field(default_factory=dict)

    def config(self, seed: int, rate: float) -> RunConfig:
        """The run at one rate."""
        plain = self.plan.config(self.cell, seed, rate)  # whose schedule is that of the cell
        schedule = {"warmup": plain.preset.warmup, "decay": plain.preset.decay}
        return replace(plain, preset=replace(self.preset, **schedule))

    def rate(self, place: int) -> float:
        """The rate of an octave, or of a place among the fixed rates."""
        if self.fixed:
            return self.fixed[place]
        return float(self.plan.options(self.cell)["lr"] * 2.0**place)

    def wanted(self) -> list[int]:
        """The octaves to try next: the first ones, then the untried neighbours of the best."""
        if self.fixed:
            return [] if self.losses else list(range(len(self.fixed)))
        if not self.losses:
            return list(START)
        best = min(self.losses, key=lambda place: (self.losses[place], place))
        room = len(self.losses) < MAX_RATES
        return [place for place in (best - 1, best + 1) if room and place not in self.losses]


def transfer(arguments: Namespace) -> int:
    """Run the grids and the coordinate check, and report them; returns the exit code, 1 when a run failed."""
    arguments.optimizers = [GEOMETRIES.get(name, name) for name in arguments.geometries]
    defaults = SMOKE if arguments.smoke else DEFAULTS
    vars(arguments).update({name: value for name, value in defaults.items() if getattr(arguments, name) is None})
    arguments.depths = [depth for depth in arguments.depths if depth]
    arguments.width = _largest_width(arguments)
    try:
        plan = Plan(arguments)
    except PlanError as error:  # geometries are names of optimizers, or what stands for one
        raise PlanError(str(error).replace("--optimizers", "--geometries")) from None
    presets = dict(_sizes(plan, arguments))
    pool = Pool(arguments.out, plan.workers)
    seeds = range(TUNING_SEED, TUNING_SEED + arguments.seeds)
    rates = sorted(set(arguments.rates))
    grids = [Grid(cell, preset, plan, rates) for cell in plan.cells for preset in presets.values()]
    rows = _grown(grids, seeds, pool)
    if not pool.failures:
        rows += pool.run(list(_coordinate_runs(grids, arguments.widths, TUNING_SEED)))
    write_transfer(rows, arguments.out)
    return 1 if pool.failures else 0


def _largest_width(arguments: Namespace) -> int:
    """The largest width of the command line; raises `PlanError` for one that the preset's heads do not divide."""
    preset = PRESETS["smoke" if arguments.smoke else arguments.preset]
    d_head = preset.d_model // preset.n_heads
    named = [("--widths", width) for width in arguments.widths]
    named += [("--depth-width", arguments.depth_width)] * bool(arguments.depths)
    for option, width in named:
        if width % d_head:
            raise PlanError(f"{option} {width} is no multiple of the preset's heads of {d_head}")
    return int(max(width for _, width in named))


def _sizes(plan: Plan, arguments: Namespace) -> Iterator[tuple[Size, Preset]]:
    """The presets of all sizes: every width at the preset's depth, and every depth at one width.

    Losses are taken on fewer tokens than in a comparison: all rates are judged on the same ones.
    """
    largest = plan.preset
    d_head = largest.d_model // largest.n_heads
    short = replace(largest, curve_tokens=max(1, largest.curve_tokens // 8), final_tokens=largest.curve_tokens)
    wanted = [(width, largest.n_layers) for width in sorted(arguments.widths)]
    wanted += [(arguments.depth_width, depth) for depth in sorted(arguments.depths)]
    for width, depth in wanted:
        yield (width, depth), replace(short, d_model=width, n_layers=depth, n_heads=width // d_head)


def _grown(grids: list[Grid], seeds: range, pool: Pool) -> list[Row]:
    """The rows of all grids, which grow until nothing more is wanted or a run has failed."""
    rows: list[Row] = []
    while any(grid.wanted() for grid in grids) and not pool.failures:
        asked = [(grid, place) for grid in grids for place in grid.wanted()]
        configs = [grid.config(seed, grid.rate(place)) for grid, place in asked for seed in seeds]
        found = {row["key"]: row for row in pool.run(configs)}
        rows += found.values()
        for grid, place in asked if not pool.failures else []:
            grid.losses[place] = mean_loss([found[grid.config(seed, grid.rate(place)).key] for seed in seeds])
    return rows


def _coordinate_runs(grids: list[Grid], widths: list[int], seed: int) -> Iterator[RunConfig]:
    """A few steps at the full rate, the same for all widths: the best of the grid at the smallest width."""
    for cell in dict.fromkeys(grid.cell for grid in grids):
        of_width = {grid.preset.d_model: grid for grid in reversed(grids) if grid.cell == cell}
        smallest = of_width[min(widths)]
        best = smallest.rate(min(smallest.losses, key=lambda place: (smallest.losses[place], place)))
        for width in widths:
            config = of_width[width].config(seed, best)
            few = replace(config.preset, steps=COORDINATE_STEPS, warmup=0, decay=0.0, evaluations=1)
            yield replace(config, preset=few, diagnose=True)


def write_transfer(rows: list[Row], out: Path) -> None:
    """Print the tables, and write them (`transfer.md`, `.csv`, `.tex`) and the plots of curves and activations."""
    if not rows:
        return
    check_corpus(rows)
    files = ("transfer.csv", "transfer.tex", *(f"transfer_{axis}.png" for axis in AXES), "coordinates.png")
    set_aside(out / "transfer.md", *files)
    notes, lines, tables = [], [], []
    for axis in AXES:
        if found := drifts(rows, axis):
            plot_transfer(found, out / f"transfer_{axis}.png", unit(rows))
            tables.append(transfer_table(found))
            lines += numbers(found)
            notes += [drawn(tables[-1], "github")] * (len(tables) > 1)
            notes.append(f"![loss by learning rate and {axis}](transfer_{axis}.png)")
    notes.append(MEANING)
    if checks := coordinates(rows):
        plot_coordinates(checks, out / "coordinates.png")
        notes += [CHECK, drawn(coordinate_table(checks), "github"), "![activations by width](coordinates.png)"]
        print("\n" + drawn(coordinate_table(checks), "simple_outline"))
    if not tables:
        print("One size alone: there is no transfer to report.")
        return
    for table in tables[1:]:
        print("\n" + drawn(table, "simple_outline"))
    write_table(lines, out / "transfer")
    publish(tables[0], _setting(rows), out / "transfer.md", notes)


def _setting(rows: list[Row]) -> str:
    """The models, lengths, text and seeds of the grids, as a sentence."""
    rows = [row for row in rows if not is_coordinates(row)]
    preset, config = rows[0]["config"]["preset"], rows[0]["config"]
    models = ", ".join(sorted({row["config"]["model"] for row in rows}))
    seeds = sorted({row["config"]["seed"] for row in rows})
    return (
        f"{models} {preset['name']}, heads of {preset['d_model'] // preset['n_heads']}, {preset['steps']} steps of "
        f"{preset['batch']} x {preset['context']} tokens of {config['source']}, seeds {seeds}, {config['device']}, "
        f"torch {rows[0]['torch']}. {len(rows)} runs."
    )


#: What the columns of the tables mean.
MEANING = (
    "The best rate is the vertex of the parabola in log2(rate) through the best rate tried and its two neighbours; "
    "`>=` and `<=`: the best is the largest or smallest tried, `~`: a neighbour diverged. Drift: log2 of the best rate "
    "at the largest size over that at the smallest. Intervals redraw the mean losses with the error that seeds show "
    "around the best rates; what a seed does to all rates alike is left out."
)
CHECK = (
    "Coordinate check: the exponent of the width in the root mean square of activations after the steps, and before "
    "them in brackets; 0 does not depend on the width."
)
