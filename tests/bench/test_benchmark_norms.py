"""What `python -m benchmarks norms` finds inside the models."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.language.data import Corpus
from benchmarks.language.diagnose import measure
from benchmarks.language.train import MODELS, Run
from benchmarks.output.records import read_rows
from tests.support.bench_runs import config, finish, tiny_corpus


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Corpus]:
    yield from tiny_corpus(tmp_path, monkeypatch)


@pytest.mark.parametrize("name", MODELS)
def test_norms_are_those_of_the_model(name: str) -> None:
    torch.manual_seed(0)
    model, tokens = MODELS[name](11, 16, 3, 2), torch.randint(11, (4, 7))
    with torch.no_grad():
        model.blocks[1].mlp.down.weight.mul_(3)  # type: ignore[union-attr, operator]
    found = measure(model, tokens)
    h = model.embed(tokens)
    expected = [h.norm(dim=-1).mean().item()]
    for block in model.blocks.children():
        h = block(h)
        expected.append(h.norm(dim=-1).mean().item())
    assert found["residual"] == pytest.approx(expected)
    kinds = ["attention.qkv", "attention.out", "mlp.gate", "mlp.up", "mlp.down"]
    assert list(found["rows"]) == kinds
    down = [block.mlp.down.weight for block in model.blocks]  # type: ignore[union-attr]
    axis = 0 if name == "ngpt" else 1
    assert found["rows"]["mlp.down"] == pytest.approx([w.norm(dim=axis).mean().item() for w in down])
    if name == "gpt":
        assert found["alpha"] == {}
    else:
        assert found["rows"]["mlp.down"] == pytest.approx([1, 3, 1])
        assert found["alpha"] == {"attention": pytest.approx([0.05] * 3), "mlp": pytest.approx([0.05] * 3)}
    assert not any(module._forward_hooks for module in model.modules())


def test_diagnosed_runs_are_runs_of_their_own_with_the_same_losses(corpus: Corpus) -> None:
    plain = config(corpus)
    diagnosed = dataclasses.replace(plain, diagnose=True)
    assert diagnosed.key != plain.key
    row, expected = finish(diagnosed), finish(plain)
    assert "norms" not in expected and row["final_loss"] == expected["final_loss"]
    assert [step for step, _ in row["norms"]] == [step for step, *_ in row["curve"]]
    run = Run(diagnosed, corpus)
    run.record_curve()
    run.save(Path("checkpoint.pt"))
    again = Run(diagnosed, corpus)
    again.restore(Path("checkpoint.pt"))
    assert again.progress.norms == run.progress.norms and len(run.progress.norms) == 1


@pytest.mark.slow
def test_the_command_writes_a_table_and_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 600)
    command = ["norms", "--smoke", "--steps", "4", "--data", str(tmp_path / "text.txt"), "--out", str(tmp_path)]
    assert main(command) == 0
    rows = read_rows(tmp_path / "results.jsonl").values()
    assert {row["config"]["model"] for row in rows} == set(MODELS)
    table = (tmp_path / "norms.md").read_text()
    assert "adamw@ngpt" in table and "adamw@ngpt" in capsys.readouterr().out
    for name in ("residual", "rows", "alpha"):
        assert f"norms_{name}.png" in table and (tmp_path / f"norms_{name}.png").stat().st_size > 10_000
