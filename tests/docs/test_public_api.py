"""The public API is one text, public_api.txt beside this file: changing a name, an argument or a default changes it.

After a change that is meant: ``PYTHONPATH=. python tests/docs/test_public_api.py > tests/docs/public_api.txt``
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from normopt.ingredient import Ingredient
from normopt.zoo.base import DeclaredOptimizer, FixedStepOptimizer
from normopt.zoo.matrices import FixedStepMatrixOptimizer, MatrixOptimizer

ROOT = Path(__file__).parents[2]
LISTING = Path(__file__).with_name("public_api.txt")
COMMAND = "PYTHONPATH=. python tests/docs/test_public_api.py > tests/docs/public_api.txt"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

#: What users import from. A name that several of these have is listed under the first.
MODULES = ["normopt", "normopt.norms", "normopt.zoo", "normopt.nn"]
MODULES += ["normopt.integrations", "normopt.metrics", "normopt.polar", "normopt.ingredient"]

#: Modules that a process may load which has nothing but torch and numpy with what these two require.
RUNTIME = {"normopt", "torch", "torchgen", "functorch", "numpy"}
RUNTIME |= {"filelock", "fsspec", "jinja2", "markupsafe", "mpmath", "networkx", "setuptools", "sympy"}
RUNTIME |= {"typing_extensions"}

#: What declared optimizers have their common arguments from.
BASES = (FixedStepOptimizer, DeclaredOptimizer, FixedStepMatrixOptimizer, MatrixOptimizer)


# The listing --------------------------------------------------------------------------------------------------------


def public(module: ModuleType) -> list[str]:
    """What ``__all__`` names; without one, the classes and functions that the module defines under no ``_``."""
    own = [
        name
        for name, x in vars(module).items()
        if (inspect.isclass(x) or inspect.isfunction(x)) and x.__module__ == module.__name__ and name[0] != "_"
    ]
    return sorted(getattr(module, "__all__", own))


def signature(x: Any) -> str:
    """Arguments and their defaults, without types; those that a declared optimizer only inherits by its base's name."""
    found = inspect.signature(x)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()]
    base = next((base for base in x.__mro__[1:] if base in BASES), None) if inspect.isclass(x) else None
    if base is not None and x not in BASES:
        inherited = inspect.signature(base).parameters.values()
        common = {(p.name, p.default) for p in inherited if p.kind is p.KEYWORD_ONLY}
        bare = [p for p in bare if (p.name, p.default) not in common]
        bare.append(inspect.Parameter(base.__name__, inspect.Parameter.VAR_KEYWORD))
    return str(found.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def methods(cls: type) -> Iterator[str]:
    """Those that the class is the first in the library to have."""
    bases = [base for base in cls.__mro__[1:] if base.__module__.startswith("normopt")]
    for name, x in sorted(vars(cls).items()):
        if name[0] == "_" or any(name in vars(base) for base in bases):
            continue
        if inspect.isfunction(x):
            yield f"    {name}{signature(x)}"
        elif isinstance(x, property):
            yield f"    {name}"


def described(name: str, x: Any) -> list[str]:
    if inspect.ismodule(x):
        return [f"{name}: module"]
    if inspect.isclass(x):
        return [f"{name}{signature(x)}", *methods(x)]
    if callable(x):
        return [f"{name}{signature(x)}"]
    return [f"{name}: {type(x).__name__}" if isinstance(x, Ingredient) else f"{name} = {sorted(x)}"]


def listing() -> str:
    lines, seen = [f"# {COMMAND}"], {}
    for module in map(importlib.import_module, MODULES):
        lines += ["", f"[{module.__name__}]"]
        for name in public(module):
            x = getattr(module, name)
            first = seen.setdefault(id(x), f"{module.__name__}.{name}")
            known = first != f"{module.__name__}.{name}"
            lines += [f"{name} = {first}"] if known else described(name, x)
    return "\n".join(lines) + "\n"


def listed() -> list[tuple[str, str]]:
    """Pairs of module and name."""
    pairs, module = [], ""
    for line in LISTING.read_text().splitlines():
        if line.startswith("["):
            module = line[1:-1]
        elif line and line[0] not in "# ":
            pairs.append((module, re.split(r"\W", line)[0]))
    return pairs


# The tests ----------------------------------------------------------------------------------------------------------


def test_the_public_api_is_what_is_listed() -> None:
    old, new = LISTING.read_text().splitlines(), listing().splitlines()
    changes = "\n".join(difflib.unified_diff(old, new, "listed", "found", n=0, lineterm=""))
    assert not changes, f"the public API has changed; if that is meant: {COMMAND}\n{changes}"


@pytest.mark.parametrize("module", MODULES)
def test_names_are_those_of_all(module: str) -> None:
    found = importlib.import_module(module)
    names = [name for owner, name in listed() if owner == module]
    assert names == public(found) and len(names) == len(set(names)) > 0
    assert all(hasattr(found, name) for name in names)


def own_docstring(name: str, x: Any) -> str:
    """Not inherited, and not the signature that dataclasses write where there is none."""
    text = x.__doc__ if inspect.isfunction(x) else vars(x).get("__doc__")
    return "" if not text or text.startswith(f"{name}(") else text


def test_every_public_name_has_a_docstring_of_its_own() -> None:
    found = [(module, name, getattr(importlib.import_module(module), name)) for module, name in listed()]
    asked = [
        each for each in found if inspect.isroutine(each[2]) or inspect.isclass(each[2]) or inspect.ismodule(each[2])
    ]
    missing = [f"{module}.{name}" for module, name, x in asked if not own_docstring(name, x)]
    assert not missing and len(asked) > 150


def test_the_documentation_mentions_only_what_is_listed() -> None:
    """``normopt.create``, ``from normopt import EMA``, ``from normopt.ingredient import option``."""
    known = {f"{module}.{name}" for module, name in listed()} | set(MODULES)
    text = "\n".join(page.read_text() for page in PAGES)
    imports = re.findall(r"^from (normopt[\w.]*) import (.+)$", text, re.MULTILINE)
    mentioned = {f"{module}.{name.strip()}" for module, names in imports for name in names.split(",")}
    mentioned |= {name.rstrip(".") for name in re.findall(r"(?<![\w/.])normopt(?:\.\w+)+", text)}
    assert not mentioned - known and len(mentioned) > 30


FRESH = """
import importlib, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in allowed:
            raise ModuleNotFoundError(f"{name} is no runtime dependency", name=name)

allowed = sys.stdlib_module_names | set(sys.argv[1].split(","))
sys.meta_path.insert(0, Blocker())
for pair in sys.argv[2].split(","):
    module, name = pair.split(":")
    getattr(importlib.import_module(module), name)
for name in ("matplotlib", "tqdm", "pytest"):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} was not blocked")
"""


def test_torch_and_numpy_are_all_that_it_takes() -> None:
    """A fresh interpreter, in which nothing else can be imported, has every name."""
    names = ",".join(f"{module}:{name}" for module, name in listed())
    arguments = [sys.executable, "-c", FRESH, ",".join(sorted(RUNTIME)), names]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    print(listing(), end="")
