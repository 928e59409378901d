"""What ``summary`` and ``describe`` say, and that it is true; the periodic table; the command line."""

from __future__ import annotations

import re
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import normopt
from normopt import SteepestDescent, View, describe, periodic_table, summary, zoo
from normopt.__main__ import main
from normopt.nn import GPT
from normopt.norms import SCALES, names
from normopt.report import MEMORIES, WIDTH, state_bytes

SPECTRAL = {"method": "exact"}


def by_name(optimizer: SteepestDescent) -> dict[str, dict[str, Any]]:
    return {row["parameter"]: row for row in summary(optimizer)}


def test_muon_on_a_gpt() -> None:
    model = GPT(13, 8, 2, 2)
    optimizer = normopt.create("muon", model, lr=0.02, overrides={"*down*": {"lr": 0.5}, "head.*": normopt.Row()})
    rows = by_name(optimizer)
    assert set(rows) == {name for name, _ in model.named_parameters()}
    qkv = rows["blocks.1.attention.qkv.weight"]
    assert (qkv["shape"], qkv["view"], qkv["role"]) == ((24, 8), (3, 8, 8), "linear")
    assert qkv["norm"].startswith("Spectral(scale='max1'")
    assert qkv["momentum"] == "EMA(beta=0.95, nesterov=True)"
    assert (qkv["step_size"], qkv["constraint"]) == ("Constant()", ["WeightDecay(weight_decay=0.1)"])
    assert (qkv["lr"], qkv["state_bytes"], qkv["parameters"]) == (0.02, 0, 192)
    assert qkv["effective_lr"] == pytest.approx(0.02 / 8**0.5)
    assert rows["blocks.0.mlp.down.weight"]["lr"] == 0.5
    embedding = rows["embed.weight"]
    assert (embedding["shape"], embedding["view"]) == ((13, 8), (1, 8, 13))
    assert embedding["norm"] == "Smoothed(norm=Max(), beta=0.95, eps=1e-08)" and embedding["effective_lr"] == 0.01
    assert rows["head.weight"]["norm"] == "Row()" and rows["head.weight"]["reason"] == "override 'head.*'"
    assert rows["norm.weight"]["view"] == (1, 1, 8)


def test_a_rate_that_is_not_the_optimizers_has_its_ratio_beside_it() -> None:
    model = GPT(13, 8, 2, 2)
    optimizer = normopt.create("muon", model, lr=0.02, overrides={"*down*": {"lr": 0.5}})
    rows = by_name(optimizer)
    assert [rows[name]["lr_ratio"] for name in ("embed.weight", "blocks.0.mlp.down.weight")] == [0.5, 25]
    lines = normopt.describe(optimizer).splitlines()
    rates = [line.removeprefix("lr          ") for line in lines if line.startswith("lr ")]
    assert rates == ["0.01, 0.5 times the optimizer's", "0.02", "0.5, 25 times the optimizer's"]
    normopt.set_lr(optimizer, 0.002)
    assert "0.001, 0.5 times the optimizer's" in normopt.describe(optimizer)
    still = SteepestDescent([{"params": [nn.Parameter(torch.ones(3))], "lr": 0.1}], lr=0.0, norm="max")
    assert "times" not in normopt.describe(still)  # of a rate of 0 there is no ratio


def test_optimizers_without_a_model() -> None:
    params = [nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(()))]
    rows = summary(normopt.create("adamw", params, lr=torch.tensor(0.25), weight_decay=0.5))
    assert [row["parameter"] for row in rows] == ["#0", "#1"]
    assert [row["shape"] for row in rows] == [(3, 2), ()]
    assert {row["lr"] for row in rows} == {0.25} and {row["role"] for row in rows} == {""}
    assert all(row["constraint"] == ["WeightDecay(weight_decay=0.5)"] for row in rows)
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 1.0}]
    assert [*by_name(normopt.create("adamw", groups))] == ["#0.0", "#1.0"]


@pytest.mark.parametrize("name", normopt.list_optimizers())
def test_every_optimizer_can_be_described(name: str) -> None:
    """Before and after steps, within the width, with every tensor and with the numbers of the param groups."""
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 5))
    optimizer = normopt.create(name, model)
    for _ in range(2):
        rows, text, full = summary(optimizer), describe(optimizer), describe(optimizer, full=True)
        assert len(rows) == 7 and all(type(row["effective_lr"]) is float for row in rows)
        assert max(map(len, f"{text}\n{full}".splitlines())) <= WIDTH
        assert {row["parameter"] for row in rows} <= {*full.split()}
        for key in "norm", "momentum", "step_size":
            assert all("".join(row[key].split()) in "".join(text.split()) for row in rows)
        totals = f"7 tensors, 85 parameters, {sum(row['state_bytes'] for row in rows):,} bytes of state"
        assert text.startswith(f"{type(optimizer).__name__}: {totals}")
        for group in optimizer.param_groups:
            decay = group.get("weight_decay")
            assert decay is None or decay == 0 or f"weight_decay={decay:.6g}" in text
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step(lambda: torch.zeros(()))


