"""A model with awkward shapes in all layouts of torch.distributed, and optimizers on it beside one process.

Every rank hands both runs the same full gradients: gradients of half a batch differ in the last bit, which SOAP and its
like amplify.
"""

from __future__ import annotations

import copy
import io
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.optim import Optimizer

import normopt
from normopt import (
    EMA,
    L2,
    AdaScaled,
    Ball,
    Blocked,
    Chain,
    Column,
    Constant,
    DAdaptation,
    EqualRows,
    FrankWolfe,
    FrobeniusSphere,
    Grafted,
    Innovated,
    KahanSum,
    KyFan,
    LowRank,
    Max,
    NoiseScaled,
    PerBlock,
    Prodigy,
    RadialBrake,
    Relative,
    Row,
    RowBound,
    RowFloor,
    Schatten,
    Sinkhorn,
    Smoothed,
    Spectral,
    SpectralCap,
    SpectralNormalize,
    Sphere,
    SteepestDescent,
    Stiefel,
    StochasticRounding,
    Tangent,
    TangentProjection,
    WeightDecay,
)
from normopt.engine import mesh as meshes
from normopt.ingredient.stage import Context, Direction
from normopt.numerics import host
from normopt.stepsize.base import StepSize

#: How a model is laid out -> on how many ranks.
LAYOUTS = {
    "fsdp 2": 2,
    "fsdp 4": 4,
    "shard(1) 4": 4,
    "hsdp 2x2": 4,
    "tp 2x2": 4,
    "fsdp+tp 2x2": 4,
    "replicate 2": 2,
    "mesh 2": 2,
    "mesh 4": 4,
}


