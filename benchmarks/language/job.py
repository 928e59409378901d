"""Run configurations one after the other, each by all processes of a job."""

import sys
from contextlib import nullcontext
from pathlib import Path

from tqdm import tqdm

from benchmarks.language.parallel import Together
from benchmarks.language.presets import RunConfig
from benchmarks.language.train import train
from benchmarks.language.workers import announce, summary
from benchmarks.output.records import RESULTS, Row, alone, append_row, read_rows, unreadable


class Job:
    """Runs configurations in the processes that torchrun has started; the first one appends each row to the results.

    A run that fails ends the job: the other processes could only wait for it. The same command continues.
    """

    failures: tuple[str, ...] = ()

    def __init__(self, out: Path, team: Together) -> None:
        self.out, self.team = out, team

    def run(self, configs: list[RunConfig]) -> list[Row]:
        """The rows of the configurations, in order, on the first process; a configuration on file is not run again."""
        configs = list({config.key: config for config in configs}.values())
        with alone(self.out) if self.team.is_first else nullcontext():
            results = self.out / RESULTS
            done = self.team.agreed(read_rows(results) if self.team.is_first else None)
            if self.team.is_first and (lost := unreadable(results)):
                print(lost, file=sys.stderr)
            announce([done[config.key] for config in configs if config.key in done], len(configs), results)
            for config in configs:
                checkpoint = self.out / "checkpoints" / config.key
                if config.key not in done:
                    done[config.key] = self._row(config, checkpoint)
                    if self.team.is_first:
                        append_row(results, done[config.key])
                self.team.forget(checkpoint)
        return [done[config.key] for config in configs]

    def _row(self, config: RunConfig, checkpoint: Path) -> Row:
        interval = 0.2 if sys.stderr.isatty() else 10
        names = {"desc": config.label, "leave": False, "unit": "step", "mininterval": interval}
        with tqdm(total=config.preset.steps, disable=not self.team.is_first, **names) as bar:

            def report(step: int, loss: float, speed: float) -> None:
                bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s", refresh=False)
                bar.update(step - bar.n)

            row = train(config, checkpoint, report)
        if self.team.is_first:
            tqdm.write(f"{config.label}: {summary(row)}")
        return row
