"""Whole training jobs under torchrun end where one process ends, also after they were killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.language.parallel import METADATA
from benchmarks.output.records import RESULTS, Row, read_rows
from tests.support.torchrun import command, environment, run

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(sys.platform != "linux", reason="torchrun's processes are found by /proc"),
]

#: Muon's own products are in bfloat16, which makes steps of 0.4% of the last bits in which averages of shares differ.
EXACT = ["adamw", "lion", "scion", 'muon32=muon(orthogonalize_dtype="float32")']
ROUNDED = ["muon"]


def compare(folder: Path, out: str, optimizers: list[str], steps: int, parallel: str = "") -> list[str]:
    """The arguments of a tiny comparison."""
    text = folder / "text.txt"
    if not text.exists():
        text.write_bytes(b"".join(path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("a*.py"))))
    size = f"--smoke --width 16 --batch 4 --steps {steps} --evaluations 4 --workers 1".split()
    asked = ["--optimizers", ",".join(optimizers), "--data", str(text), "--out", out]
    return ["-m", "benchmarks", "compare", *size, *asked, *(["--parallel", parallel] if parallel else [])]


def rows(folder: Path, out: str) -> dict[str, Row]:
    return {row["config"]["optimizer"]: row for row in read_rows(folder / out / RESULTS).values()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the results of one process."""
    folder = tmp_path_factory.mktemp("jobs")
    run(0, compare(folder, "one", EXACT + ROUNDED, 12), folder)
    return folder


@pytest.mark.parametrize(("parallel", "processes"), [("ddp", 2), ("fsdp2", 2), ("fsdp2", 4), ("fsdp2+tp", 4)])
def test_a_job_of_many_processes_has_the_loss_curve_of_one(folder: Path, parallel: str, processes: int) -> None:
    out = f"{parallel}{processes}"
    said = run(processes, compare(folder, out, EXACT + ROUNDED, 12, parallel), folder)
    assert said.count("Written to") == 1, "the first process alone writes tables"
    assert f"{parallel} on {processes} processes" in (folder / out / "compare.md").read_text()
    one, many = rows(folder, "one"), rows(folder, out)
    assert len((folder / out / RESULTS).read_text().splitlines()) == len(many) == len(one)
    for name, row in many.items():
        for (step, _, loss), (same, _, expected) in zip(row["curve"], one[name]["curve"], strict=True):
            assert step == same
            assert loss == pytest.approx(expected, abs=5e-3 if name in ROUNDED else 1e-5), (name, step)
        assert row["parameters"] == one[name]["parameters"]
        assert row["init_hash"] == one[name]["init_hash"]
    if parallel != "ddp":
        for name, row in many.items():
            whole = one[name]["state_bytes_per_parameter"]
            assert row["state_bytes_per_parameter"] < 1.3 * whole / processes, "state is not shared out"
    assert not [*(folder / out / "checkpoints").glob("*")], "checkpoints of finished runs stay"


@pytest.mark.parametrize(("parallel", "before", "after"), [("fsdp2", 4, 2), ("fsdp2+tp", 4, 2), ("ddp", 2, 1)])
def test_a_killed_job_goes_on_with_other_processes(tmp_path: Path, parallel: str, before: int, after: int) -> None:
    """The checkpoint of step 100 of 120 is what is left."""
    optimizers = ['muon32=muon(orthogonalize_dtype="float32")']
    run(0, compare(tmp_path, "one", optimizers, 120), tmp_path)
    asked = compare(tmp_path, "many", optimizers, 120, parallel)
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(command(before, asked), cwd=tmp_path, env=environment(), stdout=log, stderr=log)
        kill_a_process(job, (tmp_path / "many" / "checkpoints"))
        assert job.wait(60) != 0, (tmp_path / "log").read_text()
    assert not rows(tmp_path, "many")
    (row,) = rows(tmp_path, "one").values()
    run(after, asked, tmp_path)
    (resumed,) = rows(tmp_path, "many").values()
    assert resumed["processes"] == after
    assert resumed["final_loss"] == pytest.approx(row["final_loss"], abs=1e-4)
    assert [step for step, *_ in resumed["curve"]] == [step for step, *_ in row["curve"]]


def kill_a_process(job: subprocess.Popen[bytes], checkpoints: Path) -> None:
    """Kill one of torchrun's processes, as the kernel does when memory runs out, as soon as there is a checkpoint."""
    end = time.monotonic() + 120
    while not [*checkpoints.glob(f"*/*/{METADATA}")]:
        assert job.poll() is None, "the job has ended"
        assert time.monotonic() < end, "no checkpoint"
        time.sleep(0.01)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)


def test_mistakes_are_named_before_any_training(tmp_path: Path) -> None:
    alone = compare(tmp_path, "out", ["adamw"], 12, "fsdp2")
    assert "needs several processes: torchrun" in failed([sys.executable, *alone], tmp_path)
    uneven = [*alone, "--batch", "3"]
    assert "--batch 3 cannot be cut into 2 equal shares" in failed(command(2, uneven), tmp_path)
    other = [*compare(tmp_path, "out", ["adamw"], 12, "fsdp2+tp"), "--model", "ngpt"]
    assert "--parallel fsdp2+tp cuts gpt only, not ngpt" in failed(command(2, other), tmp_path)
    assert not (tmp_path / "out" / RESULTS).exists()


def failed(whole: list[str], folder: Path) -> str:
    done = subprocess.run(whole, cwd=folder, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    return done.stderr
