"""Pages of the site that are written from the registry and from the repository's folders, as hooks of mkdocs.

``mkdocs build`` calls the functions named ``on_...``. What is generated: a page for each optimizer, for each kind of
ingredient, the API, the examples, and the tables of the benchmark as they lie on file.
"""

from __future__ import annotations

import ast
import html
import inspect
import json
import posixpath
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

import normopt
from normopt.constraints import Constraint
from normopt.ingredient import Ingredient, choices
from normopt.momentum import Momentum
from normopt.norms import Direction, Norm
from normopt.optimizer import SteepestDescent
from normopt.stepsize import StepSize

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

#: The side of the matrix whose state is measured.
SIDE = 256

#: Pages of ingredients: title, kind, and what its ingredients answer.
INGREDIENTS: dict[str, tuple[str, type[Ingredient], str]] = {
    "norms": ("Norms, one by one", Norm, "Which direction is steepest?"),
    "directions": ("Directions", Direction, "Which direction is steepest, if not a norm's alone?"),
    "momentum": ("Momentum", Momentum, "Which gradient do we trust?"),
    "step-sizes": ("Step sizes", StepSize, "How far do we go?"),
    "constraints": ("Constraints, one by one", Constraint, "Where may the weights live?"),
}

#: What the page of the API lists, in this order; of a package what it has beside ingredients and optimizers.
MODULES = ["normopt", "normopt.zoo", "normopt.metrics", "normopt.integrations", "normopt.polar", "normopt.nn"]
MODULES += ["normopt.ingredient"]

#: Files at the root that are pages too.
PROJECT = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}

#: Where links to files and folders of the repository lead that are not in the site under their own names.
LED = {**PROJECT, "examples": "examples.md", "README.md": "index.md"}


# Optimizers ----------------------------------------------------------------------------------------------------------


@cache
def notes() -> dict[str, dict[str, Any]]:
    """What docs/zoo.yml says of each optimizer."""
    found: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "docs" / "zoo.yml").read_text(encoding="utf-8"))
    return found


@cache
def runs() -> dict[str, list[dict[str, Any]]]:
    """The rows of the grid over all optimizers, by name, from the smallest learning rate to the largest."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in (RESULTS / "zoo" / "results.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found.setdefault(row["config"]["optimizer"], []).append(row)
    return {name: sorted(rows, key=lambda row: row["config"]["lr"]) for name, rows in found.items()}


def optimizer_page(cls: type[SteepestDescent]) -> str:
    """What an optimizer is, what it costs, what it is checked against, and what it did on the benchmark's GPT."""
    name, note = cls.__name__, notes()[cls.__name__]
    about, arguments, rest = sections(inspect.getdoc(cls) or "")
    parts = [f"# {name} {{#normopt.zoo.{name}}}", about, f"**When.** {note['when']}", "## The four answers"]
    parts += ["For a hidden matrix of a model, at the default arguments:", table(["question", "answer"], answers(name))]
    parts += [f'```python\noptimizer = normopt.create("{name.lower()}", model)\n```']
    parts += ["## Arguments", table(["argument", "default", "meaning"], meanings(cls, arguments)), rest]
    parts += ["## Checked against", checked(note), "## Cost and learning rate", *cost(name)]
    return "\n\n".join(part for part in parts if part)


def answers(name: str) -> Iterator[tuple[str, str]]:
    """The four ingredients of the hidden matrix, as :func:`normopt.summary` has them."""
    row = hidden_row(name)
    yield "Which gradient do we trust?", code(row["momentum"])
    yield "Which direction is steepest?", code(row["norm"])
    yield "How far do we go?", code(row["step_size"])
    yield "Where may the weights live?", ", ".join(map(code, row["constraint"])) or "anywhere"


@cache
def hidden_row(name: str) -> dict[str, Any]:
    """The row of a hidden matrix of ``SIDE`` x ``SIDE`` in the summary of an optimizer, after three steps."""
    model = nn.Sequential(nn.Embedding(3, SIDE), nn.Linear(SIDE, SIDE, bias=False), nn.Linear(SIDE, 3, bias=False))
    optimizer = normopt.create(name, model)
    noise = torch.Generator().manual_seed(0)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=noise)
        optimizer.step(lambda: torch.zeros(()))
    return next(row for row in normopt.summary(optimizer) if row["parameter"] == "1.weight")


