"""Corpora: Shakespeare, sympy's or the standard library's sources, any text file, or llm.c token shards.

Each is three texts. A run trains on the first. Losses by which something is chosen are those of the validation text,
losses that are reported those of the test text, which no choice has seen.
"""

import glob
import hashlib
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.language import shakespeare, sympy_sources

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER = 20240520, 1, 256
GPT2_VOCAB = 50304  # GPT-2's 50,257 tokens, rounded up to a multiple of 128
SHARD_HELD_OUT = 10_485_760  # the customary FineWeb validation set: the first tokens of the validation shard
CHECKED = 1_000_000  # tokens looked at and hashed at both ends of a shard: shards are too large to read in full
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "__pycache__"}

#: The texts that losses are taken on: for choices, and for reports.
SPLITS = ("validation", "test")

Tokens = NDArray[np.generic]


class DataError(ValueError):
    """A source that is missing, empty, too short or corrupt."""


@dataclass(frozen=True)
class Corpus:
    """Training tokens in one or several parts, and held-out tokens for validation and for the test.

    `bytes_per_token` is None where the text behind the tokens is unknown; `digest` identifies the content.
    """

    name: str
    train: tuple[Tokens, ...]
    validation: Tokens
    test: Tokens
    vocab_size: int
    bytes_per_token: float | None
    digest: str

    def check(self, context: int) -> None:
        """Raise `DataError` if a text is too short for a window of `context + 1` tokens or has a token out of range.

        Of large parts, the tokens at both ends are looked at.
        """
        longest = max((len(part) for part in self.train), default=0)
        for text, length in (("training", longest), *((split, len(self.held_out(split))) for split in SPLITS)):
            if length <= context:
                raise DataError(
                    f"{self.name}: too short: {length} {text} tokens, a context of {context} needs {context + 1}"
                )
        for part in (*self.train, *map(self.held_out, SPLITS)):
            self._check_tokens(np.concatenate((part[:CHECKED], part[-CHECKED:])))

    def order(self, seed: int, steps: int, batch: int, context: int) -> NDArray[np.int64]:
        """Numbers of the training windows of every step, uniform with replacement: (steps, batch)."""
        return np.random.default_rng(seed).integers(0, self._ends(context)[-1], size=(steps, batch))

    def batch(self, windows: NDArray[np.int64], context: int) -> Tensor:
        """The training windows of `context + 1` tokens with these numbers, int64 (batch, context + 1)."""
        ends = self._ends(context)
        parts = np.searchsorted(ends, windows, side="right")
        starts = windows - np.concatenate(([0], ends))[parts]
        rows = [self.train[part][start : start + context + 1] for part, start in zip(parts, starts, strict=True)]
        return self._tensor(np.stack(rows))

    def held_out(self, split: str) -> Tokens:
        """The tokens of one of `SPLITS`."""
        return {"validation": self.validation, "test": self.test}[split]

    def windows(self, split: str, tokens: int, context: int) -> Tensor:
        """About `tokens` tokens of one of `SPLITS`, as evenly spread windows without overlap: (count, context + 1)."""
        text = self.held_out(split)
        available = (len(text) - 1) // context
        count = min(available, max(1, tokens // context))
        starts = np.arange(count) * available // count * context
        return self._tensor(np.stack([text[start : start + context + 1] for start in starts]))

    def _ends(self, context: int) -> NDArray[np.int64]:
        """Running count of the windows in the parts of the training tokens."""
        return np.cumsum([max(0, len(part) - context) for part in self.train], dtype=np.int64)

    def _check_tokens(self, tokens: Tokens) -> None:
        highest = tokens.max(initial=0)
        if highest >= self.vocab_size:
            raise DataError(f"{self.name}: corrupt: token {highest} in a vocabulary of {self.vocab_size}")

    def _tensor(self, tokens: Tokens) -> Tensor:
        self._check_tokens(tokens)
        return torch.from_numpy(tokens.astype(np.int64))


def load(source: str) -> Corpus:
    """The corpus of `source`: "shakespeare", "sympy", "stdlib", a path ending in .bin (may be a pattern), or a file.

    Held out, for validation and for the test: of Shakespeare three whole works each, of sympy three whole sub-packages
    each, of the standard library every tenth file, of a text file the last tenth but one and the last. Of shards the
    first one whose name contains "val" is the test, and the last tenth of the last other shard, or the customary
    10,485,760 tokens if that is less, the validation; without such a shard both are cut from the end of the last one.

    Raises:
        DataError: if the source is missing, empty or corrupt.
        benchmarks.language.shakespeare.FetchError: if Shakespeare is not cached and cannot be downloaded.
    """
    named = {
        "shakespeare": _shakespeare,
        "sympy": _sympy,
        "stdlib": lambda: _stdlib(Path(sysconfig.get_path("stdlib"))),
    }
    if source in named:
        return named[source]()
    return _shards(source) if source.endswith(".bin") else _file(Path(source))


def load_or_fall_back(source: str) -> Corpus:
    """Like `load`, but when Shakespeare cannot be fetched, say so and use the standard library's sources."""
    try:
        return load(source)
    except shakespeare.FetchError as error:
        print(f"{error}\nTraining on the sources of the Python standard library instead.", file=sys.stderr)
        return load("stdlib")


def _shakespeare() -> Corpus:
    return _by_parts("shakespeare", shakespeare.works, shakespeare.VALIDATION, shakespeare.TEST)


def _sympy() -> Corpus:
    return _by_parts("sympy", sympy_sources.packages, sympy_sources.VALIDATION, sympy_sources.TEST)


def _by_parts(
    source: str, read: Callable[[], dict[str, bytes]], validation: Sequence[str], test: Sequence[str]
) -> Corpus:
    """A text in named parts, some of which are held out."""
    try:
        parts = read()
    except ValueError as error:
        raise DataError(str(error)) from None
    return _text(source, *_split(parts, validation, test))


def _split(texts: Mapping[str, bytes], validation: Sequence[str], test: Sequence[str]) -> tuple[bytes, bytes, bytes]:
    """The texts that are not held out, and the two held-out ones, each in the order of the names."""
    train = b"".join(text for name, text in texts.items() if name not in {*validation, *test})
    return train, b"".join(texts[name] for name in validation), b"".join(texts[name] for name in test)


def _stdlib(root: Path) -> Corpus:
    paths = sorted(path for path in root.rglob("*.py") if not SKIPPED & set(path.relative_to(root).parts))
    if len(paths) < 10:
        raise DataError(f"stdlib: no Python sources in {root}")
    sources = {str(path): path.read_bytes() for path in paths}
    return _text("stdlib", *_split(sources, list(sources)[9::10], list(sources)[4::10]))


def _file(path: Path) -> Corpus:
    if not path.is_file():
        raise DataError(
            f"{path}: no such file (--data takes shakespeare, sympy, stdlib, a text file or a .bin pattern)"
        )
    content = path.read_bytes()
    if not content:
        raise DataError(f"{path}: the file is empty")
    first, second = len(content) * 8 // 10, len(content) * 9 // 10
    return _text(str(path), content[:first], content[first:second], content[second:])


def _text(name: str, *texts: bytes) -> Corpus:
    """A corpus of bytes from its three texts."""
    digest = hashlib.sha256(b"".join(len(text).to_bytes(8, "big") + text for text in texts)).hexdigest()
    train, validation, test = (np.frombuffer(text, dtype=np.uint8) for text in texts)
    return Corpus(name, (train,), validation, test, vocab_size=256, bytes_per_token=1.0, digest=digest)


def _shards(pattern: str) -> Corpus:
    paths = [Path(path) for path in sorted(glob.glob(pattern))]
    if not paths:
        raise DataError(f"{pattern}: no file matches")
    shards = {path: _shard(path) for path in paths}
    held_out = [path for path in paths if "val" in path.name]
    train = [shards[path] for path in paths if path not in held_out]
    if held_out:
        test = shards[held_out[0]][:SHARD_HELD_OUT]
        validation = _cut_off(train) if train else test[:0]
    else:
        test = _cut_off(train)
        validation = _cut_off(train)
    return Corpus(pattern, tuple(train), validation, test, GPT2_VOCAB, None, _shard_digest([*train, validation, test]))


def _cut_off(train: list[Tokens]) -> Tokens:
    """The last tenth of the last shard, or `SHARD_HELD_OUT` tokens if that is less, which the shard then lacks."""
    kept = len(train[-1]) - min(-(-len(train[-1]) // 10), SHARD_HELD_OUT)
    train[-1], cut = train[-1][:kept], train[-1][kept:]
    return cut


def _shard(path: Path) -> Tokens:
    """The tokens of one shard, memory-mapped, after a check of the header."""
    header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER)
    if len(header) < SHARD_HEADER or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise DataError(f"{path}: corrupt: not a version {SHARD_VERSION} token shard (magic {SHARD_MAGIC})")
    held = (path.stat().st_size - 4 * SHARD_HEADER) / 2
    if held != header[2] or not held:
        raise DataError(f"{path}: corrupt: its header promises {header[2]} tokens, the file holds {held:g}")
    return np.memmap(path, dtype="<u2", mode="r", offset=4 * SHARD_HEADER)


def _shard_digest(parts: list[Tokens]) -> str:
    """A hash of the parts' lengths and of the tokens at their ends."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part[:CHECKED].tobytes() + part[-CHECKED:].tobytes())
    return digest.hexdigest()
