"""Every script of examples/ runs to its end, asserts included, where what it imports is installed."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))

#: How a script is started that is more than one process.
LAUNCHED = {"fsdp2.py": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]}


def imported(script: Path) -> set[str]:
    """The top-level packages that a script imports, and TensorBoard, which torch imports for it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    extra = {"tensorboard"} if "torch.utils.tensorboard" in names else set()
    return {name.split(".")[0] for name in names} | extra


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_an_example_runs(script: Path, tmp_path: Path) -> None:
    missing = [name for name in imported(script) if find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *LAUNCHED.get(script.name, []), str(script)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


def test_examples_say_what_they_are() -> None:
    assert len(SCRIPTS) >= 8
    assert not [
        script.name for script in SCRIPTS if not ast.get_docstring(ast.parse(script.read_text(encoding="utf-8")))
    ]
