"""Tables: on the terminal, as Markdown with the command that made the table, as CSV and as LaTeX."""

import csv
import itertools
import re
import shlex
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import tabulate

from benchmarks.output.records import replacing, writing

#: Columns of a terminal that tables are made for.
WIDTH = 120

#: What a CSV file has in the place of a cell's text.
Number = float | int | str | None


class Cell(str):
    """The text of a cell, and the numbers behind it, which a CSV file has in its place.

    `Cell("1.2 ± 0.1", mean=1.23, n=8)` in the column `loss` makes the columns `loss mean` and `loss n`; a number called
    `value` is in the column `loss` itself.
    """

    numbers: dict[str, Number]

    def __new__(cls, text: str, **numbers: Number) -> "Cell":
        made = super().__new__(cls, text)
        made.numbers = numbers
        return made

    def named(self, column: str) -> dict[str, Number]:
        """The numbers by the names of their columns."""
        return {column if name == "value" else f"{column} {name}": number for name, number in self.numbers.items()}


tabulate.MIN_PADDING = 0  # no columns that are wider than their cells and their name

Table = Sequence[Mapping[str, str]]


def drawn(table: Table, style: str) -> str:
    """The table in a style of tabulate; numbers are not reformatted."""
    plain = [{name: str(cell) for name, cell in line.items()} for line in table]
    return str(tabulate.tabulate(plain, "keys", tablefmt=style, disable_numparse=True, stralign="right"))


def publish(table: Table, setting: str, path: Path, notes: list[str]) -> None:
    """Print a table, and write it with the command, the setting and notes to a Markdown file."""
    show(table)
    publish_text([setting, drawn(table, "github"), *notes], path)


def publish_text(paragraphs: list[str], path: Path) -> None:
    """Write the command and paragraphs to a Markdown file."""
    with replacing(path) as partial:
        partial.write_text("\n\n".join([f"`{command_line()}`", *paragraphs]) + "\n", encoding="utf-8")
    print(f"Written to {path.parent}: {path.name}, all rows as JSON lines, and the plots")


def show(table: Table, title: str = "", note: str = "") -> None:
    """Print a table, with a title above and a note below."""
    print("\n".join([title, drawn(table, "simple_outline"), *textwrap.wrap(note, WIDTH)]))


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
    """The table as `path`.csv, with the numbers behind its cells, and as `path`.tex."""
    lines = [_numbers(line) for line in table]
    columns = dict.fromkeys(name for line in lines for name in line)
    with replacing(path.with_suffix(".csv")) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(columns))
        writer.writeheader()
        writer.writerows(lines)
    with replacing(path.with_suffix(".tex")) as partial:
        partial.write_text(typeset(table), encoding="utf-8")


def _numbers(line: Mapping[str, str]) -> dict[str, object]:
    """The cells of a line for a CSV file."""
    found: dict[str, object] = {}
    for column, cell in line.items():
        if isinstance(cell, Cell) and cell.numbers:
            found |= cell.named(column)
        elif cell:
            found[column] = cell
    return found


def typeset(table: Table) -> str:
    """The table for LaTeX's package booktabs: numbers in math mode, with true signs, all else escaped."""
    columns = list(table[0])
    body = [" & ".join(latex(line.get(name, "")) for name in columns) + r" \\" for line in table]
    head = " & ".join(map(latex, columns)) + r" \\"
    begin = rf"\begin{{tabular}}{{l{'r' * (len(columns) - 1)}}}"
    lines = [begin, r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]
    return "\n".join(lines) + "\n"


#: A number in a cell: its bound, sign and digits with commas between thousands, and the half-width of its interval.
NUMBER = re.compile(r"(?<![\w.])(?:([<>]=?) )?([+-]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?)(?: ± ([\d.]+))?(?![\w.])")
#: What other signs are in LaTeX.
SPECIAL = {sign: "\\" + sign for sign in "&%$#_{}"} | {"<": "$<$", ">": "$>$", "±": r"$\pm$"}
SPECIAL |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


def latex(text: str) -> str:
    """The text of a cell as LaTeX."""
    parts, end = [], 0
    for found in NUMBER.finditer(text):
        bound, value, half = found.groups()
        relation = {"<": "< ", ">": "> ", "<=": r"\le ", ">=": r"\ge "}.get(bound, "")
        mantissa, _, power = value.replace(",", "{,}").partition("e")
        value = rf"{mantissa} \cdot 10^{{{int(power)}}}" if power else mantissa
        parts += [_escaped(text[end : found.start()]), f"${relation}{value}" + (rf" \pm {half}$" if half else "$")]
        end = found.end()
    return "".join([*parts, _escaped(text[end:])])


def _escaped(text: str) -> str:
    return "".join(SPECIAL.get(sign, sign) for sign in text)
