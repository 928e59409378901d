"""One benchmark run: one model, one optimizer, one seed; resumable bit for bit."""

import hashlib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import normopt
from benchmarks import controls, peers
from benchmarks.contenders import BARE
from benchmarks.harness import origin, state_bytes
from benchmarks.language.data import Corpus, load
from benchmarks.language.diagnose import measure
from benchmarks.language.parallel import team
from benchmarks.language.presets import RunConfig
from benchmarks.language.progress import Progress, clock
from benchmarks.output.records import Row
from normopt.nn import GPT, anGPT, nGPT
from normopt.numerics.eigen import LinAlgError
from normopt.optimizer import SteepestDescent
from normopt.roles.options import entry
from normopt.rule import rule_of

MODELS: dict[str, Callable[..., nn.Module]] = {"gpt": GPT, "angpt": anGPT, "ngpt": nGPT}
UNDECAYED = ("embedding", "unembedding", "vector", "scalar")
CHECKPOINT_STEPS = 100

Report = Callable[[int, float, float], None]


class Run:
    """The state of one run: model, optimizer, schedule and progress."""

    def __init__(self, config: RunConfig, corpus: Corpus) -> None:
        self.config, self.preset, self.corpus = config, config.preset, corpus
        self.team = team(config.parallel, config.device)
        torch.manual_seed(config.seed)
        self.model = make_model(config, corpus.vocab_size).to(config.device)
        self.init_hash = tensor_hash(self.model.state_dict())
        self.placed = self.team.place(self.model)
        self.optimizer = make_optimizer(config, self.model, **self.team.options)
        self.scheduler = LambdaLR(self.optimizer, self.preset.rate)
        self.order = corpus.order(config.seed, self.preset.steps, self.preset.batch, self.preset.context)
        self.progress = Progress()

    def train_step(self) -> float:
        """One update; returns the training loss.

        The run has diverged if the loss or the gradient is not finite, or if the optimizer cannot decompose a matrix.
        """
        windows = self.team.share(self.order[self.progress.step])
        tokens = self.corpus.batch(windows, self.preset.context).to(self.config.device)
        self._mode("train")
        start = clock(self.config.device)
        loss, norm = self._gradient(tokens)
        middle = clock(self.config.device)
        self.progress.diverged = not math.isfinite(loss + norm)
        if not self.progress.diverged:
            known = iter([loss])  # the gradient at these weights is set; some optimizers evaluate the closure at others
            try:
                self.optimizer.step(lambda: next(known, None) or self._gradient(tokens)[0])
            except LinAlgError:  # a matrix that no decomposition is found for any more
                self.progress.diverged = True
            else:
                self.scheduler.step()
        self.progress.optimizer_seconds += clock(self.config.device) - middle
        self.progress.gradient_seconds += middle - start
        self.optimizer.zero_grad()
        self.progress.step += 1
        return loss

    def _gradient(self, tokens: Tensor) -> tuple[float, float]:
        """Set the clipped gradient; returns the loss and the gradient's norm before clipping."""
        loss = self.team.mean(self._backward(tokens))
        return loss, self.team.clip(self.model.parameters(), self.preset.clip)

    def _backward(self, tokens: Tensor) -> float:
        """Accumulate the gradient of the mean loss over these sequences, a micro batch at a time."""
        total = 0.0
        for chunk in torch.split(tokens, self.preset.micro_batch):
            loss = self._loss(chunk) * (len(chunk) / len(tokens))
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        return total

    def _loss(self, tokens: Tensor) -> Tensor:
        device = torch.device(self.config.device).type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self.preset.bf16 and device == "cuda"):
            logits = self.placed(tokens[:, :-1])
            return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    @torch.no_grad()
    def evaluate(self, tokens: int) -> float:
        """Mean loss on the held-out text, in nats per token, over about `tokens` tokens, the same every time.

        Every process of a job evaluates all of them.
        """
        self._mode("eval")
        windows = self.corpus.windows(self.config.split, tokens, self.preset.context)
        chunks = torch.split(windows, self.preset.micro_batch)
        return sum(self._loss(chunk.to(self.config.device)).item() * len(chunk) for chunk in chunks) / len(windows)

    def _mode(self, name: str) -> None:
        """Tell optimizers that evaluate at other weights than they train, as schedule-free ones do, which to show."""
        getattr(self.optimizer, name, lambda: None)()

    def record_curve(self) -> None:
        """Add a point to the loss curve if this step is one of the evaluations."""
        step, every = self.progress.step, max(1, self.preset.steps // self.preset.evaluations)
        if step % every == 0 or step == self.preset.steps:
            self.progress.curve.append((step, self.progress.seconds, self.evaluate(self.preset.curve_tokens)))
            if self.config.diagnose:
                windows = self.corpus.windows(self.config.split, self.preset.curve_tokens, self.preset.context)
                inputs = windows[: self.preset.micro_batch, :-1].to(self.config.device)
                self.progress.norms.append((step, measure(self.model, inputs)))

    def save(self, path: Path) -> None:
        """Write a checkpoint atomically; raises `WriteError` when that fails, and keeps the previous checkpoint."""
        random = (torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])
        rest = {"scheduler": self.scheduler.state_dict(), "random": random, "progress": asdict(self.progress)}
        self.team.save(path, self.model, self.optimizer, rest)

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint that `save` wrote."""
        rest = self.team.load(path, self.model, self.optimizer)
        self.scheduler.load_state_dict(rest["scheduler"])
        torch.set_rng_state(rest["random"][0])
        torch.cuda.set_rng_state_all(rest["random"][1])
        self.progress = Progress(**rest["progress"])

    @property
    def tokens_per_second(self) -> float:
        """Training tokens per second so far, evaluation not counted."""
        return self.progress.step * self.preset.batch * self.preset.context / max(self.progress.seconds, 1e-9)


def make_model(config: RunConfig, vocab_size: int) -> nn.Module:
    """The model of a run."""
    sizes = (config.preset.d_model, config.preset.n_layers, config.preset.n_heads)
    return MODELS[config.model](vocab_size, *sizes, **{"d_ff": config.preset.d_ff, **config.model_options})


def make_optimizer(config: RunConfig, model: nn.Module, **own: Any) -> torch.optim.Optimizer:
    """The optimizer of a run; weight decay applies to the hidden matrices only. `own`: arguments of normopt's alone."""
    options = peers.tuples(config.options)
    if "averaged" in options:
        averaged = options.pop("averaged")
        return normopt.Averaged(make_optimizer(replace(config, options=options), model, **own), **averaged)
    name = options.pop("optimizer", config.optimizer)
    if name in controls.NAMES:
        spoiled = {"optimizer": controls.BASE, **controls.options_of(name, model, options)}
        made = make_optimizer(replace(config, options=spoiled), model, **own)
        controls.spoil(name, model, made)
        return made
    if peers.is_peer(name):
        return peers.make(name, model, config.lr, options.pop("rest", None), **options)
    if name == BARE:
        return _watching(model, normopt.SteepestDescent(model, lr=config.lr, **options, **own), own)
    geometry = options.get("geometry", {})
    table = normopt.GEOMETRIES.get(geometry) if isinstance(geometry, str) else geometry
    if "weight_decay" in options and table is not None:
        options["geometry"] = {**table, **{role: {"weight_decay": 0.0, **entry(table, role)} for role in UNDECAYED}}
    return _watching(model, normopt.create(name, model, lr=config.lr, **options, **own), own)


