"""Tables and plots of finished runs."""

import csv
import math
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.language.data import Corpus
from benchmarks.language.grid import grid_line, write_grid
from benchmarks.language.ngram import ngram_loss
from benchmarks.language.norms import write_norms
from benchmarks.language.search import Search
from benchmarks.language.sweep import write_sweep
from benchmarks.output.comparison import comparison_line, difference, write_comparison
from benchmarks.output.figures import MAX_LINES
from benchmarks.output.records import Row
from benchmarks.output.targets import Reach, Target, mean_losses, reach
from tests.support.bench_runs import row


def test_comparison_line() -> None:
    groups = {"adamw": [row("adamw", 0, 2.0), row("adamw", 1, 2.2)], "muon": [row("muon", 0, 1.5), row("muon", 1, 1.9)]}
    assert comparison_line("muon", groups) == {
        "optimizer": "muon",
        "lr": "0.1",
        "val nats/byte": "1.7000 ± 0.2828",
        "bits/byte": "2.4526",
        "vs adamw": "-0.4000 ± 1.2706, not resolved",  # t(0.975, 1 degree of freedom) = 12.706 times 0.1414 / sqrt(2)
        "tok/s": "1,234",
        "fwd+bwd ms": "90",
        "opt ms": "10.0",
        "opt %": "10.0",
        "state B/param": "8.00",
    }
    assert comparison_line("adamw", groups)["vs adamw"] == ""


def test_differences_pair_the_seeds() -> None:
    adamw = [row("adamw", 1, 3.0), row("adamw", 0, 2.0)]
    assert difference([row("muon", 0, 1.0), row("muon", 1, 2.0)], adamw) == "-1.0000 ± 0.0000"
    assert difference([row("muon", 1, 2.5)], adamw) == "-0.5000"
    assert difference([row("muon", 5, 2.5)], adamw) == ""
    assert difference([row("muon", 0, None)], adamw) == ""
    assert difference([row("muon", 0, 1.0)], []) == ""


def test_report_of_a_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row("adamw", 0, 2.0), row("muon", 0, 1.5), row("sgd", 0, None, bits_per_byte=None)]
    write_comparison(rows, tmp_path)
    printed, markdown = capsys.readouterr().out, (tmp_path / "compare.md").read_text()
    for text in (printed, markdown):
        assert "-0.5000" in text and "diverged (1 of 1)" in text and "val nats/byte" in text
    for name in ("loss_steps.png", "loss_seconds.png"):
        assert f"({name})" in markdown
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def of_length(made: Row, steps: int) -> Row:
    made["config"]["preset"]["steps"] = steps
    return {**made, "steps_done": steps, "train_seconds": 0.5 * steps}


def test_report_of_horizons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """AdamW ends at 2.0 after 400 steps; Muon's loss is linear in log(steps), 2.5 at 100 and 1.5 at 400."""
    found = {"adamw": {100: 3.0, 200: 2.5, 400: 2.0}, "muon": {100: 2.5, 200: 2.0, 400: 1.5}}
    rows = [
        of_length(row(n, seed, loss), steps) for n, by in found.items() for steps, loss in by.items() for seed in (0, 1)
    ]
    write_comparison(rows, tmp_path, [Target("counting", 1.75)])
    printed, markdown = capsys.readouterr().out, (tmp_path / "compare.md").read_text()
    lines = list(csv.DictReader((tmp_path / "targets.csv").read_text().splitlines()))
    reached = {(line["target"].split(",")[0], line["optimizer"]): line for line in lines}
    assert reached["tuned adamw after 400 steps", "muon"]["steps"] == "200"
    assert reached["tuned adamw after 400 steps", "muon"]["tokens"] == str(200 * 6 * 8).replace("9600", "9,600")
    assert reached["tuned adamw after 400 steps", "muon"]["CPU s"] == "100"
    assert reached["counting", "muon"]["steps"] == "283" and reached["counting", "adamw"]["steps"] == "> 400"
    assert "> 400" in printed and "horizons.png" in markdown and (tmp_path / "horizons.png").stat().st_size > 10_000
    adamw, line = csv.DictReader((tmp_path / "compare.csv").read_text().splitlines())
    assert (adamw["optimizer"], adamw["steps to adamw's"], adamw["CPU s to adamw's"]) == ("adamw", "400", "200")
    assert (line["optimizer"], line["steps to adamw's"], line["CPU s to adamw's"]) == ("muon", "200", "100")
    assert line["val nats/byte"] == "1.5000 ± 0.0000" and line["vs adamw"] == "-0.5000 ± 0.0000"
    assert r"\begin{tabular}" in (tmp_path / "compare.tex").read_text()


