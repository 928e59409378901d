"""Statistics of the inputs of linear layers, and directions that read them."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import normopt
from normopt import EMA, Averaged, Chain, InputStatistics, InputWhitened, Max, Smoothed, Spectral, SteepestDescent
from normopt.nn import GPT
from tests.support.strategies import assert_close
from tests.support.written import polar

HEAD = {"head.weight": {"norm": InputWhitened(Smoothed(Max(), 0.95)), "momentum": EMA(0.9, bias_correction=True)}}
NEWTON_MUON = InputWhitened(Spectral("max1"), -1.0, 0.2, keep_length=False, frequency=4, staggered=False)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(5, 7)
        self.head = nn.Linear(7, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(x).relu())


def batch(step: int, size: int = 12) -> tuple[Tensor, Tensor]:
    noise = torch.Generator().manual_seed(step)
    return torch.randn(size, 3, 5, generator=noise, dtype=torch.float64), torch.randint(4, (size, 3), generator=noise)


def backward(model: nn.Module, step: int, part: slice = slice(None)) -> Tensor:
    x, y = batch(step)
    loss = nn.functional.cross_entropy(model(x[part]).flatten(0, 1), y[part].flatten())
    loss.backward()
    return loss.detach()


def two(norm: Any = NEWTON_MUON, **options: Any) -> tuple[Two, SteepestDescent, InputStatistics]:
    torch.manual_seed(0)
    model = Two().double()
    linear = {"norm": norm, "momentum": options.pop("momentum", None)}
    optimizer = normopt.create("muon", model, lr=0.02, geometry={"linear": linear}, overrides=HEAD, weight_decay=0.0)
    return model, optimizer, InputStatistics(model, optimizer, **options)


def root(inputs: Tensor, exponent: float, damping: float) -> Tensor:
    values, vectors = torch.linalg.eigh(inputs)
    return (vectors * (values + damping * values.mean()) ** exponent) @ vectors.mT


@pytest.mark.parametrize("accumulate", [False, True])
def test_newton_muon_and_the_head_by_their_rules(accumulate: bool) -> None:
    """Gradients times the inverse, then their average, then the polar factor; and Adam after the inverse root."""
    stages = Chain(
        InputWhitened(exponent=-1.0, damping=0.2, keep_length=False), EMA(0.8, True), Spectral("max1", "exact")
    )
    model, optimizer, _ = two(stages, beta=0.7)
    up, head = model.up.weight.detach().clone(), model.head.weight.detach().clone()
    state: dict[str, Any] = {"m": torch.zeros_like(up), "a": torch.zeros_like(head), "v": torch.zeros_like(head)}
    for step in range(1, 9):
        optimizer.zero_grad()
        parts = [slice(0, 6), slice(6, 12)] if accumulate else [slice(None)]
        for part in parts:
            backward(model, step, part)
        x = batch(step)[0].flatten(0, 1)
        seen = {"up": x, "head": model.up(x).relu().detach()}
        for name, inputs in seen.items():
            new = inputs.mT @ inputs / len(inputs)
            state[name] = new if step == 1 else 0.7 * state[name] + 0.3 * new
        assert model.up.weight.grad is not None and model.head.weight.grad is not None
        g = model.up.weight.grad @ root(state["up"], -1.0, 0.2)
        state["m"] = 0.8 * state["m"] + 0.2 * g
        up -= 0.02 * (7 / 5) ** 0.5 * polar(0.8 * state["m"] + 0.2 * g)
        raw = model.head.weight.grad
        state["a"] = 0.9 * state["a"] + 0.1 * raw
        g, m = (y @ root(state["head"], -0.5, 0.1) for y in (raw, state["a"] / (1 - 0.9**step)))
        g, m = g * raw.norm() / g.norm(), m * (state["a"] / (1 - 0.9**step)).norm() / m.norm()
        state["v"] = 0.95 * state["v"] + 0.05 * g.square()
        head -= 0.02 / 2 * m / ((state["v"] / (1 - 0.95**step)).sqrt() + 1e-8)
        optimizer.step()
        assert_close(model.up.weight.detach(), up, 1e-9)
        assert_close(model.head.weight.detach(), head, 1e-9)
    assert_close(optimizer.state[model.head.weight]["inputs"].squeeze(), state["head"], 1e-12)


def test_only_training_passes_count() -> None:
    model, optimizer, statistics = two()
    backward(model, 0)
    with torch.no_grad():
        model(batch(1)[0])
    model.eval()
    model(batch(2)[0])
    model.train()
    optimizer.step()
    x = batch(0)[0].flatten(0, 1)
    assert_close(optimizer.state[model.up.weight]["inputs"].squeeze(), x.mT @ x / len(x), 1e-12)
    statistics.remove()
    backward(model, 3)
    optimizer.step()  # with the average that there is
    assert_close(optimizer.state[model.up.weight]["inputs"].squeeze(), x.mT @ x / len(x), 1e-12)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's own, where it cuts a graph
def test_a_compiled_model_is_watched() -> None:
    model, optimizer, _ = two()
    compiled = torch.compile(model, backend="eager")
    for step in range(3):
        optimizer.zero_grad()
        backward(compiled, step)
        optimizer.step()
        if not step:
            x = batch(0)[0].flatten(0, 1)
            assert_close(optimizer.state[model.up.weight]["inputs"].squeeze(), x.mT @ x / len(x), 1e-12)


@pytest.mark.parametrize("frequency", [1, 64])
def test_room_made_for_a_checkpoint_changes_no_step(frequency: int) -> None:
    """torch.distributed.checkpoint asks a new optimizer for its state, for which that takes a step without inputs."""
    norm = InputWhitened(Spectral("max1", "exact"), -1.0, 0.2, False, frequency, staggered=False)
    moved = []
    for asks in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(5, 4, bias=False).double()
        optimizer = SteepestDescent(model, 0.1, norm, geometry={"*": {}})
        InputStatistics(model, optimizer)
        before = model.weight.detach().clone()
        if asks:
            state = get_optimizer_state_dict(model, optimizer)["state"]["weight"]
            assert isinstance(state, dict) and state["inputs"].shape == (1, 5, 5)
            assert torch.equal(model.weight, before)
        for step in range(3):
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step()
        moved.append(model.weight.detach() - before)
    assert_close(moved[1], moved[0], 1e-12)


def test_a_learning_rate_of_0_does_not_hide_that_there_are_no_statistics() -> None:
    """Schedules begin there."""
    model = Two().double()
    optimizer = normopt.create("muon", model, lr=0.0, overrides=HEAD)
    backward(model, 0)
    with pytest.raises(ValueError, match=r"head\.weight' .*no statistics of its layer's inputs"):
        optimizer.step()


def test_inputs_that_are_not_finite_stay_out() -> None:
    model, optimizer, _ = two()
    x, _ = batch(0)
    model(torch.full_like(x, float("inf")))
    backward(model, 0)
    with pytest.raises(ValueError, match="no statistics of its layer's inputs"):
        optimizer.step()
    backward(model, 0)
    optimizer.step()
    before = optimizer.state[model.up.weight]["inputs"].clone()
    model(torch.full_like(x, float("nan")))
    backward(model, 1)
    optimizer.step()
    assert torch.equal(optimizer.state[model.up.weight]["inputs"], before)


@pytest.mark.parametrize("frequency", [1, 4])
def test_runs_resume_to_the_bit(frequency: int) -> None:
    norm = InputWhitened(Spectral("max1", "exact"), -1.0, 0.2, frequency=frequency)
    model, optimizer, _ = two(norm, momentum=0.9)
    for step in range(3):
        optimizer.step(lambda step=step: (optimizer.zero_grad(), backward(model, step))[1])
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    found = torch.load(buffer, weights_only=True)
    other, again, _ = two(norm, momentum=0.9)
    other.load_state_dict(found["model"])
    again.load_state_dict(found["optimizer"])
    for each, moved in ((optimizer, model), (again, other)):
        for step in range(3, 8):
            each.zero_grad()
            backward(moved, step)
            each.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_a_closure_a_copy_and_an_average_around_it() -> None:
    model, optimizer, _ = two()
    averaged = Averaged(optimizer)
    first = averaged.step(lambda: backward(model, 0))
    for _ in range(20):
        optimizer.zero_grad()
        last = averaged.step(lambda: backward(model, 0))
    assert last < first
    twin, of_twin = copy.deepcopy((model, optimizer))
    statistics = InputStatistics(twin, of_twin)
    of_twin.zero_grad()
    backward(twin, 1)
    assert {*statistics._sums} == {twin.up.weight, twin.head.weight}
    of_twin.step()
    assert not statistics._sums


def test_bfloat16_and_autocast() -> None:
    """The average is in float32 in both."""
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        model = Two().to(dtype)
        optimizer = normopt.create("muon", model, geometry={"linear": {"norm": NEWTON_MUON}}, overrides=HEAD)
        InputStatistics(model, optimizer)
        x, y = batch(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            loss = nn.functional.cross_entropy(model(x.to(dtype)).flatten(0, 1).float(), y.flatten())
        loss.backward()
        optimizer.step()
        found = optimizer.state[model.up.weight]["inputs"]
        rows = x.to(dtype).float().flatten(0, 1)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.squeeze(), rows.mT @ rows / len(rows), rtol=1e-5, atol=1e-6)


def test_heads_of_one_matrix_share_its_inputs() -> None:
    model, x = nn.Sequential(nn.Linear(4, 6, bias=False)), torch.randn(10, 4)
    for view in ({"split": 3}, {"split": (1, 2, 3)}):
        optimizer = normopt.create("muon", model, overrides={"0.weight": {"norm": NEWTON_MUON, "view": view}})
        InputStatistics(model, optimizer)
        model(x).square().mean().backward()
        optimizer.step()
        held = [y for name, y in optimizer.state[model[0].weight].items() if name.endswith("inputs")]
        assert torch.cat(held).shape == (3, 4, 4)
        for each in torch.cat(held):
            torch.testing.assert_close(each, x.mT @ x / 10)


@pytest.mark.parametrize("sizes", [(1e-12, 1.0), (1.0, 1e-12), (1e6, 1e-6), (0.0, 1.0), (1.0, 0.0)], ids=str)
def test_inputs_and_gradients_of_any_size(sizes: tuple[float, float]) -> None:
    model = nn.Linear(5, 3, bias=False)
    optimizer = SteepestDescent(model, 0.1, InputWhitened(Spectral()), geometry={"*": {}})
    InputStatistics(model, optimizer)
    model(torch.randn(8, 5) * sizes[0]).sum().backward()
    assert model.weight.grad is not None
    model.weight.grad.copy_(torch.randn(3, 5) * sizes[1])
    before = model.weight.detach().clone()
    optimizer.step()
    assert model.weight.isfinite().all() and (before - model.weight).norm() <= 0.1 * 3**0.5 * 1.01


def test_on_a_gpt_the_loss_falls() -> None:
    """Newton-Muon on hidden matrices and the whitened head, on one batch."""
    torch.manual_seed(0)
    model = GPT(vocab_size=31, d_model=32, n_layers=2, n_heads=2)
    table = {"linear": {"norm": NEWTON_MUON, "momentum": 0.9}, "unembedding": {**HEAD["head.weight"]}}
    optimizer = normopt.create("muon", model, lr=0.02, geometry=table)
    InputStatistics(model, optimizer)
    tokens = torch.randint(0, 31, (8, 17))
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def transposed() -> InputStatistics:
    model = nn.Linear(3, 4)
    view = {"0.weight": {"norm": NEWTON_MUON, "view": {"transpose": True}}}
    return InputStatistics(nn.Sequential(model), normopt.create("muon", nn.Sequential(model), overrides=view))


def of_embedding() -> InputStatistics:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5))
    optimizer = normopt.create("muon", model, overrides={"0.weight": {"norm": NEWTON_MUON}})
    return InputStatistics(model, optimizer)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "nobody reads": (lambda: InputStatistics(Two(), normopt.create("muon", Two())), "no ingredient of the optimizer"),
    "no layer": (of_embedding, r"0\.weight' moves by .* it is the weight of no nn.Linear"),
    "transposed": (transposed, r"0\.weight' is seen through View\(transpose=True\)"),
    "beta": (lambda: two(beta=1.0), "beta must lie"),
    "exponent": (lambda: InputWhitened(exponent=0.5), "exponent must lie"),
    "damping": (lambda: InputWhitened(damping=0.0), "damping must be positive"),
    "frequency": (lambda: InputWhitened(frequency=0), "frequency must be a whole number"),
    "a look": (lambda: InputWhitened("Rotated(Smoothed(Max()), Eigenbasis())"), "has to see the first gradient"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_an_optimizer_of_torch_is_refused() -> None:
    with pytest.raises(TypeError, match="must be one of normopt, got SGD"):
        InputStatistics(Two(), torch.optim.SGD(Two().parameters()))  # type: ignore[arg-type]


def test_no_statistics_yet_is_an_error_before_anything_moves() -> None:
    model = Two().double()
    optimizer = normopt.create("muon", model, overrides=HEAD)
    backward(model, 0)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"head\.weight' moves by InputWhitened.* make normopt\.InputStatistics"):
        optimizer.step()
    InputStatistics(model, optimizer)
    with pytest.raises(ValueError, match=r"head\.weight' .*no statistics of its layer's inputs"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)) and not optimizer.state
    backward(model, 0)
    optimizer.step()
