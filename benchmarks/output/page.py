"""One self-contained page of runs on file: figures as inline SVG, tables that sort by click, and the commands.

Every folder of results is read by what its rows are: runs of several sizes at several learning rates are of `transfer`,
runs of an optimizer at several settings are of `sweep` or `grid`, all others are of `compare`. Runs are shown together
where they have one text, one size and one batch.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from benchmarks.output import figures, sections
from benchmarks.output.palette import BASELINE, BLACK, color, family
from benchmarks.output.records import RESULTS, Row, read_rows, replacing
from benchmarks.output.rows import cell_of, check_settings
from benchmarks.output.sheets import Part
from benchmarks.output.studies import Folder, Study, studies, transfers
from benchmarks.output.tables import command_line

PAGE = "report.html"


@dataclass(frozen=True)
class Section:
    """A section of the page; without parts it says with which command (`needs`) its rows are made."""

    key: str
    title: str
    text: str
    needs: str
    parts: list[Part]


def write_page(folders: Sequence[Path], out: Path) -> Path:
    """Write `report.html` of the runs in the folders; returns its path.

    Raises:
        ValueError: two folders of comparisons have one optimizer at several options, see `check_settings`.
    """
    found = [Folder(path, list(read_rows(path / RESULTS).values())) for path in folders]
    with figures.styled():
        text = render([folder for folder in found if folder.rows])
    with replacing(out / PAGE) as partial:
        partial.write_text(text, encoding="utf-8")
    return out / PAGE


def render(folders: Sequence[Folder]) -> str:
    """The page as text."""
    of_kind = {kind: [folder for folder in folders if folder.kind == kind] for kind in ("compare", "sweep", "transfer")}
    compared, tuned = studies(of_kind["compare"]), studies(of_kind["sweep"])
    for study in compared:
        check_settings(study.rows)
    compare = "python -m benchmarks compare --optimizers adamw,muon,scion --seeds 3"
    horizons, sweep = f"{compare} --horizons 150,300", "python -m benchmarks sweep --optimizers adamw,muon,scion"
    grown = "python -m benchmarks transfer --geometries adam,muon-max1,scion"
    shown = [
        Section("final", "Final losses", sections.FINAL, compare, _parts(sections.final_part, compared)),
        Section("curves", "Loss curves", sections.CURVES, compare, _parts(sections.curves_part, compared)),
        Section("target", "Steps to a target", sections.TARGET, horizons, _parts(sections.target_part, compared)),
        Section("best", "Best of k trials", sections.BEST, sweep, _parts(sections.best_part, tuned)),
        Section("rates", "Sensitivity to the learning rate", sections.RATES, sweep, _parts(sections.rates_part, tuned)),
        Section("time", "Time against steps", sections.TIME, compare, _parts(sections.time_part, compared)),
        Section(
            "transfer",
            "Transfer over width and depth",
            sections.TRANSFER,
            grown,
            _parts(sections.transfer_part, transfers(of_kind["transfer"])),
        ),
    ]
    rows = [row for folder in folders for row in folder.rows]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("page.html").render(
        title="Optimizers compared",
        summary=_summary(folders, rows),
        command=command_line(),
        families=_families({cell_of(row) for row in rows}),
        sections=shown,
    )


def _parts(make: Callable[[Study], Part | None], found: Iterable[Study]) -> list[Part]:
    parts = []
    for study in found:
        if part := make(study):
            part.title, part.commands = study.title, study.commands
            parts.append(part)
    return parts


def _families(cells: Iterable[str]) -> list[tuple[str, str]]:
    """The families of optimizers that are there, each colour once, with the colour."""
    of_color: dict[str, set[str]] = {}
    for cell in cells:
        of_color.setdefault(color(cell), set()).add(family(cell) or "others")
    named = ((", ".join(sorted(names)), shade) for shade, names in of_color.items())
    return [(f"{BASELINE}, the baseline", BLACK), *sorted(named)]


def _summary(folders: Sequence[Folder], rows: Sequence[Row]) -> str:
    if not rows:
        return "No runs on file."
    torch = ", ".join(sorted({str(row["torch"]) for row in rows}))
    optimizers = len({row["config"]["optimizer"] for row in rows})
    return f"{len(rows):,} runs of {optimizers} optimizers in {len(folders)} folders, torch {torch}."
