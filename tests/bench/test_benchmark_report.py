"""Tables and plots of finished runs."""

import csv
import math
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from benchmarks.language.data import Corpus
from benchmarks.language.grid import grid_line, write_grid
from benchmarks.language.ngram import ngram_loss
from benchmarks.language.norms import write_norms
from benchmarks.output.comparison import comparison_lines, write_comparison
from benchmarks.output.figures import MAX_LINES
from benchmarks.output.records import Row
from benchmarks.output.rows import at_one_speed
from benchmarks.output.statistics import Estimate, bootstrap, estimate, holm, p_value, paired, ranks
from benchmarks.output.tables import Cell, write_table
from benchmarks.output.targets import Reach, Runs, Target, mean_losses, reach
from tests.support.bench_runs import row


def test_comparison_lines() -> None:
    groups = {"adamw": [row("adamw", 0, 2.0), row("adamw", 1, 2.2)], "muon": [row("muon", 0, 1.5), row("muon", 1, 1.9)]}
    adamw, muon = comparison_lines(groups)
    assert muon == {
        "optimizer": "muon",
        "val nats/byte": "1.7000 ± 2.5412",  # t(0.975, 1 degree of freedom) = 12.706 times 0.2828 / sqrt(2)
        "n": "2",
        "vs adamw": "-0.4000 ± 1.2706",  # 12.706 times 0.1414 / sqrt(2)
        "p": "0.156",
        "rank": "1-2",
        "lr": "0.1",
        "bits/byte": "2.4526",
        "tok/s": "1,234",
        "fwd+bwd ms": "90",
        "opt ms": "10.0",
        "opt %": "10.0",
        "state B/param": "8.00",
    }
    assert adamw["vs adamw"] == adamw["p"] == ""


def test_differences_pair_the_seeds() -> None:
    adamw = {1: 3.0, 0: 2.0}
    assert paired({0: 1.0, 1: 2.0}, adamw) == Estimate(-1.0, 0.0, 2, -1.0, -1.0)
    assert paired({1: 2.5}, adamw) == Estimate(-0.5, None, 1, None, None)
    assert paired({5: 2.5}, adamw) is None and paired({0: math.inf}, adamw) is None
    # Not of all seeds: no difference in the table.
    groups = {"adamw": [row("adamw", 0, 2.0)], "muon": [row("muon", 0, 1.0), row("muon", 1, 2.0)]}
    assert comparison_lines(groups)[1]["vs adamw"] == "" and comparison_lines({"muon": groups["muon"]})[0]["p"] == ""


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=9))
def test_intervals_and_p_values_are_those_of_scipy(values: list[float]) -> None:
    found = estimate(values)
    assume(found.sd is not None and found.sd > 1e-3)
    expected = stats.ttest_1samp(values, 0.0)
    low, high = expected.confidence_interval(0.95)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert p_value(found) == pytest.approx(expected.pvalue)


def test_p_values_without_noise() -> None:
    assert p_value(estimate([0.5, 0.5])) == 0.0 and p_value(estimate([0.0, 0.0])) == 1.0 == p_value(estimate([3.0]))


