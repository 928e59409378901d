"""Tables: on the terminal, as Markdown with the command that made the table, as CSV and as LaTeX."""

import csv
import itertools
import shlex
import sys
from pathlib import Path

from tabulate import tabulate

from benchmarks.output.records import replacing, writing

Table = list[dict[str, str]]


def drawn(table: Table, style: str) -> str:
    """The table in a style of tabulate; numbers are not reformatted."""
    return str(tabulate(table, "keys", tablefmt=style, disable_numparse=True, stralign="right"))


def publish(table: Table, setting: str, path: Path, notes: list[str]) -> None:
    """Print a table, and write it with the command, the setting and notes to a Markdown file."""
    print("\n" + drawn(table, "simple_outline"))
    with replacing(path) as partial:
        text = "\n\n".join([f"`{command_line()}`", setting, drawn(table, "github"), *notes])
        partial.write_text(text + "\n", encoding="utf-8")
    print(f"Written to {path.parent}: {path.name}, all rows as JSON lines, and the plots")


def set_aside(path: Path, *others: str) -> None:
    """Move a table that another command wrote, and the `others` beside it, to the next folder in `earlier/`; say so.

    To be called before `publish` and before any of the `others` is written.
    """
    if not path.exists():
        return
    command = path.read_text(encoding="utf-8").partition("\n")[0]
    if command == f"`{command_line()}`":
        return
    earlier = path.parent / "earlier"
    folder = next(earlier / str(i) for i in itertools.count(1) if not (earlier / str(i)).exists())
    moved = [name for name in (path.name, *others) if (path.parent / name).exists()]
    with writing(folder / path.name):
        for name in moved:
            (path.parent / name).rename(folder / name)
    print(f"{path} held the table of another command, {command}. Moved to {folder}: {', '.join(moved)}")


def command_line() -> str:
    """The command that is running, as a user would type it."""
    return shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])


def write_table(table: Table, path: Path) -> None:
    """The table as `path`.csv and `path`.tex."""
    with replacing(path.with_suffix(".csv")) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    with replacing(path.with_suffix(".tex")) as partial:
        partial.write_text(drawn(table, "latex_booktabs") + "\n", encoding="utf-8")
