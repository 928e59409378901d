"""Bad input is refused by name, before anything has changed."""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normopt
from normopt import SteepestDescent
from normopt.engine.checks import check_gradients
from normopt.numerics import host
from normopt.rule import rule_of
from tests.support.models import Net
from tests.support.optimizers import EVERY
from tests.support.steps import SHAPES, assert_equal, give_gradients, run, snapshot, tensors

Make = Callable[..., SteepestDescent]
ALL: dict[str, Make] = {**EVERY, "stormplus": partial(normopt.create, "stormplus")}
every = pytest.mark.parametrize("make", ALL.values(), ids=ALL)
both = pytest.mark.parametrize("deferred", [False, True], ids=["host", "device"])
NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def waiting(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """With ``deferred``, CPUs are treated as if reading a number from them were expensive."""
    parameters = getattr(request.node, "callspec", None)
    monkeypatch.setattr(host, "DEFERRED", bool(parameters and parameters.params.get("deferred")))


def named(params: list[Tensor], first: str = "abcd") -> list[tuple[str, Tensor]]:
    return list(zip(first, params, strict=False))


def two_groups(make: Make, params: list[Tensor], **options: Any) -> SteepestDescent:
    return make([{"params": named(params[:2])}, {"params": named(params[2:], "cd")}], lr=0.1, **options)


def bad(params: list[Tensor], seed: int, culprit: int, value: float) -> None:
    give_gradients(params, seed)
    params[culprit].grad.view(-1)[-1] = value


def step(optimizer: SteepestDescent, params: list[Tensor], seed: int, **spoil: Any) -> None:
    optimizer.step(lambda: bad(params, seed, **spoil) if spoil else give_gradients(params, seed))


# Gradients that are not finite -----------------------------------------------------------------------------------


@every
@both
@pytest.mark.parametrize("when", [0, 2])
def test_a_step_that_raises_changes_nothing(make: Make, deferred: bool, when: int) -> None:
    """Not even the state of parameters that had none; the run goes on as if it had not been."""
    params, others = tensors(), tensors()
    optimizer, twin = two_groups(make, params), two_groups(make, others)
    run(optimizer, params, when)
    run(twin, others, when)
    before = snapshot(optimizer)
    expected = r"gradient of parameter 'd'; .*nonfinite='skip'"
    if deferred:
        step(optimizer, params, when, culprit=3, value=NAN)
        now = snapshot(optimizer)
        assert_equal(now[0], before[0])
        if when:
            assert_equal(now, before)
        with pytest.raises(ValueError, match=expected):
            step(optimizer, params, when)
        assert_equal(snapshot(optimizer), now)
    else:
        with pytest.raises(ValueError, match=expected):
            step(optimizer, params, when, culprit=3, value=INF)
        assert_equal(snapshot(optimizer), before)
    run(optimizer, params, 2, first=when)
    run(twin, others, 2, first=when)
    assert_equal(snapshot(optimizer), snapshot(twin))


@every
@both
def test_a_step_that_is_skipped_changes_nothing(make: Make, deferred: bool) -> None:
    params, others = tensors(dtype=torch.float32), tensors(dtype=torch.float32)
    optimizer, twin = (two_groups(make, each, nonfinite="skip") for each in (params, others))
    for i in range(3):
        step(optimizer, params, 7, culprit=i, value=-INF)
        step(optimizer, params, i)
        step(twin, others, i)
        assert_equal(snapshot(optimizer), snapshot(twin))


@pytest.mark.parametrize("name", normopt.list_optimizers())
def test_every_optimizer_hands_it_on_to_every_group(name: str) -> None:
    for options in ({"name": name}, {"name": "nap", "base": name}):
        optimizer = normopt.create(model=Net(), nonfinite="skip", **options)
        assert {group["nonfinite"] for group in optimizer.param_groups} == {"skip"}


@both
def test_half_weights_of_a_step_that_is_left_out_keep_every_bit(deferred: bool) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        params = tensors(dtype=dtype)
        optimizer = normopt.create("scion", params, lr=0.1, nonfinite="skip")
        run(optimizer, params, 1)
        before = snapshot(optimizer)
        step(optimizer, params, 1, culprit=0, value=NAN)
        assert_equal(snapshot(optimizer), before)


def test_propagated_gradients_reach_the_weights() -> None:
    params = tensors()
    optimizer = normopt.create("adamw", params, lr=0.1, nonfinite="propagate")
    step(optimizer, params, 0, culprit=0, value=NAN)
    assert params[0].isnan().any()


@pytest.mark.parametrize("name", ["adam", "rmsprop", "adagrad", "sgd", "soap"])
def test_what_is_propagated_is_not_made_finite(name: str) -> None:
    """Also where gradients that are watched would be cut, so that their squares stay finite."""
    (weight,) = weights = tensors([(4, 3)], torch.float32)
    optimizer = normopt.create(name, weights, nonfinite="propagate")
    for i in range(3):
        give_gradients(weights, i)
        if i == 2:
            weight.grad.fill_(INF)
        optimizer.step()
    state = [x for s in optimizer.state.values() for x in s.values()]
    assert not all(x.isfinite().all() for x in [weight, *state])


@both
def test_each_group_has_its_own_answer(deferred: bool) -> None:
    """The strictest one that is concerned counts, and a bad gradient keeps all groups where they are."""
    params = tensors([(3, 2)] * 3)
    answers = ["raise", "skip", "propagate"]
    groups = [{"params": [p], "nonfinite": answer} for p, answer in zip(params, answers, strict=True)]
    optimizer = SteepestDescent(groups, lr=0.1, norm="identity")
    before = snapshot(optimizer)[0]
    step(optimizer, params, 0, culprit=1, value=NAN)
    optimizer.state_dict()
    assert_equal(snapshot(optimizer)[0], before)

    def both_bad() -> None:
        bad(params, 0, 1, NAN)
        params[0].grad[0] = INF

    with pytest.raises(ValueError, match="parameter 0 of its group;"):
        optimizer.step(both_bad)
        optimizer.step(both_bad)
    assert_equal(snapshot(optimizer)[0], before)
    step(optimizer, params, 0, culprit=2, value=NAN)
    assert params[2].isnan().any() and not torch.equal(params[0], before[0])


@both
def test_the_error_names_the_first_culprits(deferred: bool) -> None:
    params = tensors([(2, 2)] * 8)
    optimizer = SteepestDescent(list(zip("abcdefgh", params, strict=True)), lr=0.1, norm="max")
    give_gradients(params, 0)
    for p in params[1:]:
        p.grad[0, 0] = NAN
    with pytest.raises(ValueError, match=r"gradient of parameter 'b', .* parameter 'f' and 2 more; "):
        optimizer.step()
        optimizer.step()


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_large_gradients_are_legal_where_their_sums_overflow(dtype: torch.dtype, deferred: bool) -> None:
    params = [nn.Parameter(torch.ones(9, 5, dtype=dtype)), nn.Parameter(torch.ones(0, 3, dtype=dtype))]
    optimizer = normopt.create("signsgd", params, lr=0.25)
    for size in (torch.finfo(dtype).max, 1e30 if dtype != torch.float16 else 6e4):
        for p in params:
            p.grad = torch.full_like(p, size)
        optimizer.step()
    assert torch.equal(params[0], torch.full_like(params[0], 0.5))


@both
def test_gradients_that_overflow_in_the_working_dtype_are_not_finite(deferred: bool) -> None:
    w = nn.Parameter(torch.ones(2, 2))
    w.grad_dtype = None
    w.grad = torch.full((2, 2), 1e300, dtype=torch.float64)
    optimizer = normopt.create("adamw", [w], nonfinite="skip")
    optimizer.step()
    assert torch.equal(w, torch.ones(2, 2))


@both
def test_gradients_of_the_past_must_be_finite_too(deferred: bool) -> None:
    params, others = tensors(), tensors()
    optimizer, twin = (normopt.create("stormplus", named(each)) for each in (params, others))
    calls: list[int] = []

    def closure() -> None:
        calls.append(1)
        give_gradients(params, len(calls))
        if len(calls) == 3:
            params[1].grad[0, 0] = NAN

    optimizer.step(closure)
    twin.step(lambda: give_gradients(others, 1))
    with pytest.raises(ValueError, match="parameter 'b'"):
        optimizer.step(closure)
        optimizer.step(closure)
    assert_equal(snapshot(optimizer), snapshot(twin))
    calls[:] = [1] * 5
    again = [1] * 5
    optimizer.step(closure)
    twin.step(lambda: (again.append(1), give_gradients(others, len(again))))
    assert_equal(snapshot(optimizer), snapshot(twin))


@both
def test_the_loss_is_returned_and_hooks_run_when_a_step_is_skipped(deferred: bool) -> None:
    params, calls = tensors(), []
    optimizer = normopt.create("lion", params, nonfinite="skip")
    optimizer.register_step_post_hook(lambda *_: calls.append(1))

    def closure() -> float:
        bad(params, 0, 0, NAN)
        return 5.0

    assert optimizer.step(closure) == 5.0 and calls == [1]


def test_loading_is_a_remedy_for_a_step_that_was_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "DEFERRED", True)
    params = tensors()
    optimizer = normopt.create("adamw", params)
    run(optimizer, params, 1)
    saved = snapshot(optimizer)[1]
    step(optimizer, params, 1, culprit=0, value=NAN)
    optimizer.load_state_dict(saved)
    run(optimizer, params, 1)
    assert optimizer.state_dict()["state"][0]["step"] == 2


