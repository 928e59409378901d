"""Nothing but ``optimizer.state`` and the parameters keeps memory alive between steps, nor a parameter that is gone.

Asked of every optimizer in the registry, of bare combinations and, as a check of the questions themselves, of torch's.
"""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import normopt
from normopt import SteepestDescent
from normopt.numerics import host

Make = Callable[..., Optimizer]

OURS: dict[str, Make] = {name: partial(normopt.create, name, lr=0.01) for name in normopt.list_optimizers()}
OURS |= {
    "bare": partial(SteepestDescent, lr=0.01),
    "bare+": partial(SteepestDescent, norm="Smoothed(Spectral(), 0.9, 1e-6)", momentum=0.9, step_size="sharp"),
    "adamw, bfloat16": partial(normopt.create, "adamw", lr=0.01, state_dtype="bfloat16"),
}
TORCH: dict[str, Make] = {
    "torch:AdamW": partial(torch.optim.AdamW, lr=0.01),
    "torch:Adam": partial(torch.optim.Adam, lr=0.01, foreach=False),
    "torch:SGD": partial(torch.optim.SGD, lr=0.01, momentum=0.9),
}
EVERY = OURS | TORCH
every = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
ours = pytest.mark.parametrize("make", OURS.values(), ids=OURS)

SIDE = 40
#: How many parameters there are, in two groups.
COUNT = 12
#: What one parameter takes, and what may be held beyond all state: less than any parameter or gradient.
ONE = SIDE * SIDE * 4
SPARE = ONE - 1


@pytest.fixture(autouse=True, scope="module")
def thawed() -> Iterator[None]:
    """What is imported by a first step and a first copy is not counted; in the end collections see everything again."""
    p = nn.Parameter(torch.ones(2, 2))
    for optimizer in (torch.optim.AdamW([p]), normopt.create("muon", [p])):
        p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.load_state_dict(copy.deepcopy(optimizer).state_dict())
    gc.collect()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def quick_collections(thawed: None) -> None:
    """What there is before a test is not looked through again: neither by collections nor by ``alive``."""
    gc.collect()
    gc.freeze()


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """The bytes of each distinct storage, by its address."""
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors if not x.is_meta}


def alive() -> dict[int, int]:
    """The storages of all tensors that Python knows of and that were made in this module's tests."""
    gc.collect()
    return storages(x for x in gc.get_objects() if issubclass(type(x), Tensor))


class Run:
    """An optimizer over matrices, in two groups of six."""

    def __init__(self, make: Make, **options: Any) -> None:
        self.known = alive()
        torch.manual_seed(0)
        self.params = [nn.Parameter(torch.randn(SIDE, SIDE) / SIDE) for _ in range(COUNT)]
        half = COUNT // 2
        self.optimizer = make([{"params": self.params[:half]}, {"params": self.params[half:]}], **options)

    def give(self, present: Iterable[int], value: float = 1.0) -> None:
        for p in self.params:
            p.grad = None
        for i in present:
            noise = torch.Generator().manual_seed(i)
            self.params[i].grad = torch.randn(SIDE, SIDE, generator=noise)
            self.params[i].grad[0, 0] = value

    def go(self, present: Iterable[int] | None = None, value: float = 1.0) -> Run:
        """A step, after which no gradient is left."""
        present = range(len(self.params)) if present is None else present
        self.optimizer.step(partial(self.give, present, value))
        self.give([])
        return self

    def fade(self) -> Run:
        """In every step one parameter of each group less has a gradient, in the end one of each."""
        half = len(self.params) // 2
        for k in range(half):
            self.go([i for i in range(len(self.params)) if i % half >= k])
        return self

    def entries(self) -> list[Tensor]:
        return [x for state in self.optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]

    def size(self) -> int:
        """The bytes of all state."""
        return sum(x.numel() * x.element_size() for x in self.entries())

    def stored(self) -> int:
        """The bytes that the state keeps alive."""
        return sum(storages(self.entries()).values())

    def held(self) -> int:
        """The bytes of all other tensors that were made since, save parameters and gradients."""
        apart = storages([*self.entries(), *self.params, *(p.grad for p in self.params if p.grad is not None)])
        return sum(size for at, size in alive().items() if at not in apart.keys() | self.known.keys())

    def check(self, when: str) -> list[str]:
        """What is wrong, in words."""
        wrong = []
        if self.stored() > 1.1 * self.size() + SPARE:
            wrong.append(f"{when}: state of {self.size()} bytes keeps {self.stored()} alive")
        if self.held() > SPARE:
            wrong.append(f"{when}: {self.held()} bytes are held by something else")
        return wrong


