"""Pages of the site that are written from the registry and from the repository's folders, as hooks of mkdocs.

``mkdocs build`` calls the functions named ``on_...``. What is generated: a page for each optimizer, for each kind of
ingredient, the API, the examples, and the tables of the benchmark as they lie on file.
"""

from __future__ import annotations

import ast
import html
import importlib
import inspect
import json
import math
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
from normopt.ingredient import Ingredient, Stage, choices
from normopt.ingredient.traits import overrides
from normopt.momentum import Momentum
from normopt.norms import Direction, Norm
from normopt.optimizer import SteepestDescent
from normopt.stepsize import StepSize

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

#: The side of the matrix whose state is measured.
SIDE = 256

#: Kinds of ingredients, which have a page each and one for every ingredient: title, kind, and what they answer.
INGREDIENTS: dict[str, tuple[str, type[Ingredient], str]] = {
    "norms": ("Norms, one by one", Norm, "Which direction is steepest?"),
    "directions": ("Directions", Direction, "Which direction is steepest, if not a norm's alone?"),
    "momentum": ("Momentum", Momentum, "Which gradient do we trust?"),
    "step-sizes": ("Step sizes", StepSize, "How far do we go?"),
    "constraints": ("Constraints, one by one", Constraint, "Where may the weights live?"),
}

#: What the page of the API lists, in this order; of a package what it has beside ingredients and optimizers.
MODULES = ["normopt", "normopt.zoo", "normopt.metrics", "normopt.integrations", "normopt.polar", "normopt.nn"]
MODULES += ["normopt.ingredient", "normopt.roles"]

#: Files at the root that are pages too.
PROJECT = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}

#: Scripts with a section of the page of examples each.
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

#: Where links to files and folders of the repository lead that are not in the site under their own names.
LED = {**PROJECT, "examples": "examples.md", "README.md": "index.md"}
LED |= {f"examples/{path.name}": f"examples.md#{path.stem}" for path in EXAMPLES}

#: What a page with pictures ends with.
DRAWN = "The pictures are drawn by `python -m docs.pictures`."


# Optimizers ----------------------------------------------------------------------------------------------------------


@cache
def notes() -> dict[str, dict[str, Any]]:
    """What docs/zoo.yml says of each optimizer."""
    found: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "docs" / "zoo.yml").read_text(encoding="utf-8"))
    return found


@cache
def sources() -> dict[str, str]:
    """Where the defaults of each optimizer come from, as the table of docs/optimizers.md has it."""
    text = (ROOT / "docs" / "optimizers.md").read_text(encoding="utf-8")
    rows = text.partition("| defaults of |\n")[2].partition("\n\n")[0].splitlines()[1:]
    found: dict[str, str] = {}
    for row in rows:
        first, *_, last = (cell.strip() for cell in row.strip("|").split("|"))
        source = last.removesuffix("'s")
        link = f"[{source}]({source.lower()}.md)" if source.lower() in zoo() else source
        found |= dict.fromkeys(re.findall(r"`(\w+)`", first), link)
    return found


