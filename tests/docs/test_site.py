"""The site: every optimizer has its page, what docs/zoo.yml claims is what the tests do, and a build asks nobody."""

from __future__ import annotations

import math
import re
import shlex
import shutil
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urldefrag

import pytest

import normopt
from benchmarks.__main__ import make_parser
from normopt.zoo.base import HANDED_ON

yaml = pytest.importorskip("yaml")
from docs import pages  # noqa: E402  its first import is yaml

ROOT = Path(__file__).parents[2]
NAMES = sorted(cls.__name__ for cls in pages.zoo().values())


def test_every_optimizer_has_notes_and_no_other() -> None:
    assert sorted(pages.notes()) == sorted(pages.sources()) == NAMES
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


@pytest.mark.parametrize("name", NAMES)
def test_a_page_says_where_the_defaults_come_from(name: str) -> None:
    source = pages.sources()[name]
    assert source
    assert f"Where the defaults come from: {source}." in pages.optimizer_page(getattr(normopt.zoo, name))


@pytest.mark.parametrize("name", [name for name in NAMES if name.lower() in pages.runs()])
def test_the_smallest_loss_is_lowest_on_a_curve(name: str) -> None:
    """SVG's y grows downwards. Rates stand on a logarithmic axis, the smallest and the largest loss on the other."""
    rows = pages.runs()[name.lower()]
    drawn = pages.curve(rows)
    places = [(float(x), float(y)) for x, y in re.findall(r'cx="([-\d.]+)" cy="([-\d.]+)"', drawn)]
    rates, losses = zip(*((row["config"]["lr"], row["final_loss"]) for row in rows if row["final_loss"]), strict=True)
    assert len(places) == len(losses)
    heights = dict(zip(losses, (y for _, y in places), strict=True))
    assert heights[min(losses)] == max(heights.values()) and heights[max(losses)] == min(heights.values())
    share = [(math.log(rate) - math.log(rates[0])) / (math.log(rates[-1]) - math.log(rates[0])) for rate in rates]
    (first, _), (last, _) = places[0], places[-1]
    assert [x for x, _ in places] == pytest.approx([first + (last - first) * each for each in share], abs=1)
    labels = re.findall(r">([-\d.e]+)</text>", drawn)
    assert {*labels} == {*(f"{row['config']['lr']:g}" for row in rows)} | {f"{min(losses):.3f}", f"{max(losses):.3f}"}


@pytest.mark.parametrize("name", [name for name in NAMES if name.lower() not in pages.runs()])
def test_a_page_without_losses_has_the_command_for_them(name: str) -> None:
    (command,) = re.findall(r"^python -m benchmarks (.*)$", "\n".join(pages.cost(name)), re.M)
    parsed = make_parser().parse_args(shlex.split(command))
    of_the_grid = make_parser().parse_args(shlex.split(pages.grid_command())[3:])
    assert parsed.optimizers == [name.lower()] and parsed.out == Path("runs/zoo")
    changed = {"optimizers": of_the_grid.optimizers, "out": of_the_grid.out}
    assert vars(of_the_grid) == {**vars(parsed), **changed}


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


def test_every_public_name_is_on_one_page() -> None:
    places = [
        *re.findall(r"^::: ([\w.]+)$", "\n".join(pages.generated().values()), flags=re.MULTILINE),
        *re.findall(r"^#.* {#([\w.]+)}$", "\n".join(pages.generated().values()), flags=re.MULTILINE),
    ]
    assert not [name for name in normopt.__all__ if f"normopt.{name}" not in places]
    assert not [place for place in places if places.count(place) > 1]


def test_links_through_the_repository() -> None:
    """They lead to the site's pages and sections of its examples; of files that the site lacks the path stays."""
    inside = SimpleNamespace(inclusion=SimpleNamespace(is_excluded=lambda: False))
    own = {"recipes.md", "examples.md", "contributing.md", "benchmarks/results/zoo/grid.md", "pictures/step.png"}
    files = SimpleNamespace(get_file_from_path=lambda place: inside if place in own else None)

    def shown(text: str, place: str = "running.md") -> str:
        page = SimpleNamespace(file=SimpleNamespace(src_uri=place))
        return pages.on_page_markdown(text, page=page, files=files)

    assert shown("[steps](recipes.md#long)") == "[steps](recipes.md#long)"
    assert shown("[how](../CONTRIBUTING.md)") == "[how](contributing.md)"
    assert shown("[recipes](docs/recipes.md)", "contributing.md") == "[recipes](recipes.md)"
    assert shown("[grid](../benchmarks/results/zoo/grid.md)") == "[grid](benchmarks/results/zoo/grid.md)"
    assert shown("[fsdp2.py](../examples/fsdp2.py)") == "[fsdp2.py](examples.md#fsdp2)"
    assert shown("([test](../tests/docs/test_site.py))") == "(test `tests/docs/test_site.py`)"
    assert shown("[`test_site.py`](../tests/docs/test_site.py)") == "`tests/docs/test_site.py`"
    dead = "[gone](gone.md) and ![gone](pictures/gone.png)"
    assert shown(dead).startswith(dead)  # for mkdocs to warn of
    assert "`python -m docs.pictures`" in shown("![a step](pictures/step.png)")


