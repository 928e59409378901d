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
from benchmarks.cost.machine import EventClock, WallClock, by_threads, clock_of, refuse_sleeping_threads, setting
from benchmarks.harness import cpu_field, in_new_process, processor


def threads_and_environment() -> tuple[int, dict[str, str]]:
    """What a process for timing has."""
    return torch.get_num_threads(), machine.environment()


@pytest.mark.slow
@pytest.mark.parametrize("callers", [None, "1", "4"])
def test_processes_have_the_threads_that_were_asked_for_and_the_callers_environment(
    callers: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if callers is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", callers)
    before = machine.environment()
    for asked in (1, 3):
        assert in_new_process(asked, threads_and_environment) == (asked, before)
    default, environment = in_new_process(None, threads_and_environment)
    assert environment == before and (default == 1 or callers != "1")


@pytest.mark.parametrize(("name", "value"), [(name, value.lower()) for name, value in machine.SLEEPING.items()])
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


def test_files_of_the_first_thread_setting_have_no_ending() -> None:
    rows = [{"asked": asked} for asked in ("default", "1", "default", "16")]
    assert by_threads(rows) == {"": [rows[0], rows[2]], "_1": [rows[1]], "_16": [rows[3]]}


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


@pytest.mark.parametrize(
    ("field", "known"),
    [
        ("fpu avx2 amx_bf16 avx512 fma", ["avx2", "fma", "amx_bf16"]),
        ("fp sve2 asimd bf16", ["asimd", "sve2", "bf16"]),
        ("", []),
    ],
)
def test_flags_are_those_of_the_processor_that_decide(
    field: str, known: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(machine, "cpu_field", lambda *names: asked.extend(names) or field)
    assert machine.flags() == known and asked == ["flags", "Features"]


def test_fields_of_the_processor_are_read_by_their_whole_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(harness, "CPUINFO", tmp_path / "cpuinfo")
    assert cpu_field("flags") == "" and processor(), "the system does not say"
    lines = ["model\t\t: 17", "model name\t: One: fast", "vmx flags\t: ept", "flags\t\t: fpu avx2", "", "flags : sse"]
    harness.CPUINFO.write_text("\n".join(lines))
    assert processor() == "One: fast" and cpu_field("Features", "flags") == "fpu avx2"
    assert cpu_field("Features") == ""
