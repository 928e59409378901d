"""The sections of the page: what each says, and the figures and tables that it makes of a study's runs."""

import math
from collections.abc import Iterable, Mapping, Sequence

from matplotlib.figure import Figure

from benchmarks.output import figures
from benchmarks.output.palette import BASELINE
from benchmarks.output.records import Row
from benchmarks.output.rows import cell_of, group, losses, mean, mean_loss, steps_of, unit
from benchmarks.output.sheets import Cell, Part, Sheet, bounded, drawable, drawings, interval, name_cell, number
from benchmarks.output.statistics import estimate, expected_best, paired
from benchmarks.output.studies import Study, trial_of
from benchmarks.output.targets import Runs, Target, losses_by_seed, mean_losses, seconds_a_step
from benchmarks.output.transfer import AXES, Drift, coordinates, differ_in_rate_alone, drifts

#: Losses this far above the best, in the unit of the loss, count as near it where the rate is concerned.
NEAR = 0.05

FINAL = (
    "The mean final loss over the seeds, at the end of a full schedule. Bars are 95% intervals of the mean, by "
    f"Student's t; the dashed line is {BASELINE}. Differences to {BASELINE} are paired by seed: the same initial "
    "weights and batches."
)
CURVES = (
    "The mean held-out loss over the seeds, during training; the band is from the lowest to the highest seed. The "
    "number beside a name is the final loss, on more text than the curve. The first losses lie above the picture."
)
TARGET = (
    f"Steps after which an annealed run reaches {BASELINE}'s final loss: between two lengths of runs, log(steps) "
    "is linear in the loss. Losses in the middle of a schedule do not count. Intervals: 95%, bootstrap over the "
    "seeds, the same seeds for both; where only a bound is known there is none."
)
BEST = (
    "What one gets for how much tuning: the expected lowest loss of k trials, drawn without replacement from "
    "those that were run, of the shortest length and the first seed. It begins at the k from which no draw is of "
    "diverged trials alone."
)
RATES = (
    "Final loss against the learning rate, a dot for each run; where runs differ in nothing but rate and seed, "
    "the line is their mean. Octaves near the best: how wide the range of rates is whose mean loss is within "
    f"{NEAR} of the best; empty where it was not left on both sides."
)
TIME = (
    "Seconds are those of training, without evaluation: on a CPU, CPU seconds of one thread. Bands as in the loss "
    "curves."
)
TRANSFER = (
    "The best learning rate at several widths, or depths, of the model: the vertex of the parabola in log2(rate) "
    "through the best rate tried and its neighbours. Triangles mark it, bars are 95% intervals; hollow: no "
    "neighbour on one side. Drift: octaves from the smallest to the largest size. Below, root mean squares of "
    "activations after a few steps at one rate: flat lines do not depend on the width."
)


def full_length(study: Study) -> dict[str, list[Row]]:
    """The longest runs by optimizer, the lowest mean loss first."""
    full = max(map(steps_of, study.rows))
    cells = group([row for row in study.rows if steps_of(row) == full], cell_of)
    return dict(sorted(cells.items(), key=lambda item: mean_loss(item[1])))


def final_part(study: Study) -> Part | None:
    """The forest of final losses."""
    groups = full_length(study)
    by_seed = {name: _by_seed(rows) for name, rows in groups.items()}
    found = {name: estimate([*values.values()]) for name, values in by_seed.items()}
    drawn = {
        name: drawable(value.mean, value.low, value.high) for name, value in found.items() if math.isfinite(value.mean)
    }
    lines = []
    for name, rows in groups.items():
        gap = paired(by_seed[name], by_seed[BASELINE]) if BASELINE in groups and name != BASELINE else None
        diverged = len(rows) - len(losses(rows))
        cells = [name_cell(name), number(float(rows[0]["config"]["lr"]), ".3g"), *interval(found[name], ".4f")]
        resolved = "" if gap is None or gap.half is None else "yes" if abs(gap.mean) > gap.half else "no"
        cells += [*interval(gap, "+.4f")[:3], Cell(resolved, resolved), number(diverged, "d")]
        lines.append(cells)
    header = ["optimizer", "lr", f"loss, {unit(study.rows)}", "low", "high", "seeds"]
    header += [f"vs {BASELINE}", "low", "high", "resolved", "diverged"]
    reference = found[BASELINE].mean if BASELINE in drawn else None
    picture = figures.intervals(drawn, f"final loss, {unit(study.rows)}", reference) if drawn else None
    return Part(figures=drawings((picture, "Best first.")), tables=[Sheet(header, lines)])


