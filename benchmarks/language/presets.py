"""Sizes and schedules of the benchmark runs, the tuned options of the optimizers, and the configuration of a run."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.contenders import WITHOUT
from benchmarks.harness import PlanError
from benchmarks.output.rows import cell_name

TUNED = Path(__file__).with_name("tuned.json")
#: Keys in the entries of `tuned.json` that are not options of an optimizer, see `tuned_options`.
DECLARATIONS = ("schedule", "model_options")
UNTUNED: dict[str, Any] = {"lr": 1e-3}


@dataclass(frozen=True)
class Preset:
    """One size of the benchmark: the model, the batches, the schedule and the evaluation.

    The learning rate warms up linearly over `warmup` steps, stays constant, and falls linearly to zero over the last
    `decay` of the run; gradients are clipped to global norm `clip`. `micro_batch` sequences pass through the model at
    a time. `bf16` turns on autocast on CUDA. The held-out loss is taken `evaluations` times on `curve_tokens`
    tokens for the curve, and once at the end on `final_tokens` tokens.
    """

    name: str
    d_model: int
    n_layers: int
    n_heads: int
    steps: int
    d_ff: int | None = None
    context: int = 128
    batch: int = 16
    micro_batch: int = 16
    warmup: int = 20
    decay: float = 0.4
    clip: float = 1.0
    bf16: bool = False
    evaluations: int = 20
    curve_tokens: int = 32_768
    final_tokens: int = 262_144

    def rate(self, step: int) -> float:
        """The learning rate of step 0 .. steps - 1, as a fraction of its peak."""
        decay = (self.steps - step) / max(1.0, self.decay * self.steps)
        return min(1.0, (step + 1) / max(1, self.warmup), max(0.0, decay))

    def of_length(self, steps: int) -> "Preset":
        """The preset with another number of steps, and the same schedule: warm-up in proportion."""
        return replace(self, steps=steps, warmup=round(self.warmup * steps / self.steps))

    @property
    def schedule(self) -> str:
        """The schedule in words: all that `rate` depends on, each of which counts in the keys of runs."""
        return f"warm-up {self.warmup} steps, constant, linear to 0 over the last {self.decay} of {self.steps} steps"


PRESETS = {
    preset.name: preset
    for preset in (
        Preset("smoke", 32, 2, 2, steps=40, context=64, warmup=5, curve_tokens=2048, final_tokens=8192),
        Preset("quick", 96, 4, 3, steps=600),
        Preset("standard", 128, 5, 4, steps=1000),
        Preset(
            "gpt2",
            *(768, 12, 12),
            steps=5000,
            d_ff=2048,
            context=1024,
            batch=512,
            micro_batch=32,
            warmup=250,
            bf16=True,
            curve_tokens=1_048_576,
            final_tokens=10_485_760,
        ),
    )
}


#: Models that are trained without warm-up and without weight decay: their constraints replace both.
CONSTRAINED_MODELS = ("angpt", "ngpt")


#: Entries of optimizers by preset and name, see `tuned_options`.
Tuned = dict[str, dict[str, dict[str, Any]]]


def read_tuned(own: Path | None = None, preset: str = "quick") -> Tuned:
    """The entries of `tuned.json`, with those of the file `own` in their place or beside them.

    `own` holds what `tuned.json` holds, or the entries of `preset` alone, as in the `chosen.json` that `sweep` writes.
    An entry with "parts", options by the name of each part, is a recipe: it stands for the entry with all of them, and
    for one more entry without each, called `muonplus-soap-without-heads`.

    Raises:
        PlanError: if `own` cannot be read, or an entry is not a dict with a positive learning rate.
    """
    tuned: Tuned = json.loads(TUNED.read_text())
    for name, entries in (_given(own, preset) if own else {}).items():
        tuned[name] = {**tuned.get(name, {}), **entries}
    return {name: with_ablations(entries) for name, entries in tuned.items()}


def _given(own: Path, preset: str) -> Tuned:
    try:
        given = json.loads(own.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"--tuned {own} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise PlanError(f"--tuned {own} is not JSON: {error}") from None
    if not isinstance(given, dict) or not all(isinstance(value, dict) for value in given.values()):
        raise PlanError(
            f'--tuned {own} is not like {{"quick": {{"muon": {{"lr": 0.04}}}}}} or {{"muon": {{"lr": 0.04}}}}'
        )
    found = given if given.keys() <= PRESETS.keys() else {preset: given}
    for entries in found.values():
        for optimizer, entry in entries.items():
            lr = entry.get("lr") if isinstance(entry, dict) else None
            if isinstance(lr, bool) or not isinstance(lr, (int, float)) or not 0 < lr < float("inf"):
                raise PlanError(f"--tuned {own}: {optimizer} has no positive number as its lr")
            parts = entry.get("parts", {})
            if not isinstance(parts, dict) or not all(isinstance(options, dict) for options in parts.values()):
                raise PlanError(
                    f'--tuned {own}: the parts of {optimizer} are not like {{"decay": {{"weight_decay": 0}}}}'
                )
    return found


def with_ablations(entries: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The entries, with those without each of its parts beside every recipe, see `read_tuned`."""
    found = {}
    for name, entry in entries.items():
        parts = entry.get("parts", {})
        own = {key: value for key, value in entry.items() if key != "parts"}
        found[name] = _merged([own, *parts.values()])
        for left_out in parts:
            kept = [options for part, options in parts.items() if part != left_out]
            found[f"{name}{WITHOUT}{left_out}"] = _merged([own, *kept])
    return found


