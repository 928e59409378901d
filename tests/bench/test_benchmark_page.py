"""`python -m benchmarks report --html`: one page that fetches nothing, with every section, and tables that sort."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.__main__ import main
from benchmarks.output import figures
from benchmarks.output.figures import MAX_LINES, spread
from benchmarks.output.page import PAGE
from benchmarks.output.palette import BASELINE, BLACK, GREY, MANY, lines
from benchmarks.output.records import RESULTS, Row, append_row
from benchmarks.output.studies import Folder
from tests.bench.test_benchmark_transfer import checked, parabola
from tests.support.bench_runs import row

SECTIONS = ("final", "curves", "target", "best", "rates", "time", "transfer")


class Page(HTMLParser):
    """What a browser would find: sections, figures, tables, and every attribute that could fetch something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sections: dict[str, dict[str, int]] = {}
        self.fetched: list[str] = []
        self.cells: list[str | None] = []
        self.buttons = self.heads = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        if tag == "section":
            self.sections[str(found["id"])] = {"svg": 0, "table": 0, "details": 0}
        elif tag in ("svg", "table", "details"):
            self.sections[list(self.sections)[-1]][tag] += 1
        self.buttons += tag == "button"
        self.heads += tag == "th"
        if tag == "td":
            self.cells.append(found.get("data-key"))
        for name, value in attributes:
            fetches = name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster")
            if fetches and not str(value).startswith("#"):
                self.fetched.append(f"{tag} {name}={value}")
        if tag in ("link", "iframe", "object", "embed", "img", "base"):
            self.fetched.append(tag)


def of_length(made: Row, steps: int) -> Row:
    made["config"]["preset"] = {**made["config"]["preset"], "steps": steps}
    return {**made, "key": f"{made['key']} {steps}", "steps_done": steps, "train_seconds": 0.5 * steps}


def compared() -> list[Row]:
    found = {"adamw": {100: 3.0, 200: 2.5, 400: 2.0}, "muon": {100: 2.5, 200: 2.0, 400: 1.5}}
    rows = [
        of_length(row(name, seed, loss + 0.01 * seed), steps)
        for name, by_length in found.items()
        for steps, loss in by_length.items()
        for seed in (0, 1, 2)
    ]
    return [*rows, of_length(row("sgd", 0, None), 400)]


def tuned() -> list[Row]:
    return [row(name, 1000, 2 + abs(lr - 0.2), lr) for name in ("adamw", "muon", "lion") for lr in (0.1, 0.2, 0.4)]


def folder(name: str, rows: list[Row]) -> str:
    for made in rows:
        append_row(Path(name, RESULTS), made)
    return name


def written(folders: list[str]) -> str:
    assert main(["report", "--html", "--runs", ",".join(folders), "--out", "out"]) == 0
    return Path("out", PAGE).read_text(encoding="utf-8")


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    grown = [*parabola("adam", 64, 0.04, 0.004), *parabola("adam", 256, 0.02, 0.004)]
    grown += [checked("adam", width, 1.0) for width in (64, 256)]
    made = [folder("one", compared()), folder("two", tuned()), folder("three", grown)]
    Path("two", "sweep.md").write_text("`python -m benchmarks sweep --optimizers adamw,muon,lion --out two`\n")
    return written(made)


def test_the_page_has_all_sections_and_fetches_nothing(text: str) -> None:
    page = Page(text)
    assert tuple(page.sections) == SECTIONS and page.fetched == []
    assert not re.search(r"https?:|//\w|url\((?!#)|@import|fetch\(|XMLHttpRequest", text)
    assert "default-src 'none'" in text
    for name, found in page.sections.items():
        assert found["svg"] >= 1 and found["details"] == 1, name
        assert found["table"] >= 1 or name == "curves"
    assert text.count("<style") - text.count("<svg") == 1 or text.count("<script") == 1


def test_tables_have_keys_to_sort_by(text: str) -> None:
    page = Page(text)
    assert page.heads == page.buttons > 20 and None not in page.cells
    keys = [key for key in page.cells if key]
    assert sum(key.replace(".", "").replace("-", "").replace("e", "").isdigit() for key in keys) > len(keys) / 2
    assert ">diverged</td>" in text and 'data-key="inf"' not in text and 'data-key="nan"' not in text


