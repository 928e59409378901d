"""Python files that `--plugin` imports first: their norms and optimizers are then known by name."""

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path

from benchmarks.harness import PlanError


def import_plugins(paths: Iterable[Path]) -> dict[str, str]:
    """Import the files in order; returns their absolute paths with the hashes of their contents.

    Raises:
        PlanError: if a file cannot be read or imported; the message has the error and its place.
    """
    return {str(path.resolve()): _imported(path.resolve()) for path in paths}


def import_again(plugins: Mapping[str, str]) -> None:
    """Import in a worker process what `import_plugins` imported.

    Raises:
        ValueError: if a file has changed since.
    """
    for path, digest in plugins.items():
        if _imported(Path(path)) != digest:
            raise ValueError(f"{path} has changed since this run was planned")


def _imported(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PlanError(f"--plugin {path} cannot be read: {error.strerror}") from None
    spec = importlib.util.spec_from_file_location(str(path), path)
    if spec is None or spec.loader is None:
        raise PlanError(f"--plugin {path} is no Python file: its name has to end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[str(path)] = module  # where dataclasses look up their annotations
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        place = f", line {lines[-1]}" if lines else ""
        raise PlanError(f"--plugin {path} cannot be imported: {type(error).__name__}: {error}{place}") from error
    return hashlib.sha256(content).hexdigest()[:16]
