"""One benchmark run: the protocol, bit-exact resuming, divergence, and the files of results."""

import dataclasses
import json
import math
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import normopt
from benchmarks import harness
from benchmarks.harness import state_bytes
from benchmarks.language import presets
from benchmarks.language import train as training
from benchmarks.language.data import Corpus
from benchmarks.language.presets import PRESETS, TUNED, Preset, RunConfig, tuned_options
from benchmarks.language.train import Run, make_optimizer, train
from benchmarks.output import records
from benchmarks.output.records import RESULTS, append_row, read_rows, replacing
from normopt.nn import GPT
from tests.support.bench_runs import TINY, config, finish, tiny_corpus


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Corpus]:
    yield from tiny_corpus(tmp_path, monkeypatch)


# The protocol


def test_schedule() -> None:
    preset = Preset("p", 8, 1, 1, steps=100, warmup=20)
    rates = [preset.rate(step) for step in range(100)]
    assert rates[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])
    assert rates[20:61] == pytest.approx([1.0] * 41)
    assert rates[60:] == pytest.approx([(100 - step) / 40 for step in range(60, 100)])
    assert preset.rate(100) == 0


def test_presets_of_the_protocol() -> None:
    quick, standard, gpt2 = PRESETS["quick"], PRESETS["standard"], PRESETS["gpt2"]
    sizes = [(p.d_model, p.n_layers, p.n_heads, p.context) for p in (quick, standard, gpt2)]
    assert sizes == [(96, 4, 3, 128), (128, 5, 4, 128), (768, 12, 12, 1024)]
    assert (quick.steps, standard.steps, quick.batch) == (600, 1000, 16)
    with torch.device("meta"):
        count = sum(p.numel() for p in GPT(50304, gpt2.d_model, gpt2.n_layers, gpt2.n_heads).parameters())
    assert 120e6 < count < 200e6


def test_tuned_options_and_their_fallbacks() -> None:
    tuned = json.loads(TUNED.read_text())
    assert {"adamw", "muon", "scion", "signum"} <= set(tuned["quick"])
    assert tuned_options("quick", "muon") == (tuned["quick"]["muon"], True)
    assert tuned_options("smoke", "muon") == (tuned["quick"]["muon"], False)
    assert tuned_options("quick", "nobody") == ({"lr": 1e-3}, False)


def test_the_key_follows_everything_but_the_path_of_the_corpus(corpus: Corpus) -> None:
    base = config(corpus)
    changes: list[dict[str, Any]] = [
        {"optimizer": "sgd"},
        {"lr": 2e-2},
        {"options": {"weight_decay": 0.1}},
        {"model": "other"},
        {"preset": dataclasses.replace(TINY, steps=13)},
        {"seed": 1},
        {"corpus": "0"},
        {"device": "cuda"},
        {"split": "test"},
    ]
    keys = {base.key, *(dataclasses.replace(base, **change).key for change in changes)}
    assert len(keys) == 1 + len(changes)
    assert dataclasses.replace(base, source="elsewhere").key == base.key


def test_committed_rows_keep_their_keys() -> None:
    """Else every result on file would be run again."""
    paths = sorted((Path(presets.__file__).parents[1] / "results").rglob(RESULTS))
    rows = [row for path in paths for row in map(json.loads, path.read_text().splitlines())]
    assert len(rows) > 100
    for row in rows:
        made = RunConfig(**{**row["config"], "preset": Preset(**row["config"]["preset"])})
        assert made.key == row["key"]


SCHEDULES = st.tuples(st.integers(1, 9), st.integers(0, 6), st.sampled_from([0.0, 0.4, 0.4001, 0.5, 1.0]))