def test_the_page_says_what_made_it(text: str) -> None:
    assert "python -m benchmarks sweep --optimizers adamw,muon,lion --out two" in text
    assert "one: rows like those of <code>python -m benchmarks compare --optimizers adamw,muon,sgd --model gpt" in text
    assert "the band is from the lowest to the highest seed" in text
    assert "python -m benchmarks transfer --geometries adam" in text


def test_a_section_without_rows_says_which_command_makes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = written([folder("one", [row("muon", 0, 2.0)])])
    page = Page(text)
    assert tuple(page.sections) == SECTIONS and page.fetched == []
    empty = {name for name, found in page.sections.items() if not found["svg"]}
    assert empty == {"target", "best", "rates", "transfer"} and text.count('class="none"') == len(empty)
    assert "python -m benchmarks compare --optimizers adamw,muon,scion --seeds 3 --horizons 150,300" in text
    assert "NaN" not in text.split("<script>")[0] and ">nan<" not in text


def test_texts_are_never_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    other, held_out = row("muon", 0, 2.0), row("muon", 0, 1.0)
    other["config"]["corpus"] = "1"
    held_out["config"]["split"] = "test"
    made = [row("muon", 0, 3.0), {**other, "key": "other"}, {**held_out, "key": "held out"}]
    assert Page(written([folder("one", made)])).sections["final"]["svg"] == 3


def test_two_settings_of_one_optimizer_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [folder("one", [row("muon", 0, 3.0, lr=0.1)]), folder("two", [row("muon", 0, 2.0, lr=0.2)])]
    with pytest.raises(SystemExit):
        written(folders)
    assert "two runs of muon" in capsys.readouterr().err and not Path("out", PAGE).exists()


def test_curves_of_other_evaluations_or_none_are_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fewer, none = row("muon", 2, 2.0), row("muon", 3, 2.0, curve=[])
    fewer["curve"] = fewer["curve"][::2]
    made = [row("muon", 0, 2.0), row("muon", 1, 2.0), fewer, none]
    assert Page(written([folder("one", made)])).sections["curves"]["svg"] == 1
    assert Page(written([folder("two", [none])])).sections["curves"]["svg"] == 0


def test_a_folder_without_runs_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["report", "--html", "--runs", "nowhere", "--out", "out"])
    assert f"no runs in nowhere: give folders that hold a {RESULTS}" in capsys.readouterr().err
    assert not Path("out").exists()


def test_names_are_text_and_not_markup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = [row("<img src=x>", seed, 2.0) for seed in (0, 1)]
    assert Page(written([folder("one", made)])).fetched == []


@pytest.mark.parametrize(("rows", "kind"), [(compared(), "compare"), (tuned(), "sweep")])
def test_rows_say_which_command_they_are_of(rows: list[Row], kind: str) -> None:
    assert Folder(Path("x"), rows).kind == kind
    assert Folder(Path("x"), [*parabola("a", 64, 0.02), *parabola("a", 128, 0.02)]).kind == "transfer"


def test_the_baseline_is_black_and_of_many_the_rest_is_grey() -> None:
    names = [f"muon {i}" for i in range(MANY)]
    drawn = lines([*names, "lion", BASELINE])
    assert drawn[BASELINE]["color"] == BLACK and drawn["lion"]["color"] == GREY
    assert all(drawn[name]["color"] == drawn["muon 0"]["color"] != GREY for name in names)
    assert lines(["lion"])["lion"]["color"] != GREY


def test_panels_of_a_sweep_share_one_y_axis() -> None:
    names = [f"muon {i}" for i in range(MAX_LINES + 1)]
    groups = {(name, lr): [row(name, 0, 2 + i + lr, lr)] for i, name in enumerate(names) for lr in (0.1, 0.2)}
    with figures.styled():
        panels = figures.rates(groups, "nats/byte").axes
    assert len(panels) == len(names) and len({axes.get_ylim() for axes in panels}) == 1


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_names_beside_lines_do_not_overlap(values: list[float]) -> None:
    gap = 0.05
    placed = spread(sorted(values), gap)
    assert all(later - earlier >= gap - 1e-9 for earlier, later in pairwise(placed))
    assert placed[0] >= -1e-9 and placed[-1] <= 1 + 1e-9
    far = [0.0, 0.5, 1.0]
    assert spread(far, gap) == pytest.approx(far)