def saved_size(state: Any) -> int:
    file = io.BytesIO()
    torch.save(state, file)
    return file.tell()


def fits(found: int, run: Run, more: int = 0) -> bool:
    """Up to what a file says of each tensor."""
    return found <= 1.3 * (run.size() + more) + 600 * (len(run.entries()) + COUNT) + 8192


def replaced(run: Run, params: Iterable[Tensor]) -> None:
    for p in params:
        run.optimizer.state[p] = {name: x.clone() for name, x in run.optimizer.state[p].items()}


def deleted(run: Run, params: Iterable[Tensor]) -> None:
    for p in params:
        del run.optimizer.state[p]


def without_last_group(run: Run) -> list[weakref.ref[Tensor]]:
    """Let the optimizer and its holder forget the second group; its parameters, weakly."""
    group = run.optimizer.param_groups.pop()
    for p in group["params"]:
        run.optimizer.state.pop(p, None)
    refs = [weakref.ref(p) for p in group["params"]]
    del run.params[COUNT // 2 :]
    return refs


def living(refs: list[weakref.ref[Tensor]]) -> int:
    gc.collect()
    return sum(ref() is not None for ref in refs)


def life(run: Run) -> list[str]:
    """What is wrong in the life of an optimizer: gradients stop, state is replaced, groups go, state goes."""
    run.fade()
    wrong = run.check("gradients have stopped")
    if not fits(saved_size(run.optimizer.state_dict()), run):
        wrong.append(f"{run.size()} bytes are saved in {saved_size(run.optimizer.state_dict())}")
    replaced(run, run.params[::2])
    wrong += run.check("half of the state has been replaced")
    replaced(run, run.params)
    wrong += run.check("all state has been replaced")
    wrong += run.go().check("a step later")
    deleted(run, run.params[::2])
    wrong += run.check("half of the state has been deleted")
    refs = without_last_group(run)
    if living(refs):
        wrong.append(f"{living(refs)} of {len(refs)} parameters of a group that is gone are alive")
    wrong += run.check("a group has been taken out")
    wrong += run.go().check("a step after that")
    if living(refs):
        wrong.append(f"{living(refs)} of {len(refs)} parameters of a group that is gone are alive after a step")
    run.optimizer.state.clear()
    wrong += run.check("state has been cleared")
    return wrong


@every
def test_nothing_else_holds_memory(make: Make) -> None:
    assert life(Run(make)) == []


@pytest.mark.slow
@ours
@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
def test_nothing_else_holds_memory_whatever_is_not_finite(make: Make, nonfinite: str) -> None:
    assert life(Run(make, nonfinite=nonfinite, compile=False)) == []


@pytest.mark.slow
@every
def test_what_is_loaded_is_all_there_is(make: Make) -> None:
    """Neither what was there before nor what was saved is kept."""
    run = Run(make).go()
    run.optimizer.load_state_dict(run.optimizer.state_dict())
    wrong = run.check("loaded")
    wrong += run.go().check("a step later")
    run.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    wrong += run.check("loaded again")
    assert wrong + run.go(range(COUNT // 2)).check("some steps later") == []


def gradients_left(run: Run, act: Callable[[], Any]) -> list[str]:
    """What is wrong with gradients once they are no longer the parameters'."""
    refs: list[weakref.ref[Tensor]] = []

    def closure() -> None:
        act()
        refs[:] = [weakref.ref(p.grad) for p in run.params if p.grad is not None]

    error = ""
    try:
        run.optimizer.step(closure)
    except ValueError as raised:
        error = str(raised)
    for p in run.params:
        p.grad = None
    wrong = [f"{living(refs)} of {len(refs)} gradients are alive"] if living(refs) else []
    return [*wrong, *run.check(f"after {error[:30] or 'a step'!r}")]


@pytest.mark.slow
@every
def test_gradients_are_let_go(make: Make) -> None:
    """Also those of a step that raises, which leaves no batch of it either."""
    run = Run(make)
    everyone = range(COUNT)
    wrong = gradients_left(run, partial(run.give, everyone, math.nan)) if make in OURS.values() else []
    wrong += gradients_left(run, partial(run.give, everyone))
    wrong += gradients_left(run, partial(run.give, everyone[::2]))
    if make in OURS.values():
        wrong += gradients_left(run, partial(run.give, everyone, math.nan))
    wrong += gradients_left(run, partial(run.give, everyone[:0]))
    assert wrong == []


@pytest.mark.slow
@ours
@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
@pytest.mark.parametrize("deferred", [False, True], ids=["host", "device"])
def test_gradients_that_are_not_finite_are_let_go(
    make: Make, nonfinite: str, deferred: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the host hears of them a step later."""
    monkeypatch.setattr(host, "DEFERRED", deferred)
    run = Run(make, nonfinite=nonfinite)
    wrong = gradients_left(run, partial(run.give, range(COUNT)))
    wrong += gradients_left(run, partial(run.give, range(COUNT), math.nan))
    wrong += gradients_left(run, partial(run.give, range(COUNT)))
    assert wrong == []


@pytest.mark.slow
@every
def test_optimizers_are_let_go(make: Make) -> None:
    """With all they hold, be it in the middle of a run or after an error; copies keep nothing of the original."""
    run = Run(make).go().go(range(3))
    other = copy.deepcopy(run)
    gone = [weakref.ref(x) for x in (*run.params, *run.entries())]
    optimizer = weakref.ref(run.optimizer)
    known = run.known
    del run
    assert living(gone) == 0 and optimizer() is None
    other.known = known
    assert other.check("the original is gone") == []
    assert len(other.optimizer.state) == COUNT
    assert other.go().check("a step later") == []
    left = [weakref.ref(x) for x in (*other.params, *other.entries())]
    del other
    assert living(left) == 0
    assert sum(size for at, size in alive().items() if at not in known) <= SPARE


@pytest.mark.slow
@every
def test_pickles_hold_state_and_parameters_once(make: Make) -> None:
    """Also after gradients have stopped; the copy that comes back is no larger."""
    run = Run(make).go().go(range(1, COUNT)).go([COUNT - 1])
    pickled = pickle.dumps(run.optimizer)
    assert fits(len(pickled), run, COUNT * ONE), f"{run.size()} bytes and {COUNT * ONE} of weights in {len(pickled)}"
    other = Run.__new__(Run)
    other.known, other.optimizer = alive(), pickle.loads(pickled)
    other.params = [p for group in other.optimizer.param_groups for p in group["params"]]
    del run
    assert other.check("read back") == []
    assert other.go([1]).check("a step later") == []


def of_a_model(make: Make) -> tuple[Optimizer, list[weakref.ref[Tensor]]]:
    """An optimizer after two steps, and the parameters of the model that it alone holds now."""
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 9))
    bare = make in (OURS["bare"], OURS["bare+"])
    optimizer = make([p for p in model.parameters() if p.ndim == 2] if bare else model)

    def closure() -> None:
        for p in model.parameters():
            p.grad = torch.ones_like(p)

    optimizer.step(closure)
    optimizer.step(closure)
    model.zero_grad()
    return optimizer, [weakref.ref(p) for group in optimizer.param_groups for p in group["params"]]


@ours
def test_a_model_that_is_gone_is_let_go(make: Make) -> None:
    """An optimizer without groups and state holds no parameter of the model that it was made for."""
    optimizer, refs = of_a_model(make)
    assert living(refs) == len(refs)
    optimizer.param_groups.clear()
    optimizer.state.clear()
    assert living(refs) == 0