def _watching(model: nn.Module, optimizer: SteepestDescent, own: Mapping[str, Any]) -> SteepestDescent:
    """The optimizer, with the statistics of the layers' inputs if it reads them."""
    if any(rule_of(group).reads_inputs for group in optimizer.param_groups):
        normopt.InputStatistics(model, optimizer, process_group=own.get("process_group"))
    return optimizer


def train(config: RunConfig, checkpoint: Path, report: Report) -> Row:
    """Do a run, continuing from its checkpoint if there is one, and return its row of results.

    `report(step, training loss, tokens per second)` is called after every step.
    """
    corpus = load(config.source)
    if corpus.digest != config.corpus:
        raise ValueError(f"{config.source} has changed since this run was planned")
    started = origin(config.device)  # before anything of the checkout can change
    run = Run(config, corpus)
    if run.team.exists(checkpoint):
        _restore(run, checkpoint)
    else:
        run.record_curve()
    while run.progress.step < config.preset.steps and not run.progress.diverged:
        with run.progress.timed():
            loss = run.train_step()
            run.record_curve()
        report(run.progress.step, loss, run.tokens_per_second)
        if run.progress.step % CHECKPOINT_STEPS == 0 or run.progress.step == config.preset.steps:
            run.save(checkpoint)
    with run.progress.timed():
        final = math.nan if run.progress.diverged else run.evaluate(config.preset.final_tokens)
    return {**result_row(run, final), **started}


def _restore(run: Run, checkpoint: Path) -> None:
    try:
        run.restore(checkpoint)
    except Exception as error:
        raise RuntimeError(f"cannot continue from {checkpoint.resolve()}: delete it to start over") from error


def result_row(run: Run, final: float) -> Row:
    """The results of a finished run; a run whose final loss is not finite counts as diverged."""
    progress, per_token, finite = run.progress, run.corpus.bytes_per_token, math.isfinite(final)
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    return {
        "key": run.config.key,
        "config": asdict(run.config),
        "schedule": run.preset.schedule,
        "status": "finished" if finite else "diverged",
        "final_loss": final if finite else None,
        "bytes_per_token": per_token,
        "bits_per_byte": final / math.log(2) / per_token if finite and per_token else None,
        "curve": [point for point in progress.curve if math.isfinite(point[2])],
        **({"norms": progress.norms} if progress.norms else {}),
        "steps_done": progress.step,
        "parameters": parameters,
        **({"processes": run.team.ranks} if run.config.parallel else {}),
        "tokens_per_second": run.tokens_per_second,
        "gradient_ms": 1000 * progress.gradient_seconds / progress.step,
        "optimizer_ms": 1000 * progress.optimizer_seconds / progress.step,
        "train_seconds": progress.seconds,
        "cpu_seconds": progress.cpu,
        "wall_seconds": progress.wall,
        "state_bytes_per_parameter": state_bytes(run.optimizer) / parameters,
        "init_hash": run.init_hash,
        "order_hash": hashlib.sha256(run.order.tobytes()).hexdigest()[:16],
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def tensor_hash(tensors: dict[str, Tensor]) -> str:
    """A short hash of named tensors."""
    digest = hashlib.sha256()
    for name, value in tensors.items():
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