def curves_part(study: Study) -> Part | None:
    """The loss against steps."""
    groups = full_length(study)
    if not any(losses(rows) and len(row["curve"]) > 1 for rows in groups.values() for row in rows):
        return None
    picture = figures.curves(groups, 0, "step", unit(study.rows))
    seeds = sorted({len(rows) for rows in groups.values()})
    return Part(figures=drawings((picture, f"Band: lowest to highest of {_or(seeds)} seeds; no band of one seed.")))


def target_part(study: Study) -> Part | None:
    """Steps to the baseline's final loss."""
    by_cell = group(study.rows, cell_of)
    full = max(map(steps_of, study.rows))
    baseline = by_cell.get(BASELINE, [])
    several = {name: rows for name, rows in by_cell.items() if len(set(map(steps_of, rows))) > 1}
    longest = [row for row in baseline if steps_of(row) == full]
    if not several or not longest or not math.isfinite(mean_loss(longest)):
        return None
    target = _target(longest)
    runs = {name: Runs(rows) for name, rows in several.items()}
    found = {name: runs[name].steps(target) for name in runs}
    found = dict(sorted(found.items(), key=lambda item: (item[1][0].bound == "> ", item[1][0].steps, item[0])))
    lines = []
    for name, (steps, ends) in found.items():
        cost = _seconds_a_step(several[name])
        low, high = map(runs[name].clipped, ends) if ends else (math.nan, math.nan)
        tokens = several[name][0]["config"]["preset"]["batch"] * several[name][0]["config"]["preset"]["context"]
        lines.append(
            [
                name_cell(name),
                bounded(steps, 1),
                number(low, ".0f"),
                number(high, ".0f"),
                number(len(runs[name].seeds(target)), "d"),
                bounded(steps, 1 / full, ".2f"),
                bounded(steps, tokens),
                bounded(steps, cost),
            ]
        )
    exact = {
        name: drawable(steps.steps, *(map(runs[name].clipped, ends) if ends else (None, None)))
        for name, (steps, ends) in found.items()
        if not steps.bound
    }
    picture = figures.intervals(exact, f"steps to {BASELINE}'s loss after {full}", full, log=True) if exact else None
    by_length = {name: mean_losses(several[name]) for name in found}
    behind = figures.horizons({n: by for n, by in by_length.items() if full in by}, [target], unit(study.rows))
    header = ["optimizer", "steps", "low", "high", "seeds", f"share of {BASELINE}'s", "tokens", _seconds(study)]
    shown = (picture, f"Dashed: {BASELINE}'s own length."), (behind, "The final losses behind these numbers.")
    return Part(figures=drawings(*shown), tables=[Sheet(header, lines)])


def best_part(study: Study) -> Part | None:
    """The expected best of k trials."""
    trials = {name: first_trials(rows) for name, rows in group(study.rows, cell_of).items()}
    several = {name: [_loss(row) for row in rows] for name, rows in trials.items() if len(rows) > 1}
    expected = {n: [expected_best(found, k) for k in range(1, len(found) + 1)] for n, found in several.items()}
    if not expected:
        return None
    expected = dict(sorted(expected.items(), key=lambda item: item[1][-1]))
    ks = [2**i for i in range(max(map(len, expected.values())).bit_length())]
    lines = [
        [
            name_cell(name),
            number(len(found), "d"),
            *(number(found[k - 1] if k <= len(found) else math.nan, ".4f") for k in ks),
            number(found[-1], ".4f"),
        ]
        for name, found in expected.items()
    ]
    steps = sorted({steps_of(row) for rows in trials.values() for row in rows})
    picture = figures.best_of(expected, unit(study.rows))
    header = ["optimizer", "trials", *(f"best of {k}" for k in ks), "best of all"]
    caption = f"Trials of {_or(steps)} steps. Losses far above the best are left out of the picture."
    return Part(figures=drawings((picture, caption)), tables=[Sheet(header, lines)])


