"""What `--optimizers`, `--plugin` and `--tuned` take: patterns, other libraries, own combinations, files."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import normopt
from benchmarks import peers
from benchmarks.__main__ import main, make_parser
from benchmarks.contenders import Contender, read_contenders
from benchmarks.harness import PlanError, state_bytes
from benchmarks.language import train as training
from benchmarks.language import workers
from benchmarks.language.data import Corpus
from benchmarks.language.presets import TUNED, RunConfig, read_tuned, variants
from benchmarks.language.train import Run, make_optimizer, train
from benchmarks.output.records import RESULTS, Row, append_row, read_rows, unreadable
from normopt.nn import GPT
from tests.support.bench_runs import TINY, config, finish, row, tiny_corpus

ROOT = Path(__file__).parents[2]
QUICK = json.loads(TUNED.read_text())["quick"]
TORCHS = [f"torch:{name}" for name in peers.classes("torch")]
MINE = "mine=muon(momentum=0.9,nesterov=False)"
NEW = 'new=SteepestDescent(norm="Chain(Row(), Spectral())",momentum=0.95)'
PLUGIN = """
from __future__ import annotations
from dataclasses import dataclass
import normopt
from normopt.norms import Max

@dataclass(frozen=True)
class PluggedIn(Max):
    pass

class FromPlugin(normopt.SteepestDescent):
    def __init__(self, params: object, lr: float = 0.01, **options: object) -> None:
        super().__init__(params, lr, "plugged-in", **options)
