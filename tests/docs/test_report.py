"""The table that ``describe`` prints: what it says, and that it is true."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normopt
from normopt import SteepestDescent, View, describe, periodic_table, zoo
from normopt.nn import GPT
from normopt.norms import SCALES, names
from normopt.report import COLUMNS, MEMORIES, state_bytes

SPECTRAL = {"method": "exact"}


@pytest.fixture(params=[True, False], ids=["tabulate", "plain"])
def drawn_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param:
        pytest.importorskip("tabulate")
    else:
        monkeypatch.setitem(sys.modules, "tabulate", None)
    return request.param


def table(optimizer: SteepestDescent) -> list[dict[str, str]]:
    """The rows of the drawn table, by column."""
    lines = [line for line in describe(optimizer).splitlines() if not set(line) <= set("- ")]
    starts = [re.search(rf"(?:^|  ){column}(?=  |$)", lines[0]).end() - len(column) for column in COLUMNS]
    ends = [*starts[1:], None]
    return [{name: line[a:b].strip() for name, a, b in zip(COLUMNS, starts, ends, strict=True)} for line in lines[1:]]


def test_muon_on_a_gpt(drawn_by: bool) -> None:
    model = GPT(13, 8, 2, 2)
    optimizer = normopt.create("muon", model, lr=0.02, overrides={"*down*": {"lr": 0.5}, "head.*": normopt.Row()})
    rows = {row["parameter"]: row for row in table(optimizer)}
    assert set(rows) == {name for name, _ in model.named_parameters()}
    qkv = rows["blocks.1.attention.qkv.weight"]
    assert (qkv["shape"], qkv["matrix view"], qkv["role"]) == ("24 x 8", "3 x 8 x 8", "linear")
    assert qkv["norm"].startswith("Spectral(scale='max1'")
    assert qkv["momentum"].startswith("EMA(beta=0.95, nesterov=True")
    assert (qkv["step size"], qkv["constraint"]) == ("Constant()", "WeightDecay()")
    assert (qkv["lr"], qkv["effective lr"], qkv["state bytes"]) == ("0.02", f"{0.02 / 8**0.5:.3g}", "0")
    assert rows["blocks.0.mlp.down.weight"]["lr"] == "0.5"
    embedding = rows["embed.weight"]
    assert (embedding["shape"], embedding["matrix view"]) == ("13 x 8", "1 x 8 x 13")
    assert embedding["norm"].startswith("Smoothed(norm=Max()") and embedding["effective lr"] == "0.01"
    assert rows["head.weight"]["norm"] == "Row()" and rows["head.weight"]["reason"] == "override 'head.*'"
    assert rows["norm.weight"]["matrix view"] == "1 x 1 x 8"


def test_optimizers_without_a_model(drawn_by: bool) -> None:
    params = [nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(()))]
    optimizer = normopt.create("adamw", params, lr=torch.tensor(0.25), weight_decay=0.5)
    rows = table(optimizer)
    assert [row["parameter"] for row in rows] == ["#0", "#1"]
    assert [row["shape"] for row in rows] == ["3 x 2", "scalar"]
    assert {row["lr"] for row in rows} == {"0.25"} and {row["role"] for row in rows} == {""}
    assert {row["constraint"] for row in rows} == {"WeightDecay(weight_decay=0.5)"}


def test_every_optimizer_can_be_described(drawn_by: bool) -> None:
    for name in normopt.list_optimizers():
        model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5))
        assert len(table(normopt.create(name, model))) == 5


def step_once(optimizer: SteepestDescent) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn_like(p)
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_state_bytes_are_the_states(dtype: torch.dtype) -> None:
    """Adam: two numbers for each entry, in float32 or better, and a step counter of four bytes."""
    w = nn.Parameter(torch.zeros(3, 4, dtype=dtype))
    optimizer = normopt.create("adamw", [w])
    assert state_bytes(optimizer.state[w]) == 0
    step_once(optimizer)
    number = 8 if dtype == torch.float64 else 4
    assert table(optimizer)[0]["state bytes"] == str(2 * 12 * number + 4)


#: Arguments with which the size of an update does not depend on the gradient's spectrum.
KNOWN_SIZE: dict[str, Any] = {"spectral": SPECTRAL, "schatten": {"p": float("inf")}, "ky-fan": {"k": 1}}


@pytest.mark.parametrize("scale", [*SCALES, "rms", 2.5])
@pytest.mark.parametrize("name", names())
def test_the_effective_lr_is_the_size_of_the_first_update(name: str, scale: Any) -> None:
    """Full-rank gradients, under every norm and scale, for matrices tall and wide, vectors, splits and transposes."""
    norm = normopt.norms.get(name)
    norm = type(norm)(scale=scale, **KNOWN_SIZE.get(name, {}))
    shapes: dict[tuple[int, ...], View] = {
        (6, 4): View(),
        (4, 6): View(transpose=True),
        (12, 5): View(split=3),
        (2, 3, 5): View(flatten=True),
        (3, 2, 5): View(flatten=False),
    }
    if not norm.needs_matrix:
        shapes |= {(7,): View(), (): View()}
    for shape, view in shapes.items():
        weights = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for _ in range(2)]
        optimizer = SteepestDescent([{"params": weights, "view": view}], lr=0.5, norm=norm)
        step_once(optimizer)
        for w, row in zip(weights, table(optimizer), strict=True):
            assert float(row["effective lr"]) == pytest.approx(measured(w), rel=5e-3), (shape, view)


def measured(w: Tensor) -> float:
    return w.detach().square().mean().sqrt().item()


def test_the_effective_lr_counts_the_radius_and_names_what_it_leaves_out() -> None:
    w = nn.Parameter(torch.zeros(3, 4))
    constant = SteepestDescent([w], lr=0.5, norm="max", step_size="Constant(4.0)")
    step_once(constant)
    assert float(table(constant)[0]["effective lr"]) == measured(w) == 2.0
    for step_size, factor in ("dual", "dual norm"), ("sharp", "dual norm"), ("trust-ratio", "trust ratio"):
        optimizer = SteepestDescent([w], lr=0.5, norm="max", step_size=step_size)
        assert table(optimizer)[0]["effective lr"] == f"0.5 x {factor}"


def test_the_effective_lr_of_composed_directions() -> None:
    """The last stage's, or the norm's under memory; at the first step all of them are exact."""
    w = nn.Parameter(torch.zeros(4, 6))
    for norm in "Smoothed(Max(), 0.9)", "Smoothed(Row(), 0.9)", "Chain(Spectral(), Euclidean())", "Chain(Row(), Max())":
        with torch.no_grad():
            w.zero_()
        optimizer = SteepestDescent([w], lr=0.5, norm=norm)
        step_once(optimizer)
        assert float(table(optimizer)[0]["effective lr"]) == pytest.approx(measured(w), rel=5e-3)


# The periodic table --------------------------------------------------------------------------------------------------


ZOO = {name for name in zoo.__all__ if name.lower() in normopt.list_optimizers()}


def cells() -> dict[str, dict[str, str]]:
    """The printed table: norm -> memory -> what stands there."""
    lines = periodic_table().splitlines()
    columns = [match.span() for match in re.finditer(r"-+", lines[1])]
    header, *rows = [[line[start:end].strip() for start, end in columns] for line in (lines[0], *lines[2:])]
    whole: list[list[str]] = []
    for row in rows:
        if row[0]:
            whole.append(row)
        else:  # the rest of cells that were broken
            whole[-1] = [f"{above} {below}".strip() for above, below in zip(whole[-1], row, strict=True)]
    return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in whole}


def test_published_optimizers_stand_where_their_norms_and_memories_put_them() -> None:
    pytest.importorskip("tabulate")
    table = cells()
    plain, memory, rotated = ({norm: row[name] for norm, row in table.items()} for name in MEMORIES)
    for name in "SignSGD", "Signum", "Lion":
        assert name in plain["Max"].split(", ")
    for name in "Adam", "AdamW", "NAdam", "Adamax", "Adagrad", "RMSprop", "Prodigy", "LAMB":
        assert name in memory["Max"].split(", ")
    assert {"Muon", "Scion"} <= {*plain["Spectral"].split(", ")}
    assert {"Shampoo", "ASGO"} <= {*memory["Spectral"].split(", ")}
    assert "SOAP" in rotated["Max"] and "NovoGrad" in memory["Euclidean"] and "DASGO" in memory["Column"]
    assert memory["Nuclear"] == rotated["Nuclear"] == rotated["Spectral"] == rotated["Euclidean"] == "-"
    assert table["Factored"]["no memory"] == "Adafactor"
    everyone = {name for row in table.values() for cell in row.values() for name in cell.split(", ")}
    assert everyone >= ZOO


def test_every_hole_of_the_table_can_be_run() -> None:
    pytest.importorskip("tabulate")
    holes = [cell[1:-1] for row in cells().values() for cell in row.values() if cell.startswith("(")]
    assert len(holes) >= 4
    for hole in holes:
        w = nn.Parameter(torch.zeros(4, 6))
        optimizer = SteepestDescent([w], lr=0.5, norm=hole)
        step_once(optimizer)
        step_once(optimizer)  # a basis is built first
        assert w.detach().any()


@pytest.mark.usefixtures("registry")
def test_a_new_norm_and_a_new_optimizer_appear_in_the_table(drawn_by: bool) -> None:
    @dataclass(frozen=True)
    class Corner(normopt.Max):
        """The largest entry under another name."""

    class CornerDescent(SteepestDescent):
        def __init__(self, params: Any, lr: float = 0.1) -> None:
            super().__init__(params, lr, Corner())

    class Demanding(SteepestDescent):
        def __init__(self, params: Any, needed: float) -> None:
            super().__init__(params, needed)

    row = next(line for line in periodic_table().splitlines() if line.startswith("Corner"))
    assert "CornerDescent" in row and "(Smoothed(norm=Corner()))" in row
    assert "Demanding" not in periodic_table()


def test_the_documented_table_is_the_printed_one() -> None:
    pytest.importorskip("tabulate")
    page = (Path(__file__).parents[2] / "docs" / "optimizers.md").read_text()
    assert periodic_table() in page
    assert not [name for name in ZOO if f"`{name}`" not in page]
