"""The command line of the benchmark, and whole commands in processes of their own."""

import argparse
import functools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from benchmarks.__main__ import MODEL_NAMES, main, make_parser
from benchmarks.language import train as training
from benchmarks.language import workers
from benchmarks.language.data import SPLITS, Corpus, load
from benchmarks.language.presets import PRESETS, TUNED, RunConfig
from benchmarks.language.report import BEGIN, END
from benchmarks.output.records import RESULTS, Row, alone, append_row, read_rows
from tests.support.bench_runs import config, finish, row, tiny_corpus

ROOT = Path(__file__).parents[2]


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Corpus]:
    yield from tiny_corpus(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizers", "adamw,moun"], "unknown optimizer 'moun': did you mean 'muon'?"),
        (["--optimizers", "zzzzzz"], "unknown optimizer 'zzzzzz': choose from"),
        (["--data", "nowhere.txt"], "nowhere.txt: no such file"),
        (["--data", "short.txt"], "too short"),
        (["--lr", "sgd=0.1"], "--lr names sgd, which is none of adamw, muon, scion, signum"),
        (["--lr", "adamw=fast"], "--lr"),
        (["--lr", "adamw=-1"], "not a positive number"),
        (["--steps", "0"], "argument --steps: '0' is not a whole number from 1 up"),
        (["--seeds", "-1"], "argument --seeds: '-1' is not a whole number from 1 up"),
        (["--device", "tpu9"], "--device tpu9 cannot be used"),
        (["--out", "short.txt"], "--out short.txt cannot be used: cannot write short.txt/.probe-"),
        (["--out", "short.txt/below"], "cannot write short.txt/below/.probe-"),
        (["--preset", "huge"], "invalid choice"),
        (["--optimizers", ","], "the list is empty"),
    ],
)
def test_bad_arguments_end_before_any_training(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    corpus: Corpus,
) -> None:
    Path("short.txt").write_text("short")
    monkeypatch.setattr(workers.Pool, "run", lambda *_: pytest.fail("training began"))
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--data", corpus.name, *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def lasting(made: Row, steps: int) -> Row:
    """The row of a run of another length."""
    preset = {**made["config"]["preset"], "steps": steps}
    return {**made, "key": f"{made['key']} {steps}", "config": {**made["config"], "preset": preset}}


