"""Steps that can be captured in a CUDA graph, and compiled ones."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import normopt
from normopt import SteepestDescent
from normopt.engine import finite
from normopt.polar import choice
from tests.support.engine import batches
from tests.support.models import Net
from tests.support.optimizers import EVERY
from tests.support.steps import assert_equal, assert_goes_on, give_gradients, run, snapshot, tensors

Make = Callable[..., SteepestDescent]
ROOT = Path(__file__).parents[2]
NAN = math.nan
SQUARES: list[tuple[int, ...]] = [(3, 3), (3, 3)]

#: What decides by numbers: decompositions, first gradients that only prepare, gradients of the past, rare refreshes.
HOST = {"aro", "asgo", "dion", "klshampoo", "muonplusplus", "nadam", "novograd", "nucleardescent", "shampoo", "soap"}
HOST |= {"cosmos", "moso", "stormplus", "htmuon", "numuon", "spectra", "splus"}
#: What else is compiled in the slow tests.
MORE = ["muon", "adafactor", "adamp", "prodigy", "scion", "normuon", "lamb", "dadaptadam"]


def capturable(make: Make) -> bool:
    try:
        make(tensors(), capturable=True)
    except ValueError as error:
        assert str(error).startswith("capturable: ")
        return False
    return True


CAPTURABLE = {name: make for name, make in EVERY.items() if name not in HOST and capturable(make)}
captured = pytest.mark.parametrize("make", CAPTURABLE.values(), ids=CAPTURABLE)


# Captured ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def outcomes() -> dict[str, str]:
    pytest.importorskip("torch.utils.backend_registration")
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch has no devices written in Python")
    done = subprocess.run(
        [sys.executable, "tests/support/fake_accelerator.py"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
def test_a_captured_step_reads_no_number_and_stays_on_the_device(outcomes: dict[str, str]) -> None:
    refused = {name for name, outcome in outcomes.items() if outcome.startswith("capturable: ")}
    assert refused == HOST and outcomes.keys() == set(normopt.list_optimizers())
    assert {name: outcome for name, outcome in outcomes.items() if name not in HOST and outcome != "captured"} == {}


@captured
def test_counters_and_rates_on_the_device_change_nothing(make: Make) -> None:
    params, twins = tensors(), tensors()
    plain, ours = make(params, lr=0.1), make(twins, lr=torch.tensor(0.1, dtype=torch.float64), capturable=True)
    for i in range(4):
        run(plain, params, 1, first=i)
        run(ours, twins, 1, first=i)
        for group in plain.param_groups:
            group["lr"] = group["lr"] * 0.7
        for group in ours.param_groups:
            group["lr"].mul_(0.7)  # as a captured schedule does
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)


@captured
def test_numbers_of_the_whole_optimizer_stay_where_they_are(make: Make) -> None:
    """A graph reads and writes the addresses that it was captured with."""
    params = tensors()
    optimizer = make(params, lr=0.1, capturable=True)
    run(optimizer, params, 1)

    def addresses() -> list[int]:
        shared = [x for g in optimizer.param_groups for x in g.values() if isinstance(x, torch.Tensor)]
        return [x.data_ptr() for x in (*shared, *(x for s in optimizer.state.values() for x in s.values()), *params)]

    before = addresses()
    run(optimizer, params, 2, first=1)
    assert addresses() == before


@captured
def test_captured_bad_gradients_change_nothing_and_are_told_later(make: Make) -> None:
    params = tensors()
    optimizer = make(params, lr=0.1, capturable=True)
    run(optimizer, params, 2)
    before = snapshot(optimizer)
    give_gradients(params, 5)
    params[1].grad.view(-1)[0] = NAN  # type: ignore[union-attr]
    optimizer.step()
    assert_equal(snapshot(optimizer), before)
    with pytest.raises(ValueError, match="NaN or Inf in the gradient of parameter 1"):
        run(optimizer, params, 1, first=2)
    assert_equal(snapshot(optimizer), before)
    run(optimizer, params, 1, first=2)
    assert all(s["step"] == before[1]["state"][0]["step"] + 1 for s in optimizer.state.values())


def test_only_capturable_steps_are_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    params = tensors()
    optimizer = normopt.zoo.Lion([{"params": params[:1]}, {"params": params[1:], "capturable": True}], lr=0.1)
    run(optimizer, params, 1)
    before = snapshot(optimizer)
    monkeypatch.setattr(finite, "capturing", lambda: True)
    with pytest.raises(ValueError, match="give the optimizer capturable=True"):
        run(optimizer, params, 1)
    assert_equal(snapshot(optimizer), before)
    optimizer.param_groups[0]["capturable"] = True
    run(optimizer, params, 1)
    assert all(batch.captured for batch in batches(optimizer))
    assert optimizer.state[params[0]]["step"] == 2


def test_what_cannot_be_captured_is_refused_later_too() -> None:
    params = tensors()
    optimizer = normopt.create("soap", params)
    run(optimizer, params, 2)
    before = snapshot(optimizer)[0]
    optimizer.param_groups[0]["capturable"] = True
    with pytest.raises(ValueError, match="capturable: Rotated"):
        run(optimizer, params, 1)
    assert_equal(snapshot(optimizer)[0], before)


def test_projections_by_decompositions_are_refused() -> None:
    for norm in ("Clipped(Spectral())", "Chain(EMA(), Clipped(Spectral()))"):
        with pytest.raises(ValueError, match="capturable: "):
            SteepestDescent(tensors(SQUARES), norm=norm, capturable=True)
    SteepestDescent(tensors(SQUARES), norm="Clipped(Euclidean())", capturable=True)


def test_a_rate_of_zero_on_the_device_leaves_bounded_weights_alone() -> None:
    for lr in (0.0, torch.tensor(0.0)):
        (weight,) = tensors([(3, 4)])
        optimizer = SteepestDescent([weight], norm="max", constraint="RowBound(0.1)", lr=lr)
        before = weight.detach().clone()
        run(optimizer, [weight], 1)
        assert torch.equal(weight, before)


def test_bad_gradients_of_a_graph_are_left_out_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    params = tensors()
    optimizer = normopt.create("prodigy", params, capturable=True)
    run(optimizer, params, 2)
    before = snapshot(optimizer)
    with monkeypatch.context() as patched:
        patched.setattr(finite, "capturing", lambda: True)
        give_gradients(params, 5)
        params[1].grad.view(-1)[0] = NAN  # type: ignore[union-attr]
        optimizer.step()
        assert_equal(snapshot(optimizer), before)
    run(optimizer, params, 1, first=2)
    assert optimizer.state[params[0]]["step"] == 3


def test_a_captured_run_goes_on_from_its_checkpoint() -> None:
    params, twins = tensors(), tensors()
    optimizer = normopt.create("prodigy", params, capturable=True)
    assert_goes_on(optimizer, params, normopt.create("prodigy", twins, capturable=True), twins)


# Compiled ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """How many graphs have been compiled; by a compiler that only traces."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def compiled_and_plain(name: str, steps: int, after: Callable[[], Any] = lambda: None, **options: Any) -> None:
    net, twin = Net(), Net()
    twin.load_state_dict(net.state_dict())
    pair = [(net, normopt.create(name, net, compile=True, **options)), (twin, normopt.create(name, twin, **options))]
    for group in (group for _, optimizer in pair for group in optimizer.param_groups if group["capturable"]):
        group["lr"] = torch.tensor(group["lr"])
    for i in range(steps):
        for model, optimizer in pair:
            run(optimizer, list(model.parameters()), 1, first=i)
            for group in optimizer.param_groups:
                group["lr"] *= 0.9
        after()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["lion", *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
@pytest.mark.parametrize("capturable", [False, True])
def test_the_step_is_one_graph_for_all_rates_and_counts(name: str, capturable: bool, graphs: Callable[[], int]) -> None:
    counts: list[int] = []
    compiled_and_plain(name, 4, lambda: counts.append(graphs()), capturable=capturable)
    assert counts == [1, 1, 1, 1]


def test_a_kernel_leaves_nothing_to_compile_and_the_next_optimizer_still_is(graphs: Callable[[], int]) -> None:
    compiled_and_plain("adamw", 2)
    assert graphs() == 0
    compiled_and_plain("lion", 2)
    assert graphs() == 1


def test_what_decides_by_numbers_is_not_compiled(graphs: Callable[[], int]) -> None:
    compiled_and_plain("soap", 3)
    assert graphs() == 0


@pytest.mark.slow
def test_each_of_ten_optimizers_in_one_process_is_compiled(graphs: Callable[[], int]) -> None:
    """torch.compile gives a function up after eight graphs: each optimizer must have a function of its own."""
    from torch._dynamo.utils import counters

    for i in range(10):
        compiled_and_plain("lion", 2)
        assert graphs() == i + 1
    assert not counters["unimplemented"] and not counters["graph_break"]


def test_compiled_products_are_those_that_were_measured(
    graphs: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiler cannot measure: choices are made before it traces the step, and none of them compiles it anew."""
    monkeypatch.setattr(choice, "_measured", {})
    params, twins = (tensors([(48, 48), (48, 96)], dtype=torch.float32) for _ in range(2))
    optimizer, twin = normopt.zoo.Muon(params, lr=0.1, compile=True), normopt.zoo.Muon(twins, lr=0.1)
    for i in range(3):
        run(optimizer, params, 1, first=i)
        run(twin, twins, 1, first=i)
    assert graphs() == 1 and choice._measured.keys() == {"48x48 newton-schulz", "48x96 newton-schulz"}
    assert optimizer.param_groups[0]["products"] == twin.param_groups[0]["products"] != ""
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")
@pytest.mark.filterwarnings("ignore:`torch._prims_common.check` is deprecated")  # by torch's lowering of diagonal
@pytest.mark.parametrize("name", ["lion", "muon", "adafactor", "prodigy"])
def test_a_compiled_step_is_the_same_to_rounding(name: str) -> None:
    torch._dynamo.reset()
    compiled_and_plain(name, 3)
    torch._dynamo.reset()


def test_compiled_optimizers_can_be_copied() -> None:
    import copy
    import pickle

    params = tensors()
    optimizer = normopt.zoo.Lion(params, lr=0.1, compile=True)
    assert copy.deepcopy(optimizer).compiles and pickle.loads(pickle.dumps(optimizer)).compiles