def test_gradients_of_a_step_that_raised_are_forgotten() -> None:
    params, others = tensors(), tensors()
    optimizer, twin = normopt.create("scion", params), normopt.create("scion", others)
    run(optimizer, params, 1)
    run(twin, others, 1)
    with pytest.raises(ValueError, match="nothing has moved"):
        step(optimizer, params, 7, culprit=3, value=NAN)
    for each in (optimizer, twin):
        each.param_groups[0]["nonfinite"] = "propagate"
    run(optimizer, params, 1, first=1)
    run(twin, others, 1, first=1)
    assert_equal(snapshot(optimizer), snapshot(twin))


def test_errors_of_the_numbers_come_before_any_state() -> None:
    """A learning rate that one group cannot have keeps the others from beginning."""
    params = tensors()
    groups = [{"params": params[:2]}, {"params": params[2:], "constraint": "frank-wolfe"}]
    optimizer = SteepestDescent(groups, lr=0.1, norm="max", momentum=0.9)
    optimizer.param_groups[1]["lr"] = 1.5
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="must not exceed 1"):
        run(optimizer, params, 1)
    assert_equal(snapshot(optimizer), before)


# Gradients and parameters of another kind ------------------------------------------------------------------------


@every
@pytest.mark.parametrize("kind", ["shape", "integers", "sparse", "complex"])
def test_gradients_of_another_kind(make: Make, kind: str) -> None:
    params = tensors()
    optimizer = two_groups(make, params)
    before = snapshot(optimizer)

    def closure() -> None:
        give_gradients(params, 0)
        if kind == "shape":
            params[3].grad.data = torch.zeros(3, 3, dtype=torch.float64)
        else:
            params[3].grad = None
            params[3].grad_dtype = None
            dtype = {"integers": torch.int64, "sparse": torch.float64, "complex": torch.complex128}[kind]
            g = torch.zeros(SHAPES[3], dtype=dtype)
            params[3].grad = g.to_sparse() if kind == "sparse" else g

    named_so = {"shape": r"gradient of shape \(3, 3\) on cpu, but is of shape", "integers": "torch.int64 gradient"}
    expected = named_so.get(kind, f"{kind} gradient; only dense real gradients can be used")
    with pytest.raises(ValueError, match=f"parameter 'd' has a .*{expected}"):
        optimizer.step(closure)
    assert_equal(snapshot(optimizer), before)