@cache
def runs() -> dict[str, list[dict[str, Any]]]:
    """The rows of the grid over all optimizers, by name, from the smallest learning rate to the largest."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in (RESULTS / "zoo" / "results.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found.setdefault(row["config"]["optimizer"], []).append(row)
    return {name: sorted(rows, key=lambda row: row["config"]["lr"]) for name, rows in found.items()}


def grid_command() -> str:
    """The command that made the grid over all optimizers, with which its table begins."""
    return (RESULTS / "zoo" / "grid.md").read_text(encoding="utf-8").partition("\n")[0].strip("`")


def optimizer_page(cls: type[SteepestDescent]) -> str:
    """What an optimizer is, what it costs, what it is checked against, and what it did on the benchmark's GPT."""
    name, note = cls.__name__, notes()[cls.__name__]
    about, arguments, rest = sections(inspect.getdoc(cls) or "")
    parts = [f"# {name} {{#normopt.zoo.{name}}}", about, f"**When.** {note['when']}", "## The four answers"]
    parts += ["For a hidden matrix of a model, at the default arguments:", table(["question", "answer"], answers(name))]
    parts += [f'```python\noptimizer = normopt.create("{name.lower()}", model)\n```']
    parts += ["## Arguments", f"Where the defaults come from: {sources()[name]}."]
    parts += [table(["argument", "default", "meaning"], meanings(cls, arguments)), rest]
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
        command = grid_command().replace(RESULTS.relative_to(ROOT).as_posix(), "runs")
        command = re.sub(r"--optimizers \S+", f"--optimizers {name.lower()}", command)
        yield """Not in the [grid over all optimizers](../benchmarks/results/zoo/grid.md). Its losses at four learning
rates, in the same way:"""
        yield f"```sh\n{command}\n```"
        return
    share = sorted(row["optimizer_ms"] / (row["optimizer_ms"] + row["gradient_ms"]) for row in rows)[len(rows) // 2]
    yield f"""Of a training step of the benchmark's GPT on one CPU core the optimizer took {share:.0%}. Final losses of
[the grid](../benchmarks/results/zoo/grid.md), 300 steps of the `quick` preset, **one seed each** (differences below
0.02 are noise):"""
    losses = [f"{row['final_loss']:.3f}" if row["final_loss"] else "diverged" for row in rows]
    yield table(["learning rate", *(f"{row['config']['lr']:g}" for row in rows)], [("nats per byte", *losses)])
    yield curve(rows)


def curve(rows: list[dict[str, Any]]) -> str:
    """Final losses over learning rates as a small drawing: rates on a logarithmic axis, the smallest loss lowest."""
    rates = [math.log2(row["config"]["lr"]) for row in rows]
    losses = [row["final_loss"] for row in rows if row["final_loss"]]
    if not losses:
        return ""
    left, right, top, bottom = 50, 290, 15, 95

    def across(rate: float) -> float:
        return left + (right - left) * (rate - rates[0]) / (rates[-1] - rates[0] or 1)

    def down(loss: float) -> float:
        return bottom - (bottom - top) * (loss - min(losses)) / (max(losses) - min(losses) or 1)

    places = [
        (across(rate), down(row["final_loss"])) for rate, row in zip(rates, rows, strict=True) if row["final_loss"]
    ]
    line = " ".join(f"{x:.0f},{y:.0f}" for x, y in places)
    parts = [f'<path d="M{left - 12} {top - 8}V{bottom + 12}H{right + 12}"/>', f'<polyline points="{line}"/>']
    parts += [f'<circle cx="{x:.0f}" cy="{y:.0f}" r="4"/>' for x, y in places]
    for rate, row in zip(rates, rows, strict=True):
        parts.append(f'<text class="rate" x="{across(rate):.0f}" y="{bottom + 25}">{row["config"]["lr"]:g}</text>')
    for loss in sorted({min(losses), max(losses)}):
        parts.append(f'<text class="loss" x="{left - 17}" y="{down(loss) + 3:.0f}">{loss:.3f}</text>')
    parts.append(
        f'<text class="rate" x="{(left + right) // 2}" y="{bottom + 40}">nats per byte over the learning rate</text>'
    )
    label = "Final loss in nats per byte over the learning rate; lower is better"
    return (
        f'<svg class="curve" viewBox="0 0 320 140" role="img" aria-label="{label}"><title>{label}</title>'
        f"{''.join(parts)}</svg>"
    )


# Ingredients, API, examples ------------------------------------------------------------------------------------------


def ingredients(kind: type[Ingredient]) -> list[type[Ingredient]]:
    """The ingredients of one kind that the library has, in the order of the registry; norms are no directions here."""
    found = [cls for cls in choices(kind).values() if cls.__module__.startswith("normopt.")]
    found = [cls for cls in found if cls.__name__[0] != "_"]
    return [cls for cls in found if kind is not Direction or not issubclass(cls, Norm)]


def ingredient_pages() -> Iterator[tuple[str, str]]:
    """A page for each kind, which lists its ingredients, and one for each of these; with their places in the site."""
    for place, (title, kind, question) in INGREDIENTS.items():
        classes = ingredients(kind)
        listed = [f"* [`{cls.__name__}`]({cls.__name__.lower()}.md): {first_sentence(cls)}" for cls in classes]
        package = classes[0].__module__.rpartition(".")[0]
        heading = f"# {title} {{#{package}}}"
        yield page_of(place), "\n\n".join([heading, f"*{question}*", "\n".join(listed), *members(package)])
        yield from ((page_of(place, cls), ingredient_page(cls)) for cls in classes)


def page_of(place: str, cls: type[Ingredient] | None = None) -> str:
    """The place in the site of an ingredient's page, or of its kind's."""
    return f"ingredients/{place}/{cls.__name__.lower() if cls else 'index'}.md"


def ingredient_page(cls: type[Ingredient]) -> str:
    """What an ingredient is, what a norm does to one matrix, what a step asks of it, and who uses it."""
    parts = [f"::: {path_of(cls)}\n    options: {{members: false, heading_level: 1}}"]
    if issubclass(cls, Norm):
        parts += ["## On one matrix", *example_of(cls)]
    found = [*demands(cls)]
    parts += ["## In a step", "At the default arguments:", table(["question", "answer"], found)] if found else []
    users = [f"[{name}](../../zoo/{name.lower()}.md)" for name in sorted(users_of().get(cls.__name__, []))]
    having = f"""Optimizers that have it in the rule of some role, at their default arguments; their pages say what
they are checked against: {", ".join(users)}."""
    parts += ["## In the zoo", having if users else "No optimizer has it in a rule at its default arguments."]
    return "\n\n".join(parts)


def example_of(cls: type[Norm]) -> Iterator[str]:
    """Norm, dual norm and duality map of a small matrix, at scale 1."""
    norm, g = cls(scale="unit"), torch.tensor([[2.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    rows = [", ".join(f"{x:.2f}".replace("-0.00", "0.00") for x in row) for row in norm.dualize(g).tolist()]
    yield f"""Of the gradient [[2, 1], [0, 1]], at the scale `"unit"`: norm {norm.norm(g):.2f}, dual norm
{norm.dual_norm(g):.2f}, duality map [[{"], [".join(rows)}]]."""
    memory = f"`Smoothed({cls.__name__}())`" if norm.has_memory else "none, since it has no second moment"
    yield f"With memory: {memory}. {'A' if overrides(norm, Norm, 'unit_project') else 'No'} projection onto its balls."


def demands(cls: type[Ingredient]) -> Iterator[tuple[str, str]]:
    """What a step asks of an ingredient; nothing of one that cannot be made without arguments."""
    try:
        made: Any = cls()
    except (TypeError, ValueError):
        return
    if not isinstance(made, StepSize):
        of = {"entry": "that entry", "row": "its row", "column": "its column", "all": "sums over the matrix"}
        yield "What does one entry of the result depend on?", of.get(made.reduces, "the whole matrix")
    yield "Does it see the weights?", "yes" if made.sees_weights else "no"
    yield "Does the host look at numbers (no CUDA graph)?", "yes" if made.decides_on_host else "no"
    if isinstance(made, Stage):
        yield "Does it take vectors?", "yes" if made.takes_vectors else "no"
        entries = sum(state.numel() for state in made.init_state(torch.zeros(1, SIDE, SIDE)).values())
        yield f"State of a {SIDE} x {SIDE} matrix, numbers for each entry?", f"{entries / SIDE**2:.3g}"


@cache
def users_of() -> dict[str, set[str]]:
    """The optimizers that have an ingredient in a rule of some role, by the ingredient's name."""
    model = nn.Sequential(nn.Embedding(3, 4), nn.Conv2d(2, 3, 2), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 3))
    found: dict[str, set[str]] = {}
    for name, cls in zoo().items():
        for group in normopt.create(name, model).param_groups:
            for part in re.findall(r"(\w+)\(", group["rule"]):
                found.setdefault(part, set()).add(cls.__name__)
    return found


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
    """What the public modules offer, functions first; optimizers and ingredients have pages of their own."""
    parts = ["# API", "Optimizers are in the [zoo](optimizers.md), ingredients on the pages named after their kind."]
    for module in MODULES:
        parts += [f"## {module} {{#{module}}}", *members(module)]
    return "\n\n".join(parts)


def members(path: str) -> Iterator[str]:
    """What a module offers, but for what a page of its own or the API's section ``normopt`` has."""
    module = importlib.import_module(path)
    found = [(name, getattr(module, name)) for name in public(module)]
    found = [(name, x) for name, x in found if not (inspect.ismodule(x) or x in with_pages())]
    if module is not normopt:
        found = [(name, x) for name, x in found if getattr(normopt, name, None) is not x]
    for name, x in sorted(found, key=lambda each: inspect.isclass(each[1])):
        yield f"::: {path}.{name}\n    options: {{heading_level: 3}}"
        if not (inspect.isclass(x) or inspect.isroutine(x)):
            yield comment_above(name)


def comment_above(name: str) -> str:
    """What the comment ``#:`` above a constant of the library says."""
    for path in sorted((ROOT / "normopt").rglob("*.py")):
        found = re.search(rf"^((?:#: .*\n)+){name}\b.*=", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        if found:
            return re.sub(r"^#: ", "", found[1], flags=re.MULTILINE).strip()
    raise LookupError(f"{name} of the public API has no comment #: above it; write one, for its section of the site")


def public(module: Any) -> list[str]:
    """What a module offers under no ``_``."""
    own = [name for name, x in vars(module).items() if getattr(x, "__module__", "") == module.__name__]
    return sorted(name for name in getattr(module, "__all__", own) if name[0] != "_")


def with_pages() -> list[type]:
    """Optimizers and ingredients that have a page each."""
    return [*zoo().values(), *(cls for _, kind, _ in INGREDIENTS.values() for cls in ingredients(kind))]


def examples_page() -> str:
    """Every script of examples/, with what it says of itself and its text."""
    parts = [
        "# Examples",
        "Each runs on a CPU in about a minute, from the root of a checkout, and is run by the slow tests.",
    ]
    for path in EXAMPLES:
        text = path.read_text(encoding="utf-8")
        about = ast.get_docstring(ast.parse(text)) or ""
        body = text.split('"""', 2)[2].strip("\n")
        started = [] if "torchrun" in about else [f"```sh\npython examples/{path.name}\n```"]
        heading = f"## {path.stem.replace('_', ' ').capitalize()} {{#{path.stem}}}"
        parts += [heading, about, *started, f"```python\n{body}\n```"]
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
    return {**pages, **dict(ingredient_pages()), "api.md": api_page(), "examples.md": examples_page()}


def copied() -> dict[str, Path]:
    """Files outside of docs/ that are part of the site, by their place in it: results, and pages of the project."""
    kinds = (".md", ".png", ".jsonl", ".json", ".csv", ".tex")
    results = [path for path in sorted(RESULTS.rglob("*")) if path.suffix in kinds]
    found = {path.relative_to(ROOT).as_posix(): path for path in results}
    found |= {place: ROOT / name for name, place in PROJECT.items() if (ROOT / name).exists()}
    return found


def on_config(config: Any) -> Any:
    """Put the generated pages into the navigation."""
    results = [place for place in copied() if place.startswith("benchmarks/") and place.endswith(".md")]
    expanded: dict[str, list[Any]] = {
        "generated zoo": [{cls.__name__: f"zoo/{name.lower()}.md"} for name, cls in sorted(zoo().items())],
        "generated ingredients": [
            {title: [page_of(place), *({cls.__name__: page_of(place, cls)} for cls in ingredients(kind))]}
            for place, (title, kind, _) in INGREDIENTS.items()
        ],
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


def on_page_markdown(markdown: str, page: Any, files: Any, **_: Any) -> str:
    """Links that lead through the repository's folders lead to the same files in the site; of others the path stays.

    A page with pictures says what draws them.
    """
    place = page.file.src_uri
    moved = {there: here for here, there in PROJECT.items()}
    source = moved.get(place) or (place if place in copied() else f"docs/{place}")

    def led(match: re.Match[str]) -> str:
        words, link, anchor = match[1], match[2], match[3] or ""
        if "://" in link or link.startswith(("mailto:", "/")):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
        target = LED.get(path, path.removeprefix("docs/"))
        file = files.get_file_from_path(target.partition("#")[0])
        is_outside = file is None or file.inclusion.is_excluded()
        if is_outside and words is not None and (ROOT / path).exists():
            is_name = words.strip("`") == posixpath.basename(path)
            return f"`{path}`" if is_name else f"{words} `{path}`"
        before = "" if words is None else f"[{words}"
        return f"{before}]({posixpath.relpath(target, posixpath.dirname(place) or '.')}{anchor})"

    found = re.sub(r"(?:(?<!!)\[([^\[\]]*))?\]\(([^)#\s]+)(#[^)]*)?\)", led, markdown)
    return f"{found}\n\n{DRAWN}\n" if "](pictures/" in found else found


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