def first_trials(rows: Sequence[Row]) -> list[Row]:
    """The trials of a search: one row for each setting, of the shortest length and the first seed."""
    shortest = min(map(steps_of, rows))
    seed = min(row["config"]["seed"] for row in rows)
    chosen = [row for row in rows if steps_of(row) == shortest and row["config"]["seed"] == seed]
    return list({trial_of(row): row for row in chosen}.values())


def rates_part(study: Study) -> Part | None:
    """The loss against the learning rate."""
    shortest = group(study.rows, lambda row: (cell_of(row), steps_of(row)))
    wanted = {name: min(steps for other, steps in shortest if other == name) for name, _ in shortest}
    by_cell = {name: shortest[name, steps] for name, steps in wanted.items()}
    by_cell = {name: rows for name, rows in by_cell.items() if len({row["config"]["lr"] for row in rows}) > 1}
    if not by_cell:
        return None
    means = {name: _rate_means(rows) for name, rows in by_cell.items()}
    ordered = sorted(by_cell, key=lambda name: (min(means[name].values()), name))
    groups = {
        (name, lr): [r for r in by_cell[name] if r["config"]["lr"] == lr] for name in ordered for lr in means[name]
    }
    lines = []
    for name in ordered:
        best = min(means[name], key=lambda lr: means[name][lr])
        edge = " (edge)" if best in (min(means[name]), max(means[name])) else ""
        octaves = _octaves_near(means[name]) if differ_in_rate_alone(by_cell[name]) else math.nan
        lines.append(
            [
                name_cell(name),
                Cell(f"{best:.3g}{edge}", f"{best}"),
                number(means[name][best], ".4f"),
                number(octaves, ".1f"),
                number(len(means[name]), "d"),
                number(min(means[name]), ".3g"),
                number(max(means[name]), ".3g"),
            ]
        )
    header = ["optimizer", "best lr", f"loss, {unit(study.rows)}", "octaves near the best", "rates", "from", "to"]
    panels = len(ordered) > figures.MAX_LINES
    caption = f"Runs of {_or(sorted(set(wanted.values())))} steps" + (
        ", all panels with one y axis." if panels else "."
    )
    return Part(figures=drawings((figures.rates(groups, unit(study.rows)), caption)), tables=[Sheet(header, lines)])


def _rate_means(rows: Iterable[Row]) -> dict[float, float]:
    return {lr: mean_loss(some) for lr, some in sorted(group(list(rows), lambda r: float(r["config"]["lr"])).items())}


def _octaves_near(means: Mapping[float, float]) -> float:
    """The octaves of rates around the best whose loss is within `NEAR`, by straight lines; NaN where an end is open."""
    xs, ys = [math.log2(lr) for lr in means], list(means.values())
    place = min(range(len(ys)), key=ys.__getitem__)
    if not math.isfinite(ys[place]):
        return math.nan
    level, ends = ys[place] + NEAR, []
    for way in (-1, 1):
        i = place
        while 0 <= i + way < len(xs) and ys[i + way] <= level:
            i += way
        if not 0 <= i + way < len(xs):
            return math.nan
        beyond = ys[i + way]
        share = (level - ys[i]) / (beyond - ys[i]) if math.isfinite(beyond) else 0.0
        ends.append(xs[i] + share * (xs[i + way] - xs[i]))
    return ends[1] - ends[0]


def time_part(study: Study) -> Part | None:
    """The loss against seconds, and what a step costs."""
    groups = {name: rows for name, rows in full_length(study).items() if losses(rows)}
    if not groups:
        return None
    times = {name: (mean(rows, "gradient_ms"), mean(rows, "optimizer_ms")) for name, rows in groups.items()}
    times = dict(sorted(times.items(), key=lambda item: sum(item[1])))
    lines = [
        [
            name_cell(name),
            number(mean(rows, "tokens_per_second"), ",.0f"),
            number(times[name][0], ".1f"),
            number(times[name][1], ".2f"),
            number(100 * times[name][1] / max(sum(times[name]), 1e-9), ".1f"),
            number(mean(rows, "state_bytes_per_parameter"), ".2f"),
            number(mean(rows, "cpu_seconds"), ",.0f"),
        ]
        for name, rows in groups.items()
    ]
    header = ["optimizer", "tok/s", "fwd+bwd ms", "optimizer ms", "optimizer %", "state B/param", "CPU s a run"]
    curves = figures.curves(groups, 1, f"{_seconds(study)} of training", unit(study.rows))
    drawn = [(curves, "The same curves over seconds."), (figures.step_times(times), "A step, the cheapest first.")]
    if points := _shares(study):
        drawn.append(
            (
                figures.shares(points, BASELINE),
                f"To the target. Above the diagonal a step costs more than {BASELINE}'s.",
            )
        )
    return Part(figures=drawings(*drawn), tables=[Sheet(header, lines)])


