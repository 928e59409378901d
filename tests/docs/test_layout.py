"""The layout is the idea: imports point down from floor to floor, and never in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "normopt"

#: From the roof to the ground. What stands on one floor does not import its neighbours.
FLOORS: list[set[str]] = [
    {"__main__"},
    {"__init__"},
    {"report", "torch_state", "integrations", "averaging", "inputs", "radius"},
    {"zoo"},
    {"optimizer"},
    {"metrics"},
    {"engine"},
    {"rule", "roles"},
    {"momentum", "directions", "stepsize", "constraints"},
    {"norms"},
    {"polar"},
    {"ingredient"},
    {"numerics"},
]
#: Models stand beside the house: they declare what they are made of, in words and views.
BESIDE = {"nn": {"nn", "ingredient", "norms", "polar", "numerics"}}

FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(("normopt", *parts)).removesuffix(".__init__")


def imported(path: Path) -> Iterator[str]:
    """Every module of the library that a file imports, also for types only and inside of functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names if each.name.split(".")[0] == "normopt")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "normopt":
            for each in node.names:
                deeper = f"{node.module}.{each.name}"
                yield deeper if deeper in MODULES else str(node.module)


MODULES = {module_of(path): path for path in FILES}


def room(module: str) -> str:
    """The package or top-level module that a module belongs to."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def floor(name: str) -> int:
    return next(i for i, names in enumerate(FLOORS) if name in names)


def test_every_room_has_its_floor() -> None:
    assert {room(module) for module in MODULES} == {*set().union(*FLOORS), *BESIDE}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    here = room(module)
    for other in imported(MODULES[module]):
        there = room(other)
        if here == there or here in ("__init__", "__main__"):
            continue
        if here in BESIDE:
            assert there in BESIDE[here], f"{module} imports {other}"
        else:
            assert there not in BESIDE or floor(here) < floor("optimizer"), f"{module} imports {other}"
            assert there in BESIDE or floor(here) < floor(there), f"{module} imports {other}"


def test_there_is_no_circle() -> None:
    """Among files, ``__init__`` and imports for types included."""
    TopologicalSorter({module: set(imported(path)) - {module} for module, path in MODULES.items()}).prepare()


def test_what_stands_in_the_documentation_is_there() -> None:
    """README's four questions are the packages of those names."""
    text = (PACKAGE.parent / "README.md").read_text()
    for package in ("momentum", "norms", "directions", "stepsize", "constraints", "roles", "zoo"):
        assert f"`normopt/{package}/`" in text and (PACKAGE / package / "__init__.py").is_file()
