"""The protocol of `python -m benchmarks sweep`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.__main__ import main
from benchmarks.language import presets, workers
from benchmarks.language.data import Corpus
from benchmarks.language.presets import RunConfig
from benchmarks.language.search import Search, Trial
from benchmarks.output.records import Row
from tests.support.bench_runs import row, tiny_corpus


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Corpus]:
    yield from tiny_corpus(tmp_path, monkeypatch)


def explore(loss: Callable[[int], float], trials: int) -> Search:
    """A search on a known curve."""
    search = Search("adamw", 1.0)
    while len(search.screened) < trials or search.at_edge:
        for exponent in search.wanted():
            assert exponent not in search.screened
            search.screened[exponent] = loss(exponent)
    return search


@given(st.integers(-9, 9), st.integers(3, 7), st.floats(0.1, 3))
def test_searches_end_at_the_minimum_with_neighbours_on_both_sides(minimum: int, trials: int, steepness: float) -> None:
    search = explore(lambda e: steepness * abs(e - minimum), trials)
    assert search.ranked[0] == minimum and {minimum - 1, minimum + 1} <= search.screened.keys()
    tried = sorted(search.screened)
    assert tried == list(range(tried[0], tried[-1] + 1)), "no gaps"
    assert len(tried) <= max(trials, 4 + abs(minimum))


def test_more_trials_go_to_the_better_side() -> None:
    search = explore(lambda e: e**2 if e > 0 else 0.1 * e**2, 4)
    assert sorted(search.screened) == [-2, -1, 0, 1]


def test_diverged_rates_are_worse_than_any_other() -> None:
    search = explore(lambda e: math.inf if e > -4 else 5.0 + e / 10 if e > -7 else 6.0, 3)
    assert search.ranked[0] == -6 and search.rate(-6) == 2**-6


def test_rates_whose_seeds_disagree_are_not_chosen() -> None:
    search = Search("adamw", 1.0, finals=[Trial(1.0, {}, (1.5, 1.7)), Trial(0.5, {}, (1.65, 1.66))])
    assert search.chosen(usual_gap=0.01).lr == 0.5
    assert search.chosen(usual_gap=0.1).lr == 1.0, "where seeds usually differ that much"
    search.finals.append(Trial(2.0, {}, (1.0, math.inf)))
    assert search.chosen(0.01).lr == 0.5 and search.finals[-1].is_unstable(10.0)
    assert not Trial(1.0, {}, (1.50, 1.51)).is_unstable(0.0), "tiny gaps are no instability"


def swept(arguments: list[str], monkeypatch: pytest.MonkeyPatch, loss: Callable[[RunConfig], float]) -> list[RunConfig]:
    """All runs of a sweep whose losses are known beforehand."""
    seen: list[RunConfig] = []

    def run(_: workers.Pool, configs: list[RunConfig]) -> list[Row]:
        seen.extend(configs)
        found = [row(c.optimizer, c.seed, loss(c), c.lr) for c in configs]
        for made, config in zip(found, configs, strict=True):
            made["config"]["preset"]["steps"] = config.preset.steps
        return found

    monkeypatch.setattr(workers.Pool, "run", run)
    assert main(["sweep", "--out", "out", *arguments]) == 0
    return seen


def test_a_tuned_schedule_names_what_a_schedule_has(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "tuned.json").write_text(json.dumps({"quick": {"sgd": {"lr": 0.1, "schedule": {"warm": 3}}}}))
    monkeypatch.setattr(presets, "TUNED", tmp_path / "tuned.json")
    with pytest.raises(SystemExit):
        main(["compare", "--optimizers", "sgd", "--data", corpus.name, "--out", "out"])
    assert "tuned.json: a schedule has warmup and decay, not warm" in capsys.readouterr().err


def test_every_optimizer_gets_the_same_trials(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tuned = {"adamw": {"lr": 0.01, "betas": [0.9, 0.95], "then": {"weight_decay": [0.3, 0.5]}}}
    tuned["sgd"] = {"lr": 0.1, "schedule": {"warmup": 3, "decay": 0.7}, "model_options": {"rope_fraction": 1.0}}
    (tmp_path / "tuned.json").write_text(json.dumps({"quick": tuned}))
    monkeypatch.setattr(presets, "TUNED", tmp_path / "tuned.json")

    def loss(config: RunConfig) -> float:
        best = 0.01 if config.optimizer == "adamw" else 0.1 / 32
        decay = config.options.get("weight_decay", 0.0)
        return 2 + abs(math.log2(config.lr / best)) / 10 - (0.05 if decay == 0.3 else 0.0) + config.seed % 2 / 1000

    arguments = ["--optimizers", "adamw,sgd", "--data", corpus.name, "--screen-steps", "100"]
    runs = swept(arguments, monkeypatch, loss)
    short = [run for run in runs if run.preset.steps == 100]
    full = [run for run in runs if run.preset.steps == 600]
    assert len(short) + len(full) == len(runs) and {run.seed for run in short} == {1000}
    assert {(run.optimizer, run.preset.warmup, run.preset.decay, str(run.model_options)) for run in runs} == {
        ("adamw", 20, 0.4, "{}"),
        ("sgd", 3, 0.7, "{'rope_fraction': 1.0}"),
    }
    count = {name: sum(run.optimizer == name for run in short) for name in ("adamw", "sgd")}
    assert count["adamw"] == count["sgd"] == 8, "as many as the one that has to go far"
    finals = [(run.optimizer, run.lr, run.options.get("weight_decay"), run.seed) for run in full]
    for name, best, other in [("adamw", 0.01, 0.02), ("sgd", 0.1 / 32, 0.1 / 16)]:
        rates = {lr for optimizer, lr, decay, _ in finals if optimizer == name}
        assert best in rates and len(rates) == 2 and other in {*rates, other}
    assert [f for f in finals if f[2]] == [("adamw", 0.01, d, s) for d in (0.3, 0.5) for s in (1000, 1001)]
    chosen: dict[str, Any] = json.loads(Path("out/chosen.json").read_text())
    adamw = {"lr": 0.01, "betas": [0.9, 0.95], "weight_decay": 0.3}
    assert chosen == {"adamw": adamw, "sgd": {**tuned["sgd"], "lr": 0.1 / 32}}
    assert "8 short, 8 full" in capsys.readouterr().out and "8 short, 4 full" in Path("out/sweep.md").read_text()
    assert Path("out/sweep.png").stat().st_size > 10_000


def test_a_sweep_without_a_best_rate_ends(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="no end of better rates"):
        swept(["--optimizers", "sgd", "--data", corpus.name, "--trials", "3"], monkeypatch, lambda config: -config.lr)


def test_a_sweep_ends_where_a_run_fails(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(pool: workers.Pool, configs: list[RunConfig]) -> list[Row]:
        pool.failures.append(configs[0].label)
        return []

    monkeypatch.setattr(workers.Pool, "run", run)
    assert main(["sweep", "--optimizers", "sgd", "--data", corpus.name, "--out", "out"]) == 1
    assert not Path("out/sweep.md").exists()
