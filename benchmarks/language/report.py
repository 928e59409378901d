"""`python -m benchmarks report`: tables and plots of runs on file, whichever command made them, and README's table."""

import os
import sys
from argparse import Namespace
from pathlib import Path

from benchmarks.harness import PlanError
from benchmarks.language.data import load_or_fall_back
from benchmarks.language.ngram import counting
from benchmarks.output.comparison import write_comparison
from benchmarks.output.records import RESULTS, Row, read_rows, replacing, unreadable
from benchmarks.output.rows import cell_of, check_corpus, check_settings, group, mean_loss, split_of, steps_of
from benchmarks.output.tables import Table, drawn
from benchmarks.output.targets import Target

#: The marks around the text that `--readme` replaces.
BEGIN, END = "<!-- begin of the headline: python -m benchmarks report --readme -->", "<!-- end of the headline -->"
#: Columns of the comparison that the headline leaves out.
LEFT_OUT = ("p", "rank", "bits/byte", "tok/s", "fwd+bwd ms", "opt ms")


def report(arguments: Namespace) -> int:
    """Report the runs on file in `arguments.runs`, best first, to `arguments.out`; returns the exit code."""
    rows = []
    for folder in arguments.runs:
        if lost := unreadable(folder / RESULTS):
            print(lost, file=sys.stderr)
        rows += read_rows(folder / RESULTS).values()
    if not rows:
        raise PlanError(f"no runs in {', '.join(map(str, arguments.runs))}: give folders that hold a {RESULTS}")
    try:
        check_corpus(rows)
        check_settings(rows)
    except ValueError as error:
        raise PlanError(str(error)) from None
    if arguments.readme:
        split(arguments.readme)
    table = write_comparison(best_first(rows), arguments.out, _counting(rows, arguments.data))
    if arguments.readme:
        several = len(set(map(steps_of, rows))) > 1
        insert(arguments.readme, headline(table, several, arguments.out, arguments.readme))
    return 0


def _counting(rows: list[Row], source: str) -> list[Target]:
    """The counting model's loss on the text of the runs, where there are runs of several lengths and the text is known.

    Raises:
        PlanError: if `source` is another text than that of the runs.
    """
    if len(set(map(steps_of, rows))) == 1:
        return []
    corpus, ours = load_or_fall_back(source), rows[0]["config"]
    if corpus.digest == ours["corpus"]:
        return counting(corpus, split_of(rows[0]))
    if source != ours["source"]:
        raise PlanError(f"--data {source} is not the text of the runs, which is {ours['source']}: give that")
    print(f"The runs are of {source} as it was divided before ({ours['corpus'][:8]}): no loss of a counting model.")
    return []


def best_first(rows: list[Row]) -> list[Row]:
    """The rows ordered by the mean final loss of their optimizers' longest runs."""
    full = max(map(steps_of, rows))
    final = group([row for row in rows if steps_of(row) == full], cell_of)
    return sorted(rows, key=lambda row: mean_loss(final.get(cell_of(row), [])))


def headline(table: Table, several: bool, out: Path, readme: Path) -> str:
    """The table without the columns `LEFT_OUT`, and a plot: loss curves, or for `several` lengths `horizons.png`."""
    short = [{name: cell for name, cell in line.items() if name not in LEFT_OUT} for line in table]
    plot = os.path.relpath(out / ("horizons.png" if several else "loss_steps.png"), readme.parent)
    return f"{drawn(short, 'github')}\n\n![Validation loss]({plot})"


def split(readme: Path) -> tuple[str, str]:
    """The text before and the text after the headline, marks included."""
    try:
        before, begin, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    except OSError as error:
        raise PlanError(f"--readme {readme} cannot be read: {error.strerror}") from None
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise PlanError(f"--readme {readme} has no headline: it has to lie between {BEGIN} and {END}")
    return before + begin, end + after


def insert(readme: Path, text: str) -> None:
    """Put `text` in the place of the headline."""
    before, after = split(readme)
    with replacing(readme) as partial:
        partial.write_text(f"{before}\n\n{text}\n\n{after}", encoding="utf-8")
