"""The code blocks of README and docs run, in the order in which they stand, and print what stands below them."""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import shlex
import sys
import types
from pathlib import Path

import pytest

from benchmarks.__main__ import make_parser
from benchmarks.language.report import best_first, headline, split
from benchmarks.output.comparison import write_comparison
from benchmarks.output.records import RESULTS, read_rows
from benchmarks.output.statistics import Estimate, estimate, paired

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

#: Where README's table comes from, below `benchmarks/results/headline`.
HEADLINE = ("compare", "angpt")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
@pytest.mark.usefixtures("registry")
def test_code_blocks_run(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    module = types.ModuleType(page.stem)
    monkeypatch.setitem(sys.modules, page.stem, module)  # where dataclasses look their annotations up
    printed = ""
    for language, text in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S):
        if language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(text, str(page), "exec", dont_inherit=True), vars(module))
            printed = out.getvalue()
        elif language == "text" and printed:
            # An excerpt: its lines are there, in their order. Which products were measured as fastest may differ.
            lines = iter(printed.splitlines())
            shown = [line for line in text.splitlines() if line and not line.startswith("products ")]
            assert not [line for line in shown if line not in lines], f"{page.name} shows something else:\n{printed}"
            printed = ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


def test_headline_is_the_table_of_the_runs_on_file(tmp_path: Path) -> None:
    folder = RUNS / "headline"
    rows = [row for name in HEADLINE for row in read_rows(folder / name / RESULTS).values()]
    table = write_comparison(best_first(rows), tmp_path)
    before, after = split(ROOT / "README.md")
    text = f"{before}\n\n{headline(table, True, folder, ROOT / 'README.md')}\n\n{after}"
    assert (ROOT / "README.md").read_text(encoding="utf-8") == text
    assert (folder / "compare.csv").read_bytes() == (tmp_path / "compare.csv").read_bytes()


def test_plus_and_minus_is_half_of_the_interval_of_runs_on_file() -> None:
    """Every ``±`` on a page or in a table on file: of a mean over seeds, or of a difference paired by seed."""
    texts = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *RUNS.rglob("*.md")]
    claim = re.compile(r"([+-]?)(\d\.\d+) ± (\d+\.\d+)")
    claims = {page: set(claim.findall(page.read_text(encoding="utf-8"))) for page in texts}
    digits = {len(half.partition(".")[2]) for found in claims.values() for *_, half in found}
    known = set()
    for folder in sorted(RUNS.iterdir()):
        samples = [sample for file in sorted(folder.rglob(RESULTS)) for sample in by_seed(file)]
        gaps = [paired(ours, theirs) for ours, theirs in itertools.permutations(samples, 2)]
        for places in digits:
            known |= {written(estimate(list(sample.values())), places) for sample in samples}
            known |= {written(gap, places, "+") for gap in gaps if gap is not None}
    assert any(claims.values())
    wrong = {(page.name, *each) for page, found in claims.items() for each in found if each not in known}
    assert not wrong


def by_seed(file: Path) -> list[dict[int, float]]:
    """The final losses by seed of the runs in a file that differ in their seeds alone, where there are two or more."""
    samples: dict[str, dict[int, float]] = {}
    for row in read_rows(file).values():
        config = row.get("config", {})
        if row.get("final_loss") is not None:
            alike = str({key: value for key, value in config.items() if key != "seed"})
            samples.setdefault(alike, {})[config["seed"]] = row["final_loss"]
    return [sample for sample in samples.values() if len(sample) > 1]


def written(found: Estimate, places: int, sign: str = "") -> tuple[str, str, str] | None:
    """Sign, mean and half of the interval, as text; None for a single run, which has no interval."""
    if found.half is None:
        return None
    mean = f"{found.mean:{sign}.{places}f}"
    return mean[:1] if sign else "", mean[len(sign) :], f"{found.half:.{places}f}"


def test_commands_of_the_benchmark_are_taken() -> None:
    """A command of an earlier version stands beside the commit that takes it."""
    for page in [*PAGES, *ROOT.glob("*.md"), *RUNS.rglob("*.md")]:
        text = re.sub(r"<!--.*?-->", "", page.read_text(encoding="utf-8")).replace("\\\n", "")
        for command in re.findall(r"python -m benchmarks ([a-z][^`\n]*)", text):
            arguments = shlex.split(command.partition(" && ")[0], comments=True)
            try:
                with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
                    make_parser().parse_args(arguments)
            except SystemExit as left:
                earlier = re.search(r"as of commit [0-9a-f]{7}\b", text)
                assert not left.code or earlier, f"{page.relative_to(ROOT)}: {command}: {said.getvalue()}"


def test_readme_counts_what_the_optimizers_are_tested_by() -> None:
    yaml = pytest.importorskip("yaml", reason="mkdocs brings it")
    notes = yaml.safe_load((ROOT / "docs" / "zoo.yml").read_text(encoding="utf-8"))
    against = [note["against"] for note in notes.values()]
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"{against.count('written out')} beside the published rule" in readme
    assert [name for name, note in notes.items() if note["against"] == "its promise"] == ["MuonPlusPlus"]
    assert "and `MuonPlusPlus` by what its paper promises" in readme


def test_models_says_what_the_residual_stream_reaches() -> None:
    """Peaks are those over all steps."""
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    for row in read_rows(RUNS / "models" / "norms" / RESULTS).values():
        peak, step = max((max(found["residual"]), step) for step, found in row["norms"])
        if row["config"]["model"] in ("gpt", "angpt"):
            assert f"{peak:.3g} (step {step})" in page