@given(SCHEDULES, SCHEDULES)
def test_different_schedules_have_different_names_and_keys(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    made = [Preset("p", 8, 1, 1, steps, warmup=warmup, decay=decay) for steps, warmup, decay in (one, other)]
    rates = [[preset.rate(step) for step in range(preset.steps)] for preset in made]
    keys = {RunConfig("adamw", 0.1, {}, "gpt", preset, 0, "", "", "cpu").key for preset in made}
    if rates[0] != rates[1]:
        assert len(keys) == len({preset.schedule for preset in made}) == 2


def test_same_start_and_same_batches_for_all_optimizers_of_a_seed(corpus: Corpus) -> None:
    first, second = finish(config(corpus)), finish(config(corpus, "muon"))
    other = finish(dataclasses.replace(config(corpus), seed=1))
    assert (first["init_hash"], first["order_hash"]) == (second["init_hash"], second["order_hash"])
    assert first["init_hash"] != other["init_hash"] and first["order_hash"] != other["order_hash"]
    assert first["final_loss"] != second["final_loss"]
    assert first["curve"][0][2] == second["curve"][0][2], "both start from the same loss"


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_is_for_hidden_matrices(name: str) -> None:
    model = GPT(256, 16, 1, 2)
    made = make_optimizer(RunConfig(name, 1e-3, {"weight_decay": 0.1}, "gpt", TINY, 0, "", "", "cpu"), model)
    names = {parameter: key for key, parameter in model.named_parameters()}
    decay = {names[p]: group["weight_decay"] for group in made.param_groups for p in group["params"]}
    assert decay.keys() == set(names.values())
    hidden = {
        key
        for key in decay
        if key.endswith((".qkv.weight", ".out.weight", ".gate.weight", ".up.weight", ".down.weight"))
    }
    assert {decay[key] for key in hidden} == {0.1}
    assert {decay[key] for key in decay.keys() - hidden} == {0.0}


def test_options_reach_the_optimizer() -> None:
    options = {"betas": [0.5, 0.6], "weight_decay": 0.1, "geometry": {"vector": {"lr": 7.0}, "linear": {"lr": 3.0}}}
    made = make_optimizer(RunConfig("adamw", 1e-3, options, "gpt", TINY, 0, "", "", "cpu"), GPT(256, 16, 1, 2))
    assert {group["betas"] for group in made.param_groups} == {(0.5, 0.6)}
    rates = {group["role"]: (group["lr"], group["weight_decay"]) for group in made.param_groups}
    assert rates["vector"] == (7.0, 0.0) and rates["linear"] == (3.0, 0.1) and rates["embedding"] == (1e-3, 0.0)


def test_a_run_is_the_training_loop_it_claims_to_be(corpus: Corpus) -> None:
    row = finish(config(corpus, lr=3e-3))
    torch.manual_seed(0)
    model = GPT(256, 16, 1, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    order = corpus.order(0, 12, 6, 8)
    for step in range(12):
        optimizer.param_groups[0]["lr"] = 3e-3 * TINY.rate(step)
        tokens = corpus.batch(order[step], 8)
        optimizer.zero_grad()
        F.cross_entropy(model(tokens[:, :-1]).mT, tokens[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    windows = corpus.windows("validation", 128, 8)
    with torch.no_grad():
        final = F.cross_entropy(model(windows[:, :-1]).mT, windows[:, 1:]).item()
    assert row["final_loss"] == pytest.approx(final, rel=1e-4)
    assert row["bits_per_byte"] == pytest.approx(final / math.log(2), rel=1e-4)


def test_micro_batches_accumulate_the_same_gradient(corpus: Corpus) -> None:
    gradients = []
    for micro_batch in (6, 4, 1):
        run = Run(config(corpus, preset=dataclasses.replace(TINY, micro_batch=micro_batch)), corpus)
        loss = run._backward(corpus.batch(run.order[0], TINY.context))
        gradients.append([torch.tensor(loss), *(parameter.grad for parameter in run.model.parameters())])
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])


def test_results_of_a_run(corpus: Corpus) -> None:
    row = finish(config(corpus))
    assert row["schedule"] == "warm-up 2 steps, constant, linear to 0 over the last 0.4 of 12 steps"
    assert json.loads(json.dumps(row, allow_nan=False))["status"] == "finished"
    assert [point[0] for point in row["curve"]] == list(range(13))
    assert [point[1] for point in row["curve"]] == sorted(point[1] for point in row["curve"])
    assert row["final_loss"] < row["curve"][0][2] - 0.5
    assert row["gradient_ms"] > 0 and row["optimizer_ms"] > 0
    assert row["train_seconds"] == pytest.approx(12e-3 * (row["gradient_ms"] + row["optimizer_ms"]))
    assert row["tokens_per_second"] == pytest.approx(12 * 48 / row["train_seconds"])
    assert row["cpu_seconds"] > row["train_seconds"]
    assert row["config"]["corpus"] == corpus.digest and row["config"]["split"] == "validation"
    assert (row["torch"], row["normopt"]) == (torch.__version__, normopt.__version__)
    assert row["cpu"] and re.fullmatch(r"[0-9a-f]{40}(-dirty)?|normopt .*", row["commit"])


def test_rows_name_the_version_where_there_is_no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "git_commit", lambda: None)
    assert harness.origin()["commit"] == f"normopt {normopt.__version__}"


def test_a_commit_is_dirty_by_its_code_and_not_by_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=A", "-c", "user.email=a@example.org", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(records, "ROOT", tmp_path)
    rows, code = tmp_path / "benchmarks" / "results" / "rows.jsonl", tmp_path / "code.py"
    rows.parent.mkdir(parents=True)
    git("init")
    for file in (rows, code):
        file.write_text("1")
    git("add", ".")
    git("commit", "-m", "both")
    commit = git("rev-parse", "HEAD")
    rows.write_text("2")
    assert records.git_commit() == commit
    code.write_text("2")
    assert records.git_commit() == f"{commit}-dirty"


def test_state_bytes() -> None:
    model = torch.nn.Linear(10, 10, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    assert state_bytes(optimizer) == 0
    model(torch.ones(10)).sum().backward()
    optimizer.step()
    assert state_bytes(optimizer) == 400


# Stopping, resuming, diverging


@pytest.mark.parametrize("name", ["adamw", "muon", "scion", "signum"])
def test_resuming_is_exact(name: str, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_STEPS", 5)
    options, _ = tuned_options("quick", name)
    settings = config(corpus, name, **{key: value for key, value in options.items() if key != "lr"})
    checkpoint = tmp_path / "run.pt"
    whole, seen = finish(settings), []

    def interrupt(step: int, loss: float, speed: float) -> None:
        seen.append(step)
        if len(seen) == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(settings, checkpoint, interrupt)
    resumed = train(settings, checkpoint, interrupt)
    assert seen == [*range(1, 8), *range(6, 13)], "continues after the checkpoint of step 5"
    assert resumed["final_loss"] == whole["final_loss"]
    assert [(point[0], point[2]) for point in resumed["curve"]] == [(point[0], point[2]) for point in whole["curve"]]
    assert train(settings, checkpoint, interrupt)["final_loss"] == whole["final_loss"], "the last checkpoint is the end"


def test_a_checkpoint_of_something_else_is_named(corpus: Corpus, tmp_path: Path) -> None:
    train(config(corpus), tmp_path / "run.pt", lambda step, loss, speed: None)
    with pytest.raises(RuntimeError, match=r"cannot continue from .*run\.pt: delete it to start over"):
        train(config(corpus, "muon"), tmp_path / "run.pt", lambda step, loss, speed: None)


def test_a_changed_corpus_is_noticed(corpus: Corpus) -> None:
    Path(corpus.name).write_text("another text " * 100)
    with pytest.raises(ValueError, match="has changed"):
        finish(config(corpus))


def test_divergence_is_a_result(corpus: Corpus, tmp_path: Path) -> None:
    row = finish(config(corpus, "sgd", lr=1e30))
    assert row["status"] == "diverged" and row["final_loss"] is None and row["bits_per_byte"] is None
    assert row["steps_done"] < TINY.steps
    append_row(tmp_path / "rows.jsonl", row)
    assert read_rows(tmp_path / "rows.jsonl")[row["key"]] == json.loads(json.dumps(row))


def test_a_matrix_without_a_decomposition_is_a_divergence(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(config(corpus), corpus)

    def fail(*_: Any) -> None:
        torch.linalg.cholesky(-torch.eye(2))

    monkeypatch.setattr(run.optimizer, "step", fail)
    run.train_step()
    assert run.progress.diverged and training.result_row(run, math.nan)["status"] == "diverged"


def test_a_gradient_that_is_not_finite_changes_nothing(corpus: Corpus) -> None:
    run = Run(config(corpus), corpus)
    before = training.tensor_hash(run.model.state_dict())
    run.model.get_parameter("head.weight").register_hook(lambda gradient: gradient * math.inf)
    assert math.isfinite(run.train_step()) and run.progress.diverged
    assert training.tensor_hash(run.model.state_dict()) == before


def test_weights_that_break_in_the_last_step_count_as_diverged(corpus: Corpus) -> None:
    row = finish(config(corpus, "sgd", lr=1e38, preset=dataclasses.replace(TINY, steps=1, warmup=0)))
    assert (row["status"], row["steps_done"]) == ("diverged", 1)


# Records


def test_a_torn_line_costs_that_line_only(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    append_row(path, {"key": "a", "x": 1})
    with path.open("a") as file:
        file.write('{"key": "b", "x"')
    append_row(path, {"key": "c", "x": 3})
    append_row(path, {"key": "a", "x": 4})
    assert read_rows(path) == {"a": {"key": "a", "x": 4}, "c": {"key": "c", "x": 3}}
    assert read_rows(tmp_path / "none") == {}


def test_replacing_keeps_the_old_file_on_errors(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with replacing(path) as partial:
        partial.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
