"""`python -m benchmarks step`: contenders, clocks and ratios."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as command_line
from benchmarks import peers
from benchmarks.__main__ import main
from benchmarks.cost import contenders
from benchmarks.cost.step import SETS, Entry, make_parameters
from benchmarks.cost.step_report import line, reference
from benchmarks.output.records import read_rows

INSTALLED = {name: (family, maker) for family, name, maker in contenders.installed(list(contenders.FAMILIES))}


def test_the_command_line_knows_all_sets_and_families() -> None:
    assert set(command_line.STEP_SETS) == set(SETS) - {"smoke"}
    assert list(command_line.FAMILIES) == list(contenders.FAMILIES)


@pytest.mark.parametrize("name", INSTALLED)
def test_every_contender_moves_every_parameter(name: str) -> None:
    family, maker = INSTALLED[name]
    entry = Entry(family, name, maker, SETS["smoke"])
    before = [p.detach().clone() for p in entry.model.parameters()]
    for _ in range(contenders.REFRESH + 1):  # some move only after the first refresh of what they divide by
        assert entry.step([torch.randn_like(p) for p in before]) > 0
    assert all(not torch.equal(p, q) for p, q in zip(entry.model.parameters(), before, strict=True))


def test_what_is_compiled_is_ours_and_timed_on_demand() -> None:
    compiled = [family for family, name, _ in contenders.installed(list(contenders.FAMILIES), compiled=True)]
    assert len(compiled) == len(INSTALLED) + len(contenders.COMPILED)
    for family, maker in contenders.COMPILED.items():
        optimizer: Any = maker(make_parameters(SETS["smoke"]))
        assert optimizer.compiles and type(optimizer).__name__.lower() == family


def test_families_have_ours_and_a_peer() -> None:
    for family, makers in contenders.FAMILIES.items():
        found = [name for name in makers if name in INSTALLED]
        assert any(name.startswith("normopt") for name in found), family
        assert any(not name.startswith("normopt") for name in found), family


def test_hidden_matrices_and_the_rest_are_all_parameters() -> None:
    model = make_parameters(SETS["smoke"])
    hidden, rest = peers.hidden(model), peers.rest(model)
    assert len(hidden) == 2 * 5 and all(p.ndim == 2 for p in hidden)
    assert {id(p) for p in hidden} | {id(p) for p in rest} == {id(p) for p in model.parameters()}
    assert len(hidden) + len(rest) == len(list(model.parameters()))


def row(name: str, mean: float, family: str = "lion", parameters: str = "quick") -> dict[str, Any]:
    quartiles, rate = [mean / 2, mean, mean * 2], {"float32": 1e9, "bfloat16": 2e9}
    own = {"set": parameters, "family": family, "name": name, "mean": mean, "quartiles": quartiles}
    return {
        **own,
        "product_rate": rate,
        "flops": 1e6,
        "parameters": 10**6,
        "state_bytes_per_parameter": 4.0,
        "first": 0.25,
    }


def test_ratios_are_to_the_fastest_peer_of_the_family_on_the_set() -> None:
    rows = [row("normopt Lion", 2e-3), row("a Lion", 4e-3), row("b Lion", 3e-3), row("c", 1e-3, "adamw")]
    rows += [row("d Lion", 1e-4, parameters="wide"), row("normopt AdamW", 5e-3, "adamw", "wide")]
    assert reference(rows[0], rows) is rows[2] and reference(rows[-1], rows) is None
    cells = line(rows[0], rows)
    assert cells["/ fastest peer"] == "0.67" and cells["GEMM limit"] == "50%" and cells["mean ms"] == "2"
    assert cells["first ms"] == "250"
    assert line(rows[-1], rows)["/ fastest peer"] == ""
    assert line(row("normopt Muon", 1e-3, "muon"), rows)["GEMM limit"] == "50%", "bfloat16"


@pytest.mark.slow
def test_the_command_writes_a_table_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--threads", "1", "--families", "adamw,lion", "--compile", "--out", str(tmp_path)]
    assert main(["step", "--smoke", *arguments]) == 0
    rows = read_rows(tmp_path / "step.jsonl").values()
    times = {row["name"]: row["first"] for row in rows}
    assert times["normopt Lion, compiled"] > 10 * times["normopt Lion"], "compilation is in the first step"
    assert {row["family"] for row in rows} == {"adamw", "lion"} and all(len(row["seconds"]) == 3 for row in rows)
    assert "torch AdamW, fused" in capsys.readouterr().out
    assert (
        "normopt Lion, compiled" in (tmp_path / "step.md").read_text()
        and (tmp_path / "step.png").stat().st_size > 10_000
    )
    with pytest.raises(SystemExit):
        main(["step", "--families", "adamq"])
