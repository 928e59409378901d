"""State belongs to whoever holds ``optimizer.state``: what is there when ``step`` is called is what the step uses.

However it got there. Asked of every optimizer in the registry, of bare combinations and, as a check of the questions
themselves, of some of torch's. Nearly all of what follows is a comparison to the bit, with a twin that was left alone,
or with a fresh optimizer that has loaded the touched state.
"""

from __future__ import annotations

import copy
import functools
import itertools
import pickle
from collections import defaultdict
from collections.abc import Callable, MutableMapping
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
#: ``optimizer.state``, or the same of a state dict, and its keys in the parameters' order.
State = MutableMapping[Any, dict[str, Any]]
Touch = Callable[[State, list[Any]], None]


class Net(nn.Module):
    """Something for every role, and several parameters of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.conv = nn.Conv1d(6, 6, 3, bias=False)
        self.norm = nn.LayerNorm(6)
        self.up, self.mid, self.down = (nn.Linear(6, 6, bias=False) for _ in range(3))
        self.gain = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(6, 7)


def _matrices(params: nn.Module | list[Any], **options: Any) -> SteepestDescent:
    """Bare combinations have one norm for all, here one of matrices."""
    if isinstance(params, nn.Module):
        params = [(name, p) for name, p in params.named_parameters() if p.ndim == 2]
    return SteepestDescent(params, **options)


def _torch(cls: type[Optimizer], params: nn.Module | list[Any], **options: Any) -> Optimizer:
    return cls(params.named_parameters() if isinstance(params, nn.Module) else params, **options)


OURS: dict[str, Make] = {name: partial(normopt.create, name, lr=0.01) for name in normopt.list_optimizers()}
OURS |= {
    "bare": partial(_matrices, lr=0.01),
    "bare+": partial(_matrices, lr=0.01, norm="Smoothed(Spectral(), 0.9, 1e-6)", momentum=0.9, step_size="sharp"),
    "adamw, bfloat16": partial(normopt.create, "adamw", lr=0.01, state_dtype="bfloat16"),
}
TORCH: dict[str, Make] = {
    "torch:AdamW": partial(_torch, torch.optim.AdamW, lr=0.01),
    "torch:Adam": partial(_torch, torch.optim.Adam, lr=0.01, foreach=False),
    "torch:SGD": partial(_torch, torch.optim.SGD, lr=0.01, momentum=0.9),
}
EVERY = OURS | TORCH
every = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
ours = pytest.mark.parametrize("make", OURS.values(), ids=OURS)
#: What is trained: a model with its names and roles, or matrices alone.
whats = pytest.mark.parametrize(
    "what", ["model", pytest.param("named", marks=pytest.mark.slow), pytest.param("unnamed", marks=pytest.mark.slow)]
)


@functools.cache
def _noise(seed: int, shapes: tuple[torch.Size, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


class Run:
    """An optimizer and what it trains: a model, or a list of matrices, named or not."""

    def __init__(self, make: Make, what: str = "model", dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        net = Net().to(dtype)
        named = list(net.named_parameters())
        if what != "model":
            named = [(name, p) for name, p in named if p.ndim == 2]
        self.optimizer = make(net if what == "model" else named if what == "named" else [p for _, p in named])
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        self.names = [name for name, p in named if id(p) in held]
        self.params = [p for _, p in named if id(p) in held]
        self.done = 0
        self.first: Callable[[], None] | None = None

    def __getitem__(self, name: str) -> Tensor:
        return self.params[self.names.index(name)]

    def go(self, steps: int = 1, without: tuple[str, ...] = ()) -> Run:
        """Take steps. Gradients depend on the weights a little, and those named in ``without`` get none."""
        for _ in range(steps):
            self.optimizer.step(partial(self.give_gradients, without))
            self.done += 1
        return self

    def give_gradients(self, without: tuple[str, ...] = ()) -> None:
        if self.first is not None:
            self.first()
            self.first = None
        noise = _noise(self.done, tuple(p.shape for p in self.params))
        for name, p, g in zip(self.names, self.params, noise, strict=True):
            p.grad = None if name in without else torch.add(g.to(p.dtype), p.detach(), alpha=0.1)

    def states(self) -> list[dict[str, Any]]:
        return [self.optimizer.state.get(p, {}) for p in self.params]

    def saved_keys(self, state_dict: dict[str, Any]) -> list[Any]:
        """What the parameters are called in a state dict."""
        of: dict[int, Any] = {}
        for mine, saved in zip(self.optimizer.param_groups, state_dict["param_groups"], strict=True):
            of |= {id(p): key for p, key in zip(mine["params"], saved["params"], strict=True)}
        return [of[id(p)] for p in self.params]

    def twin(self, make: Make, state_dict: dict[str, Any]) -> Run:
        """A fresh optimizer on equal weights that has loaded ``state_dict``."""
        twin = Run(make, dtype=self.params[0].dtype)
        twin.take(self, state_dict)
        return twin

    def take(self, other: Run, state_dict: dict[str, Any]) -> None:
        """Take the other's weights, and load ``state_dict``."""
        with torch.no_grad():
            torch._foreach_copy_(self.params, other.params)
        self.optimizer.load_state_dict(state_dict)
        self.done = other.done


