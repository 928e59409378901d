"""A tiny corpus, preset and runs for the tests of the benchmark."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.language.data import Corpus, load
from benchmarks.language.presets import Preset, RunConfig
from benchmarks.language.train import train
from benchmarks.output.records import Row

TINY = Preset(
    "tiny", 16, 1, 2, steps=12, context=8, batch=6, micro_batch=6, warmup=2, curve_tokens=64, final_tokens=128
)

#: Columns of a row that are measured, and those that name the code, which others may change while a test runs.
MEASURED = {"tokens_per_second", "gradient_ms", "optimizer_ms", "train_seconds", "cpu_seconds", "wall_seconds"}
MEASURED |= {"load_average", "commit", "source"}


def tiny_corpus(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Corpus]:
    """Body of a fixture: a small text, one thread as in a worker, and `folder` as the place for checkpoints."""
    monkeypatch.chdir(folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    yield load(str(folder / "text.txt"))
    torch.set_num_threads(threads)


def config(
    corpus: Corpus, optimizer: str = "adamw", lr: float = 1e-2, preset: Preset = TINY, **options: Any
) -> RunConfig:
    return RunConfig(optimizer, lr, options, "gpt", preset, 0, corpus.name, corpus.digest, "cpu")


def finish(config: RunConfig) -> Row:
    return train(config, Path(f"{time.monotonic_ns()}.pt"), lambda step, loss, speed: None)


def unmeasured(row: Row) -> Row:
    """What has to be the same to the bit whenever a run is repeated."""
    kept = {name: value for name, value in row.items() if name not in MEASURED}
    return {**kept, "curve": [(step, loss) for step, _, loss in row["curve"]]}


def row(optimizer: str, seed: int, loss: float | None, lr: float = 0.1, **values: Any) -> Row:
    made = RunConfig(optimizer, lr, {}, "gpt", TINY, seed, "text", "0", "cpu")
    return {
        "key": made.key,
        "config": dataclasses.asdict(made),
        "status": "diverged" if loss is None else "finished",
        "steps_done": 3,
        "final_loss": loss,
        "bytes_per_token": 1.0,
        "bits_per_byte": None if loss is None else loss / math.log(2),
        "curve": [[0, 0.0, 5.0], [6, 1.0, 3.0], [12, 2.0, 2.0]],
        **{"gradient_ms": 90.0, "optimizer_ms": 10.0, "tokens_per_second": 1234.0, "cpu_seconds": 50.0},
        "train_seconds": 0.3,
        **{"state_bytes_per_parameter": 8.0, "parameters": 100, "torch": "2", "source": "x", **values},
    }
