"""Negative controls: what each of them spoils, and nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import normopt
from benchmarks import controls
from benchmarks.__main__ import make_parser
from benchmarks.harness import PlanError
from benchmarks.language.data import Corpus
from benchmarks.language.plan import Plan
from benchmarks.language.train import make_optimizer
from benchmarks.language.trials import Subject, trials
from normopt.nn import GPT
from tests.support.bench_runs import config, finish, tiny_corpus, unmeasured

HIDDEN = "blocks.0.mlp.up.weight"


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Corpus]:
    yield from tiny_corpus(tmp_path, monkeypatch)


def updates(name: str, corpus: Corpus, steps: int = 1, **options: object) -> dict[str, Tensor]:
    """How far every tensor moves in the last of some steps."""
    torch.manual_seed(0)
    model, generator = GPT(256, 16, 2, 2), torch.Generator().manual_seed(1)
    optimizer = make_optimizer(config(corpus, name, **options), model)
    for _ in range(steps):
        before = {key: p.detach().clone() for key, p in model.named_parameters()}
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return {key: p.detach() - before[key] for key, p in model.named_parameters()}


@pytest.mark.parametrize("name", controls.NAMES)
def test_controls_train_and_are_reproducible(name: str, corpus: Corpus) -> None:
    row = finish(config(corpus, name))
    assert row["status"] == "finished" and row["final_loss"] < row["curve"][0][2]
    assert unmeasured(finish(config(corpus, name))) == unmeasured(row)
    assert row["final_loss"] != finish(config(corpus, "muon"))["final_loss"]


@pytest.mark.parametrize("name", [*controls.REPLACEMENTS, "control:adamw-at-muon-length"])
def test_updates_are_as_long_as_those_of_muon(name: str, corpus: Corpus) -> None:
    exact = {"orthogonalize": "newton-schulz", "orthogonalize_dtype": "float32"}
    muon, ours = (updates(each, corpus, **exact) for each in ("muon", name))
    for key, update in ours.items():
        if key.startswith("blocks.") and update.ndim == 2:
            # Newton-Schulz takes singular values that are all equal to 0.7 .. 1.2, all to the same one.
            tolerance = 0.3 if "orthogonal" in name else 0.1
            assert update.norm().item() == pytest.approx(muon[key].norm().item(), rel=tolerance), key
            cosine = (update * muon[key]).sum() / update.norm() / muon[key].norm()
            assert abs(cosine) < (0.99 if "adamw" in name else 0.3), key
        else:
            torch.testing.assert_close(update, muon[key])


def test_random_orthogonal_matrices_stay_and_descend(corpus: Corpus) -> None:
    first, second = (updates("control:random-orthogonal", corpus, steps)[HIDDEN] for steps in (1, 2))
    assert abs((first * second).sum() / first.norm() / second.norm()) > 0.9, "the same matrix at every step"
    gradient = torch.randn(8, 6)
    replaced = controls.random_orthogonal(3, gradient)
    torch.testing.assert_close(replaced.mT @ replaced, torch.eye(6))
    assert (replaced * gradient).sum() > 0 and (controls.random_orthogonal(3, -gradient) == -replaced).all()


def test_noise_is_new_at_every_step(corpus: Corpus) -> None:
    first, second = (updates("control:polar-of-noise", corpus, steps)[HIDDEN] for steps in (1, 2))
    assert abs((first * second).sum() / first.norm() / second.norm()) < 0.3


def test_adamw_at_muon_length_moves_along_adamw(corpus: Corpus) -> None:
    ours = updates("control:adamw-at-muon-length", corpus, 3)[HIDDEN]
    theirs = updates("adamw", corpus, 3, betas=(0.9, 0.95), weight_decay=0.0)[HIDDEN]
    assert (ours * theirs).sum() / ours.norm() / theirs.norm() > 0.95, "but for Muon's decay"


def test_roles_are_shuffled_among_matrices() -> None:
    model = GPT(256, 16, 2, 2)
    plain = {name: role.name for name, role in normopt.infer_roles(model).items()}
    options = controls.shuffled_roles(model, {})
    assert options == controls.shuffled_roles(model, {})
    dealt = {name: options["role"] for name, options in options["overrides"].items()}
    assert Counter(dealt.values()) == Counter(plain[name] for name in dealt)
    assert dealt["embed.weight"] == dealt["head.weight"] == "linear"
    optimizer = normopt.create("muon", model, lr=0.1, **options)
    found = {
        n: g["role"]
        for n, p in model.named_parameters()
        for g in optimizer.param_groups
        if any(p is q for q in g["params"])
    }
    assert found == {**plain, **dealt}


def test_controls_that_replace_gradients_want_whole_ones(corpus: Corpus) -> None:
    arguments = ["compare", "--parallel", "fsdp2", "--optimizers", "control:*", "--data", corpus.name, "--out", "out"]
    with pytest.raises(PlanError, match=r"control:\S+ needs whole gradients: leave --parallel fsdp2 out"):
        Plan(make_parser().parse_args(arguments))


def test_controls_have_the_options_of_muon_and_its_space(corpus: Corpus) -> None:
    arguments = ["sweep", "--optimizers", "muon,control:*", "--data", corpus.name, "--out", "out"]
    plan = Plan(make_parser().parse_args(arguments))
    assert set(plan.cells) == {"muon", *controls.NAMES}
    muon = plan.config("muon", 0)
    for name in controls.NAMES:
        assert replace(plan.config(name, 0), optimizer="muon") == muon
        assert Subject(plan, name).space() == Subject(plan, "muon").space()
        (trial,) = trials(plan, name, 1)
        make_optimizer(plan.config(name, 0, entry=trial.entry), GPT(256, 16, 1, 2))
    assert not {*controls.NAMES} & {*normopt.list_optimizers()}
