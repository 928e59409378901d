"""What users expect of every torch optimizer, as 24 probes; `python -m benchmarks probes` runs them on peers, too.

Each probe takes `make(params, **options)`, which returns an optimizer, and answers with true, false or a number. An
exception counts as a failure.
"""

import contextlib
import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.probes.parts import Make, Probe, is_finite, parameters, same, set_gradients, take_steps, values
from benchmarks.probes.state import (
    bf16_momentum,
    bf16_small_updates,
    compile_fullgraph,
    compile_recompilations,
    distributed_checkpoint,
    resume_bfloat16,
    resume_float32,
    sharded_step,
)

# torch's tools ------------------------------------------------------------------------------------------------------


def scheduler_stops(make: Make) -> bool:
    """A scheduler that brings the learning rate to 0 must stop the weights, or warm-up and annealing have no effect."""
    params = parameters()
    optimizer = make(params)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: float(i < 3))
    for i in range(3):
        take_steps(optimizer, params, 1, first=i)
        schedule.step()
    before = values(params)
    take_steps(optimizer, params, 2, first=3)
    return same(values(params), before) and not same(before, values(parameters()))


def closure(make: Make) -> bool:
    """Lightning always computes gradients in `step(closure=...)`; optimizers without closures do not run there."""
    params = parameters()
    optimizer = make(params)

    def loss() -> Tensor:
        return torch.stack([(p - 1).square().sum() for p in params]).sum()

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        torch.autograd.backward(loss())
        return loss()

    expected = loss().item()
    answers = [cast(Any, optimizer).step(closure=evaluate).item() for _ in range(3)]
    return answers[0] == expected and not same(values(params), values(parameters()))


