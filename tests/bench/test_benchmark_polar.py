"""The benchmark of polar factors: what it counts and measures, and the whole command once, on small matrices."""

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.cost import polar as bench
from benchmarks.cost.polar_report import line
from benchmarks.output.records import read_rows
from normopt.polar import METHODS, choose


def contender(name: str, dtype: str = "float32", shape: bench.Case = (1, 24, 48)) -> bench.Contender:
    return next(c for c in bench.contenders_for(shape) if (c.name, c.dtype) == (name, dtype))


@pytest.mark.parametrize(
    ("name", "dtype", "rectangles", "squares"),
    [
        (bench.BASELINE, "bfloat16", 10, 5),
        ("newton-schulz", "float32", 10, 5),
        ("polar-express", "bfloat16", 12, 6),
        ("four steps", "bfloat16", 8, 4),
        ("gram", "float32", 2, 13),
        ("gram", "bfloat16", 4, 10),
    ],
)
def test_counted_operations(name: str, dtype: str, rectangles: int, squares: int) -> None:
    """Products of m x m and m x n matrices, and those of two m x m ones, two operations a multiplication."""
    for count, m, n in ((1, 24, 48), (3, 8, 8)):
        expected = count * (rectangles * 2 * m**2 * n + squares * 2 * m**3)
        assert bench.count_flops(contender(name, dtype), torch.randn(count, m, n)) == expected


def test_every_method_is_measured_in_both_dtypes() -> None:
    found = [(c.name, c.dtype) for c in bench.contenders_for((1, 24, 48))]
    assert found[0] == (bench.BASELINE, "bfloat16") and len(set(found)) == len(found)
    assert {name for name, _ in found} == {*METHODS, bench.BASELINE, bench.MUON, "four steps"}
    for name in {*METHODS, "four steps"} - {"exact", "auto"}:
        assert {dtype for other, dtype in found if other == name} == {"float32", "bfloat16"}


def test_accuracy_of_known_results() -> None:
    """The exact factor is exact; half of it has half of everything; what is at right angles counts for nothing."""
    matrices = bench.spectra(12, 30)
    exact = bench.accuracy(contender("exact"), matrices)
    assert exact == pytest.approx({"low": 1, "high": 1, "ascent": 1, "distance": 0}, abs=1e-5)
    run = contender("exact").run
    half = bench.accuracy(bench.Contender("half", "float32", "", lambda g: run(g) / 2), matrices)
    assert half == pytest.approx({"low": 0.5, "high": 0.5, "ascent": 0.5, "distance": 0.5}, abs=1e-5)
    nothing = bench.accuracy(bench.Contender("zero", "float32", "", torch.zeros_like), matrices)
    assert nothing == pytest.approx({"low": 0, "high": 0, "ascent": 0, "distance": 1})


def test_rounds_are_interleaved_and_the_first_is_not_counted() -> None:
    calls: list[str] = []
    timed = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    seconds = bench.interleaved(timed, 3)
    assert calls == ["a", "b"] * 4
    assert [len(seconds[name]) for name in "ab"] == [3, 3]


def test_the_share_of_the_limit() -> None:
    """Four operations at 8 a second take half a second: a quarter of two seconds."""
    row = {"shape": [1, 2, 2], "method": "", "dtype": "", "form": "", "seconds": 2.0, "ratio": 1.0, "flops": 4}
    row |= {"low": 1.0, "high": 1.0, "ascent": 1.0, "distance": 0.0}
    assert line(row, 8.0)["GEMM limit"] == "25%" and line(row, 8.0)["ms"] == "2e+03"


@pytest.mark.slow
def test_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["polar", "--smoke", "--sizes", "6", "--threads", "1,2", "--out", str(tmp_path)]) == 0
    rows = list(read_rows(tmp_path / "polar.jsonl").values())
    shapes = {tuple(row["shape"]) for row in rows}
    assert shapes == {(1, 6, 6), (1, 6, 12), (1, 6, 24), (1, 6, 48), (2, 6, 24)}
    assert len(rows) == 2 * len(shapes) * len(bench.contenders_for((1, 6, 6)))
    assert {(row["asked"], row["threads"]) for row in rows} == {("1", 1), ("2", 2)}
    for row in rows:
        assert all(
            math.isfinite(x) and x > 0 for x in (row["seconds"], row["ratio"], row["flops"], row["product_rate"])
        )
        assert row["ratio"] == 1 or row["method"] != bench.BASELINE
        assert row["method"] != "auto" or row["form"] == choose(row["shape"], torch.float32, "cpu").form
        json.dumps(row, allow_nan=False)
    table = (tmp_path / "polar.md").read_text()
    assert table.count("\n|") == len(rows) + 4 and "time / torch" in capfd.readouterr().out
    for name in ("pareto", "width", "count", "pareto_2", "width_2", "count_2"):
        assert f"polar_{name}.png" in table
        assert (tmp_path / f"polar_{name}.png").read_bytes().startswith(b"\x89PNG")