def _merged(several: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """One dict of several: what is a dict in two of them is merged too, of other values the last counts."""
    merged: dict[str, Any] = {}
    for each in several:
        for name, value in each.items():
            both = isinstance(value, dict) and isinstance(merged.get(name), dict)
            merged[name] = _merged([merged[name], value]) if both else value
    return merged


def tuned_options(preset: str, optimizer: str, tuned: Tuned | None = None) -> tuple[dict[str, Any], bool]:
    """The options for an optimizer, learning rate included, and whether they were tuned at this preset.

    An optimizer without an entry for the preset has the options of "quick", and without any entry a learning rate of
    1e-3. An entry with the key "optimizer" is a variant of that optimizer under a name of its own; an entry called
    `muon@angpt` is for a model. Two keys are not options of the optimizer (`DECLARATIONS`): "schedule" sets "warmup"
    and "decay" where the command line does not, "model_options" arguments of the model.
    """
    tuned = tuned or read_tuned()
    if optimizer in tuned.get(preset, {}):
        return tuned[preset][optimizer], True
    return tuned["quick"].get(optimizer, UNTUNED), False


def variants(tuned: Tuned | None = None) -> list[str]:
    """The names in `tuned.json` that are not optimizers of normopt but variants of an optimizer."""
    tuned = tuned or read_tuned()
    return [name for entries in tuned.values() for name, options in entries.items() if "optimizer" in options]


@dataclass(frozen=True)
class RunConfig:
    """Everything that determines a run; `key` identifies it in the results.

    `diagnose`: measure the norms inside the model whenever the loss curve gets a point. `plugins`: Python files that
    are imported before the run, each with the hash of its content. `parallel`: how several processes train the model,
    see `benchmarks.language.parallel.Together`; their number is no part of it. `split`: the text that losses are taken
    on, one of `benchmarks.language.data.SPLITS`; rows from before there were two do not name it, and have "validation".
    """

    optimizer: str
    lr: float
    options: dict[str, Any]
    model: str
    preset: Preset
    seed: int
    source: str
    corpus: str
    device: str
    model_options: dict[str, Any] = field(default_factory=dict)
    diagnose: bool = False
    plugins: dict[str, str] = field(default_factory=dict)
    parallel: str = ""
    split: str = "validation"

    @property
    def key(self) -> str:
        """Hash of the configuration; of files their content counts, not their paths, and unset options do not count."""
        content = {name: value for name, value in asdict(self).items() if name != "source"}
        content["plugins"] = list(self.plugins.values())
        content["split"] = "" if self.split == "validation" else self.split
        for name in ("model_options", "diagnose", "plugins", "parallel", "split"):
            if not content[name]:
                del content[name]
        content["preset"] = {name: value for name, value in content["preset"].items() if value is not None}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def label(self) -> str:
        """Name of the run for people."""
        return f"{cell_name(self.optimizer, self.model, self.model_options)} lr {self.lr:g} seed {self.seed}"