def grad_scaler(make: Make) -> bool:
    """Training in float16 needs steps that see unscaled gradients, and are left out, state included, on overflow."""
    params, others = parameters(), parameters()
    optimizer, plain = make(params), make(others)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for i in range(3):
        torch.autograd.backward(scaler.scale(torch.zeros((), requires_grad=True)))
        set_gradients(params, i, scale=8.0)
        scaler.step(optimizer)
        scaler.update()
    take_steps(plain, others, 3)
    agree, before = same(values(params), values(others)), copy.deepcopy(optimizer.state_dict())
    torch.autograd.backward(scaler.scale(torch.zeros((), requires_grad=True)))
    set_gradients(params, 3, scale=8.0)
    cast(Tensor, params[0].grad)[0, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    return agree and same(values(params), values(others)) and same(optimizer.state_dict(), before)


def add_param_group(make: Make) -> bool:
    """Unfreezing layers in mid-run adds a param group, which must move from then on."""
    params = parameters()
    optimizer = make(params[:1])
    take_steps(optimizer, params[:1], 2)
    optimizer.add_param_group({"params": params[1:]})
    take_steps(optimizer, params, 3, first=2)
    return not same(values(params[1:]), values(parameters()[1:]))


def named_parameters(make: Make) -> bool:
    """`model.named_parameters()` is what torch takes since 2.6; with it errors and checkpoints can name parameters."""
    params = parameters()
    optimizer = make(list(zip(("up", "down"), params, strict=True)))
    take_steps(optimizer, params, 3)
    return all(not same(*pair) for pair in zip(values(params), values(parameters()), strict=True))


# Gradients ----------------------------------------------------------------------------------------------------------


def gradients_kept(make: Make) -> bool:
    """Gradients that a step overwrites or drops are not there for logging, for clipping or for a second step."""
    params = parameters()
    optimizer = make(params)
    for i in range(3):
        set_gradients(params, i)
        given = [p.grad for p in params]
        kept = [cast(Tensor, g).clone() for g in given]
        optimizer.step()
        if any(p.grad is not g for p, g in zip(params, given, strict=True)) or not same(given, kept):
            return False
    return True


def no_gradient_no_move(make: Make) -> bool:
    """Frozen layers and unused branches have no gradient: they must neither move nor decay."""
    params = parameters()
    optimizer = make(params)
    for i in range(3):
        set_gradients(params[:1], i)
        optimizer.step()
    return same(values(params[1:]), values(parameters()[1:])) and not same(values(params), values(parameters()))


def sparse_gradients(make: Make) -> bool:
    """Sparse gradients of embeddings have to work, or be refused as sparse before anything has moved."""
    params = parameters()

    def step(optimizer: Optimizer) -> None:
        set_gradients(params, 0)
        params[1].grad = cast(Tensor, params[1].grad).to_sparse()
        optimizer.step()

    return _works_or_is_refused(make, params, step, "sparse")


def complex_parameters(make: Make) -> bool:
    """Complex parameters have to work, or be refused as complex before anything has moved."""
    params = parameters(torch.complex64)

    def step(optimizer: Optimizer) -> None:
        set_gradients(params, 0, torch.complex64)
        optimizer.step()

    return _works_or_is_refused(make, params, step, "complex")


def _works_or_is_refused(make: Make, params: list[nn.Parameter], step: Callable[[Optimizer], None], word: str) -> bool:
    before = values(params)
    try:
        optimizer = make(params)
        for _ in range(3):
            step(optimizer)
    except Exception as error:
        return word in str(error).lower() and same(values(params), before)
    return is_finite(params) and not same(values(params[1:]), before[1:])


def float64_parameters(make: Make) -> bool:
    """Scientific models train in float64: weights and state have to stay there."""
    params = parameters(torch.float64)
    optimizer = make(params)
    take_steps(optimizer, params, 3)
    state = [x for p in params for x in optimizer.state[p].values() if isinstance(x, Tensor) and x.numel() > 1]
    whole = all(x.dtype == torch.float64 for x in (*params, *state) if x.is_floating_point())
    return whole and is_finite(params) and not same(values(params), values(parameters(torch.float64)))


def zero_gradients(make: Make) -> bool:
    """Dead units and padded batches give gradients of 0; one 0 / 0 makes a NaN that spreads to the whole model."""
    params = parameters()
    optimizer = make(params)
    for _ in range(3):
        set_gradients(params, 0, scale=0.0)
        optimizer.step()
    take_steps(optimizer, params, 3)
    return is_finite(params)


def nonfinite_gradients(make: Make) -> bool:
    """One bad batch with a NaN has to be refused or skipped: once in a momentum, it never leaves."""
    params = parameters()
    optimizer = make(params)
    take_steps(optimizer, params, 2)
    set_gradients(params, 2)
    cast(Tensor, params[0].grad)[0, 0] = torch.nan
    with contextlib.suppress(Exception):
        optimizer.step()
    take_steps(optimizer, params, 2, first=3)
    state = [x for p in params for x in optimizer.state[p].values() if isinstance(x, Tensor)]
    return is_finite([*params, *state])


# Bad input ----------------------------------------------------------------------------------------------------------


def bad_lr(make: Make) -> bool:
    """A negative learning rate climbs: a run is lost to a sign in a config."""
    return _refuses(make, lr=-1e-3)


def bad_weight_decay(make: Make) -> bool:
    """A negative decay makes weights grow without bound."""
    return _refuses(make, weight_decay=-0.1)


def bad_momentum(make: Make) -> bool:
    """An average with a weight above 1 grows without bound; an optimizer without momentum has nothing to refuse."""
    choices: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"momentum": 0.9}, {"momentum": 1.5}),
        ({"betas": (0.9, 0.99)}, {"betas": (1.5, 0.99)}),
    ]
    known = [bad for good, bad in choices if not _refuses(make, **good)]
    return any(_refuses(make, **bad) for bad in known) or not known


def typo(make: Make) -> bool:
    """A misspelt argument that is swallowed trains with the default in its place."""
    return _refuses(make, weigth_decay=0.1)


def _refuses(make: Make, **options: Any) -> bool:
    """Whether an optimizer with these options cannot be made, or raises in its first step and moves no weight."""
    params = parameters()
    try:
        take_steps(make(params, **options), params, 1)
    except Exception:
        return same(values(params), values(parameters()))
    return False


#: All probes by name, in the order of the report.
PROBES: dict[str, Probe] = {
    probe.__name__: probe
    for probe in (
        compile_recompilations,
        compile_fullgraph,
        bf16_small_updates,
        bf16_momentum,
        sharded_step,
        distributed_checkpoint,
        resume_float32,
        resume_bfloat16,
        scheduler_stops,
        closure,
        grad_scaler,
        add_param_group,
        named_parameters,
        gradients_kept,
        no_gradient_no_move,
        sparse_gradients,
        complex_parameters,
        float64_parameters,
        zero_gradients,
        nonfinite_gradients,
        bad_lr,
        bad_weight_decay,
        bad_momentum,
        typo,
    )
}

#: Conditions for passing the probes whose answer is a number.
LIMITS: dict[str, Callable[[float], bool]] = {
    "compile_recompilations": lambda count: count == 0,
    "bf16_small_updates": lambda part: part > 0.5,
}
