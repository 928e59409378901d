"""The site: every optimizer has its page, what docs/zoo.yml claims is what the tests do, and a build asks nobody."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import normopt
from normopt.zoo.base import HANDED_ON

yaml = pytest.importorskip("yaml")
from docs import pages  # noqa: E402  its first import is yaml

ROOT = Path(__file__).parents[2]
NAMES = sorted(cls.__name__ for cls in pages.zoo().values())


def test_every_optimizer_has_notes_and_no_other() -> None:
    assert sorted(pages.notes()) == NAMES
    assert len(NAMES) == len(normopt.list_optimizers())
    installed = sum("." in note["against"] for note in pages.notes().values())
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"has {len(NAMES)} optimizers" in readme and f"{installed} beside an installed implementation" in readme


@pytest.mark.parametrize("name", NAMES)
def test_what_an_optimizer_is_checked_against_is_in_the_tests(name: str) -> None:
    """The file that its page names runs it beside the reference, or writes its rule out; to the difference it names."""
    note = pages.notes()[name]
    text = (ROOT / "tests" / "references" / note["tests"]).read_text(encoding="utf-8")
    assert re.search(rf"\b{name}\b|\"{name.lower()}\"", text)
    if "." in note["against"]:
        library, _, reference = note["against"].rpartition(".")
        is_case = f'case("{name}"' in text  # with the class of that name in torch.optim
        assert is_case or (library.split(".")[0] in text and re.search(rf"\b{reference}\b", text))
    far = note["by"]
    written = {float(number) for number in re.findall(r"\b\d(?:\.\d)?e-\d+\b", text)}
    assert far in written or any(abs(far - each) < 1e-3 * far for each in written)
    assert note["when"].endswith(".")


@pytest.mark.parametrize("name", NAMES)
def test_a_page_has_formula_arguments_answers_and_cost(name: str) -> None:
    page = pages.optimizer_page(getattr(normopt.zoo, name))
    assert page.startswith(f"# {name} ")
    for part in ("**When.**", "## The four answers", "## Arguments", "## Checked against", "bytes a parameter"):
        assert part in page
    undocumented = re.findall(r"^\| <code>(\w+)</code> \| [^|]* \|  \|$", page, flags=re.MULTILINE)
    assert not undocumented


def test_state_on_the_pages() -> None:
    for name, expected in {"SGD": 0, "AdamW": 8, "Muon": 4, "SOAP": 24}.items():
        state = pages.hidden_row(name)["state_bytes"] / pages.SIDE**2
        assert state == pytest.approx(expected, abs=0.01), name


def test_which_optimizers_have_not_been_run_on_the_gpt() -> None:
    text = (ROOT / "docs" / "optimizers.md").read_text(encoding="utf-8")
    said = text.partition("## Most of them on one GPT")[2].partition("are not in this table")[0]
    assert {*re.findall(r"`(\w+)`", said)} == {
        cls.__name__ for name, cls in pages.zoo().items() if name not in pages.runs()
    }


def test_the_budget_of_memory() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    said = {"0 for hidden matrices": (0, 0.1), "4": (3.9, 4.1), "8": (7.9, 8.1), "more than 8": (8.1, 100)}
    for row, (least, most) in said.items():
        (names,) = re.findall(rf"^\| {row} \| (.*) \|$", text, flags=re.MULTILINE)
        for name in re.findall(r"`(\w+)`", names):
            assert least <= pages.hidden_row(name)["state_bytes"] / pages.SIDE**2 <= most, name


def test_what_every_optimizer_can_be_told() -> None:
    """The table of common arguments has all of them."""
    text = (ROOT / "docs" / "running.md").read_text(encoding="utf-8")
    section = text.partition("## What every optimizer can be told")[2].partition("\n## ")[0]
    listed = {name for row in re.findall(r"^\| (`.*?) \|", section, flags=re.M) for name in re.findall(r"`(\w+)`", row)}
    assert listed == {*HANDED_ON}


def test_every_ingredient_has_a_page() -> None:
    text = "\n".join(dict(pages.ingredient_pages()).values())
    kinds = (normopt.Direction, normopt.Momentum, normopt.StepSize, normopt.Constraint)
    public = [name for name in normopt.__all__ if isinstance(getattr(normopt, name), type)]
    concrete = [name for name in public if issubclass(getattr(normopt, name), kinds) and name not in ABSTRACT]
    assert not [name for name in concrete if f"::: normopt.{name}\n" not in text]
    assert "(../../zoo/muon.md)" in pages.ingredient_page(normopt.Spectral)
    assert "duality map [[1.00, 1.00], [0.00, 1.00]]" in pages.ingredient_page(normopt.Max)


#: Bases of ingredients: the API has them.
ABSTRACT = {"Constraint", "Direction", "LearningRateFree", "Momentum", "Norm", "StepSize"}


class Links(HTMLParser):
    """What a page makes a browser load by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found: dict[str, Any] = dict(attrs)
        loads = {"script": "src", "img": "src", "iframe": "src", "source": "src"}
        if tag == "link" and found.get("rel") in ("stylesheet", "preconnect", "icon", "preload", "dns-prefetch"):
            self.loaded.append(found["href"])
        elif tag in loads and found.get(loads[tag]):
            self.loaded.append(found[loads[tag]])


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("mkdocs") or not find_spec("material"), reason="needs the extra docs")
def test_the_site_is_built_without_warnings_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    built = sorted(tmp_path.rglob("*.html"))
    assert len(built) > 140
    for page in built:
        text = page.read_text(encoding="utf-8")
        parser = Links()
        parser.feed(text)
        assert not [link for link in parser.loaded if re.match(r"(https?:)?//", link)], page
        assert "arithmatex" not in text and ":class:" not in text and not re.search(r"\$\$|\\\(", strip(text)), page
        assert not re.search(r"<m[ion]>\\\\\w", text), page  # a command of LaTeX that is not known
    for style in tmp_path.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//|@import", style.read_text(encoding="utf-8")), style


def strip(text: str) -> str:
    """A page without its code, where dollars and backslashes are what they are."""
    return re.sub(r"<(code|pre|script)\b.*?</\1>", "", text, flags=re.DOTALL)


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("matplotlib"), reason="needs the extra bench")
def test_pictures_are_drawn_and_shown(tmp_path: Path) -> None:
    from matplotlib.image import imread

    from docs import pictures

    pictures.main(tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in pictures.OUT.iterdir()} == set(pictures.PICTURES)
    for name in drawn:
        now, on_file = imread(tmp_path / name), imread(pictures.OUT / name)
        # A name of an optimizer changes 5e-5 of the table; rounding errors of another CPU next to nothing.
        is_same = now.shape == on_file.shape and abs(now - on_file).mean() < 2e-5
        assert is_same, f"{name} is not what is drawn now: python -m docs.pictures"
    text = "\n".join(path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    assert not [name for name in drawn if f"pictures/{name})" not in text]


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("matplotlib"), reason="needs the extra bench")
def test_pictures_have_the_colours_of_the_palette_and_as_many_norms_as_is_said() -> None:
    from benchmarks.output.palette import COLORS
    from docs import pictures

    assert {line.get_color() for line in pictures.spectra().axes[0].lines} <= {*COLORS.values()}
    text = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
    for name, words in {"balls.png": "of five norms", "walks.png": "under four norms"}.items():
        assert re.search(rf"!\[[^\]]*{words}[^\]]*\]\(pictures/{name}\)", text), name
        assert len(pictures.PICTURES[name]().axes) == {"five": 5, "four": 4}[words.split()[1]]
