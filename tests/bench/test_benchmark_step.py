"""`python -m benchmarks step`: contenders, turns, ratios, goals and plots."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import __main__ as command_line
from benchmarks.__main__ import main
from benchmarks.cost import contenders, step
from benchmarks.cost.contenders import COMPILED, FAMILIES, REFRESH, SCALE, hidden, library_of, rest, tensors
from benchmarks.cost.machine import WallClock
from benchmarks.cost.step import ROWS, SETS, Entry, block_of, matrices, rounds_within, with_earlier
from benchmarks.cost.step_figures import plot_scale, plot_step
from benchmarks.cost.step_goals import FASTEST, GOALS, ITSELF, Goal, fastest_peer, goals_table, judged
from benchmarks.cost.step_report import line, scale_table
from benchmarks.output.records import append_row, read_rows
from benchmarks.output.tables import drawn
from normopt.optimizer import SteepestDescent

INSTALLED = {name: (family, maker) for family, name, maker in contenders.installed(list(FAMILIES))}
LIST = partial(matrices, 3, 8, 6)
#: How far the weights may be from those of the family's first contender after a few steps, relative to how far they
#: went: products in bfloat16 for Muon and NorMuon, other polynomials for the rest; Shampoo is grafted here alone.
DISTANCE = {"muon": 0.02, "normuon": 0.02, "scion": 0.2, "soap": 0.3}
OWN_METHOD = ("normopt Muon, auto", "pytorch-optimizer Shampoo + fused AdamW", "dion Muon", "dion NorMuon")


def test_the_command_line_knows_all_sets_and_families() -> None:
    assert {*command_line.STEP_SETS, "smoke"} == {*SETS, SCALE}
    assert list(command_line.FAMILIES) == list(FAMILIES)
    parsed = command_line.make_parser().parse_args(["step"])
    assert parsed.threads == [None, 1] and "gpt2" not in parsed.sets and parsed.rounds % REFRESH == 0


@pytest.mark.parametrize(
    "wrong",
    [
        "--threads=0",
        "--threads=all",
        "--rounds=15",
        "--sets=tiny",
        "--families=adamq",
        "--sets=scale --families=soap,shampoo",
    ],
)
def test_what_cannot_be_measured_is_refused(wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The error names the option; nothing has been made."""
    with pytest.raises(SystemExit):
        main(["step", *wrong.split(), "--out", str(tmp_path / "out")])
    option = wrong.split()[-1].partition("=")[0]
    assert option in capsys.readouterr().err.partition("error: ")[2] and not (tmp_path / "out").exists()


def take_steps(entry: Entry, count: int) -> list[Tensor]:
    """How far each tensor went."""
    before = [p.detach().clone() for p in entry.tensors]
    torch.manual_seed(1)
    for _ in range(count):
        for p in entry.tensors:
            p.grad = 1e-2 * torch.randn_like(p)
        assert min(entry.steps(1)) > 0
    return [p.detach() - q for p, q in zip(entry.tensors, before, strict=True)]


@pytest.mark.parametrize("made", [SETS["smoke"], LIST], ids=["model", "list"])
@pytest.mark.parametrize("name", INSTALLED)
def test_every_contender_moves_every_parameter(name: str, made: Any) -> None:
    """Some move only after the first refresh of what they divide by."""
    moved = take_steps(Entry(*[INSTALLED[name][0], name, INSTALLED[name][1]], made), REFRESH + 1)
    assert all(bool(m.any()) for m in moved)


@pytest.mark.parametrize("family", FAMILIES)
def test_contenders_of_a_family_do_the_same_work(family: str) -> None:
    """On a plain list, where roles make no difference, all end at the same weights: their options agree."""
    named = {name: maker for name, (of, maker) in INSTALLED.items() if of == family}
    moved = {name: take_steps(Entry(family, name, maker, LIST), REFRESH + 2) for name, maker in named.items()}
    first = next(iter(moved.values()))
    for name in set(moved) - set(OWN_METHOD):
        for ours, theirs in zip(first, moved[name], strict=True):
            assert float((theirs - ours).norm() / ours.norm()) < DISTANCE.get(family, 1e-3), name


def test_what_is_compiled_is_ours_and_timed_on_demand() -> None:
    compiled = [family for family, name, _ in contenders.installed(list(FAMILIES), compiled=True)]
    assert len(compiled) == len(INSTALLED) + len(contenders.COMPILED)
    for family, maker in contenders.COMPILED.items():
        optimizer: Any = maker(SETS["smoke"]())
        assert optimizer.compiles and type(optimizer).__name__.lower() == family


