"""Reading rows of training runs: the cell, the length, the losses, and the columns that several tables share."""

import math
import statistics
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from benchmarks.output.records import Row
from benchmarks.output.statistics import estimate
from benchmarks.output.tables import Cell

Key = TypeVar("Key", bound=Hashable)

#: The columns of times of training.
TIMES = ("gradient_ms", "optimizer_ms", "train_seconds", "cpu_seconds")
#: The held-out texts in the names of columns.
SHORT = {"validation": "val", "test": "test"}


def cell_name(optimizer: str, model: str, model_options: dict[str, Any] | None = None) -> str:
    """The name of an optimizer on a model, with changes of the model: `muon` on the GPT, `muon@angpt` on another."""
    changes = "".join(f" {name}={value}" for name, value in (model_options or {}).items())
    return optimizer + ("" if model == "gpt" else f"@{model}") + changes


def cell_of(row: Row) -> str:
    """The name of a row's optimizer and model, see `cell_name`."""
    config = row["config"]
    return cell_name(config["optimizer"], config["model"], config.get("model_options"))


def steps_of(row: Row) -> int:
    """The length of a run."""
    return int(row["config"]["preset"]["steps"])


def split_of(row: Row) -> str:
    """The held-out text that a row's losses were taken on; rows from before there were two have the validation text."""
    return str(row["config"].get("split", "validation"))


def check_corpus(rows: list[Row]) -> None:
    """Raise `ValueError` if the rows are of several texts: their losses cannot be compared."""
    corpora = {(row["config"]["corpus"], split_of(row)): row["config"]["source"] for row in rows}
    if len(corpora) > 1:
        names = ", ".join(f"{source} ({digest[:8]}, {split})" for (digest, split), source in corpora.items())
        raise ValueError(f"rows of different corpora cannot be compared: {names}; report those of one at a time")


def check_settings(rows: list[Row]) -> None:
    """Raise `ValueError` if an optimizer has two rows of one length and seed, which are of several settings of it."""
    seen: dict[Hashable, Row] = {}
    for row in rows:
        first = seen.setdefault((cell_of(row), steps_of(row), row["config"]["seed"]), row)
        if first is not row:
            both = [f"lr {each['config']['lr']:g} ({each['key']})" for each in (first, row)]
            raise ValueError(
                f"two runs of {cell_of(row)} with {steps_of(row)} steps and seed {row['config']['seed']}, at other "
                f"options: {' and '.join(both)}; report the rows of one choice of options at a time"
            )


def at_one_speed(rows: list[Row]) -> list[Row]:
    """The rows with the times of one machine at one load.

    Forward and backward pass are the same work in all runs of a model, but took what else the machine did into their
    time: they count with their median over the model's runs, and all other times of a run in proportion to its own.
    """
    found = []
    medians = {work: statistics.median(row["gradient_ms"] for row in same) for work, same in group(rows, _work).items()}
    for row in rows:
        median = medians[_work(row)]
        factor = median / row["gradient_ms"] if row["gradient_ms"] else 1.0
        scaled = {name: row[name] * factor for name in TIMES}
        curve = [[step, seconds * factor, loss] for step, seconds, loss in row["curve"]]
        found.append({**row, **scaled, "curve": curve, "tokens_per_second": row["tokens_per_second"] / factor})
    return found


def _work(row: Row) -> str:
    """What forward and backward pass depend on, of runs of one size."""
    return cell_name("", row["config"]["model"], row["config"].get("model_options"))


def group(rows: list[Row], key: Callable[[Row], Key]) -> dict[Key, list[Row]]:
    """The rows by key, in order of appearance."""
    groups: dict[Key, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def losses(rows: list[Row]) -> list[float]:
    """The final losses of the runs that did not diverge."""
    return [row["final_loss"] for row in rows if row["final_loss"] is not None]


def mean(rows: list[Row], column: str) -> float:
    """Mean of a column."""
    return statistics.fmean(row[column] for row in rows)


def mean_loss(rows: list[Row]) -> float:
    """The mean final loss, infinite if a run diverged, or if there is none."""
    return mean(rows, "final_loss") if rows and len(losses(rows)) == len(rows) else math.inf


def loss_cells(rows: list[Row]) -> dict[str, str]:
    """The final held-out loss in nats per token, with its interval, and the number of runs."""
    diverged = sum(row["status"] == "diverged" for row in rows)
    found = estimate([math.inf if row["final_loss"] is None else row["final_loss"] for row in rows]).cell()
    text = f"diverged ({diverged} of {len(rows)})" if diverged else str(found)
    column = f"{SHORT[split_of(rows[0])]} {unit(rows)}"
    return {column: Cell(text, **found.numbers), "n": Cell(str(len(rows)), value=len(rows))}


def bits_cell(rows: list[Row]) -> str:
    """The mean final loss in bits per byte, where it is known."""
    if any(row["bits_per_byte"] is None for row in rows):
        return ""
    bits = mean(rows, "bits_per_byte")
    return Cell(f"{bits:.4f}", value=bits)


def unit(rows: list[Row]) -> str:
    """The unit of the loss."""
    return "nats/byte" if rows[0]["bytes_per_token"] == 1 else "nats/token"


def setting(rows: list[Row]) -> str:
    """The models, steps, text, seeds and hardware of the runs, as a sentence."""
    row, config = rows[0], rows[0]["config"]
    preset, seeds = config["preset"], sorted({row["config"]["seed"] for row in rows})
    models = ", ".join(
        f"{model} {preset['name']} ({members[0]['parameters']:,} parameters)"
        for model, members in group(rows, lambda row: str(row["config"]["model"])).items()
    )
    hardware = "one CPU thread per run" if config["device"] == "cpu" else config["device"]
    if config.get("parallel"):
        hardware = f"{config['parallel']} on {row['processes']} processes, {config['device']}"
    return (
        f"{models}, {preset['steps']} steps of "
        f"{preset['batch']} x {preset['context']} tokens of {config['source']}, seeds {seeds}, {hardware}, "
        f"torch {row['torch']}{_commits(rows)}. Final loss on the {split_of(row)} text, {config['corpus'][:8]}."
    )


def _commits(rows: list[Row]) -> str:
    """The commits that the rows are of, as the end of a sentence; rows of the first versions do not say."""
    found = sorted({str(row["commit"])[:7] for row in rows if "commit" in row})
    return f", commit{'s' if len(found) > 1 else ''} {', '.join(found)}" if found else ""