def test_gradients_on_another_device() -> None:
    """A stand-in: of two devices that torch lets differ, one has to be an accelerator."""
    p = SimpleNamespace(grad=torch.zeros(3, 2, device="meta"), shape=(3, 2), device=torch.device("cpu"))
    message = r"parameter 'w' has a gradient of shape \(3, 2\) on meta, but is of shape \(3, 2\) on cpu"
    with pytest.raises(ValueError, match=message):
        check_gradients({"params": [p], "param_names": ["w"]})


class FlatParameter(nn.Parameter):
    """What FSDP's is called."""


def _marked(**marks: Any) -> nn.Parameter:
    p = nn.Parameter(torch.zeros(6))
    for name, value in marks.items():
        setattr(p, name, value)
    return p


PARTS = {
    "class": (lambda: FlatParameter(torch.zeros(6)), "FullyShardedDataParallel"),
    "flat": (lambda: _marked(_is_flat_param=True), "FullyShardedDataParallel"),
    "names": (lambda: _marked(_fqns=("a", "b")), "FullyShardedDataParallel"),
    "original": (lambda: _marked(_fsdp_flattened=True), "FullyShardedDataParallel"),
    "zero": (lambda: _marked(ds_id=0, ds_shape=torch.Size((2, 3))), "DeepSpeed's ZeRO"),
    "zero without shape": (lambda: _marked(ds_id=0), "DeepSpeed's ZeRO"),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", ["adamw", "scion"])
def test_parts_of_parameters_are_refused(name: str, part: str) -> None:
    make, wrapper = PARTS[part]
    with pytest.raises(ValueError, match=rf"parameter 'a' is .*{wrapper}.*DistributedDataParallel"):
        normopt.create(name, [("a", make())])
    optimizer = normopt.create(name, tensors([(3, 3)]))
    with pytest.raises(ValueError, match=wrapper):
        optimizer.add_param_group({"params": [make()], "norm": "max"})
    assert len(optimizer.param_groups) == 1


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.usefixtures("alone")
def test_what_torch_itself_flattens_is_refused(name: str) -> None:
    """FSDP1 with and without the original parameters; FSDP2 is taken, also where its parameters come later."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    for original in (False, True):
        layers = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
        model = FullyShardedDataParallel(layers, device_id=torch.device("cpu"), use_orig_params=original)
        for params in (model, model.parameters(), model.named_parameters()):
            with pytest.raises(ValueError, match=r"by FullyShardedDataParallel, .* under DistributedDataParallel"):
                normopt.create(name, params)
    layer = nn.Linear(4, 6, bias=False)
    optimizer = normopt.create(name, layer.parameters())
    fully_shard(layer)
    optimizer.param_groups[0]["params"] = [layer.weight]
    layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.step()
    normopt.create(name, layer)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.usefixtures("alone")
def test_sums_that_are_still_to_be_made_are_refused(name: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial

    weight = DTensor.from_local(torch.ones(4, 6), init_device_mesh("cpu", (1,)), [Partial()])
    optimizer = normopt.create(name, [("a", nn.Parameter(weight))])
    optimizer.param_groups[0]["params"][0].grad = weight.clone()
    with pytest.raises(ValueError, match=r"parameter 'a' has placements .*redistribute"):
        optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize("name", normopt.list_optimizers())
def test_parameters_that_are_flattened_later_are_refused(name: str) -> None:
    """As ZeRO does to the param groups of an optimizer that it is given; rules entry by entry do not mind."""
    optimizer = normopt.create(name, Net())
    flat = [nn.Parameter(torch.cat([p.detach().flatten() for p in g["params"]])) for g in optimizer.param_groups]
    for group, p in zip(optimizer.param_groups, flat, strict=True):
        group["params"] = [p]
    before = snapshot(optimizer)
    if all(rule_of(group).elementwise for group in optimizer.param_groups):
        run(optimizer, flat, 1)
        return
    with pytest.raises(ValueError, match=r"or partitioned them, .* DistributedDataParallel|norm of matrices"):
        run(optimizer, flat, 1)
    assert_equal(snapshot(optimizer), before)


def test_whole_parameters_of_zero_are_taken() -> None:
    normopt.create("adamw", [_marked(ds_id=0, ds_shape=torch.Size((6,)))])


@every
def test_a_parameter_twice_in_one_group(make: Make) -> None:
    a, b = tensors()[:2]
    with pytest.raises(ValueError, match="parameters number 0 and number 2 of a param group are the same tensor"):
        make([a, b, a], lr=0.1)
    with pytest.raises(ValueError, match="parameters first and last"):
        make([("first", a), ("second", b), ("last", a)], lr=0.1)


# Names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nonfinite": "skipp"}, "unknown nonfinite 'skipp'; did you mean 'skip'"),
        ({"nonfinite": True}, "unknown nonfinite True"),
        ({"geometry": "scoin"}, "unknown geometry 'scoin'; did you mean 'scion'"),
        ({"geometry": {"unembeding": "max"}}, "no parameter has that role; did you mean 'unembedding'"),
        ({"overrides": {"head*": "liner"}}, "unknown role 'liner'; did you mean 'linear'"),
        (
            {"overrides": {"head.weigth": "max"}},
            "pattern 'head.weigth' matches no parameter; did you mean 'head.weight'",
        ),
        ({"overrides": {"head*": {"nonfinite": "rise"}}}, "unknown nonfinite 'rise'; did you mean 'raise'"),
        ({"overrides": {"head*": {"nonfinit": "raise"}}}, "reads 'nonfinit'; did you mean 'nonfinite'"),
    ],
)
def test_unknown_names_come_with_the_nearest(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        normopt.create("adamw", Net(), **options)


def test_unknown_optimizers_and_norms_come_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown optimizer 'moun'; did you mean 'muon'"):
        normopt.create("moun", Net())
    with pytest.raises(ValueError, match="unknown norm 'spektral'; did you mean 'spectral'"):
        normopt.norms.get("spektral")


@pytest.mark.parametrize("name", normopt.list_optimizers())
@pytest.mark.parametrize("long", ["learning_rate", "learnrate"])
def test_a_rate_by_its_long_name_is_told_its_short_one(name: str, long: str) -> None:
    with pytest.raises(TypeError, match=f"'{long}'; did you mean 'lr'"):
        normopt.create(name, nn.Linear(2, 2), **{long: 0.1})


def test_a_constructor_that_was_written_by_hand_is_told_too() -> None:
    class ByHand(normopt.SteepestDescent):
        def __init__(self, params: nn.Module, lr: float = 0.1) -> None:
            super().__init__(params, lr)

    try:
        with pytest.raises(TypeError, match="ByHand has no argument 'learning_rate'; did you mean 'lr'"):
            normopt.create("byhand", nn.Linear(2, 2), learning_rate=0.1)
    finally:
        del normopt.SteepestDescent.registry["byhand"]


def test_users_may_name_roles_of_their_own() -> None:
    optimizer = normopt.create(
        "adamw", Net(), geometry={"expert": {"lr": 0.5}}, overrides={"up.weight": {"role": "expert"}}
    )
    assert [group["lr"] for group in optimizer.param_groups if group["role"] == "expert"] == [0.5]


def test_parts_of_ingredients_are_read_by_name_like_ingredients() -> None:
    assert normopt.Smoothed("max") == normopt.Smoothed(normopt.Max())
    assert normopt.Chain("row", "spectral") == normopt.Chain(normopt.Row(), normopt.Spectral())
    assert normopt.Ball("row") == normopt.Ball(normopt.Row())
    assert normopt.Rotated("max", "eigenbasis") == normopt.Rotated(normopt.Max(), normopt.Eigenbasis())
    with pytest.raises(ValueError, match="Smoothed: norm: unknown norm 'rwo'; did you mean 'row'"):
        normopt.Smoothed("rwo")
    with pytest.raises(TypeError, match="Ball: norm: expected a Norm or the name of one, got 3"):
        normopt.Ball(3)


def test_an_unknown_answer_that_is_set_later_is_refused_at_the_step() -> None:
    params = tensors()
    optimizer = normopt.create("adamw", params)
    optimizer.param_groups[0]["nonfinite"] = "ignore"
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="unknown nonfinite 'ignore'"):
        run(optimizer, params, 1)
    assert_equal(snapshot(optimizer), before)


# Arguments out of range ------------------------------------------------------------------------------------------

ABOVE = [-1.0, NAN, INF, "much"]
POSITIVE = [0.0, *ABOVE]
BELOW_ONE = [*ABOVE, 1.0, 1.5]
COUNT = [0, -1, 1.5]
NAME = ["nonsense"]
#: What every argument of that name must not be.
OUT_OF_RANGE: dict[str, list[Any]] = {
    **dict.fromkeys(["lr", "weight_decay", "eps", "delta", "wd_ratio", "gamma", "lr_decay"], ABOVE),
    **dict.fromkeys(["aux_lr", "aux_eps", "aux_weight_decay", "graft_eps", "momentum_decay", "scale"], ABOVE),
    **dict.fromkeys(["initial_accumulator_value", "trust_coefficient", "init_factor", "alpha", "exponent"], ABOVE),
    "momentum": [*ABOVE, 1.5],  # as in torch.optim.Muon, an average of 1 stays 0
    **dict.fromkeys(["momentum_2", "beta2", "mu", "beta3", "graft_beta2", "rms_beta"], BELOW_ONE),
    "dampening": [-1.0, 1.5, NAN, "much"],
    **dict.fromkeys(["a0", "b0", "d", "d0", "d_coef", "radius", "clip", "nonstandard_constant", "v"], POSITIVE),
    "power": [1.5, *POSITIVE],
    "growth_rate": [0.5, NAN, "much"],
    "max_grad_norm": [-1.0, 0.0, NAN, "much"],
    "rank_fraction": [0.0, 1.5, *ABOVE],
    "shampoo_beta": [1.0, NAN, "much"],
    "beta2_decay": [0.5, NAN, INF, -INF, "much"],
    **dict.fromkeys(["ns_steps", "iterations", "protect", "power_iterations", "slice_p", "block_size"], COUNT),
    **dict.fromkeys(["precondition_frequency", "preconditioning_frequency", "max_precond_dim", "max_dim"], COUNT),
    **dict.fromkeys(["rows", "subset_size", "inverse_steps", "rank", "rounds"], COUNT),
    **dict.fromkeys(["beta3_warmup", "alpha_warmup"], COUNT),
    "ns_coefficients": [(NAN, 1.0, 1.0), (INF, 1.0, 1.0), (1.0, 2.0)],
    **dict.fromkeys(["adjust_lr_fn", "orthogonalize", "orthogonalize_dtype", "normalize", "base", "graft"], NAME),
    "equilibrate": NAME,
    **dict.fromkeys(["norm", "step_size", "nonfinite", "geometry"], NAME),
    "overrides": [{"nonsense": "linear"}],
    "state_dtype": ["float16", "nonsense", torch.int8],
}
#: Those whose momentum is a heavy ball.
HEAVY = ["lars", "rmsprop", "sgd", "sgdp"]
#: Where an argument of that name means something else.
BUT: dict[tuple[str, str], list[Any]] = {
    ("adafactor", "eps"): [(-1.0, 1e-3), (NAN, 1e-3), (None, -1.0), (None, NAN), 1e-3],
    ("adafactor", "d"): [0.0, 0.99, *ABOVE],
    ("rmsprop", "alpha"): BELOW_ONE,
    # As in torch: a heavy ball of 1 sums up all gradients.
    **{(name, "momentum"): ABOVE for name in HEAVY},
    **{("olion", name): [*ABOVE, 1.5] for name in ("momentum", "momentum_2")},
    ("scion", "radius"): [-1.0, NAN, INF],
    **{(name, "scale"): [-1.0, 0.0, NAN, INF, "nonsense"] for name in normopt.list_optimizers("*descent")},
    **{(name, "scale"): [-1.0, 0.0, NAN, INF, "nonsense"] for name in ("normalizedsgd", "numuon")},
}
#: Taken for torch's sake, or switches.
FREE = {"foreach", "fused", "capturable", "differentiable", "maximize", "options", "view", "fsdp_in_use"}
#: Objects of torch.distributed.
FREE |= {"mesh", "process_group"}


def arguments(cls: type[SteepestDescent]) -> dict[str, Any]:
    """Every argument of a constructor with its type, those that it hands on included."""
    hints, found = typing.get_type_hints(cls.__init__), {}
    for name, parameter in list(inspect.signature(cls.__init__).parameters.items())[2:]:
        common = typing.get_args(hints[name]) if parameter.kind is parameter.VAR_KEYWORD else ()
        found |= typing.get_type_hints(common[0]) if common else {name: hints[name]}
    return found


def refused(name: str, cls: type[SteepestDescent]) -> list[tuple[str, Any]]:
    """Pairs of argument and value."""
    pairs: list[tuple[str, Any]] = []
    for argument, kind in arguments(cls).items():
        if kind is bool or argument in FREE:
            continue
        if (name, argument) in BUT:
            values = BUT[name, argument]
        elif argument.endswith("betas"):
            n = 3 if name == "ademamix" else 2
            bounds = [
                [*ABOVE, 1.5] if (name, i) in (("shampoo", 1), ("subsetnorm", 1)) else BELOW_ONE for i in range(n)
            ]
            values = [tuple(x if i == j else 0.9 for j in range(n)) for i in range(n) for x in bounds[i]] + [
                0.9,
                (0.9,),
            ]
        else:
            values = OUT_OF_RANGE[argument]
        pairs += [(argument, value) for value in values]
    return pairs


@pytest.mark.parametrize("name", normopt.list_optimizers())
def test_arguments_out_of_range_are_refused(name: str) -> None:
    """Also those that only matter for roles that no parameter plays."""
    cls = SteepestDescent.registry[name]
    matrix, model = nn.Parameter(torch.ones(3, 3)), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))
    for argument, value in refused(name, cls):
        for params in [[matrix], model] if argument not in ("geometry", "overrides", "norm") else [model]:
            try:
                cls(params, **{argument: value})
            except (ValueError, TypeError) as error:
                assert len(str(error)) > 20, (argument, value)
            else:
                pytest.fail(f"{name} takes {argument}={value!r}")