def test_a_graph_records_a_step_after_some_and_replays_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for CUDA's streams and graphs: recording runs nothing, and every replay is one step."""
    calls: list[str] = []

    class Stream:
        def wait_stream(self, other: Stream) -> None:
            calls.append("wait")

    class Graph:
        def replay(self) -> None:
            calls.append("replay")

    @contextlib.contextmanager
    def graph(recorded: Graph) -> Iterator[None]:
        calls.append("record")
        yield

    for name, found in (("Stream", Stream), ("current_stream", Stream), ("CUDAGraph", Graph), ("graph", graph)):
        monkeypatch.setattr(torch.cuda, name, found)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    optimizer = contenders.as_graph(contenders.torchs("AdamW"))(LIST())
    assert optimizer.param_groups[0]["capturable"] is True
    replay: Any = optimizer.step
    replay.step = lambda: calls.append("step")
    for _ in range(contenders.BEFORE_CAPTURE + 2):
        optimizer.step()
    assert calls == ["wait", "step", "wait"] * contenders.BEFORE_CAPTURE + ["record", "step", "replay", "replay"]


def test_graphs_are_of_contenders_and_only_on_demand() -> None:
    with_graphs = [name for _, name, _ in contenders.installed(list(FAMILIES), graphs=True)]
    assert {f"{name}, graph" for name in contenders.GRAPHED} == {*with_graphs} - {*INSTALLED}


def test_families_with_refreshes_are_those_whose_refreshes_can_be_staggered() -> None:
    found = [name for name in FAMILIES if "staggered" in inspect.signature(SteepestDescent.registry[name]).parameters]
    assert tuple(found) == contenders.REFRESHED


def test_names_begin_with_the_library() -> None:
    assert library_of("torch AdamW, fused") == "torch" and library_of("pytorch-optimizer Lion") == "pytorch-optimizer"


def test_families_have_ours_first_and_a_peer() -> None:
    for family, makers in FAMILIES.items():
        found = [name for name in makers if name in INSTALLED]
        assert library_of(found[0]) == "normopt" != library_of(found[-1]), family
    for family in ("adamw", "sgd"):
        assert [name for name in FAMILIES[family] if name.endswith("unchecked")], family


def test_hidden_matrices_and_the_rest_are_all_parameters() -> None:
    model = SETS["smoke"]()
    matrices_of, others = hidden(model), rest(model)
    assert len(matrices_of) == 2 * 5 and all(p.ndim == 2 for p in matrices_of)
    assert {id(p) for p in matrices_of} | {id(p) for p in others} == {id(p) for p in tensors(model)}
    assert len(matrices_of) + len(others) == len(tensors(model))
    plain = LIST()
    assert len(hidden(plain)) == len(plain) and not rest(plain)


def test_sets_are_what_the_goals_name() -> None:
    shapes = {name: {tuple(p.shape) for p in tensors(SETS[name]())} for name in ("two", "many", "matrices")}
    assert shapes == {"two": {(8, 6)}, "many": {(16, 16)}, "matrices": {(64, 64)}}
    assert [len(tensors(SETS[name]())) for name in shapes] == [2, 200, 48]


def test_short_steps_are_timed_in_blocks_of_whole_periods_and_long_ones_singly() -> None:
    assert block_of(2e-3) == block_of(1e-3) == 1
    assert block_of(9e-4) == 10 and block_of(20e-6) == 50 and block_of(1e-7) == step.LONGEST_BLOCK
    assert rounds_within(1e-3, 30, False) == rounds_within(1e-3, 30, True) == 30
    assert rounds_within(0.09, 30, False) == 22 and rounds_within(0.09, 30, True) == 20
    assert rounds_within(50.0, 30, False) == step.FEWEST and rounds_within(50.0, 30, True) == REFRESH


class Refreshing(torch.optim.SGD):
    """Counts what its steps cost: 1, every tenth 10, and the first `FIRST`."""

    FIRST, count = 1000.0, 0.0

    def step(self, closure: Any = None) -> Any:
        made = self.param_groups[0].setdefault("made", 0)
        self.param_groups[0]["made"] += 1
        Refreshing.count += self.FIRST if made == 0 else 10.0 if made % REFRESH == REFRESH - 1 else 1.0