def test_rows_of_a_text_as_it_was_divided_before_are_reported(
    corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    made = row("adamw", 0, 2.0, train_seconds=1.0)
    made["config"]["source"] = corpus.name
    for each in (made, lasting(made, 6)):
        append_row(Path("one", RESULTS), each)
    assert main(["report", "--runs", "one", "--data", corpus.name, "--out", "out"]) == 0
    assert "as it was divided before (0): no loss of a counting model" in capsys.readouterr().out
    assert "5-gram" not in Path("out/targets.csv").read_text()


def test_report_of_runs_on_file(corpus: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows of two folders, best first; the headline takes the place of what was between the marks, and nothing else."""
    for folder, name, loss in (("one", "adamw", 2.0), ("one", "sgd", 3.0), ("two", "muon", 1.5)):
        made = row(name, 0, loss, train_seconds=1.0)
        made["config"] |= {"corpus": corpus.digest, "source": corpus.name}
        append_row(Path(folder, RESULTS), made)
        append_row(Path(folder, RESULTS), lasting(made, 6) | {"final_loss": loss + 1})
    readme = Path("README.md")
    readme.write_text(f"# Title\n{BEGIN}\nold\n{END}\nthe rest\n")
    command = ["report", "--runs", "one,two", "--data", corpus.name, "--out", "out", "--readme", "README.md"]
    for _ in range(2):
        assert main(command) == 0
        text = readme.read_text()
        assert text.startswith(f"# Title\n{BEGIN}\n\n|") and text.endswith(f"{END}\nthe rest\n") and "old" not in text
        assert text.count("(out/horizons.png)") == 1 and Path("out/horizons.png").exists()
        assert [line.split("|")[1].strip() for line in text.splitlines() if "|" in line][2:] == ["muon", "adamw", "sgd"]
        assert "steps to adamw's" in text and "tok/s" not in text
    assert "tok/s" in Path("out/compare.md").read_text()
    append_row(Path("three", RESULTS), next(iter(read_rows(Path("two", RESULTS)).values())))
    assert main(["report", "--runs", "three", *command[3:]]) == 0
    assert "(out/loss_steps.png)" in readme.read_text() and "horizons.png" not in readme.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runs", "nowhere"], f"no runs in nowhere: give folders that hold a {RESULTS}"),
        (["--runs", "one", "--readme", "README.md"], "README.md has no headline: it has to lie between <!--"),
        (["--runs", "one", "--readme", "none.md"], "none.md"),
        (["--runs", "long,one"], "is not the text of the runs, which is text: give that"),
        (["--runs", "one,two"], "rows of different corpora cannot be compared"),
    ],
)
def test_reports_that_cannot_be_made(
    arguments: list[str], message: str, corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("README.md").write_text("no marks")
    append_row(Path("one", RESULTS), row("adamw", 0, 2.0))
    made = row("muon", 0, 2.0)
    made["config"]["corpus"] = "1"
    append_row(Path("two", RESULTS), made)
    append_row(Path("long", RESULTS), lasting(row("muon", 0, 2.0), 24))
    with pytest.raises(SystemExit) as stop:
        main(["report", "--data", corpus.name, "--out", "out", *arguments])
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not Path("out").exists() and Path("README.md").read_text() == "no marks"


def planned(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """The runs that a command would do."""
    seen: list[RunConfig] = []
    monkeypatch.setattr(workers.Pool, "run", lambda _, configs: seen.extend(configs) or [])
    assert main(arguments) == 0
    return seen


def test_constrained_models_have_no_warm_up_and_no_decay(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["compare", "--data", corpus.name, "--optimizers", "adamw,scion"]
    runs = planned([*command, "--model", "gpt,angpt,ngpt", "--lr", "adamw@angpt=0.5"], monkeypatch)
    expected = [("gpt", 20, 0.1), ("angpt", 0, 0.0), ("ngpt", 0, 0.0)]
    assert [(run.model, run.preset.warmup, run.options["weight_decay"]) for run in runs[::2]] == expected
    assert not any("weight_decay" in run.options for run in runs[1::2])
    tuned = json.loads(TUNED.read_text())["quick"]
    assert [run.lr for run in runs[::2]] == [tuned["adamw"]["lr"], 0.5, tuned["adamw@ngpt"]["lr"]]
    assert [run.label.split(" lr")[0] for run in runs[::2]] == ["adamw", "adamw@angpt", "adamw@ngpt"]
    with pytest.raises(SystemExit):
        planned([*command, "--lr", "adamw@angpt=0.5"], monkeypatch)


def test_sizes_and_arguments_of_the_model(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["compare", "--data", corpus.name, "--optimizers", "adamw", "--model", "angpt"]
    changes = ["--width", "64", "--batch", "4", "--model-options", "gate_scale=1.0,lerp=False"]
    (plain,), (run,) = planned(command, monkeypatch), planned([*command, *changes], monkeypatch)
    assert (run.preset.d_model, run.preset.n_heads, run.preset.batch) == (64, 2, 4)
    assert run.model_options == {"gate_scale": 1.0, "lerp": False} and run.key != plain.key
    assert run.label.startswith("adamw@angpt gate_scale=1.0 lerp=False lr")
    model = training.Run(run, corpus).model
    assert model.embed.weight.shape[1] == 64 and model.blocks[0].mlp_residual.alpha is None
    with pytest.raises(SystemExit):
        planned([*command, "--width", "50"], monkeypatch)
    (scheduled,) = planned([*command, "--warmup", "3", "--decay", "1"], monkeypatch)
    assert (scheduled.preset.warmup, scheduled.preset.decay, plain.preset.warmup) == (3, 1.0, 0)
    with pytest.raises(SystemExit):
        planned([*command, "--decay", "1.5"], monkeypatch)
    with pytest.raises(SystemExit):
        planned([*command, "--model-options", "gate_scale"], monkeypatch)


def test_comparison_runs_every_optimizer_at_its_tuned_rate(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = ["--steps", "7", "--evaluations", "3"]
    runs = planned(["compare", "--data", corpus.name, "--seeds", "2", *lengths, "--lr", "muon=0.5"], monkeypatch)
    tuned = json.loads(TUNED.read_text())["quick"]
    expected = {
        "adamw": tuned["adamw"]["lr"],
        "muon": 0.5,
        "scion": tuned["scion"]["lr"],
        "signum": tuned["signum"]["lr"],
    }
    assert [(run.optimizer, run.lr, run.seed) for run in runs] == [
        (name, lr, seed) for seed in (0, 1) for name, lr in expected.items()
    ]
    assert {run.preset for run in runs} == {replace(PRESETS["quick"], steps=7, evaluations=3)}
    assert "lr" not in runs[0].options and runs[0].options["weight_decay"] == tuned["adamw"]["weight_decay"]
    assert runs[0].device == ("cuda" if torch.cuda.is_available() else "cpu")


def test_rows_of_another_corpus_are_not_taken(corpus: Corpus, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("pack my box with five dozen liquor jugs. " * 60)
    command = ["compare", "--optimizers", "adamw,muon", "--data"]
    with monkeypatch.context() as patch:
        known, other = (planned([*command, name], patch) for name in (corpus.name, "other.txt"))
    for run in known:
        append_row(tmp_path / "out" / RESULTS, row(run.optimizer, 0, 2.0, key=run.key))
    started: list[RunConfig] = []
    monkeypatch.setattr(workers.Pool, "_start", lambda _, run: started.append(run))
    monkeypatch.setattr(workers, "wait", lambda pipes: [])
    assert len(pool(tmp_path).run(known)) == 2 and started == []
    assert pool(tmp_path).run(other) == [] and started == other


def test_comparisons_are_made_on_the_test_text_and_choices_on_the_validation_text(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands, arguments = ("compare", "grid", "norms"), ["--data", corpus.name, "--optimizers", "adamw"]
    splits = {name: {run.split for run in planned([name, *arguments], monkeypatch)} for name in commands}
    assert splits == {name: {"test" if name == "compare" else "validation"} for name in commands}
    assert {run.split for run in planned(["compare", *arguments, "--split", "validation"], monkeypatch)} == {
        "validation"
    }


def test_losses_are_those_of_the_text_that_is_asked_for(corpus: Corpus) -> None:
    Path("halves.txt").write_text("abcdefgh" * 400 + "." * 400 + "?" * 400)
    halves = load("halves.txt")
    runs = [training.Run(replace(config(halves), split=split), halves) for split in SPLITS]
    for run, split in zip(runs, SPLITS, strict=True):
        windows = halves.windows(split, 128, 8)
        logits = run.model(windows[:, :-1]).flatten(0, 1)
        assert run.evaluate(128) == pytest.approx(cross_entropy(logits, windows[:, 1:].flatten()).item(), rel=1e-5)
    assert runs[0].evaluate(128) != runs[1].evaluate(128)


def test_horizons_are_runs_of_other_lengths(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["compare", "--data", corpus.name, "--optimizers", "adamw,muon", "--steps", "40", "--horizons", "10,20"]
    runs = planned(command, monkeypatch)
    assert [(run.preset.steps, run.optimizer) for run in runs] == [
        (steps, name) for steps in (40, 20, 10) for name in ("adamw", "muon")
    ]
    assert [run.preset.warmup for run in runs[::2]] == [20, 10, 5], "the same schedule at every length"


def test_the_grid_has_factors_of_two_and_fresh_seeds(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = planned(["grid", "--data", corpus.name, "--optimizers", "adamw", "--seeds", "1"], monkeypatch)
    centre = json.loads(TUNED.read_text())["quick"]["adamw"]["lr"]
    assert [run.lr for run in runs] == pytest.approx([centre / 4, centre / 2, centre, 2 * centre])
    assert {run.seed for run in runs} == {1000}
    given = planned(["grid", "--data", corpus.name, "--optimizers", "adamw,sgd", "--rates", "1e-3,1"], monkeypatch)
    assert [(run.optimizer, run.lr, run.seed) for run in given[:4]] == [
        ("adamw", 1e-3, 1000),
        ("adamw", 1e-3, 1001),
        ("adamw", 1.0, 1000),
        ("adamw", 1.0, 1001),
    ]


def test_model_names_are_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(MODEL_NAMES) == set(training.MODELS)
    with pytest.raises(SystemExit):
        main(["compare", "--model", "gpt,bert"])
    assert "bert is none of gpt, angpt, ngpt" in capsys.readouterr().err
    actions = next(a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    for name in ("compare", "grid", "sweep", "norms"):
        command = actions.choices[name]
        choices = {action.dest: action.choices for action in command._actions}
        assert set(choices["preset"]) == set(PRESETS) - {"smoke"}


# Whole commands, in processes of their own


def pool(tmp_path: Path) -> workers.Pool:
    return workers.Pool(tmp_path / "out", 2)


@pytest.mark.slow
def test_pool_keeps_finished_runs_and_reports_failures(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [config(corpus), config(corpus, "muon")]
    bad = config(corpus, "adamw", nonsense=1)
    first = pool(tmp_path)
    rows = first.run([good[0], bad, good[0], good[1]])
    assert [row["config"]["optimizer"] for row in rows] == ["adamw", "muon"]
    assert first.failures == [bad.label] and "nonsense" in capsys.readouterr().err
    assert rows[0]["final_loss"] == finish(good[0])["final_loss"], "workers compute what this process computes"
    assert list((tmp_path / "out" / "checkpoints").iterdir()) == []
    again = pool(tmp_path)
    assert again.run(good) == rows
    assert "2 of 2 runs are already in" in capsys.readouterr().out


def test_two_commands_do_not_work_in_one_folder(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    append_row(pool(tmp_path).results, row("adamw", 0, 2.0, key=config(corpus).key))
    with alone(tmp_path / "out"), pytest.raises(SystemExit):
        main(["compare", "--smoke", "--data", corpus.name, "--out", str(tmp_path / "out")])
    assert "another command is at work in" in capsys.readouterr().err
    assert len(pool(tmp_path).run([config(corpus)])) == 1, "free again"


def test_checkpoints_of_finished_runs_are_deleted(corpus: Corpus, tmp_path: Path) -> None:
    """A kill may come between the row and the end of its checkpoint, or leave half of one."""
    made = row("adamw", 0, 2.0, key=config(corpus).key)
    append_row(pool(tmp_path).results, made)
    folder = tmp_path / "out" / "checkpoints"
    folder.mkdir()
    for name in (f"{made['key']}.pt", f".{made['key']}.pt.partial", "of another run.pt"):
        (folder / name).touch()
    assert pool(tmp_path).run([config(corpus)]) == [json.loads(json.dumps(made))]
    assert [path.name for path in folder.iterdir()] == ["of another run.pt"]


def test_a_worker_without_a_parent_ends(corpus: Corpus, tmp_path: Path) -> None:
    ours, theirs = multiprocessing.Pipe(duplex=False)
    ours.close()
    workers._work(config(corpus), tmp_path / "run.pt", theirs)
    assert not (tmp_path / "run.pt").exists(), "it ends at its first report"


@pytest.mark.slow
def test_pool_survives_the_death_of_a_worker(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_work", os._exit)
    doomed = pool(tmp_path)
    assert doomed.run([config(corpus)]) == []
    assert doomed.failures == ["adamw lr 0.01 seed 0"]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks", *arguments]


@pytest.mark.slow
def test_ctrl_c_and_the_same_command_again(corpus: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = command("compare", "--smoke", "--data", corpus.name, "--steps", "160", "--out", str(out))
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    process = subprocess.Popen(
        arguments, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=heard
    )
    deadline = time.monotonic() + 120
    while not list(out.glob("checkpoints/*.pt")) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command continues" in errors and "Traceback" not in errors
    interrupted = {path.stem: path.stat().st_mtime for path in out.glob("checkpoints/*.pt")}
    assert interrupted
    subprocess.run(arguments, cwd=ROOT, check=True, timeout=300, capture_output=True)
    rows = read_rows(out / "results.jsonl")
    assert len(rows) == 4 and interrupted.keys() <= rows.keys()
    assert {row["steps_done"] for row in rows.values()} == {160}
    assert list(out.glob("checkpoints/*")) == []


@pytest.mark.slow
def test_smoke(tmp_path: Path) -> None:
    start = time.monotonic()
    result = subprocess.run(
        command("compare", "--smoke", "--out", str(tmp_path)), cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert {"compare.md", "results.jsonl", "loss_steps.png", "loss_seconds.png"} <= {p.name for p in tmp_path.iterdir()}
    assert all(name in result.stdout for name in ("adamw", "muon", "scion", "signum", "bits/byte"))
    assert time.monotonic() - start < 240, "a minute on two idle cores"