def test_holm() -> None:
    """Of four tests the smallest p counts four times, the next three times, and none less than the one before."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_ranks_say_what_is_not_told_apart() -> None:
    noise = [0.001, -0.001, 0.002, 0.0, -0.002, 0.001, 0.0, 0.0005]
    losses = {
        name: {seed: mean + scale * noise[(seed * step) % 8] for seed in range(8)}
        for name, mean, scale, step in (("a", 1.0, 1, 1), ("b", 1.0, 1, 3), ("c", 1.5, 1, 5), ("d", 1.2, 1, 7))
    }
    assert ranks(losses) == {"a": (1, 2), "b": (1, 2), "c": (4, 4), "d": (3, 3)}
    assert ranks({**losses, "lost": {0: 1.0, 1: math.inf}})["lost"] == (5, 5)
    assert ranks({"a": {0: 1.0}, "b": {0: 2.0}}) == {"a": (1, 2), "b": (1, 2)}, "one seed tells nothing apart"


def test_bootstrap_is_paired_and_the_same_every_time() -> None:
    ours = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 9.0]
    shifted = [value + 1 for value in ours]
    assert bootstrap([ours, shifted], lambda a, b: np.mean(b) - np.mean(a)) == (1.0, 1.0)
    low, high = bootstrap([ours, ours], lambda a, b: np.mean(a)) or (0, 0)
    assert 2.5 < low < np.mean(ours) < high < 7 and bootstrap([ours, ours], lambda a, b: np.mean(a)) == (low, high)
    assert bootstrap([[1.0, 2.0, 3.0, 4.0]], np.mean) is None


@pytest.mark.parametrize("n", [5, 8])
def test_the_interval_of_a_bootstrapped_mean_is_nearly_students(n: int) -> None:
    """In the mean over samples; an interval of plain percentiles is 0.62 and 0.77 times as wide for 5 and 8 values."""
    samples = np.random.default_rng(0).normal(size=(40, n))
    widths = []
    for sample in samples:
        low, high = bootstrap([sample], lambda x: float(np.mean(x))) or (0, 0)
        student = estimate(list(sample)).half
        assert student is not None
        widths.append((high - low) / 2 / student)
    assert 0.85 < np.mean(widths) < 1.15


def test_times_are_of_one_machine_at_one_load() -> None:
    """Forward and backward pass are the same work in all runs: a run whose passes took twice as long was held up."""
    quick, slow, other = (row(name, 0, 2.0) for name in ("adamw", "muon", "sgd"))
    slow |= {"gradient_ms": 180.0, "optimizer_ms": 40.0, "train_seconds": 0.66, "tokens_per_second": 500.0}
    other["config"]["model"] = "angpt"
    other["gradient_ms"] = 300.0
    same, held_up, apart = at_one_speed([quick, {**slow, "curve": [[3, 0.66, 2.0]]}, other])
    assert (same["gradient_ms"], held_up["gradient_ms"], apart["gradient_ms"]) == (135, 135, 300)
    assert held_up["optimizer_ms"] == 30 and held_up["train_seconds"] == pytest.approx(0.66 * 0.75)
    assert held_up["tokens_per_second"] == pytest.approx(500 / 0.75)
    assert held_up["curve"] == [[3, pytest.approx(0.495), 2.0]]
    assert same["optimizer_ms"] == 15 and apart == other | {"curve": apart["curve"]}


def test_two_settings_of_one_optimizer_are_never_pooled(tmp_path: Path) -> None:
    rows = [row("adamw", 0, 2.0, lr=0.1), row("adamw", 1, 2.0, lr=0.1), row("adamw", 0, 1.9, lr=0.2)]
    with pytest.raises(ValueError, match=r"two runs of adamw with .* and seed 0, at other options: lr 0.1 \(.*lr 0.2"):
        write_comparison(rows, tmp_path)
    assert list(tmp_path.iterdir()) == []
    write_comparison(rows[:2], tmp_path)


def test_tables_for_a_spreadsheet_and_for_latex(tmp_path: Path) -> None:
    loss = estimate([1.5, 1.7]).cell()
    table = [
        {"optimizer": "mine_own a=0.1", "loss": loss, "vs adamw": Cell("-0.4000 ± 0.1000", mean=-0.4), "p": ""},
        {"optimizer": "{x} & 5% $", "loss": "", "vs adamw": "", "p": Cell("< 0.001", value=1e-9)},
        {"optimizer": "c", "loss": "", "vs adamw": "> 1,228,800 [<= 600, 2e-05]", "p": ""},
    ]
    write_table(table, tmp_path / "table")
    first, second, _ = csv.DictReader((tmp_path / "table.csv").read_text().splitlines())
    assert {name: float(first[f"loss {name}"]) for name in ("mean", "sd", "n")} == pytest.approx(
        {"mean": 1.6, "sd": 0.141421, "n": 2}, rel=1e-5
    )
    assert float(first["loss low"]) < 1.5 < 1.7 < float(first["loss high"]) and float(second["p"]) == 1e-9
    assert (tmp_path / "table.tex").read_text().splitlines() == [
        r"\begin{tabular}{lrrr}",
        r"\toprule",
        r"optimizer & loss & vs adamw & p \\",
        r"\midrule",
        r"mine\_own a=$0.1$ & $1.6000 \pm 1.2706$ & $-0.4000 \pm 0.1000$ &  \\",
        r"\{x\} \& $5$\% \$ &  &  & $< 0.001$ \\",
        r"c &  & $> 1{,}228{,}800$ [$\le 600$, $2 \cdot 10^{-5}$] &  \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_the_default_tables_fit_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = {"adamw": 1.8, "muon": 1.6, "muonplus": 1.55, "signum": 1.9, "torch:AdamW": 1.8}
    rows = [
        of_length(row(name, seed, loss + 600 / steps / 50 + 0.01 * seed), steps)
        for name, loss in losses.items()
        for steps in (150, 300, 600)
        for seed in range(8)
    ]
    write_comparison(rows, tmp_path, [Target("5-gram model", 1.65)])
    write_grid(
        [row(n, s, loss, lr) for n, loss in losses.items() for s in (0, 1) for lr in (0.001, 0.0015, 0.003, 0.006)],
        tmp_path,
    )
    printed = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("Written to")]
    assert max(map(len, printed)) <= 120


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
    reached = {(line["target name"], line["optimizer"]): line for line in lines}
    line = reached["tuned adamw", "muon"]
    assert [float(line[name]) for name in ("steps", "tokens", "CPU s")] == pytest.approx([200, 200 * 6 * 8, 100])
    assert float(reached["counting", "muon"]["steps"]) == pytest.approx(100 * 2**1.5)
    line = reached["counting", "adamw"]
    assert (float(line["steps"]), line["steps bound"]) == (400, ">")
    assert "> 400" in printed and "horizons.png" in markdown and (tmp_path / "horizons.png").stat().st_size > 10_000
    adamw, line = csv.DictReader((tmp_path / "compare.csv").read_text().splitlines())
    names = ("steps to adamw's", "CPU s to adamw's")
    assert adamw["optimizer"] == "adamw" and [float(adamw[name]) for name in names] == pytest.approx([400, 200])
    assert line["optimizer"] == "muon" and [float(line[name]) for name in names] == pytest.approx([200, 100])
    assert float(line["val nats/byte mean"]) == 1.5 and float(line["vs adamw mean"]) == -0.5
    assert r"\begin{tabular}" in (tmp_path / "compare.tex").read_text()


def test_intervals_of_steps_draw_the_seeds_of_both(tmp_path: Path) -> None:
    """Muon is ahead of AdamW by the same in every seed, while the seeds differ a lot: the steps are always the same."""
    shifts = dict(enumerate([0.0, 0.3, -0.2, 0.1, -0.3, 0.2, 0.4, -0.4]))
    muon = [of_length(row("muon", s, 5 - math.log2(n) / 4 + x), n) for s, x in shifts.items() for n in (150, 300, 600)]
    by_seed = {seed: 5 - math.log2(300) / 4 + x for seed, x in shifts.items()}
    paired_target = Target("adamw", float(np.mean([*by_seed.values()])), by_seed)
    steps, tokens, seconds = Runs(muon).cells(paired_target, 10)
    assert (steps, tokens, seconds) == ("300", "3,000", "150")
    assert [steps.numbers["low"], steps.numbers["high"]] == pytest.approx([300, 300])
    fixed, _, _ = Runs(muon).cells(Target("a loss", paired_target.loss), 10)
    assert fixed.numbers["low"] < 200 < 400 < fixed.numbers["high"]
    beyond, _, _ = Runs(muon).cells(
        Target("a low loss", 5 - math.log2(590) / 4 + float(np.mean([*shifts.values()]))), 10
    )
    assert beyond.startswith("590 [") and beyond.endswith(", > 600]")
    few, _, _ = Runs([made for made in muon if made["config"]["seed"] < 2]).cells(paired_target, 10)
    assert "low" not in few.numbers, "two seeds have no interval"


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
    corpus = Corpus("text", (text, text[:2]), np.frombuffer(b"abx", dtype=np.uint8), text, 256, 1.0, "")
    a_then_b, b_then_x = (3 + 0.1) / (4 + 25.6), 0.1 / (1 + 25.6)
    assert ngram_loss(corpus, "validation", 2, 0.1) == pytest.approx(-(math.log(a_then_b) + math.log(b_then_x)) / 2)
    assert ngram_loss(corpus, "validation", 1, 0.1) == pytest.approx(
        -sum(math.log((n + 0.1) / (8 + 25.6)) for n in (4, 3, 0)) / 3
    )
    with pytest.raises(ValueError, match="9-grams of 256 tokens"):
        ngram_loss(corpus, "test", 9)


def test_rows_of_different_corpora_are_never_compared(tmp_path: Path) -> None:
    rows = [row("adamw", 0, 2.0), row("muon", 0, 1.5)]
    rows[1]["config"]["corpus"] = "1"
    for write in (
        lambda: write_comparison(rows, tmp_path),
        lambda: write_grid(rows, tmp_path),
        lambda: write_norms(rows, tmp_path),
    ):
        with pytest.raises(ValueError, match=r"different corpora cannot be compared: text \(0, .*\), text \(1, .*\)"):
            write()
    rows[1]["config"] |= {"corpus": "0", "split": "test"}
    del rows[0]["config"]["split"]  # as in rows from before there was a test text
    with pytest.raises(ValueError, match=r"cannot be compared: text \(0, validation\), text \(0, test\)"):
        write_comparison(rows, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_unknown_bytes_per_token_leave_bits_out(tmp_path: Path) -> None:
    write_comparison([row("muon", 0, 1.5, bits_per_byte=None, bytes_per_token=None)], tmp_path)
    assert "val nats/token" in (tmp_path / "compare.md").read_text()


def test_report_of_a_grid(tmp_path: Path) -> None:
    losses = {0.1: (2.0, 2.2), 0.2: (1.0, None), 0.4: (1.8, 2.0), 0.8: (3.0, 3.0)}
    rows = [row("muon", seed, loss, lr) for lr, pair in losses.items() for seed, loss in enumerate(pair)]
    write_grid([row("sign", 0, None), row("sgd", 0, 3.0, 1.0), row("sgd", 0, 2.0, 2.0), *rows], tmp_path)
    lines = [[cell.strip() for cell in line.split("|")] for line in (tmp_path / "grid.md").read_text().splitlines()]
    table = [[*line[1:3], *line[4:7]] for line in lines if len(line) > 3 and line[1] in ("muon", "sgd", "sign")]
    assert table == [
        ["muon", "0.4", "2", "0.1: 2.100, 0.2: diverged, 0.4: 1.900, 0.8: 3.000", "400"],
        ["sgd", "2 *", "1", "1: 3.000, 2: 2.000", "100"],
        ["sign", "all diverged", "1", "0.1: diverged", "50"],
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