class CountClock(WallClock):
    """Reads what steps have cost so far."""

    def stamp(self) -> float:
        return Refreshing.count


@pytest.mark.parametrize("block", [1, REFRESH])
def test_turns_cover_whole_periods_and_find_the_slow_place(block: int) -> None:
    entry = Entry("", "normopt Test", lambda ps: Refreshing(tensors(ps)), LIST)
    entry.clock = CountClock()
    entry.warm_up()
    entry.block = block
    for _ in range(REFRESH):
        entry.turn()
    columns = {"set": "two", "asked": "1", "device": "cpu"}
    row = step.row_of(entry, columns)
    assert row["first"] == Refreshing.FIRST and entry.ordinary == 1, "the first step is kept apart from ordinary ones"
    assert row["worst"] == 10 and row["mean"] == 1.9 and row["quartiles"] == [1, 1, 1]
    assert len(row["seconds"]) == REFRESH and row["block"] == block
    assert {len(place) for place in entry.by_place} == {block}


class CompileClock(WallClock):
    """Reads how many calls to `stamp` there were, and how many graphs have been compiled, 1000 for each."""

    stamps = 0

    def stamp(self) -> float:
        self.stamps += 1
        return self.stamps + 1000.0 * torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.slow
def test_compilation_is_in_the_first_step() -> None:
    entry = Entry("lion", "normopt Lion, compiled", COMPILED["lion"], LIST)
    for p in entry.tensors:
        p.grad = torch.ones_like(p)
    entry.clock = CompileClock()
    entry.warm_up()
    entry.turn()
    assert entry.first > 1000 and entry.ordinary == 1 and entry.turns == [[1.0] * entry.block]


def test_gradients_are_shared_and_new_in_every_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, float]] = []

    def turn(entry: Entry) -> None:
        grads = [p.grad for p in entry.tensors if p.grad is not None]
        assert len(grads) == len(entry.tensors) and entry.block > 1
        seen.append((entry.name, float(grads[0].sum())))
        entry.turns.append([1.0])

    monkeypatch.setattr(Entry, "turn", turn)
    found = step.measure_family("lion", LIST, False, REFRESH, "cpu")
    assert len({entry.tensors[0].grad is found[0].tensors[0].grad for entry in found}) == 1
    rounds = [seen[i : i + len(found)] for i in range(0, len(seen), len(found))]
    assert len(rounds) == REFRESH and all({name for name, _ in turns} == set(FAMILIES["lion"]) for turns in rounds)
    assert all(len({total for _, total in turns}) == 1 for turns in rounds)
    assert rounds[0][0][1] != rounds[1][0][1] and len({tuple(name for name, _ in turns) for turns in rounds}) > 1


def row(name: str, median: float, family: str = "lion", of: str = "quick", **own: Any) -> dict[str, Any]:
    columns = {"set": of, "tensors": 3, "family": family, "name": name, "asked": "1", "parameters": 10**6}
    times = {"quartiles": [median / 2, median, median * 2], "mean": median, "worst": 3 * median, "seconds": [median]}
    cost = {"gemm": {"float32": 1e9, "bfloat16": 2e9}, "flops": 1e6, "state_bytes_per_parameter": 4.0}
    return {**columns, **times, **cost, "first": 0.25, "block": 10, **own}


def test_ratios_are_to_the_fastest_peer_at_the_same_place() -> None:
    rows = [row("normopt Lion", 2e-3, mean=8e-3), row("a Lion", 4e-3), row("b Lion", 3e-3, mean=16e-3)]
    rows += [row("c", 1e-3, "adamw"), row("d Lion", 1e-4, of="wide"), row("e Lion", 1e-4, asked="default")]
    rows += [row("f Lion", 1e-4, tensors=4), row("normopt AdamW", 5e-3, "adamw", "wide")]
    assert fastest_peer(rows[0], rows, "median") is rows[2] and fastest_peer(rows[0], rows, "mean") is rows[1]
    assert fastest_peer(rows[-1], rows, "median") is None
    cells = line(rows[0], rows)
    assert cells["/ fastest peer"] == "0.67" and cells["mean / fastest"] == "2.00", "each by its own statistic"
    assert cells["median ms"] == "2" and cells["mean ms"] == "8" and cells["worst / mean"] == "0.75"
    assert cells["GEMM limit"] == "50%" and cells["first ms"] == "250" and cells["turns"] == "1 x 10"
    assert line(rows[-1], rows)["/ fastest peer"] == ""
    assert line(row("normopt Muon", 1e-3, "muon"), rows)["GEMM limit"] == "50%", "bfloat16"


