"""The protocol of `python -m benchmarks sweep`: trials, spaces, finalists, and what is reported of them."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import normopt
from benchmarks.__main__ import main, make_parser
from benchmarks.language import presets, spaces, workers
from benchmarks.language.data import Corpus
from benchmarks.language.plan import Plan
from benchmarks.language.presets import RunConfig
from benchmarks.language.spaces import INCLUSIONS, Range
from benchmarks.language.train import make_optimizer
from benchmarks.language.trials import Subject, at_edges, points, trials, usual
from benchmarks.output.records import Row
from benchmarks.output.statistics import expected_best
from normopt.nn import GPT
from tests.support.bench_runs import row, tiny_corpus


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Corpus]:
    yield from tiny_corpus(tmp_path, monkeypatch)


def plan(corpus: Corpus, optimizers: str, *arguments: str) -> Plan:
    command = ["sweep", "--optimizers", optimizers, "--data", corpus.name, "--out", "out", *arguments]
    return Plan(make_parser().parse_args(command))


RANGES = st.builds(
    lambda ends, scale: Range(min(ends), max(ends), scale, ""),
    st.lists(st.floats(0.01, 0.99), min_size=2, max_size=2).filter(lambda ends: abs(ends[0] - ends[1]) > 0.1),
    st.sampled_from(["log", "linear", "near 1"]),
)


@given(RANGES, st.floats(0, 1))
def test_values_and_shares_of_a_range_belong_together(span: Range, share: float) -> None:
    assert span.share(span.at(share)) == pytest.approx(share, abs=0.05)
    assert span.share(span.low) == 0 and span.share(span.high) == 1
    assert span.at(0) == pytest.approx(span.low, rel=0.01) and span.at(1) == pytest.approx(span.high, rel=0.01)


def test_more_trials_begin_with_the_same_trials() -> None:
    few, many = points("adamw", 7, 5), points("adamw", 7, 64)
    assert (few == many[:5]).all() and (points("muon", 7, 5) != few).any()
    assert few.shape == (5, 7) and (many >= 0).all() and (many < 1).all()
    for column in many.T:
        assert (np.histogram(column, bins=16, range=(0, 1))[0] == 4).all(), "each range is covered evenly"


@pytest.mark.parametrize("losses", [[3.0, 1.0, 2.0, 2.0, 5.0], [1.0], [1.0, math.inf, 2.0, math.inf]])
def test_the_expected_best_is_the_mean_over_all_choices(losses: list[float]) -> None:
    for count in range(1, len(losses) + 1):
        chosen = list(itertools.combinations(losses, count))
        assert expected_best(losses, count) == pytest.approx(statistics.fmean(map(min, chosen)))
    with pytest.raises(ValueError, match=rf"count must lie in \[1, {len(losses)}\]"):
        expected_best(losses, len(losses) + 1)


ALL = "all,muonplus-soap,prodigy-muon,prodigy-scion,torch:*"


def test_every_optimizer_has_a_space_whose_values_reach_it(corpus: Corpus) -> None:
    """Over the registry: rates, averages and decay of a trial are those of the param groups that are made of it."""
    made = plan(corpus, ALL)
    assert set(normopt.list_optimizers()) <= made.cells.keys()
    for cell in made.cells:
        subject, (trial, *others) = Subject(made, cell), trials(made, cell, 8)
        space = subject.space()
        assert {"lr", "warmup", "decay"} <= space.keys() == trial.values.keys(), cell
        for name, span in space.items():
            assert span.low < span.high and span.why and 0 <= span.share(trial.values[name]) <= 1, (cell, name)
        config = made.config(cell, 0, entry=trial.entry)
        json.dumps(dataclasses.asdict(config), allow_nan=False)
        model = GPT(256, 48, 1, 2)
        groups = make_optimizer(config, model).param_groups
        of = {name: g for name, p in model.named_parameters() for g in groups if any(p is q for q in g["params"])}
        hidden, head = of["blocks.0.mlp.up.weight"], of["head.weight"]
        assert config.lr == trial.values["lr"] == hidden["lr"] / hidden.get("lr_ratio", 1), cell
        rest = trial.values.get("aux_lr", trial.values.get("rest_ratio", 1) * config.lr)
        if {"aux_lr", "rest_ratio"} & space.keys() and cell != "muonplus-soap":  # whose head has a rate of its own
            assert any(g["lr"] == pytest.approx(rest, rel=0.01) for g in groups if g is not hidden), cell
        if "rest_beta2" in space:
            assert head["betas"][1] == trial.values["rest_beta2"] != hidden["betas"][1], cell
        if "momentum" in space:
            assert trial.values["momentum"] in (hidden.get("momentum"), head.get("momentum")), cell
        if "shrinkage" in space:
            expected = trial.values["shrinkage"] / (config.lr * made.preset.steps)
            assert hidden["weight_decay"] == pytest.approx(expected, rel=0.01), cell
            assert head.get("weight_decay", 0) == 0, cell
        for other in [*others, usual(made, cell)]:
            assert other.values.keys() <= space.keys(), cell
            make_optimizer(made.config(cell, 0, entry=other.entry), model)
        schedule = (round(trial.values["warmup"] * made.preset.steps), trial.values["decay"])
        assert (config.preset.warmup, config.preset.decay) == schedule, cell


def test_shrinkage_is_how_far_weights_shrink(corpus: Corpus) -> None:
    """Over the registry: without a gradient, every step of the optimizer multiplies weights by 1 - lr weight_decay."""
    made = plan(corpus, "all")
    # SGD adds the decay up in its momentum, and AdamP decays less what it projects, as it does without a gradient.
    decayed = [c for c in made.cells if "shrinkage" in Subject(made, c).space() and c not in ("sgd", "sgdp", "adamp")]
    assert {"adamw", "muon", "lion", "soap"} <= set(decayed)
    for cell in decayed:
        (trial,) = trials(made, cell, 1)
        config = made.config(cell, 0, entry=trial.entry)
        torch.manual_seed(0)
        model = GPT(256, 16, 1, 2)
        optimizer, ratios = make_optimizer(config, model), []
        weight = model.blocks[0].mlp.up.weight
        for _ in range(2):  # the first step of some only prepares
            before = weight.detach().clone()
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            optimizer.step()
            ratios.append((weight / before).median().item())
        assert ratios[1] == pytest.approx(1 - config.lr * config.options["weight_decay"], abs=1e-5), cell


def test_what_is_given_is_not_searched(corpus: Corpus) -> None:
    made = plan(corpus, "muon,fixed=muon(momentum=0.9,weight_decay=0.2,aux_lr=0.01),torch:Muon", "--warmup", "7")
    whole, fixed = Subject(made, "muon").space(), Subject(made, "fixed").space()
    assert whole.keys() - fixed.keys() == {"momentum", "shrinkage", "aux_lr"} and "warmup" not in whole
    (trial,) = trials(made, "fixed", 1)
    assert (trial.entry["momentum"], trial.entry["weight_decay"], trial.entry["aux_lr"]) == (0.9, 0.2, 0.01)
    assert made.config("fixed", 0, entry=trial.entry).preset.warmup == 7
    assert Subject(made, "torch:Muon").space().keys() == whole.keys(), "the same space as ours"
    angpt = plan(corpus, "muon", "--model", "angpt")
    assert whole.keys() - Subject(angpt, "muon@angpt").space().keys() == {"shrinkage"}
    assert "warmup" not in Subject(plan(corpus, "muon", "--model", "ngpt"), "muon@ngpt").space()


def test_spaces_and_trials_do_not_follow_what_a_sweep_has_chosen(corpus: Corpus) -> None:
    """So that a sweep can be extended after its choices have become those of the file of tuned options."""
    names = "adamw,muon,prodigy,ademamix,torch:AdamW,torch:Muon"
    before = plan(corpus, names)
    first = {cell: [*trials(before, cell, 4), usual(before, cell)] for cell in before.cells}
    Path("chosen.json").write_text(json.dumps({cell: found[3].entry for cell, found in first.items()}))
    after = plan(corpus, names, "--tuned", "chosen.json")
    assert {cell: [*trials(after, cell, 4), usual(after, cell)] for cell in after.cells} == first


def test_the_usual_options_are_defaults_at_the_middle_rate(corpus: Corpus) -> None:
    """But for customary values; defaults also where the file of tuned options has others."""
    made = plan(
        corpus, "adamw,torch:AdamW,sgd,lion,muon,torch:Muon,shampoo,fixed=adamw(betas=[0.8,0.9])", "--decay", "1"
    )
    of = {cell: usual(made, cell) for cell in made.cells}
    middle = Subject(made, "adamw").space()["lr"].at(0.5)
    expected = {"lr": middle, "betas[0]": 0.9, "betas[1]": 0.95, "rest_ratio": 1.0, "rest_beta2": 0.95}
    assert expected.items() <= of["adamw"].values.items() and of["adamw"].values == of["torch:AdamW"].values
    assert of["adamw"].entry["weight_decay"] == of["torch:AdamW"].entry["weight_decay"] == 0.1
    assert of["sgd"].values["momentum"] == 0.9 and of["sgd"].entry["weight_decay"] == 0
    assert (of["lion"].values["betas[1]"], of["lion"].values["rest_beta2"]) == (0.99, 0.99)
    assert of["lion"].entry["weight_decay"] == of["shampoo"].entry["weight_decay"] == 0
    assert "aux_lr" not in of["muon"].entry, "half of lr, by its own default"
    assert of["torch:Muon"].entry["rest"]["lr_ratio"] == 0.5
    assert (of["muon"].entry["momentum"], of["muon"].entry["weight_decay"]) == (0.95, 0.1)
    assert "betas[1]" not in of["fixed"].values and of["fixed"].entry["betas"] == [0.8, 0.9]
    assert made.config("muon", 0, entry=of["muon"].entry).preset.warmup == 20


def test_spaces_are_of_optimizers_and_arguments_that_exist() -> None:
    known = {*normopt.list_optimizers(), *presets.variants(), "steepestdescent"}
    assert {*spaces.RATES, *spaces.OWN, *spaces.FREE} <= known
    for each in INCLUSIONS:
        assert {each.container, each.contained} <= known


@pytest.mark.parametrize("inclusion", INCLUSIONS, ids=lambda each: f"{each.container}-{each.contained}")
def test_declared_inclusions_hold(inclusion: spaces.Inclusion, corpus: Corpus) -> None:
    options: dict[str, Any] = {"adamw": {"betas": (0.9, 0.97), "weight_decay": 0.1}, "signum": {"momentum": 0.9}}.get(
        inclusion.contained, {}
    )
    weights = []
    contained = inclusion.options(options)
    for name, arguments in ((inclusion.contained, options), (inclusion.container, contained)):
        torch.manual_seed(0)
        model = GPT(64, 16, 1, 2)
        optimizer, generator = normopt.create(name, model, lr=0.01, **arguments), torch.Generator().manual_seed(1)
        for _ in range(4):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*weights, rtol=0, atol=1e-6)
    space = Subject(plan(corpus, inclusion.container), inclusion.container).space()
    changed = {n: v for n, v in contained.items() if options.get(n) != v}
    named = {f"{n}[{i}]": x for n, v in changed.items() if isinstance(v, tuple) for i, x in enumerate(v)}
    named |= {n: v for n, v in changed.items() if not isinstance(v, tuple)}
    assert inclusion.inside == all(n in space and -1e-9 <= space[n].share(v) <= 1 for n, v in named.items())


def test_edges() -> None:
    space = {
        "lr": Range(1e-3, 1e-1, "log", ""),
        "decay": Range(0, 1, "linear", ""),
        "beta": Range(0.9, 0.999, "near 1", ""),
    }
    assert at_edges(space, {"lr": 1e-3, "decay": 0.5, "beta": 0.9989}) == {"lr": "low", "beta": "high"}
    assert at_edges(space, {"lr": 1.3e-3, "decay": 0.96, "beta": 0.93}) == {"decay": "high"}


def swept(
    arguments: list[str], corpus: Corpus, monkeypatch: pytest.MonkeyPatch, loss: Callable[[RunConfig], float | None]
) -> list[RunConfig]:
    """All runs of a sweep whose losses are known beforehand."""
    seen: list[RunConfig] = []

    def run(_: workers.Pool, configs: list[RunConfig]) -> list[Row]:
        seen.extend(configs)
        return [
            {**row(c.optimizer, c.seed, loss(c), c.lr), "config": dataclasses.asdict(c), "key": c.key}
            for c in {c.key: c for c in configs}.values()
        ]

    monkeypatch.setattr(workers.Pool, "run", run)
    assert main(["sweep", "--data", corpus.name, "--out", "out", *arguments]) == 0
    return seen


def lines(name: str) -> list[dict[str, str]]:
    return list(csv.DictReader(Path("out", name).read_text().splitlines()))


def test_every_optimizer_gets_the_same_trials_three_finalists_and_the_usual_options(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Losses fall with the distance of the rate to the best one; one trial of AdamW diverges."""
    best = {"adamw": 0.004, "muon": 0.05, "lion": 0.001, "signum": 0.001}
    diverges = trials(plan(corpus, "adamw"), "adamw", 8)[3].values["lr"]

    def loss(config: RunConfig) -> float | None:
        if config.optimizer == "adamw" and config.lr == diverges:
            return None
        shift = {"lion": 0.1}.get(config.optimizer, 0.0) + 0.01 * (config.seed - 1000)
        return 2 + abs(math.log2(config.lr / best[config.optimizer])) / 10 + shift

    runs = swept(["--optimizers", "adamw,muon,lion,signum", "--trials", "8"], corpus, monkeypatch, loss)
    short, full = ([run for run in runs if run.preset.steps == steps] for steps in (150, 600))
    assert len(short) == 4 * 8 and len(full) == 4 * (3 + 1) * 2
    assert [run.optimizer for run in short[:5]] == ["adamw", "muon", "lion", "signum", "adamw"]
    assert {run.seed for run in short} == {1000} and {run.seed for run in full} == {1001, 1002}
    assert {run.split for run in runs} == {"validation"}
    assert {run.preset.evaluations for run in short} == {1} and {run.preset.evaluations for run in full} == {20}
    for name in best:
        ranked = sorted((r for r in short if r.optimizer == name), key=lambda r: loss(r) or math.inf)
        finalists = [run.lr for run in full if run.optimizer == name]
        rates = [*(run.lr for run in ranked[:3]), Subject(plan(corpus, name), name).usual()["lr"]]
        assert finalists == [lr for lr in rates for _ in range(2)]
    chosen: dict[str, Any] = json.loads(Path("out/chosen.json").read_text())
    assert chosen.keys() == best.keys() and {n: e["lr"] for n, e in chosen.items()} == {
        n: min((r.lr for r in full if r.optimizer == n), key=lambda lr: abs(math.log2(lr / best[n]))) for n in best
    }
    assert chosen["lion"]["lr"] == usual(plan(corpus, "lion"), "lion").entry["lr"], "it is near the middle of the range"
    adamw, *_, signum = lines("sweep.csv")
    losses = [loss(run) or math.inf for run in short if run.optimizer == "signum"]
    for k in (1, 2, 4, 8):
        assert float(signum[f"best of {k}"]) == pytest.approx(expected_best(losses, k))
    assert (adamw["best of 1"], adamw["diverged"]) == ("inf", "1") and float(adamw["best of 2"]) < 3
    (inclusion,) = lines("inclusions.csv")
    assert (inclusion["optimizer"], inclusion["contains"], inclusion["in the space"]) == ("lion", "signum", "yes")
    assert inclusion["check"].startswith("loses") and float(inclusion["difference mean"]) > 0.05
    assert len(lines("trials.csv")) == 4 * 9 and Path("out/sweep.png").stat().st_size > 10_000
    table = next(line for line in lines("chosen.csv") if line["optimizer"] == "muon")
    assert float(table["warm-up"]) == chosen["muon"]["schedule"]["warmup"]
    assert float(table["lr"]) == chosen["muon"]["lr"] and table["val nats/byte n"] == "2"
    assert (
        float(table["decay"]) == chosen["muon"]["weight_decay"] and float(table["rest lr"]) == chosen["muon"]["aux_lr"]
    )
    assert float(table["usual"]) == pytest.approx(2 + abs(math.log2(0.0404 / 0.05)) / 10 + 0.015, abs=1e-3)
    printed = capsys.readouterr().out
    assert "best of 8" in printed and "Inclusions" in printed
    assert max(map(len, printed.splitlines())) <= 120