def _shares(study: Study) -> dict[str, tuple[float, float]]:
    """Steps and seconds to the baseline's final loss as shares of the baseline's, where they are no bounds."""
    by_cell = group(study.rows, cell_of)
    full = max(map(steps_of, study.rows))
    longest = [row for row in by_cell.get(BASELINE, []) if steps_of(row) == full]
    if not longest or not math.isfinite(mean_loss(longest)):
        return {}
    found = {}
    for name, rows in by_cell.items():
        steps = Runs(rows).steps(_target(longest))[0]
        if name != BASELINE and len(set(map(steps_of, rows))) > 1 and not steps.bound:
            cost = _seconds_a_step(rows) / _seconds_a_step(longest)
            found[name] = (steps.steps / full, cost * steps.steps / full)
    return found and {BASELINE: (1.0, 1.0), **found}


def _seconds_a_step(rows: Sequence[Row]) -> float:
    """Seconds a step of the longest runs: shorter ones may be of another command on a busier machine."""
    full = max(map(steps_of, rows))
    return seconds_a_step([row for row in rows if steps_of(row) == full])


def transfer_part(study: Study) -> Part | None:
    """Curves of the loss over the learning rate by size, the drift of the best rate, and activations by width."""
    drawn: list[tuple[Figure | None, str]] = []
    tables = []
    for axis in AXES:
        if found := drifts(study.rows, axis):
            drawn.append((figures.transfer(found, unit(study.rows)), f"Over {axis}; all panels share one y axis."))
            tables.append(drift_sheet(found))
    if checks := coordinates(study.rows):
        drawn.append(
            (figures.coordinates(checks), "Root mean squares, the mean over layers; both axes are logarithmic.")
        )
        kinds = list(checks[0].end)
        lines = [
            [name_cell(c.cell), number(c.rate, ".3g"), *(number(c.growth(kind), "+.2f") for kind in kinds)]
            for c in checks
        ]
        tables.append(Sheet(["exponent of the width in", "lr", *kinds], lines))
    return Part(figures=drawings(*drawn), tables=tables) if drawn else None


def drift_sheet(found: Sequence[Drift]) -> Sheet:
    """The best rates by size and the drift of each optimizer."""
    sizes = sorted({size for drift in found for size in drift.sizes})
    lines = []
    for drift in sorted(found, key=lambda drift: abs(drift.octaves)):
        best = [drift.curves[size].best if size in drift.curves else None for size in sizes]
        rates = [Cell(f"{b.bound}{b.rate:.3g}", f"{b.rate}") if b else Cell("", "") for b in best]
        low, high = drift.interval or (math.nan, math.nan)
        ends = [number(drift.octaves, "+.2f"), number(low, "+.2f"), number(high, "+.2f")]
        seeds = number(min(curve.seeds for curve in drift.curves.values()), "d")
        lines.append([name_cell(drift.cell), *rates, *ends, seeds])
    axis = found[0].axis
    return Sheet(
        ["optimizer", *(f"lr, {axis} {size}" for size in sizes), "drift, octaves", "low", "high", "seeds"], lines
    )


def _by_seed(rows: list[Row]) -> dict[int, float]:
    """The final losses of runs of one length by seed."""
    (found,) = losses_by_seed(rows).values()
    return found


def _target(longest: list[Row]) -> Target:
    """The baseline's mean final loss."""
    steps = steps_of(longest[0])
    return Target(f"{BASELINE} after {steps} steps", mean_loss(longest), _by_seed(longest))


def _loss(row: Row) -> float:
    return math.inf if row["final_loss"] is None else float(row["final_loss"])


def _seconds(study: Study) -> str:
    return "CPU s" if study.rows[0]["config"]["device"] == "cpu" else "s"


def _or(values: Sequence[int]) -> str:
    return " or ".join(map(str, values))
