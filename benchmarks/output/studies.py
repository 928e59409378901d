"""Runs on file that can be shown together: one text, one size of the model, one batch."""

import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.output.records import Row
from benchmarks.output.rows import at_one_speed, cell_of, group, steps_of
from benchmarks.output.transfer import AXES, axis_rows, is_coordinates, size_of


@dataclass(frozen=True)
class Folder:
    """The rows of a folder of results."""

    path: Path
    rows: list[Row]

    @property
    def kind(self) -> str:
        """The command whose rows these are like: "transfer", "sweep" or "compare"."""
        if any(is_coordinates(row) and "rms" in row["norms"][-1][1] for row in self.rows):
            return "transfer"
        cells = group(self.rows, lambda row: (cell_of(row), steps_of(row), size_of(row)))
        tuned = any(len({trial_of(row) for row in rows}) > 1 for rows in cells.values())
        if tuned and any(axis_rows(self.rows, axis) for axis in AXES):
            return "transfer"
        return "sweep" if tuned else "compare"

    @property
    def command(self) -> tuple[str, str]:
        """The command of the folder's tables, or else one whose rows are like these."""
        for path in sorted(self.path.glob("*.md")):
            first = path.read_text(encoding="utf-8").partition("\n")[0]
            if re.fullmatch(r"`python -m benchmarks (?!report).*`", first):
                return f"{self.path}:", first.strip("`")
        return f"{self.path}: rows like those of", self._like()

    def _like(self) -> str:
        configs = [row["config"] for row in self.rows]
        preset = max((config["preset"] for config in configs), key=lambda preset: int(preset["steps"]))
        names = ",".join(dict.fromkeys(config["optimizer"] for config in configs))
        models = ",".join(dict.fromkeys(config["model"] for config in configs))
        seeds = str(len({config["seed"] for config in configs}))
        which = ["--geometries" if self.kind == "transfer" else "--optimizers", names, "--model", models]
        size = ["--preset", preset["name"], "--steps", str(preset["steps"]), "--data", configs[0]["source"]]
        seeded = [] if self.kind == "sweep" else ["--seeds", seeds]
        words = ["python", "-m", "benchmarks", self.kind, *which, *size, *seeded, "--out", str(self.path)]
        return shlex.join(words)


@dataclass(frozen=True)
class Study:
    """Runs that can be shown together: one text, one size of the model, one batch."""

    title: str
    rows: list[Row]
    folders: list[Folder]

    @property
    def commands(self) -> list[tuple[str, str]]:
        """The commands of the folders that the rows are from."""
        return [folder.command for folder in self.folders]


def studies(folders: Iterable[Folder]) -> list[Study]:
    """The rows of the folders by text, size and batch; rows of one key count once."""
    found: dict[tuple[Any, ...], dict[str, Row]] = {}
    parts: dict[tuple[Any, ...], list[Folder]] = {}
    for folder in folders:
        for row in folder.rows:
            key = _setting(row)
            found.setdefault(key, {}).setdefault(row["key"], row)
            if folder not in parts.setdefault(key, []):
                parts[key].append(folder)
    return [Study(_title(rows), at_one_speed(list(rows.values())), parts[key]) for key, rows in found.items()]


def _setting(row: Row) -> tuple[Any, ...]:
    return *_batches(row), *size_of(row), row["config"]["preset"]["n_heads"]


def _batches(row: Row) -> tuple[Any, ...]:
    """The text, the device and the batch of a run."""
    config, preset = row["config"], row["config"]["preset"]
    text = (config["corpus"], config.get("split", "validation"))
    return *text, config["device"], preset["batch"], preset["context"]


def _title(rows: Mapping[str, Row]) -> str:
    row = next(iter(rows.values()))
    preset = row["config"]["preset"]
    return f"{_models(rows.values())}: width {preset['d_model']}, {preset['n_layers']} layers, {_runs(rows.values())}"


def _models(rows: Iterable[Row]) -> str:
    return ", ".join(sorted({row["config"]["model"] for row in rows}))


def _runs(rows: Iterable[Row]) -> str:
    """The longest runs and their text in words."""
    row = max(rows, key=steps_of)
    config, preset = row["config"], row["config"]["preset"]
    return (
        f"{preset['steps']} steps of {preset['batch']} x {preset['context']} tokens; {config['source']} "
        f"({config['corpus'][:8]}), {config.get('split', 'validation')} text"
    )


def transfers(folders: Iterable[Folder]) -> list[Study]:
    """Studies of all sizes together: a folder's runs of one text, batch and length, with its coordinate checks."""
    found = []
    for folder in folders:
        checks = [row for row in folder.rows if is_coordinates(row)]
        of_rate = [row for row in folder.rows if not is_coordinates(row)]
        for key, rows in group(of_rate, lambda row: (*_batches(row), steps_of(row))).items():
            same = [row for row in checks if _batches(row) == key[:-1]]
            found.append(Study(f"{_models(rows)}: {_runs(rows)}", [*rows, *same], [folder]))
    return found


def trial_of(row: Row) -> str:
    """What a search varies: the learning rate, the other options, and the schedule."""
    config, preset = row["config"], row["config"]["preset"]
    return repr((config["lr"], config["options"], preset.get("warmup"), preset.get("decay")))
