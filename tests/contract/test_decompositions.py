"""Shampoo and its relatives where decompositions are late, few, hopeless or fail."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import normopt
from normopt.polar import exact
from normopt.zoo import ASGO, SOAP, KLShampoo, Shampoo
from tests.support.paths import MATRICES
from tests.support.preconditioned import LOOKING, NAMES, SQUARE, VECTOR, WIDE, give_gradients, params, run


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[tuple[int, ...]]:
    """The shapes that torch.linalg's function of that name is called with from now on."""
    calls, original = list[tuple[int, ...]](), getattr(torch.linalg, name)

    def spy(x: Tensor, *args: Any) -> Any:
        calls.append(tuple(x.shape))
        return original(x, *args)

    monkeypatch.setattr(torch.linalg, name, spy)
    return calls


def test_decompositions_are_batched_by_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    eighs, qrs = counted(monkeypatch, "eigh"), counted(monkeypatch, "qr")
    shapes = [WIDE, SQUARE, WIDE, WIDE]
    for make, refreshes in (
        (Shampoo, ([(3, 1, 6, 6), (3, 1, 10, 10), (1, 1, 8, 8), (1, 1, 8, 8)], [])),
        (ASGO, ([(3, 6, 6), (1, 8, 8)], [])),
        (SOAP, ([(3, 6, 6), (3, 10, 10), (1, 8, 8), (1, 8, 8)], [])),
        (KLShampoo, ([(3, 6, 6), (3, 10, 10), (1, 8, 8), (1, 8, 8)], [])),
    ):
        w = params(shapes)
        eighs.clear()
        run([make(w)], [w], 1)
        assert (eighs, qrs) == refreshes
    w = params(shapes)
    optimizer = SOAP(w, precondition_frequency=1)
    run([optimizer], [w], 2)
    assert qrs == [(3, 6, 6), (3, 10, 10), (1, 8, 8), (1, 8, 8)]


def test_roots_and_bases_are_computed_when_they_are_due(monkeypatch: pytest.MonkeyPatch) -> None:
    eighs, qrs = counted(monkeypatch, "eigh"), counted(monkeypatch, "qr")

    def steps_with(make: Callable[[list[Tensor]], Optimizer], calls: list[Any]) -> list[int]:
        w = params([SQUARE])
        optimizer, found = make(w), []
        for t in range(1, 10):
            calls.clear()
            run([optimizer], [w], 1, first=t)
            found += [t] if calls else []
        return found

    assert steps_with(lambda p: Shampoo(p, eps=100.0, preconditioning_frequency=4), eighs) == [1, 4, 8]
    # The second gradient is large where the first was small.
    assert steps_with(lambda p: Shampoo(p, preconditioning_frequency=4), eighs) == [1, 2, 4, 8]
    assert steps_with(lambda p: Shampoo(p), eighs) == list(range(1, 10))
    # Their first call is no step.
    assert steps_with(lambda p: SOAP(p, precondition_frequency=4), eighs) == [1]
    assert steps_with(lambda p: SOAP(p, precondition_frequency=4), qrs) == [5, 9]
    assert steps_with(lambda p: KLShampoo(p, precondition_frequency=4), qrs) == [5, 9]


def test_a_matrix_whose_first_gradients_are_zero_does_not_wait_for_the_next_root() -> None:
    """And it does not get the root of nothing, ``eps ** -0.25``, which would blow its first gradients up."""
    (late, early, vector), (alone,) = params([SQUARE, SQUARE, VECTOR]), params([SQUARE])
    optimizer = Shampoo([late, early, vector], 0.1, (0.0, 0.9), preconditioning_frequency=6, staggered=False)
    for i in range(12):
        give_gradients([late, early, vector], i)
        if i < 3:
            late.grad.zero_()
            vector.grad.zero_()
        if i == 3:
            kept = optimizer.state[early]["root"].clone()
            before = late.detach().clone(), vector.detach().clone()
        optimizer.step()
        if i == 3:
            assert torch.equal(optimizer.state[early]["root"], kept)
            # Its second moment is a tenth of the gradient's own and 1 - 0.9^4 of it is missing.
            expected = exact(late.grad) * math.sqrt((1 - 0.9**4) / 0.1)
            torch.testing.assert_close((before[0] - late.detach()) / 0.1, expected, rtol=0, atol=1e-4)
            length = math.sqrt((1 - 0.9**4) / 0.1)
            torch.testing.assert_close(((before[1] - vector.detach()) / 0.1).norm(), torch.tensor(length))
    twin = Shampoo([alone], 0.1, (0.0, 0.9), preconditioning_frequency=6)
    for i in range(12):
        give_gradients([late, early], i)
        alone.grad = early.grad
        if i == 0:
            alone.data.copy_(params([SQUARE, SQUARE])[1].data)
        twin.step()
    torch.testing.assert_close(alone, early)


@pytest.mark.parametrize("shape", [(12,), (3, 12), (12, 3)], ids=str)
def test_an_old_root_does_not_magnify_what_it_has_not_seen(shape: tuple[int, ...]) -> None:
    """Where the second moments of the first gradient are 0, eps=1e-12 would multiply later ones a thousandfold."""
    w = nn.Parameter(torch.zeros(shape))
    optimizer = Shampoo([w], 1.0, (0.0, 1.0), preconditioning_frequency=10)
    for i in range(9):
        before = w.detach().clone()
        give_gradients([w], i)
        optimizer.step()
        assert (w.detach() - before).norm() < 10