def equal(a: Any, b: Any) -> bool:
    """Numbers, or tensors to the bit; a number equals a tensor of that value."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        alike = a.dtype == b.dtype and a.shape == b.shape
        return alike and bool(((a == b) | (a.isnan() & b.isnan())).all())
    return float(a) == float(b)


def differences(names: list[str], a: list[dict[str, Any]], b: list[dict[str, Any]]) -> list[str]:
    """The entries in which two lists of states differ."""
    found = []
    for name, x, y in zip(names, a, b, strict=True):
        found += [f"{name}: {key} is missing" for key in sorted(x.keys() ^ y.keys())]
        found += [f"{name}: {key}" for key in sorted(x.keys() & y.keys()) if not equal(x[key], y[key])]
    return found


def unlike(run: Run, twin: Run, apart: tuple[str, ...] = ()) -> list[str]:
    """Where two runs differ: weights, state, and what is saved of it; ``apart`` names parameters to leave out."""
    here = [i for i, name in enumerate(run.names) if name not in apart]
    there = [twin.names.index(run.names[i]) for i in here]
    names = [run.names[i] for i in here]
    weights = [[{"weights": r.params[i].detach()} for i in k] for r, k in ((run, here), (twin, there))]
    states = [[r.states()[i] for i in k] for r, k in ((run, here), (twin, there))]
    return [*differences(names, *weights), *differences(names, *states)]


def stale(run: Run) -> list[str]:
    """Where ``state_dict`` does not save what is in ``optimizer.state``."""
    saved = run.optimizer.state_dict()
    return differences(
        run.names, [saved["state"].get(key, {}) for key in run.saved_keys(saved)], [*map(dict, run.states())]
    )


# Touches that change nothing ---------------------------------------------------------------------------------------


def _tensors(state: State, keys: list[Any]) -> list[tuple[dict[str, Any], str, Tensor]]:
    return [(state[key], name, x) for key in keys if key in state for name, x in [*state[key].items()]]


def swap_data(state: State, keys: list[Any]) -> None:
    """What ``x.data = x.data.to(another).to(x.device)`` does."""
    for _, _, x in _tensors(state, keys):
        x.data = x.data.clone()


def replace(state: State, keys: list[Any], by: Callable[[Tensor], Any] = Tensor.clone) -> None:
    for entries, name, x in _tensors(state, keys):
        entries[name] = by(x)


def cast_and_back(state: State, keys: list[Any]) -> None:
    for _, _, x in _tensors(state, keys):
        dtype = x.dtype
        x.data = x.data.double()
        x.data = x.data.to(dtype)


def offload_and_back(state: State, keys: list[Any]) -> None:
    for _, _, x in _tensors(state, keys):
        kept = x.data.clone()
        x.data = torch.empty(0, dtype=x.dtype)
        x.data = kept


def write_in_place(state: State, keys: list[Any]) -> None:
    """Away and back."""
    for _, _, x in _tensors(state, keys):
        kept = x.clone()
        x.fill_(7.0)
        x.copy_(kept)


def strided(x: Tensor) -> Tensor:
    return torch.zeros(*x.shape, 2, dtype=x.dtype)[..., 0].copy_(x) if x.ndim else x.clone()


def transposed(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT if x.ndim > 1 else x.clone()


def one_buffer(state: State, keys: list[Any]) -> None:
    """All entries of one dtype as views of one tensor."""
    for dtype in {x.dtype for _, _, x in _tensors(state, keys)}:
        entries = [each for each in _tensors(state, keys) if each[2].dtype == dtype]
        parts = torch.cat([x.reshape(-1) for _, _, x in entries]).split([x.numel() for _, _, x in entries])
        for (held, name, x), part in zip(entries, parts, strict=True):
            held[name] = part.view(x.shape)


def new_dicts(state: State, keys: list[Any], by: Callable[[Any], Any] = lambda x: x) -> None:
    for key in keys:
        state[key] = {name: by(x) for name, x in state[key].items()}


def other_order(state: State, keys: list[Any]) -> None:
    for key in reversed(keys):
        state[key] = dict(reversed(state.pop(key).items()))


def steps_as(kind: Callable[[float], Any], state: State, keys: list[Any]) -> None:
    for entries, name, x in _tensors(state, keys):
        if name == "step":
            entries[name] = kind(float(x))


def of_one(touch: Touch) -> Touch:
    """The same for a single parameter, one of several with its shape."""
    return lambda state, keys: touch(state, keys[len(keys) // 2 :][:1])


def last_entry(state: State, keys: list[Any]) -> None:
    """One entry of one parameter, swapped; the last one is no step if there is another."""
    entries = state[keys[len(keys) // 2]]
    if entries:
        x = entries[list(entries)[-1]]
        x.data = x.data.clone()


def first_entry(state: State, keys: list[Any]) -> None:
    """One entry of one parameter, replaced."""
    entries = state[keys[len(keys) // 2]]
    if entries:
        name = next(iter(entries))
        entries[name] = entries[name].clone()


#: Whatever is done here, the run goes on as if it had not been.
HARMLESS: dict[str, Touch] = {
    "data of all swapped": swap_data,
    "all replaced": replace,
    "data of one parameter swapped": of_one(swap_data),
    "one parameter's replaced": of_one(replace),
    "data of one entry swapped": last_entry,
    "one entry replaced": first_entry,
    "cast and back": cast_and_back,
    "offloaded and back": offload_and_back,
    "one parameter's offloaded and back": of_one(offload_and_back),
    "changed in place and back": write_in_place,
    "strided": partial(replace, by=strided),
    "transposed": partial(replace, by=transposed),
    "one parameter's strided": of_one(partial(replace, by=strided)),
    "views of one buffer": one_buffer,
    "other dicts of the same tensors": new_dicts,
    "other dicts of clones": partial(new_dicts, by=lambda x: x.clone() if isinstance(x, Tensor) else x),
    "another order": other_order,
    "steps are tensors": partial(steps_as, lambda step: torch.tensor(step)),
}
#: torch's optimizers take no numbers for steps, nor tensors of another dtype.
HARMLESS_HERE: dict[str, Touch] = {
    "steps are floats": partial(steps_as, float),
    "steps are ints": partial(steps_as, int),
    "one step is an int": of_one(partial(steps_as, int)),
    "one step is a long tensor": of_one(partial(steps_as, lambda step: torch.tensor(int(step)))),
    "steps are double tensors": partial(steps_as, lambda step: torch.tensor(step, dtype=torch.float64)),
}
#: Those that touch more than entries.
WHOLE: dict[str, Callable[[Run], None]] = {
    "another mapping": lambda run: setattr(run.optimizer, "state", defaultdict(dict, run.optimizer.state)),
    "saved and loaded": lambda run: run.optimizer.load_state_dict(run.optimizer.state_dict()),
    "data of the weights swapped": lambda run: [setattr(p, "data", p.data.clone()) for p in run.params] and None,
    "one weight swapped": lambda run: setattr(run.params[-3], "data", run.params[-3].data.clone()),
    "state dict taken": lambda run: run.optimizer.state_dict() and None,
}


#: What the fast tests ask; the slow ones ask everything.
FREQUENT = {
    "data of all swapped",
    "one parameter's replaced",
    "data of one entry swapped",
    "cast and back",
    "changed in place and back",
    "strided",
    "views of one buffer",
    "another order",
    "steps are ints",
    "another mapping",
    "saved and loaded",
    "one weight swapped",
    "momenta zeroed",
    "one parameter's replaced by halves",
    "exchanged",
    "one step 0, in place",
    "one step is 0",
    "one entry deleted",
    "one deleted",
    "all deleted",
}


def frequent(touches: dict[str, Any]) -> dict[str, Any]:
    return {name: touch for name, touch in touches.items() if name in FREQUENT}


def touched(touch: Touch, run: Run) -> None:
    with torch.no_grad():
        touch(run.optimizer.state, [*run.params])


def harmless(make: Make) -> dict[str, Callable[[Run], None]]:
    known = HARMLESS | (HARMLESS_HERE if make in OURS.values() else {})
    return {name: partial(touched, touch) for name, touch in known.items()} | WHOLE


def go_alike(run: Run, twin: Run, name: str) -> None:
    """A step of both, after which they are alike."""
    run.go()
    twin.go()
    assert not unlike(run, twin), f"{name}: {unlike(run, twin)}"
    assert not stale(run), f"{name}, then a step: {stale(run)}"


def act(run: Run, touch: Callable[[], None], inside: bool) -> None:
    """Touch the run now, or while its next step computes gradients."""
    if inside:
        run.first = touch
    else:
        touch()


@every
def test_a_touch_that_keeps_values_changes_nothing(make: Make) -> None:
    """One touch after the other, with a step after each."""
    run, twin = Run(make).go(3), Run(make).go(3)
    for name, touch in frequent(harmless(make)).items():
        touch(run)
        assert not stale(run), f"{name}: {stale(run)}"
        go_alike(run, twin, name)


@pytest.mark.slow
@every
@pytest.mark.parametrize("inside", [False, True], ids=["between steps", "in the closure"])
def test_each_touch_that_keeps_values_changes_nothing(make: Make, inside: bool) -> None:
    """Each in a run of its own, before a step or while it computes gradients."""
    twin, wrong = Run(make).go(7), {}
    touches = harmless(make)
    for name, touch in (frequent(touches) if inside else touches).items():
        run = Run(make).go(3)
        act(run, partial(touch, run), inside)
        wrong[name] = unlike(run.go(4), twin) + stale(run)
    assert not {name: found for name, found in wrong.items() if found}


@ours
def test_state_stays_where_it_is_as_long_as_nobody_touches_it(make: Make) -> None:
    """Also across gradients that are laid out otherwise: a warm step copies no state."""
    run = Run(make).go(2)

    def places() -> list[int]:
        return [x.data_ptr() for state in run.states() for x in state.values()]

    before = places()
    run.go(2)
    assert places() == before and before


@every
def test_after_every_step_state_may_be_elsewhere(make: Make) -> None:
    """As when it is kept on the CPU between steps; also in halves, and with parameters that have no gradients."""
    run, twin = Run(make), Run(make)
    missing: list[tuple[str, ...]] = [(), ("up.weight",), (), ("mid.weight", "down.weight"), (), ()]
    for i, without in enumerate(missing):
        run.go(1, without)
        twin.go(1, without)
        assert not unlike(run, twin), f"step {i + 1}: {unlike(run, twin)}"
        assert not stale(run), f"step {i + 1}: {stale(run)}"
        with torch.no_grad():
            swap_data(run.optimizer.state, [p for p in run.params[:: 1 + i % 2] if p in run.optimizer.state])


# Touches that change the run -----------------------------------------------------------------------------------------


def scale(state: State, keys: list[Any], by: float = 0.5) -> None:
    """In place; bases and the like as well, and what had no bits to spare."""
    for _, name, x in _tensors(state, keys):
        if name != "step":
            x.data.mul_(by)


def scale_anew(state: State, keys: list[Any]) -> None:
    for entries, name, x in _tensors(state, keys):
        if name != "step":
            entries[name] = x * 0.5


def zero_momenta(state: State, keys: list[Any]) -> None:
    for _, name, x in _tensors(state, keys):
        if name.endswith(("momentum", "momentum_buffer", "exp_avg", "buffer", "gradient_sum")):
            x.data.zero_()


def write_steps(state: State, keys: list[Any], value: float = 0.0) -> None:
    for _, name, x in _tensors(state, keys):
        if name == "step":
            x.fill_(value)


def delete(state: State, keys: list[Any]) -> None:
    for key in keys:
        state.pop(key, None)


def delete_item(state: State, keys: list[Any]) -> None:
    for key in keys:
        if key in state:
            del state[key]


def clear_each(state: State, keys: list[Any]) -> None:
    for key in keys:
        if key in state:
            state[key].clear()


def delete_last(state: State, keys: list[Any]) -> None:
    """One entry, which is no step if there is another."""
    for key in keys:
        if len(state[key]) > 1:
            del state[key][list(state[key])[-1]]


def delete_steps(state: State, keys: list[Any]) -> None:
    for key in keys:
        del state[key]["step"]


def exchange(state: State, keys: list[Any]) -> None:
    """Two parameters of one shape trade their states."""
    shapes = {key: [(name, x.shape) for name, x in state[key].items()] for key in keys if key in state}
    for one, other in itertools.combinations(shapes, 2):
        if shapes[one] == shapes[other] and len(shapes[one]) > 1:
            state[one], state[other] = state[other], state[one]
            return


def _nothing(state: State, keys: list[Any]) -> None:
    """Touch nothing."""


#: What is done to ``optimizer.state``; the twin loads a state dict to which the same has been done.
CHANGES: dict[str, Touch] = {
    "nothing": _nothing,
    "momenta zeroed": zero_momenta,
    "one parameter's momenta zeroed": of_one(zero_momenta),
    "halved": scale,
    "one parameter's halved": of_one(scale),
    "one parameter's replaced by halves": of_one(scale_anew),
    "exchanged": exchange,
    "steps 0, in place": write_steps,
    "one step 0, in place": of_one(write_steps),
    "one step 50, in place": of_one(partial(write_steps, value=50.0)),
    "steps 0, replaced": partial(steps_as, lambda _: torch.zeros(())),
    "one step 0, replaced": of_one(partial(steps_as, lambda _: torch.zeros(()))),
    "one deleted": of_one(delete_item),
    "one popped": of_one(delete),
    "one cleared": of_one(clear_each),
    "half of them deleted": lambda state, keys: delete(state, keys[::2]),
    "all deleted": lambda state, keys: state.clear(),
}


#: What is done to ``optimizer.state``, and what is done to the state dict; torch's optimizers take neither numbers for
#: steps nor states in part.
CHANGES_HERE: dict[str, tuple[Touch, Touch]] = {
    "steps are 0": (partial(steps_as, lambda _: 0), write_steps),
    "one step is 0": (of_one(partial(steps_as, lambda _: 0)), of_one(write_steps)),
    "one step is 0.0": (of_one(partial(steps_as, lambda _: 0.0)), of_one(write_steps)),
    "one step is 50": (of_one(partial(steps_as, lambda _: 50)), of_one(partial(write_steps, value=50.0))),
    "one entry deleted": (of_one(delete_last), of_one(delete_last)),
    "one entry of each deleted": (delete_last, delete_last),
    "one step deleted": (of_one(delete_steps), of_one(write_steps)),
}


def changes(make: Make) -> dict[str, tuple[Touch, Touch]]:
    same = {name: (touch, touch) for name, touch in CHANGES.items()}
    return same | (CHANGES_HERE if make in OURS.values() else {})


def edited(run: Run, edit: Touch) -> dict[str, Any]:
    """What the run would save if its state were edited so."""
    saved = copy.deepcopy(run.optimizer.state_dict())
    with torch.no_grad():
        edit(saved["state"], run.saved_keys(saved))
    return saved


def unsaved(run: Run, expected: dict[str, Any], name: str) -> list[str]:
    """Where the state dict right after a touch has something else than the touched values."""
    saved = run.optimizer.state_dict()
    here, there = ([x["state"].get(key, {}) for key in run.saved_keys(x)] for x in (saved, expected))
    if name == "one step deleted":
        here = [{"step": 0.0, **entries} for entries in here]
    return differences(run.names, here, there)


@every
def test_a_touched_state_is_the_one_that_is_used(make: Make) -> None:
    """As by another optimizer that loads it. One touch after the other, with a step after each."""
    run, twin = Run(make).go(3), Run(make)
    for name, (touch, edit) in frequent(changes(make)).items():
        expected = edited(run, edit)
        touched(touch, run)
        assert not unsaved(run, expected, name), f"{name}: {unsaved(run, expected, name)}"
        twin.take(run, expected)
        go_alike(run, twin, name)


@pytest.mark.slow
@every
@pytest.mark.parametrize("inside", [False, True], ids=["between steps", "in the closure"])
def test_each_touched_state_is_the_one_that_is_used(make: Make, inside: bool) -> None:
    """Each in a run of its own, before a step or while it computes gradients, and four steps."""
    wrong = {}
    touches = changes(make)
    for name, (touch, edit) in (frequent(touches) if inside else touches).items():
        run = Run(make).go(3)
        expected = edited(run, edit)
        twin = run.twin(make, expected)
        act(run, partial(touched, touch, run), inside)
        if not inside:
            wrong[f"{name}: state dict"] = unsaved(run, expected, name)
        run.go(4)
        wrong[name] = unlike(run, twin.go(4)) + stale(run)
    assert not {name: found for name, found in wrong.items() if found}


@pytest.mark.slow
@ours
def test_momenta_that_are_zeroed_are_seen_to_be(make: Make) -> None:
    """So that equal twins are no accident: touched states lead elsewhere than untouched ones."""
    run, twin = Run(make).go(3), Run(make).go(3)
    if all(entries.keys() <= {"step"} for entries in run.states()):
        return
    touched(scale if any("momentum" not in entries for entries in run.states()) else zero_momenta, run)
    assert unlike(run.go(1), twin.go(1))


def test_the_examples_of_a_state_that_comes_back_from_the_cpu() -> None:
    """AdamW under constant gradients moves by lr in every step."""
    p = nn.Parameter(torch.zeros(4))
    optimizer, moved = normopt.create("adamw", [p], lr=1e-3, weight_decay=0.0), []
    for k in range(400):
        p.grad = torch.ones(4)
        before = p[0].item()
        optimizer.step()
        moved.append((before - p[0].item()) / 1e-3)
        if k == 0:
            for v in optimizer.state[p].values():
                v.data = v.data.clone()
    assert [moved[k] for k in (0, 10, 399)] == pytest.approx([1.0] * 3, rel=1e-3)
    assert optimizer.state_dict()["state"][0]["step"] == 400


# Copies ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@every
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_own_their_state(make: Make, how: str) -> None:
    """A copy goes on as the original, and neither sees what is done to the other."""
    run, twin = Run(make).go(2), Run(make).go(2)
    other: Run = copy.deepcopy(run) if how == "deepcopy" else pickle.loads(pickle.dumps(run))
    assert {id(p) for group in other.optimizer.param_groups for p in group["params"]} == {*map(id, other.params)}
    assert not unlike(other, twin)
    touched(scale, run)
    run.go()
    assert not unlike(other.go(), twin.go()) and not stale(other)
    expected = edited(other, scale)
    touched(scale, other)
    twin = other.twin(make, expected)
    assert not unlike(other.go(), twin.go()) and not stale(other)


# Param groups ------------------------------------------------------------------------------------------------------


def _group(run: Run, p: Tensor) -> tuple[dict[str, Any], int]:
    return next((g, i) for g in run.optimizer.param_groups for i, q in enumerate(g["params"]) if q is p)


def skip_what_goes_by_place(make: Make, what: str) -> None:
    """Skip optimizers whose random bits, or turns, are others at another place of the group, for want of names."""
    rounds = "state_dtype" in getattr(make, "keywords", {})
    if what == "unnamed" and (rounds or "staggered" in type(make([torch.zeros(2, 2)])).__init__.__annotations__):
        pytest.skip("without names, random bits and turns go by the place in the group, which is another one now")


def _pop(run: Run, p: Tensor) -> None:
    group, i = _group(run, p)
    group["params"].pop(i)


def _filter(run: Run, p: Tensor) -> None:
    group, _ = _group(run, p)
    group["params"] = [q for q in group["params"] if q is not p]


@every
@whats
def test_parameters_that_are_taken_out_of_their_group(make: Make, what: str) -> None:
    """The others go on, whatever gradients and state are left to those that are gone."""
    skip_what_goes_by_place(make, what)
    run, twin = Run(make, what).go(2), Run(make, what).go(2)
    gone: tuple[str, ...] = ()
    for name, take in (("mid.weight", _pop), ("embed.weight", _filter)):
        before = run[name].detach().clone()
        take(run, run[name])
        gone = (*gone, name)
        run.go(2)
        twin.go(2, without=gone)
        assert not unlike(run, twin, gone), f"without {gone}: {unlike(run, twin, gone)}"
        assert torch.equal(run[name], before)
        del run.optimizer.state[run[name]]
        if name == "embed.weight":
            break
        run.go()
        twin.go(1, without=gone)
        assert not unlike(run, twin, gone), f"without {gone} and their state: {unlike(run, twin, gone)}"


@pytest.mark.slow
@every
@whats
def test_saving_and_loading_without_parameters_that_were_taken_out(make: Make, what: str) -> None:
    """By the optimizer itself, and by another one that has the same parameters left."""
    run, other = Run(make, what).go(2), Run(make, what)
    for each in (run, other):
        p = each["mid.weight"]
        _pop(each, p)
        each.optimizer.state.pop(p, None)
    saved = copy.deepcopy(run.optimizer.state_dict())
    run.go()
    after = [p.detach().clone() for p in run.params]
    with torch.no_grad():
        for p, q, fresh in zip(run.params, other.params, Run(make, what).go(2).params, strict=True):
            p.copy_(fresh)
            q.copy_(fresh)
    for each in (run, other):
        each.optimizer.load_state_dict(copy.deepcopy(saved))
        each.done = 2
        each.go()
        wrong = [n for n, p, q in zip(each.names, each.params, after, strict=True) if not torch.equal(p, q)]
        assert [n for n in wrong if n != "mid.weight"] == []
    assert not unlike(run, other, ("mid.weight",))


@ours
@whats
def test_errors_name_the_right_parameter_after_others_were_taken_out(make: Make, what: str) -> None:
    run = Run(make, what).go(1)
    for name in ("up.weight", "mid.weight"):
        run.optimizer.state.pop(run[name])
        _pop(run, run[name])
    run.go(1)
    place = _group(run, run["down.weight"])[1]
    expected = "parameter 'down.weight'" if what != "unnamed" else f"parameter {place} of its group"

    def closure() -> None:
        run.give_gradients()
        run["down.weight"].grad[0, 0] = float("nan")

    with pytest.raises(ValueError, match="NaN or Inf") as error:
        run.optimizer.step(closure)
    assert f"in the gradient of {expected}" in str(error.value)
    assert not any(f"'{name}'" in str(error.value) for name in run.names if name != "down.weight")


@pytest.mark.slow
@every
def test_a_group_may_lose_all_its_parameters(make: Make) -> None:
    """And be taken out after that; the others go on."""
    run, twin = Run(make).go(2), Run(make).go(2)
    group, _ = _group(run, run["embed.weight"])
    gone = tuple(n for n, p in zip(run.names, run.params, strict=True) if any(p is q for q in group["params"]))
    group["params"].clear()
    for _ in range(2):
        run.go()
        twin.go(1, without=gone)
        assert not unlike(run, twin, gone), unlike(run, twin, gone)
        run.optimizer.param_groups = [g for g in run.optimizer.param_groups if g is not group]
        for name in gone:
            run.optimizer.state.pop(run[name], None)
    if run.optimizer.param_groups:
        run.optimizer.load_state_dict(run.optimizer.state_dict())
    run.go()
    twin.go(1, without=gone)
    assert not unlike(run, twin, gone), unlike(run, twin, gone)


@every
@pytest.mark.parametrize("what", [pytest.param("named", marks=pytest.mark.slow), "unnamed"])
def test_a_parameter_that_is_appended_by_hand_trains(make: Make, what: str) -> None:
    """As one that was there all the time and had no gradient before."""
    skip_what_goes_by_place(make, what)
    run, twin = Run(make, what), Run(make, what)
    new = run["mid.weight"]
    group, _ = _group(run, new)
    _pop(run, new)
    if "param_names" in group:
        group["param_names"].remove("mid.weight")
    run.go(2)
    twin.go(2, without=("mid.weight",))
    group["params"].append(new)
    before = new.detach().clone()
    run.go(2)
    twin.go(2)
    assert not torch.equal(new, before) or twin["mid.weight"].equal(before)
    assert not unlike(run, twin), unlike(run, twin)
    assert not stale(run)
    run.optimizer.load_state_dict(run.optimizer.state_dict())
    assert not unlike(run.go(), twin.go()), unlike(run, twin)


# Parameters ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@ours
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_parameters_may_change_their_dtype(make: Make, dtype: torch.dtype) -> None:
    """Steps go on as those of an optimizer that was made for them and loaded the state; nothing is lost of it."""
    run = Run(make).go(2)
    for p in run.params:
        p.data = p.data.to(dtype)
    twin = run.twin(make, copy.deepcopy(run.optimizer.state_dict()))
    run.go(2)
    twin.go(2)
    assert not unlike(run, twin), unlike(run, twin)
    assert all(p.dtype == dtype for p in run.params) and not stale(run)


@pytest.mark.slow
@every
def test_modules_that_are_moved(make: Make) -> None:
    """To another dtype and back, by the module's own means, which swap the parameters' data."""
    run, twin = Run(make).go(2), Run(make).go(2)
    holder = nn.ParameterList(run.params)
    assert all(p is q for p, q in zip(holder, run.params, strict=True))
    holder.double().float()
    assert not unlike(run.go(2), twin.go(2))


# What plans and guards remember ------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [lambda groups: groups.pop(0), lambda groups: groups.reverse()], ids=["pop", "turn"])
def test_groups_may_go_and_change_places(change: Callable[[list[Any]], Any]) -> None:
    """Another group's parameter of one shape may be seen as other matrices."""

    def made() -> tuple[list[Tensor], Optimizer]:
        torch.manual_seed(0)
        params: list[Tensor] = [nn.Parameter(torch.randn(8, 8)) for _ in range(2)]
        heads = {"params": params[:1], "view": normopt.View(split=4)}
        return params, normopt.zoo.Muon([heads, {"params": params[1:]}], lr=0.1)

    (ours, optimizer), (theirs, twin) = made(), made()
    for step in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(8, 8)
            q.grad = p.grad.clone()
        if step == 2:
            change(optimizer.param_groups)
        optimizer.step()
        twin.step()
    assert torch.equal(ours[1], theirs[1]) and optimizer.state[ours[1]]["step"] == 4


