"""The benchmark of what sharded steps send: counts against formulas, and the whole command once, on a tiny model."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from benchmarks.__main__ import WIRE_MODELS, main
from benchmarks.cost import wire
from benchmarks.output.records import read_rows

ROOT = Path(__file__).parents[2]


@pytest.fixture
def eight() -> Iterator[None]:
    with wire.one_of(8):
        yield


@pytest.mark.parametrize(("optimizer", "carried"), zip(wire.OPTIMIZERS, (2, 3), strict=True))
@pytest.mark.usefixtures("eight")
def test_counts_are_the_least_where_ranks_divide_everything(optimizer: str, carried: int) -> None:
    row = wire.count("smoke", optimizer, wire.mesh_of(8))
    entries = 2 * 12 * 16 * 16
    assert (row["owned"], row["matrices"]) == (entries, 8)
    assert row["sent_mean"] == row["least"] == 4 * carried * entries * 7 / 64
    assert row["gather_all"] == 4 * entries * 7 / 8 and row["all_to_alls"] == 2
    assert row["work_max"] <= max(1.2 * row["work_mean"], row["work_largest"])


@pytest.mark.usefixtures("eight")
def test_copies_share_the_work() -> None:
    """Each matrix comes in from the ranks of one copy, and its update goes to those of all."""
    row = wire.count("smoke", "muon", wire.mesh_of(8, 2))
    entries = row["owned"]
    assert row["sent_mean"] == 4 * (entries * 3 / 4 + entries / 4 * 7) / 8
    assert (row["copies"], row["shards"], row["layout"]) == (2, 4, "HSDP 2 x 4")


@pytest.mark.parametrize(
    ("name", "parameters", "matrices"),
    [("gpt2-124m", 124_439_808, 48), ("gpt2-1.5b", 1_557_611_200, 192), ("llama3-8b", 8_030_261_248, 224)],
)
def test_shapes_are_those_of_the_models(name: str, parameters: int, matrices: int) -> None:
    model = wire.make(wire.MODELS[name])
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(p.ndim == 2 for p in model.layers.parameters()) == matrices
    assert {*WIRE_MODELS} == {*wire.MODELS} - {"smoke"}


@pytest.mark.slow
def test_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["wire", "--smoke", "--out", str(tmp_path)]) == 0
    rows = read_rows(tmp_path / "wire.jsonl")
    assert len(rows) == 6 and not dist.is_initialized()
    for row in rows.values():
        assert 0 < row["sent_mean"] <= row["sent_max"] and row["state_mean"] <= row["state_max"]
        assert row["sent_mean"] <= row["least"] and row["sent_mean"] < row["fsdp"]
        assert row["work_max"] <= max(1.2 * row["work_mean"], row["work_largest"])
    table = (tmp_path / "wire.md").read_text()
    assert table.count("\n|") == len(rows) + 2 and "work max / mean" in capfd.readouterr().out
    assert all((tmp_path / f"wire.{kind}").stat().st_size for kind in ("csv", "tex", "png"))


def test_one_rank_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["wire", "--ranks", "1,2", "--out", str(tmp_path)])
    assert "--ranks: one rank sends nothing; give numbers from 2 up" in capsys.readouterr().err


def test_the_page_shows_the_table_on_file() -> None:
    page = (ROOT / "docs" / "many-machines.md").read_text(encoding="utf-8")
    header, *lines = [
        line.strip("| ").split(" | ") for line in page.splitlines() if re.match(r"\| ?(model|gpt2|llama)", line)
    ]
    with (ROOT / "benchmarks" / "results" / "wire" / "wire.csv").open(encoding="utf-8") as file:
        known = [[row[name] for name in header] for row in csv.DictReader(file) if row["optimizer"] == "muon"]
    assert len(lines) >= 12 and all(line in known for line in lines)
