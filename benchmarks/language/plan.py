"""From the command line to the runs: optimizers, rates, seeds, corpus, device."""

import inspect
from argparse import Namespace
from dataclasses import replace
from typing import Any

import torch

from benchmarks import controls, peers
from benchmarks.contenders import read_contenders
from benchmarks.harness import PlanError
from benchmarks.language.data import Corpus, load_or_fall_back
from benchmarks.language.plugins import import_plugins
from benchmarks.language.presets import (
    CONSTRAINED_MODELS,
    DECLARATIONS,
    PRESETS,
    TUNED,
    Preset,
    RunConfig,
    read_tuned,
    tuned_options,
    variants,
)
from benchmarks.language.room import check_room
from benchmarks.language.train import MODELS, make_model, make_optimizer
from benchmarks.language.workers import default_size
from benchmarks.output.records import WriteError
from benchmarks.output.rows import cell_name
from normopt.ingredient import nearest

#: The first seed of `grid` and `sweep`, far from the seeds of `compare`, on which the chosen rates are judged.
TUNING_SEED = 1000


class Plan:
    """The settings that all runs of one command share, and the configurations made from these settings.

    `cells` are the combinations of model and optimizer, each with the name that `cell_name` gives it.
    """

    def __init__(self, arguments: Namespace) -> None:
        self.arguments = arguments
        self.plugins = import_plugins(arguments.plugin)
        self.device = resolve_device(arguments.device)
        self.workers: int = arguments.workers or default_size(self.device)
        self.preset = choose_preset(arguments)
        self.tuned = read_tuned(arguments.tuned, self.preset.name)
        self.contenders = {c.name: c for c in read_contenders(arguments.optimizers, variants(self.tuned))}
        self.cells = {
            cell_name(optimizer, model): (optimizer, model)
            for model in arguments.model
            for optimizer in self.contenders
        }
        self.corpus: Corpus = load_or_fall_back(arguments.data)
        self.corpus.check(self.preset.context)
        try:
            check_room(arguments.out, self.preset, self.corpus.vocab_size, self.workers)
        except WriteError as error:
            remedy = "make room there or give another --out"
            raise PlanError(f"--out {arguments.out} cannot be used: {error}; {remedy}") from None
        self._check_cells()

    def _check_cells(self) -> None:
        """Make every model and every optimizer once, without memory for the weights; raises `PlanError`."""
        check_model_options(self.arguments.model, self.arguments.model_options)
        for cell, (optimizer, model) in self.cells.items():
            if peers.is_peer(self.contenders[optimizer].base) and model in CONSTRAINED_MODELS:
                raise PlanError(
                    f"--model {model} has constraints, which {optimizer} would not keep: leave one of them out"
                )
            if self.arguments.parallel and self.contenders[optimizer].base in controls.REPLACEMENTS:
                raise PlanError(f"{optimizer} needs whole gradients: leave --parallel {self.arguments.parallel} out")
            config = self.config(cell, seed=0)
            try:
                with torch.device("meta"):
                    made = make_model(config, self.corpus.vocab_size)
            except (TypeError, ValueError) as error:
                raise PlanError(f"{model} cannot be made with {config.model_options}: {error}") from None
            try:
                make_optimizer(config, made)
            except Exception as error:
                raise PlanError(f"--optimizers: {optimizer} cannot be made: {error}") from error

    def config(
        self,
        cell: str,
        seed: int,
        lr: float | None = None,
        diagnose: bool = False,
        entry: dict[str, Any] | None = None,
    ) -> RunConfig:
        """One run, by default as the cell's entry says and at the learning rate there.

        Constrained models have no warm-up unless it is asked for.
        """
        optimizer, model = self.cells[cell]
        entry = self.entry(cell) if entry is None else entry
        options = self._options(model, entry)
        tuned = options.pop("lr")
        return RunConfig(
            optimizer=optimizer,
            lr=tuned if lr is None else lr,
            options=options,
            model=model,
            preset=self._schedule(model, entry.get("schedule", {})),
            seed=seed,
            source=self.corpus.name,
            corpus=self.corpus.digest,
            device=self.device,
            model_options={**entry.get("model_options", {}), **self.arguments.model_options},
            diagnose=diagnose,
            plugins=self.plugins,
            parallel=self.arguments.parallel,
            split=self.arguments.split,
        )

    def _schedule(self, model: str, tuned: dict[str, Any]) -> Preset:
        """The preset with the tuned schedule where the command line sets none; no warm-up for constrained models."""
        if unknown := sorted(tuned.keys() - {"warmup", "decay"}):
            raise PlanError(f"{TUNED.name}: a schedule has warmup and decay, not {', '.join(unknown)}")
        schedule = tuned | ({"warmup": 0} if model in CONSTRAINED_MODELS else {})
        free = {name: value for name, value in schedule.items() if getattr(self.arguments, name) is None}
        return replace(self.preset, **free)

    def entry(self, cell: str) -> dict[str, Any]:
        """The entry of a cell in `tuned.json`, declarations included; else the optimizer's entry on the GPT.

        An own combination has the entry of the optimizer that it is made of, with the options that it sets. Another
        library's optimizer has the entry of normopt's optimizer of that name, as far as it has these arguments.
        """
        optimizer, model = self.cells[cell]
        contender = self.contenders[optimizer]
        spoiled = contender.base in controls.NAMES and not self.has_entry(contender.base)
        entry = self._tuned(controls.BASE if spoiled else contender.base, model)
        if peers.is_peer(contender.base) and not self.has_entry(contender.base):
            of_ours = self._tuned(contender.base.partition(":")[2].lower(), model)
            entry = {name: value for name, value in of_ours.items() if peers.takes(contender.base, name)}
            entry |= {"rest": peers.REST} if contender.base in peers.MATRICES_ONLY else {}
        if contender.base != contender.name:
            entry = {"optimizer": contender.base, **entry, **contender.options}
            own = contender.options.get("rest")
            entry |= {"rest": {**peers.REST, **own}} if isinstance(own, dict) and "optimizer" not in own else {}
        return entry

    def _tuned(self, optimizer: str, model: str) -> dict[str, Any]:
        """The entry of an optimizer on a model, else on the GPT."""
        entry, tuned = tuned_options(self.preset.name, cell_name(optimizer, model), self.tuned)
        return entry if tuned else tuned_options(self.preset.name, optimizer, self.tuned)[0]

    def has_entry(self, optimizer: str) -> bool:
        """Whether there is an entry for an optimizer on the GPT."""
        return optimizer in self.tuned.get(self.preset.name, {}) or optimizer in self.tuned["quick"]

    def options(self, cell: str) -> dict[str, Any]:
        """A copy of the tuned options, learning rate included; constrained models are not decayed."""
        return self._options(self.cells[cell][1], self.entry(cell))

    def _options(self, model: str, entry: dict[str, Any]) -> dict[str, Any]:
        undecayed = {"weight_decay": 0.0} if model in CONSTRAINED_MODELS else {}
        return {name: undecayed.get(name, value) for name, value in entry.items() if name not in DECLARATIONS}

    def rates(self, given: dict[str, float]) -> dict[str, float]:
        """The learning rates of the command line, by cell; raises `PlanError` for a rate of no cell."""
        unknown = sorted(set(given) - set(self.cells))
        if unknown:
            raise PlanError(f"--lr names {', '.join(unknown)}, which is none of {', '.join(self.cells)}")
        return given

    def untuned(self) -> list[str]:
        """The cells without an entry of their own for this preset."""
        return [cell for cell in self.cells if not tuned_options(self.preset.name, cell, self.tuned)[1]]


def check_model_options(models: list[str], options: dict[str, Any]) -> None:
    """Raise `PlanError` for an argument that one of the models does not have, with those that the model has."""
    for model in models:
        parameters = list(inspect.signature(MODELS[model]).parameters.values())
        known = [p.name for p in parameters if p.default is not p.empty]
        for name in options:
            if name not in known:
                raise PlanError(
                    f"--model-options {name}={options[name]}: {model} has no {name}; {nearest(name, known)}"
                )


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
    """The preset of the command line, with the sizes and schedule that the command line sets besides."""
    preset = PRESETS["smoke" if arguments.smoke else arguments.preset]
    names = ("steps", "evaluations", "batch", "warmup", "decay")
    given: dict[str, int | float | None] = {name: getattr(arguments, name) for name in names}
    if arguments.width:
        d_head = preset.d_model // preset.n_heads
        if arguments.width % d_head:
            raise PlanError(f"--width {arguments.width} is no multiple of the preset's heads of {d_head}")
        given |= {"d_model": arguments.width, "n_heads": arguments.width // d_head}
    return replace(preset, **{name: value for name, value in given.items() if value is not None})
