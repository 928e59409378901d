"""Comparisons killed at any moment: what is on file stays sound, and the same command ends with the same table."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.language.data import Corpus
from benchmarks.language.train import CHECKPOINT_STEPS
from benchmarks.language.workers import Pool
from benchmarks.output.records import RESULTS, Row, read_rows
from tests.support.bench_runs import config, finish, tiny_corpus, unmeasured

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="signals and limits of POSIX systems")]

ROOT = Path(__file__).parents[2]
STEPS, SECONDS = 160, 240
SIZE = f"--smoke --width 16 --batch 2 --steps {STEPS} --evaluations 4 --workers 2 --out out".split()
REPORT = {"compare.md", "compare.csv", "compare.tex", "costs.csv", "costs.tex", "loss_steps.png", "loss_seconds.png"}


@dataclass
class Comparison:
    """A comparison of two optimizers in a process group of its own; `folder` is its working directory."""

    folder: Path
    text: Path
    seeds: int = 2

    def start(self, limit: Callable[[], None] | None = None) -> subprocess.Popen[str]:
        self.folder.mkdir(exist_ok=True)
        arguments = ["--optimizers", "adamw,signum", "--seeds", str(self.seeds), "--data", str(self.text), *SIZE]
        with (self.folder / "log").open("w") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "benchmarks", "compare", *arguments],
                cwd=self.folder,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=log,
                stderr=log,
                text=True,
                start_new_session=True,
                preexec_fn=limit,
            )

    def finish(self) -> None:
        process = self.start()
        try:
            assert process.wait(SECONDS) == 0, self.log
        finally:
            end(process)

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    @property
    def rows(self) -> dict[str, Row]:
        return {key: unmeasured(row) for key, row in read_rows(self.out / RESULTS).items()}

    @property
    def table(self) -> list[dict[str, str]]:
        """The first table of the Markdown file, which has no timings."""
        blocks = (self.out / "compare.md").read_text().split("\n\n")
        lines = next(block for block in blocks if block.startswith("|")).splitlines()
        names, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        return [dict(zip(names, row, strict=True)) for row in rows]

    def checkpoints(self, pattern: str = "[!.]*.pt") -> list[Path]:
        return list((self.out / "checkpoints").glob(pattern))


def end(process: subprocess.Popen[str]) -> None:
    """Kill a command and its workers at once, if they are there."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    return path


@dataclass
class Undisturbed:
    """What an undisturbed comparison found, and how long it took."""

    rows: dict[str, Row]
    table: list[dict[str, str]]
    seconds: float


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Undisturbed:
    comparison, start = Comparison(tmp_path_factory.mktemp("undisturbed"), text), time.monotonic()
    comparison.finish()
    assert len(comparison.rows) == 4 and {row["steps_done"] for row in comparison.rows.values()} == {STEPS}
    return Undisturbed(comparison.rows, comparison.table, time.monotonic() - start)


def wait_until(process: subprocess.Popen[str], happens: Callable[[], bool]) -> bool:
    """Whether it happened before the process ended."""
    deadline = time.monotonic() + SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if happens():
            return True
        time.sleep(0.0005)
    return False


def check_what_is_left(comparison: Comparison, undisturbed: Undisturbed) -> None:
    """Right after a kill: whole rows only, the right ones, whole checkpoints, and no file under a name of its own."""
    content = (comparison.out / RESULTS).read_text() if (comparison.out / RESULTS).exists() else ""
    assert content == "" or content.endswith("\n")
    for line in content.splitlines():
        assert unmeasured(json.loads(line)) == undisturbed.rows[json.loads(line)["key"]]
    for path in comparison.checkpoints():
        assert path.stem in undisturbed.rows
        step = torch.load(path, weights_only=False)["progress"]["step"]
        assert step in (CHECKPOINT_STEPS, STEPS)
    visible = {path.name for path in comparison.out.glob("[!.]*")}
    assert visible <= {RESULTS, "checkpoints", *REPORT}


def check_the_end(comparison: Comparison, undisturbed: Undisturbed) -> None:
    assert comparison.rows == undisturbed.rows
    assert comparison.table == undisturbed.table
    assert {path.name for path in comparison.out.iterdir()} == {".lock", RESULTS, "checkpoints", *REPORT}
    assert comparison.checkpoints("*") == []


