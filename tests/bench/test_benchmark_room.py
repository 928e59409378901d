"""Folders that are read-only or full: an error before any training, and an error that names the file in the middle."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.__main__ import main
from benchmarks.language import train as training
from benchmarks.language import workers
from benchmarks.language.data import Corpus
from benchmarks.language.presets import PRESETS
from benchmarks.language.room import RESULTS_BYTES, check_room, room_needed
from benchmarks.language.train import Run, train
from benchmarks.output.records import RESULTS, WriteError, append_row, read_rows, replacing
from normopt.nn import GPT
from tests.support.bench_runs import TINY, config, finish, tiny_corpus, unmeasured

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full, the device that has no room")
COMMANDS = ["compare", "grid", "sweep", "norms"]


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Corpus]:
    yield from tiny_corpus(tmp_path, monkeypatch)


def refusal(
    command: str, corpus: Corpus, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """The last line of what a command says that must not train."""
    monkeypatch.setattr(workers.Pool, "run", lambda *_: pytest.fail("training began"))
    with pytest.raises(SystemExit) as stop:
        main([command, "--data", corpus.name, "--smoke", "--out", str(out)])
    assert stop.value.code == 2
    *usage, line = capsys.readouterr().err.splitlines()
    assert all(line.startswith(("usage:", " ")) for line in usage), "a single line says what is wrong"
    return line


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_ends_every_command_that_trains(
    command: str, corpus: Corpus, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * 2**20))
    line = refusal(command, corpus, tmp_path / "out", monkeypatch, capsys)
    assert f"--out {tmp_path / 'out'} cannot be used: only 3 MB are free there" in line
    assert "make room there or give another --out" in line


@pytest.mark.parametrize("command", COMMANDS)
def test_a_read_only_disk_ends_every_command_that_trains(
    command: str, corpus: Corpus, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "replace", refuse)
    line = refusal(command, corpus, tmp_path / "out", monkeypatch, capsys)
    assert f"--out {tmp_path / 'out'} cannot be used: cannot write" in line and "Read-only file system" in line


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc, where nobody can make files")
def test_folders_in_which_nobody_can_make_files(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for out in (Path("/proc"), Path("/proc/results")):
        assert f"--out {out} cannot be used: cannot write" in refusal("compare", corpus, out, monkeypatch, capsys)


def test_rows_that_cannot_be_added_to_and_checkpoints_that_cannot_be_made(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "a" / RESULTS).mkdir(parents=True)
    assert f"a/{RESULTS}: Is a directory" in refusal("compare", corpus, tmp_path / "a", monkeypatch, capsys)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "checkpoints").write_text("a file")
    assert "b/checkpoints/.probe-" in refusal("compare", corpus, tmp_path / "b", monkeypatch, capsys)


def test_the_look_at_the_folder_leaves_nothing_behind(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    append_row(tmp_path / "out" / RESULTS, {"key": "a"})
    monkeypatch.setattr(workers.Pool, "run", lambda *_: [])
    assert main(["compare", "--data", corpus.name, "--smoke", "--out", str(tmp_path / "out")]) == 0
    found = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*"))
    assert found == ["checkpoints", RESULTS] and read_rows(tmp_path / "out" / RESULTS) == {"a": {"key": "a"}}


def test_the_ranks_of_a_job_look_at_the_same_time(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(lambda _: check_room(tmp_path, PRESETS["smoke"], 256, 1), range(200)):
            pass
    assert [*tmp_path.rglob("*")] == [tmp_path / "checkpoints"]


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
def test_the_estimate_has_room_for_two_checkpoints(name: str, corpus: Corpus, tmp_path: Path) -> None:
    preset = replace(PRESETS["smoke"], steps=1, batch=1)
    run = Run(config(corpus, name, preset=preset), corpus)
    run.train_step()
    run.save(tmp_path / "run.pt")
    room = room_needed(preset, 256, 1) - RESULTS_BYTES
    assert 2 * (tmp_path / "run.pt").stat().st_size < room < 10 * (tmp_path / "run.pt").stat().st_size


@pytest.mark.parametrize("name", ["smoke", "quick", "standard"])
def test_the_estimate_knows_the_size_of_the_model(name: str) -> None:
    preset = PRESETS[name]
    count = sum(p.numel() for p in GPT(256, preset.d_model, preset.n_layers, preset.n_heads).parameters())
    estimate = (room_needed(preset, 256, 3) - RESULTS_BYTES) / (3 * 2 * 16)
    assert estimate == pytest.approx(count, rel=0.05)


# A disk that fills up in the middle


@needs_full
def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="cannot write /dev/full: No space left on device"):
        append_row(FULL, {"key": "a", "curve": [[0.5] * 1000] * 20})
    path = tmp_path / "table.md"
    path.write_text("old")
    (tmp_path / ".table.md.partial").symlink_to(FULL)
    with pytest.raises(WriteError, match=r"cannot write .*table\.md: No space left on device"), replacing(path) as part:
        part.write_text("new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@needs_full
def test_a_checkpoint_without_room_is_named_and_the_one_before_stays(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_STEPS", 4)
    checkpoint, whole = tmp_path / "run.pt", finish(config(corpus))

    def fill_up(step: int, loss: float, speed: float) -> None:
        if step == 8:
            (tmp_path / ".run.pt.partial").symlink_to(FULL)

    with pytest.raises(WriteError, match=r"cannot write .*run\.pt: .*No space left on device"):
        train(config(corpus), checkpoint, fill_up)
    assert not (tmp_path / ".run.pt.partial").is_symlink(), "what was written is deleted, which makes room"
    seen: list[int] = []
    resumed = train(config(corpus), checkpoint, lambda step, loss, speed: seen.append(step))
    assert seen == list(range(5, TINY.steps + 1)) and unmeasured(resumed) == unmeasured(whole)


@needs_full
def test_a_worker_without_room_sends_one_line(corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / ".run.pt.partial").symlink_to(FULL)
    ours, theirs = multiprocessing.Pipe(duplex=False)
    workers._work(config(corpus), tmp_path / "run.pt", theirs)
    messages = []
    while ours.poll():
        messages.append(ours.recv())
    kind, content = messages[-1]
    assert kind == "unwritable" and "run.pt" in content and "\n" not in content


def test_a_row_without_room_ends_the_command_with_one_line(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(pool: workers.Pool, configs: list[Any]) -> None:
        with replacing(pool.results):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(workers.Pool, "run", run)
    assert main(["compare", "--data", corpus.name, "--smoke", "--out", "out"]) == 1
    errors = capsys.readouterr().err.strip()
    assert errors.startswith(f"cannot write out/{RESULTS}: No space left on device.") and "\n" not in errors
    assert errors.endswith("Finished runs are in out; make room there, and the same command continues.")


def test_a_plan_counts_its_workers(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr("benchmarks.language.plan.check_room", lambda out, preset, vocab, workers: seen.append(workers))
    monkeypatch.setattr(workers.Pool, "run", lambda pool, configs: seen.append(pool.size) or [])
    assert main(["compare", "--data", corpus.name, "--smoke", "--out", "out", "--workers", "3"]) == 0
    assert main(["compare", "--data", corpus.name, "--smoke", "--out", "out", "--device", "cpu"]) == 0
    assert seen[:2] == [3, 3] and seen[2] == seen[3] == workers.default_size("cpu")
