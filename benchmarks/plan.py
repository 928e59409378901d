"""From the command line to the runs: optimizers, rates, seeds, corpus, device."""

import difflib
from argparse import Namespace
from dataclasses import replace
from typing import Any

import torch

import normopt
from benchmarks.data import Corpus, load_or_fall_back
from benchmarks.presets import CONSTRAINED_MODELS, PRESETS, Preset, RunConfig, tuned_options, variants

BASELINE = "adamw"


class PlanError(ValueError):
    """Arguments that do not make a benchmark."""


class Plan:
    """What every run of one command shares, and the configurations made from it."""

    def __init__(self, arguments: Namespace) -> None:
        self.arguments = arguments
        self.optimizers = check_names(arguments.optimizers)
        self.device = resolve_device(arguments.device)
        self.preset = choose_preset(arguments)
        self.corpus: Corpus = load_or_fall_back(arguments.data)
        self.corpus.check(self.preset.context)
        try:
            arguments.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PlanError(f"--out {arguments.out} cannot be used: {error.strerror}") from None

    def config(self, optimizer: str, seed: int, lr: float | None = None) -> RunConfig:
        """One run, by default at the tuned learning rate."""
        options = self.options(optimizer)
        tuned = options.pop("lr")
        return RunConfig(
            optimizer=optimizer,
            lr=tuned if lr is None else lr,
            options=options,
            model=self.arguments.model,
            preset=self.preset,
            seed=seed,
            source=self.corpus.name,
            corpus=self.corpus.digest,
            device=self.device,
            model_options=self.arguments.model_options,
        )

    def options(self, optimizer: str) -> dict[str, Any]:
        """A copy of the tuned options, learning rate included; constrained models are not decayed."""
        options = dict(tuned_options(self.preset.name, optimizer)[0])
        undecayed = {"weight_decay": 0.0} if self.arguments.model in CONSTRAINED_MODELS else {}
        return {name: undecayed.get(name, value) for name, value in options.items()}

    def untuned(self) -> list[str]:
        """The optimizers without an entry of their own for this preset."""
        return [name for name in self.optimizers if not tuned_options(self.preset.name, name)[1]]


def check_names(names: list[str]) -> list[str]:
    """The names without repetitions; an unknown one raises `PlanError` with the nearest known one."""
    known = sorted({*normopt.list_optimizers(), *variants()})
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"choose from {', '.join(known)}"
            raise PlanError(f"unknown optimizer {name!r}: {hint}")
    return list(dict.fromkeys(names))


def resolve_device(name: str) -> str:
    """A torch device name; "auto" takes CUDA when there is one."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (AssertionError, RuntimeError) as error:
        raise PlanError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None
    return name


def choose_preset(arguments: Namespace) -> Preset:
    """The preset of the command line, with what else it says of the runs; no warm-up for constrained models."""
    preset = PRESETS["smoke" if arguments.smoke else arguments.preset]
    given: dict[str, int] = {"steps": arguments.steps, "evaluations": arguments.evaluations, "batch": arguments.batch}
    if arguments.width:
        d_head = preset.d_model // preset.n_heads
        if arguments.width % d_head:
            raise PlanError(f"--width {arguments.width} is no multiple of the preset's heads of {d_head}")
        given |= {"d_model": arguments.width, "n_heads": arguments.width // d_head}
    changes = {name: value for name, value in given.items() if value}
    return replace(preset, **changes, **({"warmup": 0} if arguments.model in CONSTRAINED_MODELS else {}))
