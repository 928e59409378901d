"""Tables and plots of finished runs."""

from pathlib import Path

import pytest

from benchmarks.report import best_rate, comparison_line, difference, write_comparison, write_grid
from tests.bench_runs import row


def test_comparison_line() -> None:
    groups = {"adamw": [row("adamw", 0, 2.0), row("adamw", 1, 2.2)], "muon": [row("muon", 0, 1.5), row("muon", 1, 1.9)]}
    assert comparison_line("muon", groups) == {
        "optimizer": "muon",
        "lr": "0.1",
        "val nats/byte": "1.7000 ± 0.2828",
        "bits/byte": "2.4526",
        "vs adamw": "-0.4000 ± 1.2706",  # t(0.975, 1 degree of freedom) = 12.706 times 0.1414 / sqrt(2)
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


def test_unknown_bytes_per_token_leave_bits_out(tmp_path: Path) -> None:
    write_comparison([row("muon", 0, 1.5, bits_per_byte=None, bytes_per_token=None)], tmp_path)
    assert "val nats/token" in (tmp_path / "compare.md").read_text()


def test_report_of_a_grid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = {0.1: (2.0, 2.2), 0.2: (1.0, None), 0.4: (1.8, 2.0), 0.8: (3.0, 3.0)}
    rows = [row("muon", seed, loss, lr) for lr, pair in losses.items() for seed, loss in enumerate(pair)]
    write_grid([*rows, row("sgd", 0, 3.0, 1.0), row("sgd", 0, 2.0, 2.0), row("sign", 0, None)], tmp_path)
    printed = capsys.readouterr().out
    assert "muon: best learning rate 0.4 of 4, found in 400 CPU seconds.\n" in printed
    assert "sgd: best learning rate 2 of 2, found in 100 CPU seconds. It is at the edge of the grid" in printed
    assert "sign: every learning rate diverged." in printed
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")
    assert "diverged (1 of 2)" in (tmp_path / "grid.md").read_text()


def test_best_rate_at_the_lower_edge() -> None:
    groups = {("a", 0.1): [row("a", 0, 1.0)], ("a", 0.2): [row("a", 0, 2.0)], ("b", 0.01): [row("b", 0, 0.5)]}
    assert "edge" in best_rate("a", groups)
