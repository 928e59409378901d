"""The example of FSDP2 runs, and continues on another number of processes where it has stopped."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.torchrun import ROOT, run


@pytest.mark.exhaustive
def test_the_example_of_fsdp2_continues_with_other_processes(tmp_path: Path) -> None:
    example = [str(ROOT / "examples" / "fsdp2.py")]
    whole = run(2, [*example, "--folder", "whole"], tmp_path)
    half = run(2, [*example, "--folder", "half", "--steps", "30"], tmp_path)
    rest = run(3, [*example, "--folder", "half"], tmp_path)
    assert "2 processes, from step 0" in half
    assert "3 processes, from step 30" in rest
    expected, found = losses(whole), {**losses(half), **losses(rest)}
    assert [*found] == [*expected] == [10, 20, 30, 40, 50, 60]
    assert expected[60] < 0.6 * expected[10], "it has learnt nothing"
    for step, loss in found.items():
        # Muon multiplies in bfloat16, which makes more of the last bits in which averages of other shares differ.
        assert loss == pytest.approx(expected[step], rel=0 if step <= 30 else 2e-2)


def losses(said: str) -> dict[int, float]:
    return {int(step): float(loss) for step, loss in re.findall(r"step (\d+): loss ([\d.]+)", said)}