@pytest.mark.parametrize("name", NAMES)
def test_no_run_dies_of_a_decomposition(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(x: Tensor) -> Any:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    w, start = params(MATRICES), params(MATRICES)
    optimizer = normopt.create(name, w, lr=0.01)
    run([optimizer], [w], 15)
    assert all(torch.isfinite(p).all() and (p != q).all() for p, q in zip(w, start, strict=True))
    if name == "shampoo":  # the diagonals alone
        (p,) = params([WIDE])
        optimizer = normopt.create(name, [p], lr=1.0, betas=(0.0, 0.0))
        run([optimizer], [[p]], 1)
        rows, columns = (p.grad.norm(dim=dim, keepdim=True) for dim in (1, 0))
        torch.testing.assert_close(start[0] - p, p.grad / (rows * columns).sqrt())


def rank_one(g: Tensor) -> Tensor:
    return g[:, :1] * g[:1]


EXTREMES: dict[str, Callable[[Tensor], Tensor]] = {
    "huge": lambda g: g * 1e30,
    "tiny": lambda g: g * 1e-30,
    "zero": torch.zeros_like,
    "rank one": rank_one,
    "one entry": lambda g: torch.zeros_like(g).index_put_((torch.tensor(0), torch.tensor(0)), torch.tensor(1.0)),
    "one huge entry": lambda g: g.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(1e25)),
}


@pytest.mark.parametrize("kind", EXTREMES)
@pytest.mark.parametrize("when", ["first", "later", "always"])
@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in NAMES), ("shampoo", {"graft": "adam"})])
def test_extreme_gradients_leave_everything_finite(name: str, options: Any, when: str, kind: str) -> None:
    w = params(MATRICES)
    frequency = {"preconditioning_frequency": 3} if name == "shampoo" else {}
    frequency = {"precondition_frequency": 3} if name in LOOKING else frequency
    optimizer = normopt.create(name, w, lr=1e-3, **frequency, **options)
    for i in range(8):
        give_gradients(w, i)
        if when == "always" or i == (0 if when == "first" else 3):
            for p in w:
                p.grad = EXTREMES[kind](p.grad)
        optimizer.step()
        assert all(torch.isfinite(p).all() for p in w)
    for p in w:
        for side in ("left", "right") if name in LOOKING else ():
            basis = optimizer.state[p][f"{side}_basis"]
            torch.testing.assert_close(basis.mT @ basis, torch.eye(basis.shape[-1]).expand_as(basis), rtol=0, atol=1e-5)


def test_squares_that_would_overflow_do_not_stop_shampoo_and_asgo() -> None:
    for make in (Shampoo, ASGO):
        w, start = params([SQUARE], dtype=torch.float32), params([SQUARE], dtype=torch.float32)
        optimizer = make(w, weight_decay=0.0)
        give_gradients(w, 0, scale=1e30)
        optimizer.step()
        moved = start[0] - w[0]
        assert moved.isfinite().all() and (moved * w[0].grad.sign()).sum() > 0
        assert all(x.isfinite().all() for x in optimizer.state[w[0]].values())


@pytest.mark.parametrize("name", NAMES)
def test_statistics_of_bfloat16_parameters_are_float32(name: str) -> None:
    w = params(MATRICES, torch.bfloat16)
    optimizer = normopt.create(name, w, lr=0.1)
    run([optimizer], [w], 3)
    tensors = [v for s in optimizer.state_dict()["state"].values() for k, v in s.items() if k != "step"]
    assert tensors and {v.dtype for v in tensors} == {torch.float32}
    assert all(p.dtype == torch.bfloat16 and torch.isfinite(p).all() for p in w)


RESUMED: dict[str, dict[str, Any]] = {
    "shampoo": {"preconditioning_frequency": 4, "graft": "adam", "block_size": 5},
    "soap": {"precondition_frequency": 4, "precondition_1d": True},
    "klshampoo": {"precondition_frequency": 4},
    "asgo": {},
    "dasgo": {},
}


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("at", [0, 1, 2, 3, 5, 6])
def test_runs_resume_to_the_bit_at_any_step(name: str, at: int) -> None:
    shapes = [*MATRICES, WIDE, *([VECTOR] if name in ("shampoo", "soap") else [])]
    w = params(shapes)
    optimizer = normopt.create(name, w, lr=0.01, **RESUMED[name])
    run([optimizer], [w], at)
    saved = copy.deepcopy(optimizer.state_dict())
    others = [nn.Parameter(p.detach().clone()) for p in w]
    twin = normopt.create(name, others, lr=0.5, **RESUMED[name])
    twin.load_state_dict(saved)
    run([optimizer, twin], [w, others], 8, first=at)
    assert all(torch.equal(p, q) for p, q in zip(w, others, strict=True))
    for p, q in zip(w, others, strict=True):
        assert optimizer.state[p].keys() == twin.state[q].keys()
        assert all(torch.equal(v, twin.state[q][k]) for k, v in optimizer.state[p].items())


@pytest.mark.parametrize("name", LOOKING)
def test_the_first_call_moves_nothing(name: str) -> None:
    w, start = params(MATRICES), params(MATRICES)
    optimizer = normopt.create(name, w, lr=0.1, weight_decay=0.5)
    run([optimizer], [w], 1)
    assert all(torch.equal(p, q) for p, q in zip(w, start, strict=True))
    (late,), (before,) = params([SQUARE], seed=1), params([SQUARE], seed=1)
    optimizer.add_param_group({"params": [late]})
    run([optimizer], [[*w, late]], 1, first=1)
    assert torch.equal(late, before) and all((p != q).all() for p, q in zip(w, start, strict=True))