def test_goals_are_of_contenders_and_of_sets_that_exist() -> None:
    names = {name for makers in FAMILIES.values() for name in makers}
    for goal in GOALS:
        assert goal.name in names and library_of(goal.name) == "normopt", goal
        assert goal.peer in {FASTEST, ITSELF} | names and set(goal.sets) <= set(SETS), goal
        assert goal.statistic in ("median", "mean", "worst") and 0 < goal.limit <= 2, goal


def test_goals_are_judged_by_set_and_thread_setting() -> None:
    rows = [row("normopt SOAP", 2.0, "soap", mean=3.0, worst=7.0), row("x SOAP", 1.0, "soap", mean=5.0)]
    rows += [row("normopt Muon", 3.0, "muon", "wide"), row("torch Muon + fused AdamW", 10.0, "muon", "wide")]
    assert judged(Goal("normopt SOAP", 0.7, statistic="mean"), rows, "1") == {"quick": 0.6}
    assert judged(Goal("normopt SOAP", 2.0, ITSELF, "worst"), rows, "1") == {"quick": pytest.approx(7 / 3)}
    assert judged(Goal("normopt SOAP", 1.0, sets=("two",)), rows, "1") == {}
    assert judged(Goal("normopt Muon", 0.4, "torch Muon + fused AdamW"), rows, "1") == {"wide": pytest.approx(0.3)}
    assert judged(Goal("normopt Muon", 0.4, "timm Muon"), rows, "1") == {}
    table, met, cells = goals_table(rows)
    assert (met, cells) == (3, 4) and len(table) == 4
    text = drawn(table, "github")
    assert "0.60 met" in text and "2.33 missed" in text and "median <= 0.40 x torch Muon + fused AdamW" in text


def test_plots_and_the_scale_table(tmp_path: Path) -> None:
    names = list(FAMILIES["sgd"])
    rows = [row(name, 1e-4 * (i + 1), "sgd", "scale", tensors=n) for n in (10, 100) for i, name in enumerate(names)]
    table = scale_table(rows)
    assert [cells["optimizer"] for cells in table] == names
    assert table[0]["10 tensors"] == "10" and table[0]["100 tensors"] == "1"
    plot_scale(rows, "1 thread", tmp_path / "scale.png")
    plot_step(rows, "1 thread", tmp_path / "step.png")
    assert all((tmp_path / f"{name}.png").stat().st_size > 10_000 for name in ("scale", "step"))


@pytest.mark.slow
def test_the_command_writes_tables_and_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--threads", "1,2", "--families", "adamw,lion", "--compile", "--out", str(tmp_path)]
    assert main(["step", "--smoke", *arguments]) == 0
    rows = list(read_rows(tmp_path / "step.jsonl").values())
    assert "normopt Lion, compiled" in {row["name"] for row in rows if row["set"] == "smoke"}
    assert {row["family"] for row in rows} == {"adamw", "lion"} and all(
        step.FEWEST <= len(row["seconds"]) <= 10 for row in rows
    )
    assert {(row["asked"], row["threads"]) for row in rows} == {("1", 1), ("2", 2)}
    assert {row["tensors"] for row in rows if row["set"] == "scale"} == set(step.SMOKE_COUNTS)
    assert "torch AdamW, fused" in capsys.readouterr().out
    page = (tmp_path / "step.md").read_text()
    assert "normopt Lion, compiled" in page and "Steps on 2 threads" in page and "GFLOP/s" in page
    for name in ("step", "step_2", "scale", "scale_2"):
        assert f"{name}.png" in page and (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_plain_lists_are_parameters() -> None:
    assert all(isinstance(p, nn.Parameter) for p in LIST())


def test_a_family_that_is_measured_alone_joins_the_others(tmp_path: Path) -> None:
    machine = {"cpu": "A", "flags": ["avx2"], "torch": "2.13.0", "device": "cpu"}
    old, new = ({"key": "lion", "mean": mean, **machine} for mean in (1.0, 2.0))
    for row in ({"key": "sgd", **machine}, old, {"key": "muon", **machine, "cpu": "B"}, {"key": "older"}, new):
        append_row(tmp_path / ROWS, row)
    assert with_earlier([new], tmp_path) == [{"key": "sgd", **machine}, new]