"""


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Corpus]:
    yield from tiny_corpus(tmp_path, monkeypatch)


@pytest.fixture
def plugin(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "my_norm.py"
    path.write_text(PLUGIN)
    yield path
    normopt.SteepestDescent.registry.pop("fromplugin", None)
    normopt.ingredient.Ingredient._classes.pop("PluggedIn", None)
    sys.modules.pop(str(path.resolve()), None)


def planned(
    arguments: list[str], corpus: Corpus, monkeypatch: pytest.MonkeyPatch, given: str = "compare"
) -> list[RunConfig]:
    """The runs that a command would do."""
    seen: list[RunConfig] = []
    monkeypatch.setattr(workers.Pool, "run", lambda _, configs: seen.extend(configs) or [])
    assert main([given, "--data", corpus.name, *arguments]) == 0
    return seen


def refused(arguments: list[str], corpus: Corpus, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> str:
    """The error of a command that ends before any training."""
    monkeypatch.setattr(workers.Pool, "run", lambda *_: pytest.fail("training began"))
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--data", corpus.name, *arguments])
    assert stop.value.code == 2
    return str(capsys.readouterr().err.splitlines()[-1])


def names(text: list[str]) -> list[str]:
    return [contender.name for contender in read_contenders(text, variants())]


# Which optimizers a text names


def test_recipes_without_each_of_their_parts() -> None:
    recipe = QUICK["muonplus-soap"]
    assert names(["muonplus-soap-without-*"]) == sorted(f"muonplus-soap-without-{part}" for part in recipe["parts"])
    assert names(["muonplus-soap-without-decay"]) == ["muonplus-soap-without-decay"]
    entries = read_tuned()["quick"]
    whole, bare = entries["muonplus-soap"], entries["muonplus-soap-without-decay"]
    assert "parts" not in whole and bare == {key: x for key, x in whole.items() if key != "weight_decay"}
    bare = entries["muonplus-soap-without-embedding"]
    assert whole["geometry"].keys() - bare["geometry"].keys() == {"embedding"} and whole["lr"] == bare["lr"]
    bare = entries["muonplus-soap-without-heads"]
    assert whole["overrides"].keys() - bare["overrides"].keys() == {"*.qkv.weight"}


def test_all_patterns_and_names() -> None:
    assert names(["all"]) == normopt.list_optimizers()
    assert names(["muon*"]) == sorted([*normopt.list_optimizers("muon*"), "muonplus-soap"])
    assert names(["torch:*"]) == sorted(TORCHS) and "torch:SparseAdam" not in TORCHS
    assert names(["torch:Ada*"]) == [name for name in sorted(TORCHS) if name.startswith("torch:Ada")]
    assert names(["AdamW", "adamw", "muon"]) == ["adamw", "muon"], "in any case, once"


def test_own_combinations_are_read_and_never_evaluated() -> None:
    (mine,) = read_contenders([MINE], [])
    assert mine == Contender("mine", "muon", {"momentum": 0.9, "nesterov": False})
    (new,) = read_contenders([NEW], [])
    assert new == Contender("new", "steepestdescent", {"norm": "Chain(Row(), Spectral())", "momentum": 0.95})
    (bare,) = read_contenders(["x=SteepestDescent(norm=Chain(Row(), Spectral()))"], [])
    assert bare.options == {"norm": "Chain(Row(), Spectral())"}, "ingredients need no quotes"
    (unnamed,) = read_contenders(["muon(momentum=0.9)"], [])
    assert unnamed.name == "muon(momentum=0.9)" and unnamed.base == "muon"
    assert read_contenders(["fast=torch:AdamW(betas=(0.9,0.99))"], [])[0].options == {"betas": (0.9, 0.99)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x=moun(lr=1)", "unknown optimizer 'moun': did you mean 'muon'?"),
        ("x=muon(lr=", "cannot be read, .*: give it as NAME="),
        ("x=muon(0.1)", "all options need their names"),
        ("x=muon(**{})", "all options need their names"),
        ("x=muon(lr=1).step(a=2)", "cannot be read"),
        ("x=muon(lr=__import__)", "lr is __import__, and not a number"),
        ("x=muon(lr=[].append)", "and not a number"),
        ("x=muon(lr={1})", "and not a number"),
        ("a b=muon()", "the name 'a b'"),
        ("adamw=muon()", "an optimizer named adamw already"),
        ("zz*", "matches none: choose from adafactor"),
        ("torch:zz*", "matches none: choose from torch's are"),
        ("torch:Muno", "unknown optimizer 'torch:Muno': did you mean 'Muon'"),
        ("torch:SparseAdam", "sparse gradients only"),
        ("no_such_library:Adam", "no_such_library cannot be imported"),
        ("json:Adam", "json has no optimizers"),
    ],
)
def test_texts_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        read_contenders([text], ["adamw"])


def test_two_optimizers_of_one_name() -> None:
    with pytest.raises(PlanError, match="two different optimizers named x"):
        read_contenders(["x=muon()", "x=adamw()"], [])


# What is run


def test_examples_are_planned_with_tuned_options(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    given = f"torch:AdamW,torch:Muon,{MINE},{NEW}"
    adamw, muon, mine, new = planned(["--optimizers", given, "--lr", "new=0.5"], corpus, monkeypatch)
    assert (adamw.lr, adamw.options) == (QUICK["adamw"]["lr"], {"betas": [0.9, 0.95], "weight_decay": 0.1})
    assert (muon.lr, muon.options) == (QUICK["muon"]["lr"], {"weight_decay": 0.1, "rest": peers.REST})
    assert mine.label == f"mine lr {QUICK['muon']['lr']:g} seed 0"
    assert mine.options == {"optimizer": "muon", "weight_decay": 0.1, "momentum": 0.9, "nesterov": False}
    assert new.lr == 0.5 and new.options["norm"] == "Chain(Row(), Spectral())"
    (pair,) = planned(["--optimizers", 'p=torch:SGD(rest={"lr_ratio":0.1})'], corpus, monkeypatch)
    assert pair.options["rest"] == {**peers.REST, "lr_ratio": 0.1} and pair.options["momentum"] == 0.9
    for run in (adamw, muon, mine, new, pair):
        assert json.loads(json.dumps(run.options)) == json.loads(json.dumps(run.options, allow_nan=False))


def test_all_is_planned(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = planned(["--optimizers", "all"], corpus, monkeypatch)
    assert [run.optimizer for run in runs] == normopt.list_optimizers()
    assert [run.lr for run in runs] == [QUICK.get(name, {"lr": 1e-3})["lr"] for name in normopt.list_optimizers()]


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHS)
def test_every_optimizer_of_torch_trains_and_resumes(
    name: str, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run,) = planned(["--optimizers", name], corpus, monkeypatch)
    whole = resumed(config(corpus, name, run.lr, **run.options), tmp_path, monkeypatch)
    assert whole["state_bytes_per_parameter"] > 0 or name == "torch:SGD"


def test_statistics_of_inputs_are_kept_for_those_that_read_them(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = {"unembedding": {"norm": "InputWhitened(Smoothed(Max()))"}}
    resumed(config(corpus, "muon", 0.02, geometry=head), tmp_path, monkeypatch)
    bare = config(corpus, "steepestdescent", 0.02, geometry={"*": "max", **head})
    assert resumed(bare, tmp_path, monkeypatch)["state_bytes_per_parameter"] > 0


@pytest.mark.parametrize("name", ["muon", "torch:SGD"])
def test_averaged_iterates_are_evaluated(
    name: str, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = f"sf={name}(averaged={{'beta':0.5,'start':2,'interpolation':0.0}})"
    (run,) = planned(["--optimizers", given, "--lr", "sf=0.1"], corpus, monkeypatch)
    settings = replace(config(corpus, "sf", run.lr), options=run.options)
    plain = replace(settings, options={key: value for key, value in run.options.items() if key != "averaged"})
    assert resumed(settings, tmp_path, monkeypatch)["final_loss"] != finish(plain)["final_loss"]
    made = make_optimizer(settings, GPT(256, 16, 1, 2))
    assert isinstance(made, normopt.Averaged) and made.beta == 0.5


def resumed(settings: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Row:
    """The row of a run that is interrupted and goes on as if it had not been."""
    monkeypatch.setattr(training, "CHECKPOINT_STEPS", 5)
    whole, seen = finish(settings), []

    def interrupt(step: int, loss: float, speed: float) -> None:
        seen.append(step)
        if len(seen) == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path / "run.pt", interrupt)
    again = train(settings, tmp_path / "run.pt", interrupt)
    assert seen == [*range(1, 8), *range(6, 13)]
    assert whole["status"] == "finished" and again["final_loss"] == whole["final_loss"]
    (tmp_path / "run.pt").unlink()
    return whole


@pytest.mark.parametrize(
    "name",
    ["lion_pytorch:Lion", "pytorch_optimizer:Muon", "prodigyopt:Prodigy", "schedulefree:AdamWScheduleFree"],
)
def test_other_installed_libraries(name: str, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec(name.partition(":")[0]) is None:
        pytest.skip(f"{name} is not installed")
    (run,) = planned(["--optimizers", name], corpus, monkeypatch)
    assert finish(config(corpus, name, run.lr, **run.options))["status"] == "finished"


def test_torch_adamw_is_ours(corpus: Corpus) -> None:
    options = {"betas": [0.9, 0.95], "weight_decay": 0.1}
    ours, theirs = (finish(config(corpus, name, 1e-2, **options)) for name in ("adamw", "torch:AdamW"))
    assert ours["final_loss"] == pytest.approx(theirs["final_loss"], rel=1e-4), "decay is for hidden matrices in both"


def test_the_pair_has_all_parameters_one_schedule_and_decay_for_matrices(corpus: Corpus) -> None:
    run = Run(config(corpus, "torch:Muon", 0.1, weight_decay=0.2, rest=peers.REST), corpus)
    matrices, others = run.optimizer.param_groups
    assert {id(p) for p in matrices["params"]} == {id(p) for p in peers.hidden(run.model)}
    assert {id(p) for p in others["params"]} == {id(p) for p in peers.rest(run.model)}
    assert (matrices["weight_decay"], others["weight_decay"], others["betas"]) == (0.2, 0.0, (0.9, 0.95))
    for step in range(4):
        rate = TINY.rate(step)
        assert (matrices["lr"], others["lr"]) == pytest.approx((0.1 * rate, 0.05 * rate))
        run.train_step()
    state = run.optimizer.state
    assert {id(p) for p in state} == {id(p) for p in run.model.parameters()}
    assert {len(state[p]) for p in peers.hidden(run.model)} == {1}, "a momentum"
    assert {len(state[p]) for p in peers.rest(run.model)} == {3}, "two averages and the step"
    entries = [sum(p.numel() for p in part(run.model)) for part in (peers.hidden, peers.rest)]
    assert state_bytes(run.optimizer) == 4 * entries[0] + 8 * entries[1] + 4 * len(peers.rest(run.model))


def test_any_optimizer_can_be_paired(corpus: Corpus) -> None:
    found = make_optimizer(config(corpus, "torch:SGD", rest={"lr_ratio": 0.1}), GPT(256, 16, 1, 2))
    assert [type(each).__name__ for each in found.optimizers] == ["SGD", "AdamW"]
    assert [group["lr"] for group in found.param_groups] == pytest.approx([1e-2, 1e-3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--optimizers", "mine=muon(momentun=0.9)"],
            "mine cannot be made: Muon has no argument 'momentun'; did you mean",
        ),
        (["--optimizers", "mine=muon(momentum=9)"], "mine cannot be made: "),
        (["--optimizers", "x=SteepestDescent(norm=Spectrul())"], "did you mean 'Spectral'"),
        (["--optimizers", "x=torch:AdamW(beta=1)"], "x cannot be made"),
        (["--optimizers", "x=torch:Muon(rest={'momentum': 1})"], "x cannot be made"),
        (
            ["--optimizers", "torch:AdamW", "--model", "ngpt"],
            "--model ngpt has constraints, which torch:AdamW would not",
        ),
        (["--model-options", "foo=1"], "--model-options foo=1: gpt has no foo; Known: "),
        (["--model-options", "foo"], "argument --model-options: 'foo' is not like gate_scale=1.0"),
        (["--lr", "muon=abc"], "argument --lr: the rate of muon: 'abc' is not a positive number; give NAME=RATE"),
        (["--lr", "muon"], "argument --lr: 'muon' has no '='; give NAME=RATE"),
        (["--horizons", "5,x"], "argument --horizons: 'x' is not a whole number from 1 up; give a list like 150,300"),
        (["--tuned", "none.json"], "--tuned none.json cannot be read: No such file"),
        (["--tuned", "text.txt"], "--tuned text.txt is not JSON"),
        (["--tuned", "list.json"], "--tuned list.json is not like {"),
        (["--tuned", "rate.json"], "--tuned rate.json: muon has no positive number as its lr"),
        (["--tuned", "parts.json"], "--tuned parts.json: the parts of muon are not like {"),
        (["--plugin", "none.py"], "none.py cannot be read: No such file"),
        (["--plugin", "text.txt"], "text.txt is no Python file"),
        (["--plugin", "wrong.py"], "wrong.py cannot be imported: ZeroDivisionError: division by zero, line 2"),
    ],
)
def test_errors_name_the_argument_and_the_choices(
    arguments: list[str], message: str, corpus: Corpus, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    Path("list.json").write_text("[1]")
    Path("rate.json").write_text('{"muon": {"lr": "fast"}}')
    Path("parts.json").write_text('{"muon": {"lr": 0.1, "parts": {"decay": 0.1}}}')
    Path("wrong.py").write_text("\n1 / 0")
    assert message in refused(arguments, corpus, monkeypatch, capsys)


def test_every_argument_that_is_read_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    """By its name, and without the name of a function of ours."""
    (commands,) = (a for a in make_parser()._actions if a.dest == "command")
    checked = 0
    for name, command in commands.choices.items():
        for action in command._actions:
            if action.type not in (None, Path) and action.dest not in ("geometries", "optimizers", "runs"):
                with pytest.raises(SystemExit):
                    command.parse_args([action.option_strings[0], "?"])
                error = capsys.readouterr().err.splitlines()[-1]
                assert f"argument {action.option_strings[0]}: " in error and "invalid" not in error, (name, error)
                assert "?" in error
                checked += 1
    assert checked > 40


# Files that are given


def test_tuned_options_of_ones_own(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_preset, chosen = tmp_path / "my.json", tmp_path / "chosen.json"
    mine = {"optimizer": "muon", "lr": 0.3, "momentum": 0.8}
    by_preset.write_text(json.dumps({"quick": {"muon": {"lr": 0.5}, "mine": mine}}))
    chosen.write_text(json.dumps({"muon": {"lr": 0.5}, "mine": mine}))
    for path in (by_preset, chosen):
        given = ["--optimizers", "muon,mine,adamw", "--tuned", str(path)]
        muon, own, adamw = planned(given, corpus, monkeypatch)
        assert (muon.lr, muon.options) == (0.5, {}) and adamw.lr == QUICK["adamw"]["lr"]
        assert (own.lr, own.options) == (0.3, {"optimizer": "muon", "momentum": 0.8})
    assert "mine" not in read_tuned()["quick"]


def test_a_plugin_is_known_by_name_and_counts_in_the_key(
    corpus: Corpus, plugin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = "fromplugin,x=SteepestDescent(norm='plugged-in'),y=SteepestDescent(norm=PluggedIn())"
    runs = planned(["--optimizers", given, "--plugin", str(plugin)], corpus, monkeypatch)
    assert [run.optimizer for run in runs] == ["fromplugin", "x", "y"]
    (digest,) = {run.plugins[str(plugin)] for run in runs}
    plugin.write_text(PLUGIN + "# changed\n")
    (changed,) = planned(["--optimizers", "fromplugin", "--plugin", str(plugin)], corpus, monkeypatch)
    assert changed.plugins[str(plugin)] != digest and changed.key != runs[0].key


@pytest.mark.slow
def test_worker_processes_see_plugins_and_combinations(corpus: Corpus, plugin: Path, tmp_path: Path) -> None:
    given = f"fromplugin,p=SteepestDescent(norm=PluggedIn()),{MINE},{NEW},torch:AdamW,torch:Muon"
    arguments = ["compare", "--smoke", "--steps", "4", "--data", corpus.name, "--out", "out", "--plugin", str(plugin)]
    command = [sys.executable, "-m", "benchmarks", *arguments, "--optimizers", given]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = read_rows(tmp_path / "out" / RESULTS).values()
    assert {r["config"]["optimizer"] for r in rows} == {"fromplugin", "p", "mine", "new", "torch:AdamW", "torch:Muon"}
    assert all(math.isfinite(r["final_loss"]) for r in rows)
    assert all(name in done.stdout for name in ("fromplugin", "mine", "torch:Muon"))


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


# Rows and tables on file


def test_unreadable_rows_are_counted_and_named(corpus: Corpus, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "out" / RESULTS
    made = row("adamw", 0, 2.0, key=config(corpus).key, train_seconds=1.0)
    made["config"] |= {"corpus": corpus.digest, "source": corpus.name}
    append_row(path, made)
    assert unreadable(path) == "" == unreadable(tmp_path / "none")
    with path.open("a") as file:
        file.write('{"key": "b", "x"\n[1]\n\n{"no": "key"}\n{"key": 3}\n')
    expected = f"{path}: 4 lines are no rows and are left out: lines 2, 3, 5, 6"
    assert unreadable(path) == expected
    assert workers.Pool(tmp_path / "out", 1).run([config(corpus)]) == [json.loads(json.dumps(made))]
    assert expected in capsys.readouterr().err
    assert main(["report", "--runs", str(tmp_path / "out"), "--data", corpus.name, "--out", "report"]) == 0
    assert expected in capsys.readouterr().err


def test_tables_of_another_command_are_moved_and_not_overwritten(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for name, loss in (("adamw", 2.0), ("sgd", 3.0)):
        made = row(name, 0, loss, train_seconds=1.0)
        made["config"] |= {"corpus": corpus.digest, "source": corpus.name}
        append_row(tmp_path / name / RESULTS, made)

    def run(folder: str) -> str:
        arguments = ["report", "--runs", folder, "--data", corpus.name, "--out", "out"]
        monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
        assert main(arguments) == 0
        return str(capsys.readouterr().out)

    assert "Moved" not in run("adamw") and "Moved" not in run("adamw"), "the same command again"
    first = Path("out/compare.csv").read_bytes()
    said = run("sgd")
    assert "out/compare.md held the table of another command, `python -m benchmarks report --runs adamw" in said
    assert "Moved to out/earlier/1: compare.md, compare.csv" in said
    assert Path("out/earlier/1/compare.csv").read_bytes() == first != Path("out/compare.csv").read_bytes()
    assert Path("out/earlier/1/loss_steps.png").exists() and Path("out/loss_steps.png").exists()
    assert "Moved to out/earlier/2" in run("adamw")
