"""The wheel and the source distribution hold what they should, and what was built passes tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: Tests of every floor of the library that take seconds.
TESTS = ["tests/theory/test_norms.py", "tests/references/test_sgd.py", "tests/contract/test_registry.py"]


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("hatchling"), reason="needs hatchling")
def test_what_is_built_works_without_the_checkout(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,), (source,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "normopt").rglob("*.py")}
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        file.extractall(tmp_path / "installed")
    assert {name for name in names if not name.startswith("normopt-")} == modules | {"normopt/py.typed"}

    with tarfile.open(source) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / source.name.removesuffix(".tar.gz")
    assert {"README.md", "LICENSE", "CHANGELOG.md", "normopt", "tests", "docs", "benchmarks", "examples"} <= {
        path.name for path in unpacked.iterdir()
    }
    shutil.rmtree(unpacked / "normopt")  # the tests of the source distribution, against the wheel
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    where = "import normopt; print(normopt.__file__)"
    found = subprocess.run([sys.executable, "-c", where], cwd=unpacked, env=environment, capture_output=True, text=True)
    assert found.stdout.startswith(str(tmp_path)), found.stdout + found.stderr
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    done = subprocess.run(tests, cwd=unpacked, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