def meanings(cls: type[SteepestDescent], documented: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    """The arguments in their order, with default and meaning."""
    for name, parameter in inspect.signature(cls).parameters.items():
        default = "" if parameter.default is parameter.empty else code(repr(parameter.default))
        yield code(name), default, documented.get(name, "")


def checked(note: dict[str, Any]) -> str:
    """What the tests run the optimizer beside."""
    how = {
        "written out": "the published rule, written out in the test",
        "its promise": "what the paper promises, measured",
    }
    against = how.get(note["against"], f"`{note['against']}`, as installed")
    far = "the distance travelled" if note["by"] > 1e-8 else "the weights, in float64"
    where = f"`tests/references/{note['tests']}`"
    return f"{against[0].upper() + against[1:]}: equal to {note['by']:.0e} of {far}, in {where}."


def cost(name: str) -> Iterator[str]:
    """State, share of a step, and the losses by learning rate."""
    state = hidden_row(name)["state_bytes"] / SIDE**2
    yield f"State of a {SIDE} x {SIDE} float32 matrix: **{state:.2f} bytes a parameter** (AdamW: 8)."
    rows = runs().get(name.lower(), [])
    if not rows:
        yield "Not in the [grid over all optimizers](../benchmarks/results/zoo/grid.md)."
        return
    share = sorted(row["optimizer_ms"] / (row["optimizer_ms"] + row["gradient_ms"]) for row in rows)[len(rows) // 2]
    yield f"""Of a training step of the benchmark's GPT on one CPU core the optimizer took {share:.0%}. Final losses of
[the grid](../benchmarks/results/zoo/grid.md), 300 steps of the `quick` preset, **one seed each** (differences below
0.02 are noise):"""
    losses = [f"{row['final_loss']:.3f}" if row["final_loss"] else "diverged" for row in rows]
    yield table(["learning rate", *(f"{row['config']['lr']:g}" for row in rows)], [("nats per byte", *losses)])
    yield curve(rows)


def curve(rows: list[dict[str, Any]]) -> str:
    """Losses over learning rates, a factor of two apart, as a small drawing."""
    points = [(i, row["final_loss"]) for i, row in enumerate(rows) if row["final_loss"]]
    low, high = min(loss for _, loss in points), max(loss for _, loss in points)
    places = [(20 + 240 * i / max(1, len(rows) - 1), 15 + 60 * (high - loss) / (high - low or 1)) for i, loss in points]
    places = [(x, 90 - y) for x, y in places]
    line = " ".join(f"{x:.0f},{y:.0f}" for x, y in places)
    dots = "".join(f'<circle cx="{x:.0f}" cy="{y:.0f}" r="4"/>' for x, y in places)
    label = "Final loss over the learning rate; lower is better"
    return (
        f'<svg class="curve" viewBox="0 0 280 100" role="img" aria-label="{label}"><title>{label}</title>'
        f'<polyline points="{line}"/>{dots}</svg>'
    )


# Ingredients, API, examples ------------------------------------------------------------------------------------------


def ingredient_page(title: str, kind: type[Ingredient], question: str) -> str:
    """Every ingredient of one kind, with its formula and arguments."""
    classes = [cls for cls in choices(kind).values() if cls.__module__.split(".")[0] == "normopt"]
    if kind is Direction:
        classes = [cls for cls in classes if not issubclass(cls, Norm)]
    classes = [cls for cls in classes if not cls.__name__.startswith("_")]
    listed = "\n".join(f"* [`{cls.__name__}`][{path_of(cls)}]: {first_sentence(cls)}" for cls in classes)
    bodies = "\n\n".join(f"::: {path_of(cls)}\n    options: {{members: false, heading_level: 2}}" for cls in classes)
    return f"# {title}\n\n*{question}* All of them, from the registry.\n\n{listed}\n\n{bodies}"


def path_of(x: Any) -> str:
    """Where a public class or function is imported from."""
    name: str = x.__name__
    short = "normopt" if getattr(normopt, name, None) is x else x.__module__
    return f"{short}.{name}"


def first_sentence(x: Any) -> str:
    """What the docstring says first, with roles of reStructuredText as code."""
    first = " ".join((inspect.getdoc(x) or "").split("\n\n")[0].split())
    return re.sub(r":\w+:`~?(?:\w+\.)*(\w+)`", r"`\1`", first)


def api_page() -> str:
    """Functions and classes of the public modules; optimizers and ingredients have pages of their own."""
    parts = ["# API", "Optimizers are in the [zoo](optimizers.md), ingredients on the pages named after their kind."]
    seen: set[Any] = set()
    for name in MODULES:
        module = __import__(name, fromlist=["__all__"])
        found = [x for x in (getattr(module, each) for each in public(module)) if callable(x) and x not in seen]
        seen |= {*found}
        found = [x for x in found if not is_shown_elsewhere(x)]
        found = sorted(found, key=inspect.isclass)  # functions first
        parts += [f"## {name}" if found else ""]
        parts += [f"::: {name}.{x.__name__}\n    options: {{heading_level: 3}}" for x in found]
    return "\n\n".join(part for part in parts if part)


def public(module: Any) -> list[str]:
    """What a module offers under no ``_``."""
    own = [name for name, x in vars(module).items() if getattr(x, "__module__", "") == module.__name__]
    return sorted(name for name in getattr(module, "__all__", own) if name[0] != "_")


def is_shown_elsewhere(x: Any) -> bool:
    """Whether the zoo or a page of ingredients has it."""
    if not inspect.isclass(x):
        return not inspect.isfunction(x)
    shown = [*SteepestDescent.registry.values(), *choices(Ingredient).values()]
    return x in shown or x.__name__ not in vars(__import__(x.__module__, fromlist=["x"]))


def examples_page() -> str:
    """Every script of examples/, with what it says of itself and its text."""
    parts = [
        "# Examples",
        "Each runs on a CPU in about a minute, from the root of a checkout, and is run by the slow tests.",
    ]
    for path in sorted((ROOT / "examples").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        about = ast.get_docstring(ast.parse(text)) or ""
        body = text.split('"""', 2)[2].strip("\n")
        started = [] if "torchrun" in about else [f"```sh\npython examples/{path.name}\n```"]
        parts += [f"## {path.stem.replace('_', ' ').capitalize()}", about, *started, f"```python\n{body}\n```"]
    return "\n\n".join(parts)


# Docstrings as Markdown ----------------------------------------------------------------------------------------------


def sections(text: str) -> tuple[str, dict[str, str], str]:
    """What a docstring says, its arguments by name, and its other sections."""
    before, _, after = text.partition("\nArgs:\n")
    listed, *others = re.split(r"\n(?=[A-Z]\w+:\n)", after)
    found = dict(re.findall(r"^    (\w+): (.*(?:\n {6,}.*)*)", listed, flags=re.MULTILINE))
    arguments = {name: " ".join(words.split()) for name, words in found.items()}
    return before.strip(), arguments, "\n\n".join(f"**{other.replace(':', '.**', 1)}" for other in others)


def code(text: str) -> str:
    """Code in a cell of a table."""
    return f"<code>{html.escape(text).replace('|', '&#124;')}</code>" if text else ""


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of Markdown; ``|`` in a cell is kept."""
    first, *rest = [[cell.replace("|", "&#124;") for cell in row] for row in (header, *rows)]
    lines = [first, ["---"] * len(first), *rest]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# Hooks of mkdocs -----------------------------------------------------------------------------------------------------


def generated() -> dict[str, str]:
    """Every generated page by its place in the site."""
    pages = {f"zoo/{name.lower()}.md": optimizer_page(cls) for name, cls in zoo().items()}
    pages |= {f"ingredients/{place}.md": ingredient_page(*spec) for place, spec in INGREDIENTS.items()}
    return {**pages, "api.md": api_page(), "examples.md": examples_page()}


def copied() -> dict[str, Path]:
    """Files outside of docs/ that are part of the site, by their place in it: results, and pages of the project."""
    kinds = (".md", ".png", ".jsonl", ".json", ".csv", ".tex")
    results = [path for path in sorted(RESULTS.rglob("*")) if path.suffix in kinds]
    found = {path.relative_to(ROOT).as_posix(): path for path in results}
    found |= {place: ROOT / name for name, place in PROJECT.items() if (ROOT / name).exists()}
    return found | {f"examples/{path.name}": path for path in sorted((ROOT / "examples").glob("*.py"))}


def on_config(config: Any) -> Any:
    """Put the generated pages into the navigation."""
    results = [place for place in copied() if place.startswith("benchmarks/") and place.endswith(".md")]
    expanded: dict[str, list[Any]] = {
        "generated zoo": [{cls.__name__: f"zoo/{name.lower()}.md"} for name, cls in sorted(zoo().items())],
        "generated ingredients": [{title: f"ingredients/{place}.md"} for place, (title, *_) in INGREDIENTS.items()],
        "generated benchmarks": [{title_of(place): place} for place in results],
        "generated project": [{place[:-3].capitalize(): place} for place in PROJECT.values() if place in copied()],
        "generated examples": ["examples.md"],
        "generated api": ["api.md"],
    }
    config["nav"] = expand(config["nav"], expanded)
    return config


def zoo() -> dict[str, type[SteepestDescent]]:
    """The optimizers of the library by name; a user's plugin is not among them."""
    return {name: cls for name, cls in SteepestDescent.registry.items() if cls.__module__.startswith("normopt.zoo")}


def title_of(place: str) -> str:
    """``headline: sweep`` for ``benchmarks/results/headline/sweep/sweep.md``."""
    folders = place.split("/")[2:-1]
    stem = Path(place).stem
    words = folders if stem in ("README", folders[-1]) else [*folders, stem]
    return ": ".join(words)


def expand(nav: list[Any], expanded: dict[str, list[Any]]) -> list[Any]:
    """The navigation with lists in the place of their marks."""
    found: list[Any] = []
    for item in nav:
        if isinstance(item, str):
            found += expanded.get(item, [item])
            continue
        ((title, inside),) = item.items()
        if isinstance(inside, list):
            found.append({title: expand(inside, expanded)})
        else:
            found.append({title: expanded.get(inside, [inside])[0]})
    return found


def on_files(files: Any, config: Any) -> Any:
    """Add generated and copied files."""
    from mkdocs.structure.files import File

    for place, text in generated().items():
        files.append(File.generated(config, place, content=text))
    for place, path in copied().items():
        files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links that lead through the repository's folders lead to the same files in the site."""
    place = page.file.src_uri
    moved = {there: here for here, there in PROJECT.items()}
    source = moved.get(place) or (place if place in copied() else f"docs/{place}")

    def led(match: re.Match[str]) -> str:
        link, anchor = match[1], match[2] or ""
        if "://" in link or link.startswith(("mailto:", "/")):
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
        target = LED.get(target, target.removeprefix("docs/"))
        return f"]({posixpath.relpath(target, posixpath.dirname(place) or '.')}{anchor})"

    return re.sub(r"\]\(([^)#\s]+)(#[^)]*)?\)", led, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Formulas as MathML, and the roles of reStructuredText in docstrings as links."""
    from latex2mathml.converter import convert

    def formula(match: re.Match[str]) -> str:
        text = html.unescape(match[2]).strip()
        return str(convert(text[2:-2], display="block" if match[1] == "div" else "inline"))

    content = re.sub(r'<(div|span) class="arithmatex">(.*?)</\1>', formula, content, flags=re.DOTALL)
    return re.sub(r":(?:class|func|meth|mod|data|attr):<code>~?([\w.]+)</code>", linked, content)


def linked(match: re.Match[str]) -> str:
    """A link to the class or function, where a page has it."""
    path: str = match[1]
    name = path.split(".")[-1]
    if name in SteepestDescent.registry or f"{name.lower()}" in SteepestDescent.registry:
        path = f"normopt.zoo.{name}"
    elif "." not in path or hasattr(normopt, name):
        path = f"normopt.{name}"
    return f'<autoref identifier="{path}" optional><code>{name}</code></autoref>'
