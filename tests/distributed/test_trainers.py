"""accelerate's FSDP2 and Lightning's ModelParallelStrategy train and resume with our optimizers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.torchrun import run

NAMES = "adamw,muon,prodigy,soap"


@pytest.mark.exhaustive
@pytest.mark.parametrize("library", ["accelerate", "lightning"])
def test_sharded_by_a_trainer(tmp_path: Path, library: str) -> None:
    pytest.importorskip(library)
    run(2, ["-m", "tests.support.fsdp2_trainers", library, NAMES, str(tmp_path)], tmp_path)