@ours
def test_an_entry_that_is_transposed_in_place_is_seen_so(make: Make) -> None:
    def run(touch: Callable[[dict[str, Any], str], None]) -> Tensor:
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(6, 6))
        optimizer = make([p])
        for step in range(4):
            g = torch.randn(6, 6)

            def closure(g: Tensor = g) -> None:
                p.grad = g

            if step == 3:
                for name, x in list(optimizer.state[p].items()):
                    if x.ndim > 1 and x.shape[-1] == x.shape[-2]:
                        touch(optimizer.state[p], name)
            optimizer.step(closure)
        return p.detach()

    def in_place(state: dict[str, Any], name: str) -> None:
        state[name].transpose_(-1, -2)

    def anew(state: dict[str, Any], name: str) -> None:
        state[name] = state[name].mT.clone()

    assert torch.equal(run(in_place), run(anew))


def test_a_step_that_a_device_left_out_is_not_taken_from_a_count_that_was_set_since(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host, "DEFERRED", True)
    p = nn.Parameter(torch.zeros(4))
    optimizer = normopt.zoo.AdamW([p], lr=0.1, nonfinite="skip")
    for g in (torch.ones(4), torch.full((4,), float("nan"))):
        p.grad = g
        optimizer.step()
    optimizer.state[p]["step"] = 0
    for name in ("momentum", "second_moment"):
        optimizer.state[p][name].zero_()
    p.grad = torch.ones(4)
    optimizer.step()
    assert optimizer.state[p]["step"] == 1 and p.isfinite().all()