#: Bases of ingredients: the API has them.
ABSTRACT = {"Constraint", "Direction", "LearningRateFree", "Momentum", "Norm", "StepSize"}


class Links(HTMLParser):
    """What a page makes a browser load by itself, what it leads to, and its anchors."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.leads_to: list[str] = []
        self.anchors: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found: dict[str, Any] = dict(attrs)
        loads = {"script": "src", "img": "src", "iframe": "src", "source": "src"}
        if tag == "link" and found.get("rel") in ("stylesheet", "preconnect", "icon", "preload", "dns-prefetch"):
            self.loaded.append(found["href"])
        elif tag in loads and found.get(loads[tag]):
            self.loaded.append(found[loads[tag]])
        elif tag == "a" and found.get("href"):
            self.leads_to.append(found["href"])
        self.anchors |= {found["id"]} if "id" in found else set()


#: The command that ends the gate, for this environment's Python.
BUILD = [sys.executable, *re.findall(r'/python" (-m mkdocs build.*)', (ROOT / ".ci" / "run").read_text())[0].split()]
builds = pytest.mark.skipif(not find_spec("mkdocs") or not find_spec("material"), reason="needs the extra docs")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run([*BUILD, "--site-dir", str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@builds
def test_the_site_is_built_without_warnings_and_loads_nothing_from_elsewhere(site: Path) -> None:
    built = sorted(site.rglob("*.html"))
    assert len(built) > 140
    for page in built:
        text = page.read_text(encoding="utf-8")
        assert not [link for link in Links(page).loaded if re.match(r"(https?:)?//", link)], page
        assert re.search(r'<link rel="icon" href="[./]*icon\.svg">', text), page
        assert "arithmatex" not in text and ":class:" not in text and not re.search(r"\$\$|\\\(", strip(text)), page
        assert not re.search(r"<m[ion]>\\\\\w", text), page  # a command of LaTeX that is not known
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//|@import", style.read_text(encoding="utf-8")), style


@pytest.mark.slow
@builds
def test_every_link_and_anchor_of_the_site_is_there(site: Path) -> None:
    """Of 404.html, which is shown at any address, the links begin at the root of the site."""
    found = {page: Links(page) for page in site.rglob("*.html")}
    dead = []
    for page, links in found.items():
        for link in {*links.leads_to, *links.loaded}:
            if re.match(r"\w+:|//", link):
                continue
            path, anchor = (unquote(part) for part in urldefrag(link))
            target = (site / path[1:] if path.startswith("/") else page.parent / path).resolve() if path else page
            target = target / "index.html" if target.is_dir() else target
            if not target.exists() or (anchor and target in found and anchor not in found[target].anchors):
                dead.append((page.relative_to(site).as_posix(), link))
    assert not dead


@pytest.mark.slow
@builds
def test_the_site_has_an_anchor_for_every_public_name(site: Path) -> None:
    anchors = set().union(*(Links(page).anchors for page in site.rglob("*.html")))
    names = {f"normopt.{name}" for name in normopt.__all__}
    assert names <= anchors
    inventory = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    modules = {f"normopt.{name}" for name in normopt.__all__ if isinstance(getattr(normopt, name), type(normopt))}
    assert names - modules <= {line.split()[0] for line in inventory.splitlines()}


@pytest.mark.slow
@builds
def test_a_warning_fails_the_build(tmp_path: Path) -> None:
    """Of a checkout whose docs have one dead link more."""
    for path in ROOT.iterdir():
        if path.name not in ("docs", "mkdocs.yml", "build", ".git"):
            (tmp_path / path.name).symlink_to(path)
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    with (tmp_path / "docs" / "glossary.md").open("a", encoding="utf-8") as file:
        file.write("\nSee [nothing](nothing.md).\n")
    done = subprocess.run([*BUILD, "--site-dir", str(tmp_path / "site")], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    (warning,) = re.findall(r"^WARNING .*", done.stderr, flags=re.MULTILINE)
    assert "'nothing.md'" in warning and "Aborted with 1 warnings in strict mode" in done.stdout


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
