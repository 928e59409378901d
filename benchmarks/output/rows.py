"""Reading rows of training runs: the cell, the length, the losses, and the columns that several tables share."""

import math
import statistics
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from benchmarks.output.records import Row
from benchmarks.output.statistics import estimate
from benchmarks.output.tables import Cell

Key = TypeVar("Key", bound=Hashable)

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
        f"torch {row['torch']}. Final loss on the {split_of(row)} text, {config['corpus'][:8]}."
    )