@pytest.mark.parametrize("step", [-1, None, float("nan"), "3", torch.tensor(-1.0), torch.zeros(2)], ids=str)
def test_what_is_no_number_of_steps_is_refused(step: Any) -> None:
    p = nn.Parameter(torch.zeros(4))
    optimizer = normopt.zoo.AdamW([p], lr=0.1)
    p.grad = torch.ones(4)
    optimizer.step()
    before = p.detach().clone()
    optimizer.state[p]["step"] = step
    with pytest.raises(ValueError, match="'step'"):
        optimizer.step()
    assert torch.equal(p, before)


def test_a_count_that_is_negative_in_place_is_refused() -> None:
    p = nn.Parameter(torch.zeros(4))
    optimizer = normopt.zoo.AdamW([p], lr=0.1)
    p.grad = torch.ones(4)
    optimizer.step()
    optimizer.state[p]["step"].fill_(-1.0)
    with pytest.raises(ValueError, match="parameter 0 of its group: the state 'step'"):
        optimizer.step()


def test_entries_of_others_are_left_alone() -> None:
    """A view that somebody keeps in the state of a parameter which leaves its batch stays a view."""
    params = [nn.Parameter(torch.zeros(4)) for _ in range(2)]
    optimizer = normopt.zoo.AdamW(params, lr=0.1)
    for p in params:
        p.grad = torch.ones(4)
    optimizer.step()
    flat = torch.zeros(8)
    optimizer.state[params[0]]["theirs"] = flat[:4]
    params[0].grad = None
    optimizer.step()
    flat.add_(1)
    assert (optimizer.state[params[0]]["theirs"] == 1).all()


def test_numbers_of_the_whole_optimizer_may_be_set_as_numbers() -> None:
    p = nn.Parameter(torch.zeros(4))
    optimizer = normopt.zoo.Prodigy([p])
    for _ in range(2):
        p.grad = torch.ones(4)
        optimizer.step()
        optimizer.param_groups[0]["d"] = 1e-3
    p.grad = torch.ones(4)
    optimizer.step()
    assert isinstance(optimizer.param_groups[0]["d"], Tensor) and optimizer.param_groups[0]["d"] >= 1e-3
