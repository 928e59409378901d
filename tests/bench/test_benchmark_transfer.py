"""`python -m benchmarks transfer`: best rates by size, their drift with an interval, and activations by width."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from benchmarks.__main__ import GEOMETRY_NAMES, main, make_parser
from benchmarks.contenders import read_contenders
from benchmarks.language import transfer as command
from benchmarks.language.data import Corpus
from benchmarks.language.diagnose import measure
from benchmarks.language.presets import RunConfig
from benchmarks.language.train import MODELS, make_optimizer
from benchmarks.language.transfer import COORDINATE_STEPS, GEOMETRIES, write_transfer
from benchmarks.output.records import RESULTS, Row, read_rows
from benchmarks.output.transfer import Curve, best_rate, coordinates, drifts, transfer_table
from tests.support.bench_runs import config, row, tiny_corpus


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Corpus]:
    yield from tiny_corpus(tmp_path, monkeypatch)


def sized(made: Row, width: int, layers: int = 1) -> Row:
    """The row with another size of the model, and a key of its own."""
    made["config"]["preset"] = {**made["config"]["preset"], "d_model": width, "n_layers": layers}
    return {**made, "key": f"{made['key']} {width} {layers}"}


def parabola(name: str, width: int, best: float, noise: float = 0.0, seeds: int = 2, layers: int = 1) -> list[Row]:
    """Runs at octaves whose losses are a parabola in log2(rate) with its vertex at log2(best)."""
    random = np.random.default_rng(width)
    rows = []
    for octave in range(-8, -1):
        for seed in range(seeds):
            loss = 2.0 + 0.1 * (octave - math.log2(best)) ** 2 + 0.02 * seed + noise * random.standard_normal()
            rows.append(sized(row(name, seed, loss, 2.0**octave), width, layers))
    return rows


@pytest.mark.parametrize("best", [0.02, 1 / 32, 0.05])
def test_the_best_rate_is_the_vertex(best: float) -> None:
    found = Curve(parabola("muon", 64, best)).best
    assert found.rate == pytest.approx(best) and found.bound == ""


def test_best_rates_at_the_edge_and_beside_runs_that_diverged() -> None:
    assert (best_rate([1, 2, 4], [1.0, 2.0, 3.0]).rate, best_rate([1, 2, 4], [1.0, 2.0, 3.0]).bound) == (1, "<= ")
    assert (best_rate([1, 2, 4], [3.0, 2.0, 1.0]).rate, best_rate([1, 2, 4], [3.0, 2.0, 1.0]).bound) == (4, ">= ")
    assert (best_rate([1, 2, 4], [3.0, 2.0, math.inf]).rate, best_rate([1, 2, 4], [3.0, 2.0, math.inf]).bound) == (
        2,
        "~",
    )
    assert best_rate([1, 2, 4], [math.inf] * 3).bound == "<= "


def test_the_drift_is_in_octaves_and_its_interval_is_of_the_seeds() -> None:
    rows = [
        *parabola("muon", 64, 0.04, 0.004),
        *parabola("muon", 128, 0.03, 0.004),
        *parabola("muon", 256, 0.02, 0.004),
    ]
    (drift,) = drifts(rows, "width")
    assert drift.sizes == [64, 128, 256] and drift.octaves == pytest.approx(-1, abs=0.2)
    low, high = drift.interval or (0.0, 0.0)
    assert low < drift.octaves < high and 0.02 < high - low < 0.5
    (exact,) = drifts([*parabola("muon", 64, 0.04), *parabola("muon", 256, 0.02)], "width")
    assert exact.interval == pytest.approx((-1, -1)), "a seed that shifts all losses alike does not move the best rate"
    (alone,) = drifts([*parabola("muon", 64, 0.04, seeds=1), *parabola("muon", 256, 0.02, seeds=1)], "width")
    assert alone.interval is None and alone.rate_interval(64) is None
    assert drifts(rows, "depth") == []


def test_intervals_hold_the_true_drift_as_often_as_they_say() -> None:
    """Of 40 experiments with drift -1, a 95% interval may miss it in a few."""
    misses = 0
    for trial in range(40):
        random = np.random.default_rng(trial)
        rows = [*parabola("muon", 64, 0.04), *parabola("muon", 128, 0.02)]
        for made in rows:
            made["final_loss"] += 0.01 * random.standard_normal()
        (drift,) = drifts(rows, "width")
        low, high = drift.interval or (math.inf, math.inf)
        misses += not low <= -1 <= high
    assert misses <= 6


def test_depths_are_at_the_commonest_width() -> None:
    rows = [made for width in (64, 128) for made in parabola("muon", width, 0.03, layers=4)]
    rows += [made for layers, best in ((2, 0.04), (8, 0.01)) for made in parabola("muon", 128, best, layers=layers)]
    (width,), (depth,) = drifts(rows, "width"), drifts(rows, "depth")
    assert width.sizes == [64, 128] and depth.sizes == [2, 4, 8]
    assert depth.octaves == pytest.approx(-2)


@pytest.mark.parametrize("name", MODELS)
def test_activations_are_those_of_the_model(name: str) -> None:
    torch.manual_seed(0)
    model, tokens = MODELS[name](11, 16, 3, 2), torch.randint(11, (4, 7))
    found = measure(model, tokens)["rms"]
    logits = model(tokens)
    assert found["logits"] == pytest.approx([logits.square().mean().sqrt().item()])
    assert found["embedding"] == pytest.approx([model.embed(tokens).square().mean().sqrt().item()])
    assert {kind: len(values) for kind, values in found.items()} == {
        **{"embedding": 1, "attention": 3, "mlp": 3, "stream": 3, "logits": 1}
    }


def checked(name: str, width: int, logits: float) -> Row:
    """A row of the coordinate check whose logits have that root mean square after the steps."""
    others = {"embedding": [1.0], "attention": [0.5, 0.5], "mlp": [0.2, 0.2], "stream": [1.0, 3.0]}
    at = [
        (step, {"rms": {**others, "logits": [value]}, "residual": [], "rows": {}, "alpha": {}})
        for step, value in ((0, 1.0), (10, logits))
    ]
    return sized(row(name, 0, 2.0, norms=at), width)


def test_coordinates_grow_by_their_exponent() -> None:
    (check,) = coordinates([checked("adam", width, 0.5 * width**0.5) for width in (64, 128, 256)])
    assert check.growth("logits") == pytest.approx(0.5) and check.growth_at_start("logits") == pytest.approx(0)
    assert check.end["stream"] == {64: 2.0, 128: 2.0, 256: 2.0} and check.steps == 10
    assert coordinates([checked("adam", 64, 1.0)]) == []


def test_files_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*parabola("adam", 64, 0.04, 0.004), *parabola("adam", 256, 0.01, 0.004)]
    rows += [*parabola("scion", 64, 0.02, 0.004), *parabola("scion", 256, 0.02, 0.004)]
    rows += [checked(name, width, 1.0) for name in ("adam", "scion") for width in (64, 256)]
    write_transfer(rows, tmp_path)
    text, printed = (tmp_path / "transfer.md").read_text(), capsys.readouterr().out
    assert "drift, octaves" in text and "drift, octaves" in printed and "Coordinate check" in text
    for name in ("transfer_width.png", "coordinates.png"):
        assert f"({name})" in text and (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    lines = list(csv.DictReader((tmp_path / "transfer.csv").read_text().splitlines()))
    assert [(line["optimizer"], line["axis"], line["size"]) for line in lines] == [
        *(("adam", "width", "64"), ("adam", "width", "256"), ("scion", "width", "64"), ("scion", "width", "256"))
    ]
    for line in lines:
        assert float(line["lr_low"]) <= float(line["lr"]) <= float(line["lr_high"])
        assert float(line["drift_low"]) <= float(line["drift"]) <= float(line["drift_high"])
    assert r"\begin{tabular}" in (tmp_path / "transfer.tex").read_text()
    assert [line["optimizer"] for line in transfer_table(drifts(rows, "width"))] == ["scion", "adam"]
    assert not (tmp_path / "transfer_depth.png").exists()


class FakePool:
    """In place of training: the loss is a parabola in log2(rate), with its vertex at a rate that falls with width."""

    failures = ()
    last: ClassVar[FakePool]

    def __init__(self, out: Path, size: int) -> None:
        self.asked: list[RunConfig] = []

    def run(self, configs: list[RunConfig]) -> list[Row]:
        self.asked += configs
        FakePool.last = self
        return [self.row(config) for config in configs]

    def row(self, of: RunConfig) -> Row:
        best = {32: -4.0, 64: -6.5}[of.preset.d_model]
        made = row(of.optimizer, of.seed, 2 + 0.1 * (math.log2(of.lr) - best) ** 2, of.lr)
        made["config"]["preset"] |= {"d_model": of.preset.d_model, "n_layers": of.preset.n_layers}
        norms: dict[str, Any] = {} if not of.diagnose else {"norms": checked("adam", of.preset.d_model, 1.0)["norms"]}
        return {**made, "key": of.key, **norms}


def test_grids_grow_until_the_best_rate_has_neighbours(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "Pool", FakePool)
    arguments = ["transfer", "--data", corpus.name, "--model", "gpt", "--geometries", "adam", "--widths", "32,64"]
    assert main([*arguments, "--depths", "0", "--out", "out"]) == 0
    asked = FakePool.last.asked
    for width, best in ((32, -4.0), (64, -6.5)):
        rates = sorted({run.lr for run in asked if run.preset.d_model == width and not run.diagnose})
        assert rates[0] < 2.0**best < rates[-1] and 3 <= len(rates) < 8
        assert np.allclose(np.diff(np.log2(rates)), 1), "octaves"
    checks = [run for run in asked if run.diagnose]
    assert {run.preset.d_model for run in checks} == {32, 64} and len({run.lr for run in checks}) == 1
    assert all((run.preset.steps, run.preset.warmup) == (COORDINATE_STEPS, 0) for run in checks)
    assert {run.preset.d_model // run.preset.n_heads for run in asked} == {32}
    (line,) = transfer_table(drifts([FakePool(Path(), 1).row(run) for run in asked], "width"))
    assert line["drift, octaves"] == "-2.50" and "-2.50" in capsys.readouterr().out


def test_rates_of_the_command_line_are_tried_and_no_others(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "Pool", FakePool)
    arguments = ["transfer", "--data", corpus.name, "--model", "gpt", "--geometries", "adam", "--widths", "32,64"]
    assert main([*arguments, "--depths", "0", "--rates", "0.01,0.02", "--out", "out"]) == 0
    asked = FakePool.last.asked
    assert {run.lr for run in asked} == {0.01, 0.02}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--widths", "64,100", "--depths", "0"], "--widths 100 is no multiple of the preset's heads of 32"),
        (["--depth-width", "100"], "--depth-width 100 is no multiple of the preset's heads of 32"),
        (["--widths", "0"], "argument --widths: '0' is not a whole number from 1 up"),
        (["--geometries", "adam,moun"], "--geometries: unknown optimizer 'moun': did you mean 'muon'?"),
        (["--rates", "-1"], "argument --rates"),
    ],
)
def test_bad_arguments_end_before_any_training(
    arguments: list[str], message: str, corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["transfer", "--data", corpus.name, "--model", "gpt", *arguments])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_every_geometry_makes_an_optimizer_without_decay(corpus: Corpus) -> None:
    assert tuple(GEOMETRIES) == GEOMETRY_NAMES
    assert make_parser().parse_args(["transfer"]).geometries == list(GEOMETRY_NAMES)
    contenders = read_contenders(list(GEOMETRIES.values()), [])
    assert [contender.name for contender in contenders] == list(GEOMETRIES)
    for contender in contenders:
        options = {name: value for name, value in contender.options.items() if name != "lr"}
        run = config(corpus, contender.base, **options)
        optimizer = make_optimizer(run, MODELS["gpt"](11, 16, 1, 2))
        assert not any(group.get("weight_decay") for group in optimizer.param_groups), contender.name


@pytest.mark.slow
def test_the_command_trains_and_continues(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 600)
    arguments = ["transfer", "--smoke", "--model", "gpt", "--geometries", "adam,modula", "--workers", "1"]
    arguments += ["--data", str(tmp_path / "text.txt"), "--out", str(tmp_path), "--seeds", "1"]
    assert main(arguments) == 0
    rows = read_rows(tmp_path / RESULTS)
    assert len(rows) == 2 * 2 * 3 + 2 * 2 and "modula" in (tmp_path / "transfer.md").read_text()
    assert main(arguments) == 0
    assert read_rows(tmp_path / RESULTS) == rows and "runs are already in" in capsys.readouterr().out