# Equal layers --------------------------------------------------------------------------------------------------------


def test_a_deep_model_is_one_screen() -> None:
    model = GPT(256, 96, 12, 3)
    for name in "muon", "scion", "soap", "adamw":
        optimizer = normopt.create(name, model)
        lines = describe(optimizer).splitlines()
        assert len(lines) < 50 and max(map(len, lines)) <= WIDTH
        (up,) = [line.split() for line in lines if ".up." in line]
        assert up[:4] == ["blocks.{0..11}.mlp.up.weight", "x12", "384x96", "1x384x96"]
        assert up[5] == f"{12 * 384 * 96:,}"
        assert "linear: Linear: a hidden layer" in "\n".join(lines)
        assert len(describe(optimizer, full=True).splitlines()) > 99


def test_a_layer_that_is_moved_otherwise_has_its_own_row() -> None:
    optimizer = normopt.create("muon", GPT(13, 8, 6, 2), overrides={"blocks.2.mlp.up.weight": {"lr": 0.5}})
    names = [line.split()[0] for line in describe(optimizer).splitlines() if ".up." in line]
    assert names == ["blocks.{0,1,3..5}.mlp.up.weight", "blocks.2.mlp.up.weight"]


def expanded(name: str) -> set[str]:
    """All names that one with braces stands for."""
    found = re.search(r"\{(.*?)\}", name)
    if found is None:
        return {name}
    numbers: list[int] = []
    for part in found[1].split(","):
        first, *rest = map(int, part.split(".."))
        numbers += range(first, (rest[0] if rest else first) + 1, rest[1] if len(rest) > 1 else 1)
    return {each for i in numbers for each in expanded(name[: found.start()] + str(i) + name[found.end() :])}


@given(st.sets(st.from_regex(r"\A[ab][0-9]{1,2}(\.[0-9]){0,2}\Z"), min_size=1, max_size=25))
def test_braces_stand_for_the_names_that_are_there_and_no_others(names: set[str]) -> None:
    optimizer = normopt.zoo.SGD([(name, nn.Parameter(torch.zeros(1))) for name in sorted(names)])
    rows = [row for row in describe(optimizer).splitlines() if re.match(r" +[ab]", row)]
    found = [(row.split()[0], int((re.search(r" x(\d+) ", row) or [0, 1])[1])) for row in rows]
    every = [each for name, _ in found for each in expanded(name)]
    assert sorted(every) == sorted(names)
    assert all(len(expanded(name)) == count for name, count in found)


# Numbers -------------------------------------------------------------------------------------------------------------


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
    assert summary(optimizer)[0]["state_bytes"] == 2 * 12 * number + 4


#: Arguments with which the size of an update does not depend on the gradient's spectrum.
KNOWN_SIZE: dict[str, Any] = {"spectral": SPECTRAL, "ky-fan": {"k": 1}}
KNOWN_SIZE |= {name: {"p": float("inf")} for name in ("schatten", "lp")}


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
        for w, row in zip(weights, summary(optimizer), strict=True):
            assert row["effective_lr"] == pytest.approx(measured(w), rel=5e-3), (shape, view)


def measured(w: Tensor) -> float:
    return w.detach().square().mean().sqrt().item()


def test_the_effective_lr_counts_the_radius_and_names_what_it_leaves_out() -> None:
    w = nn.Parameter(torch.zeros(3, 4))
    constant = SteepestDescent([w], lr=0.5, norm="max", step_size="Constant(4.0)")
    step_once(constant)
    assert summary(constant)[0]["effective_lr"] == measured(w) == 2.0
    for step_size, factor in ("dual", "dual norm"), ("sharp", "dual norm"), ("trust-ratio", "trust ratio"):
        optimizer = SteepestDescent([w], lr=0.5, norm="max", step_size=step_size)
        row = summary(optimizer)[0]
        assert (row["effective_lr"], row["times"]) == (0.5, factor)
        assert f"0.5 x {factor}" in describe(optimizer)


