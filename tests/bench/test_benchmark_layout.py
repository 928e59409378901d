"""The layout of `benchmarks`: one folder for each subject, and imports that point one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import benchmarks
import normopt

ROOT = Path(benchmarks.__file__).parent
FOLDERS = ("language", "cost", "probes", "output")
#: What each part may import of the others; a module of a folder may also import the rest of its folder.
ALLOWED = {
    "__main__": {"language", "cost", "probes", "arguments", "harness", "output"},
    "language": {"contenders", "controls", "peers", "harness", "output"},
    "cost": {"peers", "harness", "output"},
    "probes": {"contenders", "peers", "harness", "output"},
    "contenders": {"controls", "peers", "harness"},
    "peers": {"controls", "harness", "output"},
    "controls": set(),
    "harness": {"output"},
    "arguments": set(),
    "output": set(),
}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in ROOT.rglob("*.py")}


def imports_of(path: Path) -> set[str]:
    """The modules of `benchmarks` that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            module = node.module or ""
            below = [f"{module}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else module for name in below}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] == "benchmarks"}


def part_of(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_one_way(name: str) -> None:
    own = part_of(name)
    for other in imports_of(MODULES[name]):
        assert part_of(other) in {own, *ALLOWED.get(own, set())}, f"{name} imports {other}"


def test_no_circle_of_imports() -> None:
    graph = {name: imports_of(path) for name, path in MODULES.items()}
    order = list(TopologicalSorter(graph).static_order())
    assert set(MODULES) <= set(order)
    assert sum(map(len, graph.values())) > 80, "the imports are not found"


def test_every_module_has_its_folder() -> None:
    assert {part_of(name) for name in MODULES} == {"", *ALLOWED}
    for folder in FOLDERS:
        (docstring,) = ast.parse((ROOT / folder / "__init__.py").read_text(encoding="utf-8")).body
        assert isinstance(docstring, ast.Expr), f"{folder}/__init__.py holds a docstring and nothing else"


def test_normopt_does_not_import_its_benchmarks() -> None:
    for path in Path(normopt.__file__).parent.rglob("*.py"):
        assert not imports_of(path), path


def test_the_wheel_holds_what_readme_says() -> None:
    assert 'packages = ["normopt"]' in (ROOT.parent / "pyproject.toml").read_text()
    assert "The benchmark is in this repository\nand not in the wheel" in (ROOT.parent / "README.md").read_text()


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; from benchmarks.__main__ import make_parser; make_parser(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent)
