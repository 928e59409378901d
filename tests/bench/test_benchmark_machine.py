"""What is said of the machine beside times: threads, clocks, rates, and what is refused."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import pytest
import torch

from benchmarks import arguments, harness
from benchmarks.__main__ import main
from benchmarks.cost import machine
from benchmarks.cost.machine import EventClock, WallClock, clock_of, refuse_sleeping_threads, setting
from benchmarks.harness import in_new_process


def variables() -> dict[str, str | int | None]:
    """What a process for timing sees."""
    seen = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")}
    return {**seen, "threads": torch.get_num_threads()}


@pytest.mark.slow
def test_processes_have_the_threads_that_were_asked_for_and_users_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert in_new_process(None, variables) == {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": None, "threads": 1}
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert in_new_process(1, variables) == {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": None, "threads": 1}
    assert os.environ["OMP_NUM_THREADS"] == "2"


def test_the_environment_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with harness._environment({"OMP_NUM_THREADS": "7"}):
        assert os.environ["OMP_NUM_THREADS"] == "7"
    assert "OMP_NUM_THREADS" not in os.environ


@pytest.mark.parametrize(("name", "value"), [("OMP_WAIT_POLICY", "passive"), ("KMP_BLOCKTIME", "0")])
@pytest.mark.parametrize("command", ["step", "polar"])
def test_sleeping_threads_are_refused_before_anything_is_made(
    command: str, name: str, value: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        main([command, "--smoke", "--out", str(tmp_path / "out")])
    assert f"Unset {name}" in capsys.readouterr().err and not (tmp_path / "out").exists()
    monkeypatch.setenv(name, "active")
    refuse_sleeping_threads()


def test_thread_settings() -> None:
    assert arguments.threads("default") is None and arguments.threads("2") == 2
    with pytest.raises(argparse.ArgumentTypeError, match="default or a number"):
        arguments.threads("-1")


def test_the_clock_is_the_devices() -> None:
    assert isinstance(clock_of("cpu"), WallClock)
    assert isinstance(clock_of("cuda"), EventClock) and isinstance(clock_of("cuda:1"), EventClock)


def test_a_clock_gives_the_seconds_between_stamps() -> None:
    clock = clock_of("cpu")
    stamps = [clock.stamp()]
    for seconds in (0.01, 0.03):
        time.sleep(seconds)
        stamps.append(clock.stamp())
    first, second = clock.seconds(stamps)
    assert first >= 0.01 and second >= 0.03


def test_events_are_read_once_the_gpu_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.at = 0

        def record(self) -> None:
            calls.append("record")
            self.at = len(calls)

        def elapsed_time(self, other: Event) -> float:
            assert "synchronize" in calls
            return 5.0 * (other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("synchronize"))
    clock = EventClock()
    assert clock.seconds([clock.stamp() for _ in range(3)]) == [5e-3, 5e-3], "milliseconds are turned into seconds"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_gpu_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["step", "--smoke", "--device", "cuda", "--out", str(tmp_path / "out")])
    assert "torch sees no GPU" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_header_says_what_a_ratio_is_worth(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(machine.THREADING)]:
        monkeypatch.delenv(name)
    rates = machine.product_rate("cpu", 1e-3)
    assert set(rates) == {"float32", "bfloat16"} and min(rates.values()) > 0
    monkeypatch.setattr(machine, "product_rate", lambda device: {"float32": 150e9, "bfloat16": 83e9})
    monkeypatch.setattr(machine, "flags", lambda: ["avx2", "avx512_bf16"])
    rows = [machine.machine(None), {**machine.machine(1), "gemm": {"float32": 80e9, "bfloat16": 40e9}, "threads": 1}]
    said = setting(rows)
    assert "(avx2, avx512_bf16)" in said and torch.__version__ in said and rows[0]["commit"] in said
    assert "float32 150, bfloat16 83 GFLOP/s" in said and "on 1 thread: float32 80, bfloat16 40 GFLOP/s" in said
    assert "OpenMP as it is by default" in said
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert "unlike yours: OMP_NUM_THREADS=2, OMP_WAIT_POLICY=ACTIVE" in setting([machine.machine(None)])
    assert "unlike yours: OMP_WAIT_POLICY=ACTIVE" in setting([machine.machine(1)]), "the number was asked for"


def test_flags_are_the_processors() -> None:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    assert all(flag in text.split() for flag in machine.flags())