def test_the_effective_lr_of_composed_directions() -> None:
    """The last stage's, or the norm's under memory; at the first step all of them are exact."""
    w = nn.Parameter(torch.zeros(4, 6))
    for norm in "Smoothed(Max(), 0.9)", "Smoothed(Row(), 0.9)", "Chain(Spectral(), Euclidean())", "Chain(Row(), Max())":
        with torch.no_grad():
            w.zero_()
        optimizer = SteepestDescent([w], lr=0.5, norm=norm)
        step_once(optimizer)
        assert summary(optimizer)[0]["effective_lr"] == pytest.approx(measured(w), rel=5e-3)


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
    holes = [cell[1:-1] for row in cells().values() for cell in row.values() if cell.startswith("(")]
    assert len(holes) >= 4
    for hole in holes:
        w = nn.Parameter(torch.zeros(4, 6))
        optimizer = SteepestDescent([w], lr=0.5, norm=hole)
        step_once(optimizer)
        step_once(optimizer)  # a basis is built first
        assert w.detach().any()


@pytest.mark.usefixtures("registry")
def test_a_new_norm_and_a_new_optimizer_appear_in_the_table() -> None:
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
    page = (Path(__file__).parents[2] / "docs" / "optimizers.md").read_text()
    assert periodic_table() in page
    assert not [name for name in ZOO if f"`{name}`" not in page]


def test_the_documented_description_is_the_printed_one() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reports.md").read_text()
    assert describe(normopt.create("muon", GPT(256, 96, 12, 3), lr=0.02)) in page


# The command line ----------------------------------------------------------------------------------------------------


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    main(arguments)
    return capsys.readouterr().out


@pytest.fixture
def factories(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("factories")
    vars(module).update(gpt=lambda: GPT(13, 8, 2, 2), number=lambda: 3, broken=lambda: 1 / 0, net=nn.Linear(2, 2), x=3)
    monkeypatch.setitem(sys.modules, "factories", module)


def test_list_and_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(capsys, "list").split() == normopt.list_optimizers()
    assert command(capsys, "table") == f"{periodic_table()}\n"


@pytest.mark.usefixtures("factories")
def test_describe_a_model_that_a_factory_returns(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--optimizer", "scion", "--lr", "0.5", "--set", "momentum=0.25", "--set", "geometry=modula"]
    expected = normopt.create("scion", GPT(13, 8, 2, 2), lr=0.5, momentum=0.25, geometry="modula")
    assert command(capsys, "describe", "factories:gpt", *options) == f"{describe(expected)}\n"
    assert command(capsys, "describe", "factories:gpt", *options, "--full") == f"{describe(expected, full=True)}\n"


@pytest.mark.usefixtures("factories")
@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["factories"], "'factories' does not say where the model is; write package.module:factory"),
        (["nowhere.to:be"], "cannot import 'nowhere.to' from here: No module named 'nowhere'"),
        (["factories:nothing"], "'factories' has no 'nothing'"),
        (["factories:x"], "factories:x is int, not a callable that returns a model"),
        (["factories:net"], "factories:net is Linear, not a callable that returns a model"),
        (["factories:number"], "factories:number() returned int, not a torch.nn.Module"),
        (["factories:broken"], "factories:broken() raised ZeroDivisionError: division by zero"),
        (["factories:gpt", "--optimizer", "muun"], "unknown optimizer 'muun'; did you mean 'muon'?"),
        (["factories:gpt", "--set", "momentum"], "--set momentum: write NAME=VALUE"),
        (["factories:gpt", "--set", "wd=1"], "Muon has no argument 'wd'; did you mean 'weight_decay'?"),
        (["factories:gpt", "--lr", "-1"], "lr"),
    ],
)
def test_errors_say_what_to_do(arguments: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["describe", *arguments])
    assert error in capsys.readouterr().err


@pytest.mark.usefixtures("factories")
@pytest.mark.parametrize("has_rich", [True, False])
def test_a_terminal_gets_the_same_text(
    has_rich: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In colour where rich is installed."""
    if has_rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = command(capsys, "describe", "factories:gpt")
    assert ("\x1b[" in shown) == has_rich
    assert re.sub(r"\x1b\[[\d;]*m", "", shown) == describe(normopt.create("muon", GPT(13, 8, 2, 2))) + "\n"


def test_it_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "normopt", "describe", "torch.nn:Identity", "--optimizer", "sgd"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "error: " in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("what", ["list", "table"])
def test_a_reader_that_has_seen_enough_is_no_error(what: str) -> None:
    """As ``head`` is."""
    with subprocess.Popen(
        [sys.executable, "-m", "normopt", what],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
