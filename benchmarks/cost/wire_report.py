"""The table and the plot of `python -m benchmarks wire`."""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.output.plots import STYLE, save
from benchmarks.output.records import Row
from benchmarks.output.tables import publish, set_aside, write_table

NOTES = (
    "Counted from placements, nothing ran: the bytes of one step that leave a rank, mean and (largest) over ranks, "
    "with gradients and weights in float32. Parameters are sharded by rows over all ranks (FSDP2), or over those of "
    "each copy of the model (HSDP, copies x ranks of a copy). Muon moves the matrices of the layers (P entries), "
    "AdamW the rest, which sends nothing. Least, over N shards: 2 P (N-1) / N^2 entries, what it takes to make each "
    "matrix in one place of each copy, all but the maker's own part in and out again; 3 P (N-1) / N^2 with weights. "
    "(Ranks that do not divide a matrix send less, since owners have more of it than the mean; copies that share the "
    "work bring each matrix in once.) Gather: P (N-1) / N, every rank gathers all gradients and does all the work. "
    "FSDP2: what the forward and the backward pass send anyway, 3 (N-1) / N times all parameters, and an all-reduce "
    "over copies. All-to-alls: in a step, beside one small all-reduce; more than 2 where a rank's share is taken in "
    "waves, which bound temporary memory. Work: the largest over the mean, of the matrices' products (long x "
    "short^2); promised is at most the larger of 1.2 and the largest matrix. Idle: ranks that own no matrix. State: "
    "float32."
)
SECTION = ("model", "optimizer")


def write_wire(rows: list[Row], out: Path) -> None:
    """Print the table, and write `wire.md`, `wire.csv`, `wire.tex` and `wire.png`."""
    rows = sorted(rows, key=lambda row: (*(_order(rows, row, name) for name in SECTION), row["ranks"], row["layout"]))
    table = [line(row) for row in rows]
    set_aside(out / "wire.md", "wire.csv", "wire.tex", "wire.png")
    plot_wire(rows, out)
    write_table(table, out / "wire")
    publish(table, f"torch {rows[0]['torch']}. {NOTES}", out / "wire.md", ["![bytes by ranks](wire.png)"])


def _order(rows: list[Row], row: Row, column: str) -> int:
    return list(dict.fromkeys(r[column] for r in rows)).index(row[column])


def line(row: Row) -> dict[str, str]:
    """One line of the table."""
    mean, largest = row["work_mean"], row["work_largest"]
    return {
        "model": row["model"],
        "optimizer": row["optimizer"],
        "ranks": str(row["ranks"]),
        "layout": row["layout"],
        "MB sent": f"{megabytes(row['sent_mean'])} ({megabytes(row['sent_max'])})",
        "least": megabytes(row["least"]),
        "gather": megabytes(row["gather_all"]),
        "FSDP2": megabytes(row["fsdp"]),
        "sent / FSDP2": f"{100 * row['sent_mean'] / row['fsdp']:.3g}%",
        "all-to-alls": str(row["all_to_alls"]),
        "work max / mean": f"{row['work_max'] / mean:.2f}",
        "promised": f"{max(1.2, largest / mean):.2f}",
        "idle": str(row["idle"]),
        "MB state": f"{megabytes(row['state_mean'])} ({megabytes(row['state_max'])})",
    }


def megabytes(count: float) -> str:
    """Bytes in millions, with three digits at the least."""
    return f"{count / 1e6:.0f}" if count >= 1e8 else f"{count / 1e6:.3g}"


def plot_wire(rows: list[Row], out: Path) -> None:
    """Bytes that a rank sends in a step against the number of ranks, a panel for each model (`wire.png`).

    Lines are means over ranks, and bands go up to the rank that sends most.
    """
    models = list(dict.fromkeys(str(row["model"]) for row in rows))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4 * len(models), 4.8), layout="constrained")
        panels = figure.subplots(1, len(models), squeeze=False)[0]
        for axes, model in zip(panels, models, strict=True):
            _draw(axes, [row for row in rows if row["model"] == model])
            axes.set_title(model, loc="left", fontsize=11)
            axes.set_xlabel("ranks")
        panels[0].set_ylabel("MB a rank sends in a step, mean to largest")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
        save(figure, out / "wire.png")


def _draw(axes: Axes, rows: list[Row]) -> None:
    flat = [row for row in rows if row["layout"] == "FSDP2"]
    optimizers = list(dict.fromkeys(row["optimizer"] for row in rows))
    first = [row for row in flat if row["optimizer"] == optimizers[0]]
    ranks = [row["ranks"] for row in first]
    for column, label, style in (("fsdp", "FSDP2 itself", "-"), ("gather_all", "gather everything", "-.")):
        axes.plot(ranks, [row[column] / 1e6 for row in first], style, color="C0", label=label)
    lines = [(optimizer, 0) for optimizer in optimizers]
    lines += [(optimizers[0], shards) for shards in sorted({row["shards"] for row in rows if row["copies"] > 1})]
    for i, (optimizer, shards) in enumerate(lines, 1):
        # Of FSDP2 where `shards` is 0, else of copies with so many ranks.
        some = [row for row in rows if row["optimizer"] == optimizer]
        some = [
            row for row in some if (row["shards"] == shards if shards else True) and (row["copies"] > 1) == bool(shards)
        ]
        x = [row["ranks"] for row in some]
        mean, largest = ([row[name] / 1e6 for row in some] for name in ("sent_mean", "sent_max"))
        label = f"{optimizer}, {f'copies of {shards} ranks' if shards else 'FSDP2'}"
        axes.plot(x, mean, "--" if shards else "-", marker="o", color=f"C{i}", label=label, linewidth=2, markersize=4)
        axes.fill_between(x, mean, largest, color=f"C{i}", alpha=0.15, linewidth=0)
    least = [row["least"] / 1e6 for row in first]
    axes.plot(ranks, least, ":", color="black", label="least for gradients in, updates out", linewidth=1.5, zorder=5)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ranks, [str(n) for n in ranks], fontsize=8)
