"""`python -m benchmarks norms`: norms inside the models over the course of training."""

from argparse import Namespace
from pathlib import Path

from benchmarks.language.plan import Plan
from benchmarks.language.workers import Pool
from benchmarks.output.plots import plot_norms
from benchmarks.output.records import Row
from benchmarks.output.rows import cell_of, check_corpus, group, loss_cells, setting
from benchmarks.output.tables import publish, set_aside


def norms(arguments: Namespace) -> int:
    """Train every model with every optimizer, measure norms, and report; returns the exit code, 1 when a run failed."""
    plan = Plan(arguments)
    rates = plan.rates(arguments.lr)
    configs = [
        plan.config(cell, seed, rates.get(cell), diagnose=True)
        for cell in plan.cells
        for seed in range(arguments.seeds)
    ]
    pool = Pool(arguments.out, plan.workers)
    rows = pool.run(configs)
    write_norms(rows, arguments.out)
    return 1 if pool.failures else 0


def write_norms(rows: list[Row], out: Path) -> None:
    """Print the norms after the last step, and write `norms.md` and plots of the first run of each cell."""
    rows = [row for row in rows if row["status"] == "finished"]
    if rows:
        check_corpus(rows)
        set_aside(out / "norms.md", "norms_residual.png", "norms_rows.png", "norms_alpha.png")
        cells = group(rows, cell_of)
        table = [norms_line(name, members) for name, members in cells.items()]
        files = plot_norms({name: members[0] for name, members in cells.items()}, out)
        publish(table, setting(rows), out / "norms.md", [f"![{name}]({name})" for name in files])


def norms_line(name: str, rows: list[Row]) -> dict[str, str]:
    """One line of the table of norms: ranges over layers at the last evaluation."""
    first, last = rows[0]["norms"][0][1], rows[0]["norms"][-1][1]
    return {
        "optimizer": name,
        "lr": f"{rows[0]['config']['lr']:g}",
        **loss_cells(rows),
        "residual norm at first": _extent(first["residual"]),
        "residual norm": _extent(last["residual"]),
        **{f"rows of {kind}": _extent(lengths) for kind, lengths in last["rows"].items()},
        **{f"alpha of {kind}": _extent(last["alpha"].get(kind, [])) for kind in ("attention", "mlp")},
    }


def _extent(values: list[float]) -> str:
    return f"{min(values):.3g} .. {max(values):.3g}" if values else ""