def test_compare_takes_what_a_sweep_has_chosen(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """The finalists' runs again, but for the seed and the text."""
    names = "adamw,muon,m95{},torch:AdamW,torch:Muon"
    arguments = ["--optimizers", names.format("=muon(momentum=0.95)"), "--trials", "2"]
    runs = swept(arguments, corpus, monkeypatch, lambda c: 2.0 + c.lr)
    seen: list[RunConfig] = []
    monkeypatch.setattr(workers.Pool, "run", lambda _, configs: seen.extend(configs) or [])
    command = ["compare", "--data", corpus.name, "--optimizers", names.format("")]
    assert main([*command, "--tuned", "out/chosen.json", "--out", "other"]) == 0
    full = {r.optimizer: r for r in sorted(runs, key=lambda r: -r.lr) if r.preset.steps == 600}
    for run in seen:
        assert dataclasses.replace(run, seed=1002, split="validation").key == full[run.optimizer].key
    assert len(seen) == 5 and {run.split for run in seen} == {"test"}


def test_own_combinations_are_contained_where_they_only_set_what_is_searched(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, outside = "in=muon(momentum=0.9)", "out=muon(momentum=0.5),other=muon(nesterov=False)"
    names = ["muon", inside, outside, "betas=adamw(betas=[0.9,0.95])", "adamw"]
    swept(
        ["--optimizers", ",".join(names), "--trials", "2"],
        corpus,
        monkeypatch,
        lambda c: 2.0 + (c.optimizer == "betas"),
    )
    found = [(each["optimizer"], each["contains"], each["at"], each["check"]) for each in lines("inclusions.csv")]
    assert found == [("muon", "in", "momentum = 0.9", "holds"), ("adamw", "betas", "betas = [0.9, 0.95]", "holds")]


def test_a_sweep_ends_where_a_run_fails(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(pool: workers.Pool, configs: list[RunConfig]) -> list[Row]:
        pool.failures.append(configs[0].label)
        return []

    monkeypatch.setattr(workers.Pool, "run", run)
    assert main(["sweep", "--optimizers", "sgd", "--data", corpus.name, "--out", "out"]) == 1
    assert not Path("out/sweep.md").exists()


def test_a_tuned_schedule_names_what_a_schedule_has(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "tuned.json").write_text(json.dumps({"quick": {"sgd": {"lr": 0.1, "schedule": {"warm": 3}}}}))
    monkeypatch.setattr(presets, "TUNED", tmp_path / "tuned.json")
    with pytest.raises(SystemExit):
        main(["compare", "--optimizers", "sgd", "--data", corpus.name, "--out", "out"])
    assert "tuned.json: a schedule has warmup and decay, not warm" in capsys.readouterr().err
