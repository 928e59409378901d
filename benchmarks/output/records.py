"""Files of results: append-only JSONL rows, atomic writes, and the version of the code."""

import contextlib
import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

ROOT = Path(__file__).resolve().parents[2]

#: The file of finished rows, in the folder of the results.
RESULTS = "results.jsonl"

Row = dict[str, Any]


class WriteError(OSError):
    """A file that cannot be written: the disk is full, or read-only. The message names the file."""


class BusyError(RuntimeError):
    """Another command is at work in the folder."""


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """A block in which no other command works in `folder`: two commands would do the same runs twice.

    Raises:
        BusyError: if another command already works there.
    """
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise BusyError(f"another command is at work in {folder}: wait for it or give another --out") from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """A block that writes `path`; makes its folder, and turns any `OSError` in the block into a `WriteError`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror or error}") from error


def append_row(path: Path, row: Row) -> None:
    """Add one line to a JSONL file and flush the file to disk; a line cut short by a crash stays a separate line."""
    with writing(path), path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
        else:
            torn = False
        file.write(b"\n" * torn + json.dumps(row, allow_nan=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> dict[str, Row]:
    """The rows of a JSONL file by key; of equal keys the last row counts, and what is no row is left out."""
    return {row["key"]: row for row in map(_row, _lines(path)) if row is not None}


def unreadable(path: Path) -> str:
    """How many lines of a JSONL file are no rows, and which, as a sentence; empty if all are rows."""
    numbers = [i for i, line in enumerate(_lines(path), 1) if line.strip() and _row(line) is None]
    if not numbers:
        return ""
    shown = ", ".join(map(str, numbers[:10])) + (", ..." if len(numbers) > 10 else "")
    lines = "1 line is no row and is" if len(numbers) == 1 else f"{len(numbers)} lines are no rows and are"
    return f"{path}: {lines} left out: line{'' if len(numbers) == 1 else 's'} {shown}"


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []


def _row(line: str) -> Row | None:
    """A line as a row, which has a key; None for any other line, such as one that a crash cut short."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("key"), str) else None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends without an error."""
    partial = partial_path(path)
    with writing(path):
        try:
            yield partial
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def partial_path(path: Path) -> Path:
    """The temporary path of `replacing`; a killed process leaves this file behind."""
    return path.with_name(f".{path.name}.partial")


def git_commit() -> str | None:
    """The commit of this checkout, with "-dirty" when files differ from it; None outside a git repository.

    Results, which a command may be writing meanwhile, do not count.
    """
    git = ["git", "-C", str(ROOT)]
    status = [*git, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"]
    try:
        commit, changed = (
            subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
            for command in ([*git, "rev-parse", "HEAD"], status)
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}-dirty" if changed else commit


def source_hash() -> str:
    """A short hash of the Python sources of normopt and of the benchmarks."""
    paths = sorted(path for folder in ("normopt", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:16]
