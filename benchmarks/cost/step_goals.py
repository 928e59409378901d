"""What steps should cost, as data, and what the rows of `python -m benchmarks step` say of it."""

from dataclasses import dataclass

from benchmarks.cost.contenders import library_of
from benchmarks.output.records import Row
from benchmarks.output.tables import Table

#: Two tensors, 200 of 16 x 16, and a GPT of 4 layers and width 96: where bookkeeping is most of a step.
LIGHT = ("two", "many", "quick")
FASTEST = "fastest peer"
ITSELF = "its own mean"


@dataclass(frozen=True)
class Goal:
    """`statistic` of a contender's step is at most `limit` times that of `peer`.

    `statistic` is "median", "mean" or "worst", see `row_of`. `peer` is a contender's name, `FASTEST` for the fastest
    one of another library in the family, or `ITSELF` for the contender's own mean. `sets`: all if empty.
    """

    name: str
    limit: float
    peer: str = FASTEST
    statistic: str = "median"
    sets: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}, {self.statistic} <= {self.limit:.2f} x {self.peer}"


GOALS = (
    *(Goal(f"normopt {name}", 1.0, sets=LIGHT) for name in ("SGD", "Lion", "Signum", "RMSprop")),
    Goal("normopt AdamW, unchecked", 1.0, "torch AdamW, fused", sets=LIGHT),
    Goal("normopt AdamW", 1.15, "torch AdamW, fused", sets=LIGHT),
    Goal("normopt Muon", 0.4, "torch Muon + fused AdamW", sets=("wide",)),
    Goal("normopt Muon", 0.2, "torch Muon + fused AdamW", sets=("matrices",)),
    Goal("normopt Muon", 0.9),
    *(Goal(f"normopt {name}", 1.0) for name in ("Prodigy", "Adafactor", "NorMuon", "Scion")),
    *(Goal(f"normopt {name}", 0.7, statistic="mean") for name in ("SOAP", "Shampoo")),
    *(Goal(f"normopt {name}", 2.0, ITSELF, "worst") for name in ("SOAP", "Shampoo")),
)


def statistic_of(row: Row, statistic: str) -> float:
    """The median, the mean or the worst step of a row, in seconds."""
    return float(row["quartiles"][1] if statistic == "median" else row[statistic])


def place_of(row: Row) -> tuple[str, int, str]:
    """What rows share that are compared with each other: the set, its number of tensors and the thread setting."""
    return row["set"], row["tensors"], row["asked"]


def fastest_peer(row: Row, rows: list[Row], statistic: str) -> Row | None:
    """The fastest peer of a row's family at its place; `None` where no peer is installed."""
    same = [r for r in rows if r["family"] == row["family"] and place_of(r) == place_of(row)]
    peers = [r for r in same if library_of(r["name"]) != "normopt"]
    return min(peers, key=lambda r: statistic_of(r, statistic), default=None)


def ratio_of(row: Row, rows: list[Row], statistic: str = "median", peer: str = FASTEST) -> float | None:
    """A row's statistic over that of the peer, both as in `Goal`; `None` where the peer was not measured."""
    if peer == ITSELF:
        return statistic_of(row, statistic) / statistic_of(row, "mean")
    if peer == FASTEST:
        other = fastest_peer(row, rows, statistic)
    else:
        other = next((r for r in rows if r["name"] == peer and place_of(r) == place_of(row)), None)
    return None if other is None else statistic_of(row, statistic) / statistic_of(other, statistic)


def judged(goal: Goal, rows: list[Row], asked: str) -> dict[str, float]:
    """The ratio by set, in the order of the rows, of those sets that the goal is for and that were measured."""
    found = {}
    for row in rows:
        if row["name"] == goal.name and row["asked"] == asked and (not goal.sets or row["set"] in goal.sets):
            ratio = ratio_of(row, rows, goal.statistic, goal.peer)
            if ratio is not None:
                found[str(row["set"])] = ratio
    return found


def goals_table(rows: list[Row]) -> tuple[Table, int, int]:
    """A line for each goal and thread setting, a column for each set; and how many cells are met, of how many."""
    sets = list(dict.fromkeys(str(row["set"]) for row in rows))
    lines, met, all_cells = [], 0, 0
    for asked in dict.fromkeys(str(row["asked"]) for row in rows):
        for goal in GOALS:
            ratios = judged(goal, rows, asked)
            met += sum(ratio <= goal.limit for ratio in ratios.values())
            all_cells += len(ratios)
            if ratios:
                cells = {name: _verdict(ratios[name], goal.limit) if name in ratios else "" for name in sets}
                lines.append({"threads": asked, "goal": str(goal), **cells})
    return lines, met, all_cells


def _verdict(ratio: float, limit: float) -> str:
    return f"{ratio:.2f} {'met' if ratio <= limit else 'missed'}"
