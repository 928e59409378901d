"""The code blocks of README and docs run, in the order in which they stand."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from statistics import mean, stdev

import pytest

from benchmarks.language.report import best_first, headline, split
from benchmarks.output.comparison import write_comparison
from benchmarks.output.records import RESULTS, read_rows

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

#: Where README's table comes from, below `benchmarks/results/headline`.
HEADLINE = ("compare", "angpt")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
@pytest.mark.usefixtures("registry")
def test_code_blocks_run(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    code = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL))
    module = types.ModuleType(page.stem)
    monkeypatch.setitem(sys.modules, page.stem, module)  # where dataclasses look their annotations up
    exec(compile(code, str(page), "exec", dont_inherit=True), vars(module))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


def test_headline_is_the_table_of_the_runs_on_file(tmp_path: Path) -> None:
    folder = ROOT / "benchmarks" / "results" / "headline"
    rows = [row for name in HEADLINE for row in read_rows(folder / name / RESULTS).values()]
    table = write_comparison(best_first(rows), tmp_path)
    before, after = split(ROOT / "README.md")
    text = f"{before}\n\n{headline(table, True, folder, ROOT / 'README.md')}\n\n{after}"
    assert (ROOT / "README.md").read_text(encoding="utf-8") == text
    assert (folder / "compare.csv").read_bytes() == (tmp_path / "compare.csv").read_bytes()


def test_models_says_what_the_runs_on_file_say() -> None:
    """Deviations of its tables are those of the samples, and the residual stream's peaks are peaks over all steps."""
    folder, page = ROOT / "benchmarks" / "results" / "models", (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    samples: dict[str, list[float]] = {}
    for name in ("compare", "alpha", "batch64"):
        for row in read_rows(folder / name / RESULTS).values():
            config = {key: value for key, value in row["config"].items() if key != "seed"}
            samples.setdefault(str(config), []).append(row["final_loss"])
    known = {f"{mean(x):.3f} ± {stdev(x):.3f}" for x in samples.values() if len(x) > 1}
    claimed = set(re.findall(r"\d\.\d{3} ± \d\.\d{3}", page))
    assert claimed and claimed <= known
    for row in read_rows(folder / "norms" / RESULTS).values():
        peak, step = max((max(found["residual"]), step) for step, found in row["norms"])
        if row["config"]["model"] in ("gpt", "angpt"):
            assert f"{peak:.3g} (step {step})" in page