@given(st.floats(0.1, 3), st.floats(0.01, 2), st.floats(50, 900))
def test_targets_are_interpolated_in_log_steps(start: float, slope: float, steps: float) -> None:
    losses = {length: start - slope * math.log(length) for length in (100, 200, 400, 800)}
    found = reach(losses, start - slope * math.log(steps))
    if steps <= 100 or steps > 800:
        assert (found.bound, found.steps) == (("<= ", 100) if steps <= 100 else ("> ", 800))
    else:
        assert found.bound == "" and found.steps == pytest.approx(steps, rel=1e-6)


def test_targets_of_lengths_that_diverge() -> None:
    assert reach({100: math.inf, 200: 2.0}, 2.5) == Reach(200, "<= ")
    assert reach({100: 3.0, 200: math.inf}, 2.5) == Reach(200, "> ")
    assert mean_losses([of_length(row("a", 0, None), 100), of_length(row("a", 1, 2.0), 100)]) == {100: math.inf}


def test_counting_models() -> None:
    """By hand: after "a" come b, b and c of 256; after "b" only a."""
    text = np.frombuffer(b"abacab", dtype=np.uint8)
    corpus = Corpus("text", (text, text[:2]), np.frombuffer(b"abx", dtype=np.uint8), 256, 1.0, "")
    a_then_b, b_then_x = (3 + 0.1) / (4 + 25.6), 0.1 / (1 + 25.6)
    assert ngram_loss(corpus, 2, 0.1) == pytest.approx(-(math.log(a_then_b) + math.log(b_then_x)) / 2)
    assert ngram_loss(corpus, 1, 0.1) == pytest.approx(-sum(math.log((n + 0.1) / (8 + 25.6)) for n in (4, 3, 0)) / 3)
    with pytest.raises(ValueError, match="9-grams of 256 tokens"):
        ngram_loss(corpus, 9)


def test_rows_of_different_corpora_are_never_compared(tmp_path: Path) -> None:
    rows = [row("adamw", 0, 2.0), row("muon", 0, 1.5)]
    rows[1]["config"]["corpus"] = "1"
    search = [Search("adamw", 0.1), Search("muon", 0.1)]
    for write in (
        lambda: write_comparison(rows, tmp_path),
        lambda: write_grid(rows, tmp_path),
        lambda: write_norms(rows, tmp_path),
        lambda: write_sweep(search, 0.0, rows, 12, {}, tmp_path),
    ):
        with pytest.raises(ValueError, match=r"different corpora cannot be compared: text \(0\), text \(1\)"):
            write()
    assert list(tmp_path.iterdir()) == []


def test_unknown_bytes_per_token_leave_bits_out(tmp_path: Path) -> None:
    write_comparison([row("muon", 0, 1.5, bits_per_byte=None, bytes_per_token=None)], tmp_path)
    assert "val nats/token" in (tmp_path / "compare.md").read_text()


def test_report_of_a_grid(tmp_path: Path) -> None:
    losses = {0.1: (2.0, 2.2), 0.2: (1.0, None), 0.4: (1.8, 2.0), 0.8: (3.0, 3.0)}
    rows = [row("muon", seed, loss, lr) for lr, pair in losses.items() for seed, loss in enumerate(pair)]
    write_grid([row("sign", 0, None), row("sgd", 0, 3.0, 1.0), row("sgd", 0, 2.0, 2.0), *rows], tmp_path)
    lines = [[cell.strip() for cell in line.split("|")] for line in (tmp_path / "grid.md").read_text().splitlines()]
    table = [line[1:3] + line[5:8] for line in lines if len(line) > 3 and line[1] in ("muon", "sgd", "sign")]
    assert table == [
        ["muon", "0.4", "0.1: 2.100, 0.2: diverged, 0.4: 1.900, 0.8: 3.000", "8", "400"],
        ["sgd", "2 *", "1: 3.000, 2: 2.000", "2", "100"],
        ["sign", "all diverged", "0.1: diverged", "1", "50"],
    ]
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("error")
def test_many_optimizers_get_a_panel_each_also_those_that_diverge(tmp_path: Path) -> None:
    names = [f"o{i}" for i in range(MAX_LINES)]
    rows = [row(name, 0, 2.0 + lr, lr) for name in names for lr in (0.1, 9.0)]
    write_grid([*rows, row("lost", 0, None, 0.1), row("lost", 0, None, 0.2)], tmp_path)
    height, width = matplotlib.image.imread(tmp_path / "grid.png").shape[:2]
    assert width > 1.5 * height, "13 panels, six a row"


def test_the_lower_edge_is_an_edge_too() -> None:
    line = grid_line("a", {0.1: [row("a", 0, 1.0)], 0.2: [row("a", 0, 2.0)]})
    assert line["best lr"] == "0.1 *"
