"""`pytest --device cuda`: tests make their tensors on a GPU, and are skipped where there is none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def test_new_tensors_are_where_the_option_says(request: pytest.FixtureRequest) -> None:
    assert torch.zeros(1).device.type == torch.device(request.config.getoption("--device")).type


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_all_tests_are_skipped() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "--device", "cuda", "tests/contract/test_device.py"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "torch sees no GPU here" in found.stdout and "passed" not in found.stdout
    assert found.returncode == 0, found.stdout