class Net(nn.Module):
    """Rows that do not divide by the ranks, down to empty shards; a fused qkv, a convolution, a head, odd vectors."""

    def __init__(self, dim: int = 10) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.up = nn.Linear(dim, 7)
        self.down = nn.Linear(7, dim)
        self.narrow = nn.Linear(dim, 5)
        self.wide = nn.Linear(5, dim)
        self.norm = nn.LayerNorm(dim)
        self.conv = nn.Conv1d(dim, 6, 3, padding=1)
        self.back = nn.Linear(6, dim)
        self.gain = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(dim, 11, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.emb(x)
        q, k, v = self.qkv(self.norm(h)).chunk(3, -1)
        h = h + torch.softmax(q @ k.mT / 3, -1) @ v
        h = h + self.down(torch.relu(self.up(h)))
        h = h + self.wide(torch.tanh(self.narrow(h)))
        h = h + self.back(self.conv(h.mT).mT) * self.gain
        return self.head(h)


def net(layout: str = "", dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    # fully_shard takes even shards only along other dimensions than the first.
    return Net(12 if "shard(1)" in layout else 10).to(dtype)


def batch(step: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(11, (8, 7), generator=torch.Generator().manual_seed(1000 + step))
    return tokens[:, :-1], tokens[:, 1:]


def loss_of(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step)
    return nn.functional.cross_entropy(model(x).flatten(0, 1).float(), y.flatten())


_MESHES: dict[Any, DeviceMesh] = {}


def mesh_of(*shape: int, names: tuple[str, ...] | None = None) -> DeviceMesh:
    """One device mesh for all tests of a process: each makes process groups."""
    if (shape, names) not in _MESHES:
        _MESHES[shape, names] = init_device_mesh("cpu", shape, mesh_dim_names=names)
    return _MESHES[shape, names]


PLAN: dict[str, ParallelStyle] = {
    **dict.fromkeys(("up", "narrow", "qkv"), ColwiseParallel()),
    **dict.fromkeys(("down", "wide", "emb"), RowwiseParallel()),
}


def laid_out(
    model: nn.Module, layout: str, every_module: bool = False, plan: Mapping[str, ParallelStyle] = PLAN
) -> nn.Module:
    """The model in one of ``LAYOUTS``, in place; ``plan`` says which layers tensor parallelism cuts."""
    kind, world = layout.split()[0], dist.get_world_size()
    if kind in ("fsdp", "shard(1)"):
        if every_module:
            for module in [*model.modules()][1:]:
                fully_shard(module, mesh=mesh_of(world))
        second = None if kind == "fsdp" else lambda p: Shard(1) if p.ndim > 1 and p.shape[1] % world == 0 else Shard(0)
        fully_shard(model, mesh=mesh_of(world), shard_placement_fn=second)
    elif kind == "hsdp":
        fully_shard(model, mesh=mesh_of(2, world // 2, names=("replicate", "shard")))
    elif kind in ("tp", "fsdp+tp"):
        both = mesh_of(world // 2, 2, names=("dp", "tp"))
        parallelize_module(model, both["tp"], dict(plan))
        if kind == "fsdp+tp":
            fully_shard(model, mesh=both["dp"])
    elif kind == "replicate":
        from torch.distributed._composable.replicate_with_fsdp import replicate

        replicate(model, mesh=mesh_of(world))
    return model


def options_of(layout: str) -> dict[str, Any]:
    """What the optimizer of a layout is told."""
    return {"mesh": mesh_of(dist.get_world_size())} if layout.startswith("mesh") else {}


def like(full: Tensor, p: Tensor) -> Tensor:
    """``full`` as ``p`` is laid out."""
    return meshes.placed_as(p, full.clone())


def full(x: Tensor) -> Tensor:
    """All of a tensor, sharded or not; all ranks must call together."""
    return x.full_tensor() if isinstance(x, DTensor) else x


@torch.no_grad()
def whole(params: Iterable[Tensor]) -> Tensor:
    return torch.cat([full(p.detach()).flatten().double() for p in params])


def hand_over(source: nn.Module, model: nn.Module) -> None:
    """Give a laid out model the gradients of a plain one."""
    for p, q in zip(source.parameters(), model.parameters(), strict=True):
        q.grad = None if p.grad is None else like(p.grad, q)


@torch.no_grad()
def copy_weights(source: nn.Module, model: nn.Module) -> None:
    """Give a laid out model the weights of a plain one."""
    for p, q in zip(source.parameters(), model.parameters(), strict=True):
        meshes.local(q).copy_(meshes.local(like(p, q)))


def learning_rate(name: str) -> dict[str, float]:
    """Steps that go somewhere."""
    if name in ("prodigy", "dadaptadam"):
        return {"lr": 1.0}
    return {} if name == "stormplus" else {"lr": 0.1 if name in ("sgd", "sgdp", "lars") else 1e-2}


Make = Callable[..., SteepestDescent]


class Pair:
    """An optimizer on a laid out model and the same on a plain one, which get the same gradients."""

    def __init__(self, make: Make, layout: str, dtype: torch.dtype = torch.float32) -> None:
        self.plain, self.model = net(layout, dtype), laid_out(net(layout, dtype), layout)
        self.one, self.many = make(self.plain), make(self.model, **options_of(layout))
        self._probe, self._start = net(layout, dtype), whole(self.plain.parameters())

    def step(self, step: int) -> None:
        looks = any(rule.momentum.looks_back for rule in map(normopt.rule.rule_of, self.one.param_groups))
        self.one.zero_grad()
        if looks:
            self.one.step(lambda: self._gradients(self.plain, self.plain, step))
            self.many.step(lambda: self._at_weights(step))
            return
        self._gradients(self.plain, self.plain, step)
        hand_over(self.plain, self.model)
        self.one.step()
        self.many.step()

    @staticmethod
    def _gradients(source: nn.Module, model: nn.Module, step: int) -> Tensor:
        source.zero_grad()
        loss = loss_of(source, step)
        loss.backward()
        if model is not source:
            hand_over(source, model)
        return loss

    def _at_weights(self, step: int) -> Tensor:
        """Gradients of a plain model at the laid out one's weights."""
        with torch.no_grad():
            for p, q in zip(self._probe.parameters(), self.model.parameters(), strict=True):
                p.copy_(full(q))
        return self._gradients(self._probe, self.model, step)

    def step_many(self, step: int) -> None:
        """The laid out one alone."""
        self.one.zero_grad()
        self._gradients(self.plain, self.model, step)
        self.many.step()

    def distance(self) -> float:
        """How far apart both are, over the distance that the plain one has travelled."""
        mine, other = whole(self.model.parameters()), whole(self.plain.parameters())
        return float((mine - other).norm() / (other - self._start).norm())

    def flipped(self) -> int:
        """How many entries differ; an ``AssertionError`` if one does by more than a unit in its last place."""
        mine, other = whole(self.model.parameters()), whole(self.plain.parameters())
        assert ((mine - other).abs() <= other.abs() * 2.0**-7).all()
        return int((mine != other).sum())

    def spread(self) -> float:
        """How far apart replicas are: the largest difference between ranks in what should be equal.

        Where shards are gathered, ranks get those of their own replicas.
        """
        mine = whole(self.model.parameters())
        least, most = mine.clone(), mine.clone()
        dist.all_reduce(least, dist.ReduceOp.MIN)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return float((most - least).abs().max())


def outcome(make: Make, layout: str, steps: int, dtype: torch.dtype = torch.float32) -> Outcome:
    """What some steps of both come to."""
    pair, spread = Pair(make, layout, dtype), 0.0
    for step in range(steps):
        pair.step(step)
        if step == steps - 1 or step % 5 == 4:
            spread = max(spread, pair.spread())
    return Outcome(pair.distance(), spread, pair.flipped() if dtype == torch.bfloat16 else 0)


class Outcome(NamedTuple):
    """How far apart both are, replicas from each other after any step, and how many bfloat16 entries differ."""

    distance: float
    spread: float
    flipped: int


def of_optimizers(names: Sequence[str], layout: str, steps: int) -> dict[str, Outcome | str]:
    """For each optimizer of the registry what comes out, or the error."""
    return _each({name: partial(outcome, _named(name), layout, steps) for name in names})


def of_rules(names: Sequence[str], layout: str, steps: int) -> dict[str, Outcome | str]:
    """The same for ``RULES``."""
    return _each({name: partial(outcome, RULES[name][0], layout, steps, RULES[name][1]) for name in names})


def _each(runs: dict[str, Callable[[], Outcome]]) -> dict[str, Outcome | str]:
    found: dict[str, Outcome | str] = {}
    for name, run in runs.items():
        try:
            found[name] = run()
        except Exception:
            found[name] = traceback.format_exc()[-2000:]
            break  # ranks may be out of step now
    return found


def _named(name: str) -> Make:
    return partial(_create, name)


def _create(name: str, model: nn.Module, **more: Any) -> SteepestDescent:
    return normopt.create(name, model, **learning_rate(name), **more)


# Checkpoints ----------------------------------------------------------------------------------------------------------


def states(optimizer: SteepestDescent) -> dict[tuple[str, str], Tensor]:
    """Each piece of state, whole, by the names of the parameter and of the piece."""
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    each = optimizer.state_dict()["state"].items()
    return {(names[i], key): full(x).detach().clone() for i, held in each for key, x in held.items()}


def saved_by(name: str, layout: str, folder: str, **options: Any) -> tuple[dict[tuple[str, str], Tensor], Tensor]:
    """Three steps, saved to a folder, and two more: the state when it was saved, and the weights at the end."""
    pair = Pair(_named(name), layout)
    for step in range(3):
        pair.step(step)
    checkpoint.save(state_dicts(pair.model, pair.many, **options), checkpoint_id=folder)
    found = states(pair.many)
    gradients = []
    for step in range(3, 5):
        pair.step(step)
        gradients.append([p.grad for p in pair.plain.parameters()])
    torch.save(gradients, f"{folder}/gradients{dist.get_rank()}.pt")  # for those who load it: the same to the last bit
    return found, whole(pair.model.parameters())


def loaded_by(name: str, layout: str, folder: str, **options: Any) -> tuple[dict[tuple[str, str], Tensor], Tensor]:
    """The state after loading that, and the weights after the same two steps."""
    pair = Pair(_named(name), layout)
    found = state_dicts(pair.model, pair.many, **options)
    checkpoint.load(found, checkpoint_id=folder)
    set_model_state_dict(pair.model, found["model"])
    set_optimizer_state_dict(pair.model, pair.many, found["optimizer"], options=StateDictOptions(**options))
    state = states(pair.many)
    for gradients in torch.load(f"{folder}/gradients0.pt", weights_only=True):
        for p, g in zip(pair.model.parameters(), gradients, strict=True):
            p.grad = like(g, p)
        pair.many.step()
    return state, whole(pair.model.parameters())


def state_dicts(model: nn.Module, optimizer: Optimizer, **options: Any) -> dict[str, Any]:
    """What is saved of both; ``options`` are those of ``StateDictOptions``, for the optimizer."""
    state = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(**options))
    return {"model": get_model_state_dict(model), "optimizer": state}


def loads_whole_state(name: str, layout: str, saved: bytes) -> float:
    """How far from one process the run is after the state dict of one process has been loaded, and two steps."""
    pair = Pair(_named(name), layout)
    found = torch.load(io.BytesIO(saved), weights_only=True)
    pair.plain.load_state_dict(found["model"])
    pair.one.load_state_dict(found["optimizer"])
    copy_weights(pair.plain, pair.model)
    pair.many.load_state_dict(found["optimizer"])
    for step in range(3, 5):
        pair.step(step)
    return pair.distance()


def one_process(name: str) -> bytes:
    """Model and optimizer of one process after three steps, as ``torch.save`` writes them."""
    model = net()
    optimizer = _create(name, model)
    for step in range(3):
        Pair._gradients(model, model, step)
        optimizer.step()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    return file.getvalue()


def goes_through_rank_0(name: str, layout: str) -> bool:
    """Whether a whole state dict, broadcast from rank 0 to a new run, is the state that it was."""
    pair, other = Pair(_named(name), layout), Pair(_named(name), layout)
    for step in range(3):
        pair.step(step)
    whole_state = StateDictOptions(full_state_dict=True, cpu_offload=True)
    found = get_optimizer_state_dict(pair.model, pair.many, options=whole_state)
    spread = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(other.model, other.many, found, options=spread)
    return equal(states(pair.many), states(other.many))


def before_the_first_step(layout: str) -> tuple[int, int]:
    """How many parameters have state in a new optimizer, and in one of whose parameters one never gets a gradient."""
    pair = Pair(_named("muon"), layout)
    none = len(pair.many.state_dict()["state"])
    pair._gradients(pair.plain, pair.model, 0)
    pair.model.get_parameter("gain").grad = None
    pair.model.get_parameter("up.weight").grad = None
    pair.many.step()
    return none, len(pair.many.state_dict()["state"])


def equal(a: dict[tuple[str, str], Tensor], b: dict[tuple[str, str], Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


# What goes wrong ------------------------------------------------------------------------------------------------------


class Fault(NamedTuple):
    """What a faulty step came to."""

    error: str
    late: str
    has_moved: bool
    has_counted: bool
    distance: float


def fault(name: str, layout: str, kind: str, policy: str, deferred: bool) -> Fault:
    """Two steps, one at which rank 1 has a fault, and the same step without it."""
    group = {"process_group": dist.group.WORLD} if layout == "plain" else {}
    host.DEFERRED = deferred
    try:
        pair = Pair(lambda model, **more: _create(name, model, nonfinite=policy, **more), layout)
        if group:
            pair.many = _create(name, pair.model, nonfinite=policy, **group)
        for step in range(2):
            pair.step(step)
        weights, state = whole(pair.model.parameters()), states(pair.many)
        pair.one.zero_grad()
        pair._gradients(pair.plain, pair.model, 2)
        p = pair.model.get_parameter("up.weight")
        if dist.get_rank() == 1:
            _spoil(p, kind, pair.many)
        error = error_of(pair.many.step)
        late = error_of(pair.many.state_dict)
        if kind == "state" and dist.get_rank() == 1:
            pair.many.state[p]["step"] = torch.tensor(2.0)
        if deferred and policy == "raise":
            pair._gradients(pair.plain, pair.model, 2)
            late = error_of(pair.many.step)
        has_moved = not torch.equal(weights, whole(pair.model.parameters()))
        has_counted = not equal(state, states(pair.many))
        pair.step(2)
        return Fault(error, late, has_moved, has_counted, pair.distance())
    finally:
        host.DEFERRED = False


def nan_at_the_first_step(name: str, layout: str) -> tuple[str, int]:
    """The error of a first step with NaN on rank 1, and how many parameters have state after it."""
    pair = Pair(_named(name), layout)
    pair._gradients(pair.plain, pair.model, 0)
    if dist.get_rank() == 1:
        _spoil(pair.model.get_parameter("up.weight"), "nan", pair.many)
    return error_of(pair.many.step), len(pair.many.state)


def _spoil(p: Tensor, kind: str, optimizer: SteepestDescent) -> None:
    if kind == "nan":
        assert p.grad is not None
        meshes.local(p.grad)[-1:, -1:].fill_(float("nan"))
    elif kind == "missing":
        p.grad = None
    else:
        optimizer.state[p]["step"] = torch.tensor(-1.0)


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


def until_killed(layout: str, folder: str, victim: int, how: str) -> str:
    """Steps with a checkpoint after the second; then one rank dies or hangs, and the others say what they see."""
    pair = Pair(_named("muon"), layout)
    for step in range(2):
        pair.step(step)
    checkpoint.save(state_dicts(pair.model, pair.many), checkpoint_id=folder)
    pair._gradients(pair.plain, pair.model, 2)
    if dist.get_rank() == victim:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    try:
        pair.many.step()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def after_the_death(layout: str, folder: str) -> bool:
    """Whether the last checkpoint loads, and the run goes on."""
    pair = Pair(_named("muon"), layout)
    found = state_dicts(pair.model, pair.many)
    checkpoint.load(found, checkpoint_id=folder)
    set_optimizer_state_dict(pair.model, pair.many, found["optimizer"])
    pair.step(2)
    return all(float(held["step"]) == 3 for held in pair.many.state.values())


def reported(name: str, layout: str) -> tuple[str, list[float], list[float]]:
    """What ``describe`` says, without the other ranks, and what is measured of a step here and in one process."""
    pair = Pair(_named(name), layout)
    text = normopt.describe(pair.many) if dist.get_rank() == 0 else ""
    with pair.one.metrics() as plain, pair.many.metrics() as sharded:
        pair.step(0)
    key = "update_rms"
    order = {row["parameter"]: row[key] for row in plain.rows()}
    return text, [row[key] for row in sharded.rows()], [order[row["parameter"]] for row in sharded.rows()]


def squares(name: str, deterministic: bool) -> tuple[float, list[str], float]:
    """Four matrices of 128 x 128 on their owners: the distance, what was chosen for products, and the spread."""
    torch.manual_seed(0)
    plain = nn.Sequential(*(nn.Linear(128, 128, bias=False) for _ in range(4)))
    model = laid_out(copy.deepcopy(plain), f"fsdp {dist.get_world_size()}")
    options = {"lr": 1e-2, "deterministic": deterministic}
    one, many = (normopt.create(name, each, **options) for each in (plain, model))
    start = whole(plain.parameters())
    for step in range(3):
        for p in plain.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        hand_over(plain, model)
        one.step()
        many.step()
    mine, other = whole(model.parameters()), whole(plain.parameters())
    chosen = [group["products"] for group in many.param_groups]
    apart = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(apart, mine)
    spread = max(float((x - mine).abs().max()) for x in apart)
    return float((mine - other).norm() / (other - start).norm()), chosen, spread


# Declarations ---------------------------------------------------------------------------------------------------------


def of_own_ingredients(layout: str) -> dict[str, float | str]:
    """Ingredients of a user: without a word on sharding, and with a word that is wrong."""

    @dataclass(frozen=True)
    class Undeclared(Direction):
        """Looks at rows, columns and weights, and says nothing of it."""

        def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
            assert type(x) is Tensor, "an ingredient has seen a DTensor"
            return x / (x.abs().amax() + 1e-12) + 0.1 * context.w / (context.w.abs().sum(-1, keepdim=True) + 1.0)

    @dataclass(frozen=True)
    class Wrong(Direction):
        """Looks at weights, and says that it does not."""

        sees_weights = False

        def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
            return x + context.w

    @dataclass(frozen=True)
    class Silent(StepSize):
        """Sums over all tensors, and does not say what."""

        sees_weights = False

        def survey(self, state: dict[str, Tensor], context: Context, shared: Any) -> dict[str, Tensor]:
            return {"square": context.g.double().square().sum()}

        def conclude(self, sums: dict[str, Tensor], shared: Any) -> Any:
            return {"size": sums["square"].sqrt() + 1}

        def length(self, x: Tensor, d: Tensor, context: Context, shared: Any) -> Any:
            return context.rate / shared["size"]

    @dataclass(frozen=True)
    class Said(Silent):
        """Says it."""

        survey_sums = ("square",)

    found: dict[str, float | str] = {
        "undeclared": outcome(descent(norm=Undeclared()), layout, 3).distance,
        "sums": outcome(descent(norm="spectral", step_size=Said()), layout, 3).distance,
    }
    found["wrong"] = error_of(lambda: Pair(descent(norm=Wrong()), layout).step(0))
    found["silent"] = error_of(lambda: Pair(descent(norm="spectral", step_size=Silent()), layout).step_many(0))
    return found


# Rules ----------------------------------------------------------------------------------------------------------------

VECTORS = {
    "vector": {"norm": Smoothed(Max()), "momentum": EMA(0.9, bias_correction=True)},
    "scalar": {"norm": Smoothed(Max())},
    "*": {},
}


def descent(**ingredients: Any) -> Make:
    """Matrices by these ingredients, vectors by Adam."""
    return lambda model, **more: SteepestDescent(model, lr=1e-2, geometry=VECTORS, **ingredients, **more)


def create(name: str, **options: Any) -> Make:
    return lambda model, **more: normopt.create(name, model, **{"lr": 1e-2, **options}, **more)


def unequal(model: nn.Module) -> tuple[int, int, int]:
    """A half, a third and a sixth of the rows of ``qkv.weight``."""
    rows = model.get_parameter("qkv.weight").shape[0]
    return rows // 2, rows // 3, rows // 6


def viewed(view: dict[str, Any], **other: Any) -> dict[str, Any]:
    return {"overrides": {"qkv.weight": {"view": view}, **other}}


FLOAT32: dict[str, Make] = {
    "row bound": descent(norm="spectral", momentum="nesterov", constraint=RowBound(0.3)),
    "column bound": descent(norm="spectral", constraint=RowBound(0.3, axis=-2)),
    "sphere": descent(norm="spectral", momentum=0.9, constraint=Sphere(0.5)),
    "Frobenius sphere": descent(norm="spectral", constraint=FrobeniusSphere()),
    "Stiefel": descent(norm=Chain(Tangent(), Spectral()), constraint=Stiefel()),
    "radial brake": descent(norm="spectral", constraint=RadialBrake()),
    "row floor": descent(norm="max", constraint=RowFloor(10.0)),
    "equal rows": descent(norm=EqualRows(), momentum=0.9),
    "innovation": descent(norm=Innovated(), momentum=0.9),
    "noise": descent(norm=Chain(NoiseScaled(gamma=10.0), Spectral()), momentum=EMA(0.95)),
    "AdaScaled": descent(norm=Chain(Max(), AdaScaled(floor=1e-3)), momentum=0.9),
    "spectral ball": descent(norm="spectral", constraint=Ball(Spectral(), 0.5)),
    "ball of entries": descent(norm=Smoothed(Max()), constraint=Ball(Max("unit"), 0.1)),
    "ball of rows": descent(norm="row", constraint=Ball(Row(), 0.1)),
    "spectral cap": descent(norm="spectral", constraint=SpectralCap(0.5)),
    "spectral normalize": descent(norm="spectral", constraint=SpectralNormalize(0.5)),
    "Frank-Wolfe": descent(norm="spectral", constraint=FrankWolfe(), step_size=Constant(3.0)),
    "tangent": descent(norm=Smoothed(Max()), constraint=TangentProjection(weight_decay=0.1)),
    "cautious decay": descent(norm="spectral", constraint=WeightDecay(0.1, cautious=True)),
    "decay after": descent(norm="spectral", constraint=WeightDecay(0.1, after=True)),
    "L2": descent(norm="spectral", constraint=L2(0.1)),
    "Adam, row bound": descent(
        norm=Smoothed(Max()), momentum=EMA(0.9, bias_correction=True), constraint=(WeightDecay(0.1), RowBound(0.2))
    ),
    "dual": descent(norm="spectral", step_size="dual"),
    "sharp": descent(norm="spectral", step_size="sharp"),
    "relative": descent(norm=Smoothed(Max()), step_size=Relative()),
    "gradient trust": descent(norm="identity", momentum="heavy-ball", step_size="gradient-trust"),
    "Prodigy": descent(norm="spectral", momentum=0.9, step_size=Prodigy(d0=1e-3)),
    "D-Adaptation": descent(norm="spectral", step_size=DAdaptation(d0=1e-3)),
    "blocked Shampoo": descent(norm=Blocked(Smoothed(Spectral()), 4)),
    "per block": descent(norm=PerBlock(Spectral(), rows=5)),
    "grafted": descent(norm=Grafted(Spectral(), Smoothed(Max()))),
    "column": descent(norm="column"),
    "row": descent(norm="row"),
    "smoothed column": descent(norm=Smoothed(Column())),
    "smoothed row": descent(norm=Smoothed(Row()), momentum=0.9),
    "row, row bound": descent(norm="row", constraint=RowBound(0.3)),
    "max, fan in": descent(norm=Max(scale="fan_in")),
    "Ky Fan": descent(norm=KyFan(2)),
    "Schatten": descent(norm=Schatten(3.0)),
    "nuclear": descent(norm="nuclear"),
    "low rank": descent(norm=LowRank(0.5)),
    "Sinkhorn": descent(norm=Sinkhorn()),
    "split": create("muon", **viewed({"split": 3})),
    "unequal split": lambda model, **more: create("muon", **viewed({"split": unequal(model)}))(model, **more),
    "rows, split": lambda model, **more: SteepestDescent(
        model,
        lr=1e-2,
        norm="row",
        geometry=VECTORS,
        **viewed({"split": 3}, **{"emb.weight": {"view": {"split": 2}}}),
        **more,
    ),
    "heads": create("soap", **viewed({"split": 6})),
    "maximize": create("muon", maximize=True),
    "rate in a tensor": lambda model, **more: create("muon", lr=torch.tensor(1e-2), weight_decay=0.1)(model, **more),
    "capturable": lambda model, **more: create("muon", lr=torch.tensor(1e-2), capturable=True)(model, **more),
    "decay": create("muon", weight_decay=0.3),
    **{f"bfloat16 state, {name}": create(name, state_dtype="bfloat16") for name in ("muon", "adamw", "scale", "soap")},
}
BFLOAT16: dict[str, Make] = {
    "bfloat16, Muon": create("muon", weight_decay=0.1),
    "bfloat16, AdamW": create("adamw", weight_decay=0.1),
    "bfloat16, SOAP": create("soap"),
    "bfloat16, Kahan": descent(norm="spectral", constraint=KahanSum()),
    "bfloat16, Kahan, Adam": descent(norm=Smoothed(Max()), constraint=KahanSum()),
    "bfloat16, stochastic": descent(norm="spectral", constraint=StochasticRounding()),
    "bfloat16, stochastic, Adam": descent(norm=Smoothed(Max()), constraint=StochasticRounding()),
    "bfloat16, its own state": create("muon", state_dtype="parameter"),
}
#: Rules that use what the registry leaves at its default, and the dtype of the model.
RULES = {name: (make, torch.float32) for name, make in FLOAT32.items()}
RULES |= {name: (make, torch.bfloat16) for name, make in BFLOAT16.items()}


# Around optimizers ----------------------------------------------------------------------------------------------------

#: Averages of iterates that between them use every argument, and bounds that the averages have to be brought back to.
AVERAGED: dict[str, tuple[Make, dict[str, Any]]] = {
    "schedule-free NorMuon": (create("normuon"), {}),
    "schedule-free AdamW": (create("adamw", betas=(0.0, 0.99)), {"weight_decay": 0.1, "r": 1.0}),
    "AMUSE": (create("muon"), {"power": 0.0, "rise": (3, 0.7)}),
    "tail": (create("muon"), {"interpolation": 0.0, "decay": 0.9, "start": 3, "share": 0.6}),
    "EMA-Nesterov": (create("muon"), {"interpolation": -0.06, "decay": 0.9, "share": 0.0, "leap": True}),
    "row bound": (descent(norm="spectral", constraint=RowBound(0.3)), {"interpolation": 0.5}),
    "Frobenius sphere": (descent(norm="spectral", constraint=FrobeniusSphere()), {"interpolation": 0.5}),
    "Stiefel": (descent(norm="spectral", constraint=Stiefel(method="exact")), {"interpolation": 0.5}),
}


def averaged(name: str, layout: str, folder: str) -> tuple[float, float, bool, bool]:
    """How far averaged iterates are from those of one process after 5 steps, in training and in evaluation.

    And whether a run that is loaded from a checkpoint is the same, in both modes and after one more step; and whether
    the state of one process gives its weights.
    """
    make, options = AVERAGED[name]
    pair, other = Pair(make, layout), Pair(make, layout)
    one, many, again = (normopt.Averaged(each, **options) for each in (pair.one, pair.many, other.many))
    for step in range(5):
        pair._gradients(pair.plain, pair.model, step)
        one.step()
        many.step()
    training = pair.distance()
    checkpoint.save(state_dicts(pair.model, many), checkpoint_id=folder)
    found = state_dicts(other.model, again)
    checkpoint.load(found, checkpoint_id=folder)
    set_model_state_dict(other.model, found["model"])
    set_optimizer_state_dict(other.model, again, found["optimizer"])
    for each in (one, many, again):
        each.eval()
    evaluated, is_same = pair.distance(), _are_equal(pair.model, other.model)
    for each in (one, many, again):
        each.train()
    pair._gradients(pair.plain, pair.model, 5)
    hand_over(pair.plain, other.model)
    for each in (one, many, again):
        each.step()
    is_same &= _are_equal(pair.model, other.model)
    again.load_state_dict(one.state_dict())
    return training, evaluated, is_same, _are_equal(pair.plain, other.model)


def _are_equal(model: nn.Module, other: nn.Module) -> bool:
    return torch.equal(whole(model.parameters()), whole(other.parameters()))


def softmax_limited(layout: str) -> list[tuple[float, float, float]]:
    """Steps within the softmax's radius: the ratios of one process and of a sharded model, and how far apart both are.

    The learning rate is a hundred times too large, so that steps are cut.
    """
    pair, found = Pair(create("muon", lr=1.0), layout), []
    for step in range(4):
        pair._gradients(pair.plain, pair.model, step)
        tokens = batch(step)[0]
        mine = tokens.chunk(dist.get_world_size())[dist.get_rank()]  # each rank has a part of the batch
        plain = {"process_group": dist.group.WORLD} if layout.startswith("mesh") else {}
        ratios = (
            normopt.softmax_limited_step(pair.one, pair.plain, tokens),
            normopt.softmax_limited_step(pair.many, pair.model, mine, **plain),
        )
        found.append((*ratios, pair.distance()))
    return found


def evaluated_between_steps(layout: str) -> tuple[list[float], list[float]]:
    """Losses of one process and of a sharded model: at the averages, and in training afterwards."""
    pair = Pair(create("muon"), layout)
    averages = [normopt.Averaged(each) for each in (pair.one, pair.many)]
    for step in range(4):
        pair._gradients(pair.plain, pair.model, step)
        for each in averages:
            each.step()
    found = []
    for each, model in zip(averages, (pair.plain, pair.model), strict=True):
        with each.evaluating(), torch.no_grad():
            losses = [float(loss_of(model, 9))]
        if isinstance(model, FSDPModule):
            model.reshard()
        found.append([*losses, float(loss_of(model, 9).detach())])
    return found[0], found[1]