def moment(kind: str, comparison: Comparison, seconds: float) -> Callable[[], bool]:
    """Whether the moment of a kill has come."""
    due = time.monotonic() + seconds
    moments: dict[str, Callable[[], bool]] = {
        "time": lambda: time.monotonic() > due,
        "writing": lambda: bool(comparison.checkpoints(".*.partial")),
        "written": lambda: bool(comparison.checkpoints()),
    }
    return moments[kind]


def kill(comparison: Comparison, kind: str, seconds: float) -> bool:
    """Start a comparison and kill it; False if it gets to its end before."""
    come = moment(kind, comparison, seconds)
    process = comparison.start()
    try:
        wait_until(process, come)
    finally:
        end(process)
    assert process.returncode in (0, -signal.SIGKILL), comparison.log
    return process.returncode != 0


def test_six_kills_at_random_moments_change_nothing(undisturbed: Undisturbed, text: Path, tmp_path: Path) -> None:
    """Four moments drawn over the time that the undisturbed comparison took, one when a checkpoint is being written,
    one when one has been. A comparison that gets to its end before is checked, and the next one begun.
    """
    draw, kinds = random.Random(0), ["time"] * 4 + ["writing", "written"]
    draw.shuffle(kinds)
    comparisons, met = [Comparison(tmp_path / "0", text)], []
    for kind in kinds:
        while not kill(comparisons[-1], kind, draw.uniform(0, undisturbed.seconds)):
            check_the_end(comparisons[-1], undisturbed)
            comparisons.append(Comparison(tmp_path / str(len(comparisons)), text))
        check_what_is_left(comparisons[-1], undisturbed)
        met.append((kind, len(comparisons[-1].rows), len(comparisons[-1].checkpoints())))
    comparisons[-1].finish()
    check_the_end(comparisons[-1], undisturbed)
    assert len(met) == 6 and any(checkpoints for *_, checkpoints in met), "some go on from a checkpoint"
    print(f"moments, rows, checkpoints: {met}; {len(comparisons)} comparisons of {undisturbed.seconds:.0f} s")


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """The ids of the processes that train."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.mark.skipif(not Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").exists(), reason="no list of children")
def test_a_killed_worker_is_named_and_run_again(undisturbed: Undisturbed, text: Path, tmp_path: Path) -> None:
    comparison = Comparison(tmp_path / "one", text, seeds=1)
    process = comparison.start()
    try:
        assert wait_until(process, lambda: bool(comparison.checkpoints())), comparison.log
        os.kill(workers_of(process)[0], signal.SIGKILL)
        assert process.wait(SECONDS) == 1
    finally:
        end(process)
    assert "failed: the worker process was killed by signal 9" in comparison.log
    assert "the same command runs it again" in comparison.log and "Traceback" not in comparison.log
    assert len(comparison.rows) == 1 and len(comparison.table) == 1, "the other run is not disturbed"
    comparison.finish()
    assert comparison.rows == {key: undisturbed.rows[key] for key in comparison.rows} and len(comparison.rows) == 2


def test_a_disk_that_fills_up_ends_the_command_which_continues(
    undisturbed: Undisturbed, text: Path, tmp_path: Path
) -> None:
    """No file may grow beyond 20 KB, which rows do not and checkpoints do."""
    comparison = Comparison(tmp_path / "full", text, seeds=1)
    process = comparison.start(partial(resource.setrlimit, resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY)))
    try:
        assert process.wait(SECONDS) == 1
    finally:
        end(process)
    (line,) = [line for line in comparison.log.splitlines() if line.startswith("cannot write")]
    assert "out/checkpoints/" in line and "File too large" in line and "the same command continues" in line
    assert "Traceback" not in comparison.log
    check_what_is_left(comparison, undisturbed)
    comparison.finish()
    assert comparison.rows == {key: undisturbed.rows[key] for key in comparison.rows} and len(comparison.rows) == 2
    assert comparison.checkpoints("*") == []


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Corpus]:
    yield from tiny_corpus(tmp_path, monkeypatch)


def test_workers_and_repetitions_change_nothing(corpus: Corpus, tmp_path: Path) -> None:
    """With one worker, with two, and twice in this process."""
    configs = [config(corpus), config(corpus, "muon")]
    one, two = ([unmeasured(row) for row in Pool(tmp_path / str(size), size).run(configs)] for size in (1, 2))
    here, again = ([unmeasured(json.loads(json.dumps(finish(config)))) for config in configs] for _ in range(2))
    assert one == two == here == again
