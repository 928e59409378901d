"""Shampoo, SOAP, KL-Shampoo, ASGO and DASGO: beside their references, in their limits, and when things go wrong."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Optimizer

import normopt
from normopt import L2, SteepestDescent
from normopt.directions.algebra import Chain, Grafted, Identity
from normopt.directions.bases import Eigenbasis
from normopt.directions.coordinates import Blocked, Rotated
from normopt.directions.smoothed import Smoothed
from normopt.directions.whitening import KLWhitened
from normopt.ingredient import Context
from normopt.momentum.averages import EMA
from normopt.norms import Column, Euclidean, Max, Row, Spectral
from normopt.numerics.eigen import eigh, matrix_power, power_iteration_
from normopt.polar import exact
from normopt.zoo import ASGO, DASGO, SOAP, KLShampoo, Shampoo
from tests.paths import assert_same_path
from tests.strategies import from_spectrum, spectrum

WIDE, TALL, SQUARE, VECTOR = (6, 10), (10, 6), (8, 8), (7,)
MATRICES: list[tuple[int, ...]] = [WIDE, TALL, SQUARE]
NAMES = ("asgo", "dasgo", "klshampoo", "shampoo", "soap")
LOOKING = ("klshampoo", "soap")


class Plain(Optimizer):
    """A reference: one tensor at a time, as its paper writes it down."""

    def __init__(self, params: list[Tensor], lr: float, **options: Any) -> None:
        super().__init__(params, {"lr": lr, **options})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["step"] = self.state[p].get("step", 0) + 1
                self.move(p, p.grad, self.state[p], **{k: v for k, v in group.items() if k != "params"})

    def move(self, p: Tensor, g: Tensor, s: dict[str, Any], **options: Any) -> None:
        raise NotImplementedError


def inverse_power(gram: Tensor, exponent: float, eps: float) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    return (vectors * (values.clamp(min=0) + eps) ** -exponent) @ vectors.mT


# Shampoo ----------------------------------------------------------------------------------------------------------


class PlainShampoo(Plain):
    """Distributed Shampoo (arXiv 2309.06497) as facebookresearch/optimizers runs it, roots from the first step on.

    It computes in float64: with eps=1e-12, rounding errors of float32 in directions that no gradient has seen yet would
    be multiplied by up to a million, and be the largest part of a vector's first updates.
    """

    def move(self, p: Tensor, g: Tensor, s: dict[str, Any], block: int = 1024, **options: Any) -> None:
        for i, (w, x) in enumerate(zip(self.cut(p, block), self.cut(g.double(), block), strict=True)):
            self.move_block(w, x, s.setdefault(i, {}), s["step"], **options)

    def cut(self, x: Tensor, block: int) -> list[Tensor]:
        parts = [x]
        for dim, n in enumerate(x.shape):
            parts = [piece for part in parts for piece in part.split(-(-n // -(-n // block)), dim)]
        return parts

    def move_block(
        self, w: Tensor, g: Tensor, s: dict[str, Any], t: int, lr: float, betas: tuple[float, float], eps: float,
        graft: str | None = None, frequency: int = 1, exponent: float | None = None, weight_decay: float = 0.0,
        graft_beta2: float = 0.999, graft_eps: float = 1e-10,
    ) -> None:  # fmt: skip
        beta1, beta2 = betas
        keep, add, unbiased = (1, 1, 1) if beta2 == 1 else (beta2, 1 - beta2, 1 - beta2**t)
        m = s["m"] = beta1 * s.get("m", 0) + (1 - beta1) * g
        m = m / (1 - beta1**t)
        grams = [g @ g.mT, g.mT @ g] if g.ndim == 2 else [g.outer(g)]
        s["grams"] = [keep * old + add * new for old, new in zip(s.get("grams", [0, 0]), grams, strict=False)]
        if t == 1 or t % frequency == 0:
            power = exponent or 1 / (2 * g.ndim)
            s["roots"] = [inverse_power(gram / unbiased, power, eps) for gram in s["grams"]]
        d = s["roots"][0] @ m @ s["roots"][1] if g.ndim == 2 else s["roots"][0] @ m
        if graft:
            v = s["v"] = graft_beta2 * s.get("v", 0) + (1 - graft_beta2) * g**2
            bias = 1 - graft_beta2**t if graft == "adam" else 1
            other = m if graft == "sgd" else m / ((v / bias).sqrt() + graft_eps)
            d = d * other.norm() / (d.norm() + 1e-16)
        w.sub_(lr * (d + weight_decay * w))


SHAMPOO = {
    "sums": {},
    "averages": {"betas": (0.8, 0.99)},
    "memory only": {"betas": (0.0, 1.0), "weight_decay": 0.1},
    "adam": {"graft": "adam", "betas": (0.9, 0.99), "weight_decay": 0.1},
    "rmsprop": {"graft": "rmsprop", "graft_beta2": 0.9, "graft_eps": 1e-3},
    "sgd": {"graft": "sgd"},
    "large eps": {"eps": 0.1, "betas": (0.9, 0.95)},
    "exponent": {"exponent": 0.5, "graft": "adam", "betas": (0.9, 0.9)},
    "frequency": {"frequency": 3, "eps": 1e-2, "betas": (0.9, 0.99)},
    "frequency of sums": {"frequency": 4, "eps": 1e-2, "graft": "adam"},
    "blocks": {"block": 4, "graft": "adam"},
    "blocks without a graft": {"block": 5, "betas": (0.9, 0.99)},
    "blocks and frequency": {"block": 5, "frequency": 3, "eps": 1e-2},
}


@pytest.mark.parametrize("case", SHAMPOO)
def test_shampoo_is_the_distributed_one(case: str) -> None:
    options = {"lr": 0.05, "betas": (0.9, 1.0), "eps": 1e-12, **SHAMPOO[case]}
    names = {"frequency": "preconditioning_frequency", "block": "block_size"}
    ours = {names.get(name, name): value for name, value in options.items()}
    assert_same_path(lambda p: Shampoo(p, **ours), lambda p: PlainShampoo(p, **options), [*MATRICES, VECTOR], 2e-5)


@pytest.mark.parametrize("decay", [{}, {"weight_decay": 0.1, "weight_decouple": True}, {"weight_decay": 0.1}], ids=str)
def test_shampoo_is_pytorch_optimizers(decay: dict[str, Any]) -> None:
    """The Shampoo of arXiv 1802.09568, with decoupled weight decay and with L2."""
    from pytorch_optimizer import Shampoo as Reference

    def ours(p: list[Tensor]) -> Optimizer:
        if "weight_decouple" in decay or not decay:
            return Shampoo(p, 0.1, (0, 1), 1e-6, decay.get("weight_decay", 0.0))
        return Shampoo([{"params": p, "constraint": L2(0.1)}], 0.1, (0, 1), 1e-6)

    assert_same_path(ours, lambda p: Reference(p, 0.1, matrix_eps=1e-6, **decay), [*MATRICES, VECTOR], 1e-4)


def test_pytorch_optimizers_shampoo_waits_for_the_first_multiple() -> None:
    """A defect of the reference: its roots are 0 until then. Ours are computed at the first step."""
    from pytorch_optimizer import Shampoo as Reference

    (a,), (b,) = params([SQUARE]), params([SQUARE])
    ours = Shampoo([a], 0.1, (0, 1), 1e-6, preconditioning_frequency=3)
    theirs = Reference([b], 0.1, matrix_eps=1e-6, preconditioning_compute_steps=3)
    before = a.detach().clone()
    run([ours, theirs], [[a], [b]], 2)
    assert torch.equal(b, before) and (a != before).all()


# SOAP -------------------------------------------------------------------------------------------------------------


def share_bases(ours: Optimizer, reference: Optimizer, step: int) -> None:
    """Give ours the reference's bases while it is free to choose them.

    The Gram matrix of the first gradients is rank deficient on the longer side of a matrix, and for a vector. Which
    orthonormal vectors stand for its null space is up to rounding, and implementations that differ there part for good.
    What is determined, the span of the others, is compared.
    """
    for p, q in zip(*(o.param_groups[0]["params"] for o in (ours, reference)), strict=True):
        sides = ["left", "right"] if p.ndim == 2 else ["right"]
        rank = step * min(p.shape) if p.ndim == 2 else step
        state = {name.removeprefix("0."): value for name, value in ours.state[p].items()}
        for side, basis in zip(sides, reference.state[q]["Q"], strict=True):
            mine = state.get(f"{side}_basis")
            assert (mine is None) == (len(basis) == 0)
            if mine is not None and (step == 1 or rank < len(basis)):
                top, seen = mine.view_as(basis)[:, :1], basis[:, :rank]
                torch.testing.assert_close(seen @ (seen.mT @ top), top, rtol=0, atol=1e-3)
                mine.copy_(basis)


@pytest.mark.parametrize("frequency", [1, 3, 10])
@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ({}, {}),
        ({"lr": 0.02, "betas": (0.8, 0.9), "shampoo_beta": 0.7, "weight_decay": 0.5, "eps": 1e-4}, {}),
        ({"max_precond_dim": 8}, {"max_precondition_dim": 8}),
        ({"precondition_1d": True}, {}),
        ({"normalize_grads": True, "correct_bias": False, "lr": 0.02}, {"normalize_gradient": True}),
        ({"correct_bias": False}, {}),
    ],
    ids=str,
)
def test_soap_is_pytorch_optimizers(frequency: int, options: dict[str, Any], theirs: dict[str, Any]) -> None:
    from pytorch_optimizer import SOAP as Reference

    common = {"precondition_frequency": frequency}
    renamed = {k: v for k, v in options.items() if k not in ("max_precond_dim", "normalize_grads")}
    assert_same_path(
        lambda p: SOAP(p, **common, **options),
        lambda p: Reference(p, **common, **renamed, **theirs),
        [*MATRICES, VECTOR],
        1e-4,
        share=share_bases,
    )


@pytest.mark.parametrize("frequency", [1, 3, 10])
def test_soap_needs_no_shared_bases_where_they_are_determined(frequency: int) -> None:
    from pytorch_optimizer import SOAP as Reference

    common = {"lr": 0.01, "precondition_frequency": frequency}
    assert_same_path(lambda p: SOAP(p, **common), lambda p: Reference(p, **common), [SQUARE, VECTOR], 1e-4)


def test_soap_normalizes_what_it_moves_by() -> None:
    """A defect of the reference: it multiplies the normalized update by Adam's bias correction, at first by 4.5."""
    from pytorch_optimizer import SOAP as Reference

    steps = {ours: [torch.zeros(SQUARE)] for ours in (True, False)}
    for ours, seen in steps.items():
        (w,) = params([SQUARE])
        if ours:
            optimizer: Optimizer = SOAP([w], 1.0, normalize_grads=True, weight_decay=0.0)
        else:
            optimizer = Reference([w], 1.0, normalize_gradient=True, weight_decay=0.0)
        for i in range(12):
            before = w.detach().clone()
            run([optimizer], [[w]], 1, first=i)
            seen.append(before - w.detach())
    for t, (a, b) in enumerate(zip(steps[True][2:], steps[False][2:], strict=True), start=1):
        torch.testing.assert_close(b, a * math.sqrt(1 - 0.95**t) / (1 - 0.95**t), rtol=1e-3, atol=1e-4)
        assert a.square().mean().sqrt() == pytest.approx(1, rel=1e-5)


def test_a_matrix_with_one_row_is_treated_as_a_vector() -> None:
    """A deviation from the reference, which rotates it whatever ``precondition_1d`` is."""
    (a,), (b,) = params([(1, 7)]), params([(7,)])
    first, second = SOAP([a], 0.1), SOAP([b], 0.1)
    run([first, second], [[a], [b]], 12)
    assert torch.equal(a[0], b)
    assert not any("basis" in name for name in first.state[a])


# KL-Shampoo -------------------------------------------------------------------------------------------------------


class PlainKLShampoo(Plain):
    """KL-Shampoo (arXiv 2509.03378) as yorkerlin/KL-Methods runs it, in float32."""

    def move(
        self, p: Tensor, g: Tensor, s: dict[str, Any], lr: float, betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8, weight_decay: float = 0.01, frequency: int = 10, factor: float = 0.1,
    ) -> None:  # fmt: skip
        (beta1, beta2), (m, n), t = betas, p.shape, s["step"] - 1
        if t == 0:
            s["S"] = [(1 - beta2) * g @ g.mT / n, (1 - beta2) * g.mT @ g / m]
            s["Q"] = [torch.linalg.eigh(gram)[1].flip(-1) for gram in s["S"]]
            s["lambda"] = [torch.full((m,), factor), torch.full((n,), factor)]
            s["m"] = torch.zeros_like(g)
            return
        (ql, qr), (a, b) = s["Q"], s["lambda"]
        s["m"] = beta1 * s["m"] + (1 - beta1) * g
        e = 1 / (a[:, None] * b[None, :]).sqrt()
        d = ql @ (ql.mT @ s["m"] @ qr * (e / (1 + e * eps))) @ qr.mT
        whitened = [g @ (qr / b) @ qr.mT @ g.mT / n, g.mT @ (ql / a) @ ql.mT @ g / m]
        s["S"] = [beta2 * old + (1 - beta2) * new for old, new in zip(s["S"], whitened, strict=True)]
        squares = (ql.mT @ g @ qr) ** 2
        averages = [(squares / b[None, :]).mean(1), (squares / a[:, None]).mean(0)]
        s["lambda"] = [
            (beta2 * old + (1 - beta2) * new).clamp(min=max(10, min(len(old), 4000)) ** -2)
            for old, new in zip(s["lambda"], averages, strict=True)
        ]
        if t % frequency == 0:
            s["Q"] = [torch.linalg.qr(gram @ q)[0] for gram, q in zip(s["S"], s["Q"], strict=True)]
        p.sub_(lr * d)
        p.mul_(1 - lr * weight_decay)


KL = [
    {"lr": 0.01},
    {"lr": 0.02, "betas": (0.8, 0.9), "eps": 1e-2, "weight_decay": 0.5, "factor": 1.0},
    {"lr": 0.02, "betas": (0.5, 0.5), "factor": 10.0},
]


@pytest.mark.parametrize("frequency", [1, 3, 10])
@pytest.mark.parametrize("options", KL, ids=str)
def test_kl_shampoo_is_the_authors(frequency: int, options: dict[str, Any]) -> None:
    names = {"factor": "init_factor"}
    ours = {names.get(name, name): value for name, value in options.items()}
    assert_same_path(
        lambda p: KLShampoo(p, precondition_frequency=frequency, **ours),
        lambda p: PlainKLShampoo(p, frequency=frequency, **options),
        MATRICES,
        2e-5,
        share=share_bases,
    )


def test_the_eigenvalues_of_kl_shampoo_have_a_lower_bound() -> None:
    """Gradients of 0 let them fall, but no inverse root exceeds the side, or 10."""
    w = nn.Parameter(torch.zeros(4, 12))
    optimizer = KLShampoo([w], betas=(0.9, 0.5))
    for _ in range(20):
        w.grad = torch.zeros_like(w)
        optimizer.step()
    assert (optimizer.state[w]["left_eigenvalues"] == torch.tensor(1 / 100)).all()
    assert (optimizer.state[w]["right_eigenvalues"] == torch.tensor(1 / 144)).all()


def seeing(g: Tensor, step: int = 1) -> Context:
    return Context(g, g, step, 1.0, None, lambda: g)


def whitened(gradients: list[Tensor], beta: float, steps: int) -> list[Tensor]:
    """What KLWhitened makes of gradients that come round and round, in the last round."""
    direction = KLWhitened(beta, eps=0.0, frequency=1, init_factor=1.0)
    state = direction.init_state(gradients[0])
    direction.look(gradients[0], state)
    results = []
    for t in range(1, steps + 1):
        g = gradients[t % len(gradients)]
        results.append(direction(g, state, seeing(g, t)))
    return results[-len(gradients) :]


def test_kl_shampoo_whitens_from_both_sides() -> None:
    """At the fixed point mean(u u^T) / in = 1 and mean(u^T u) / out = 1; averages of finite memory come near it."""
    torch.manual_seed(0)
    gradients = [from_spectrum(5, 7, spectrum(5)) for _ in range(4)]
    errors = []
    for beta in (0.9, 0.99):
        u = torch.stack(whitened(gradients, beta, int(12 / (1 - beta))))
        rows, columns = (u @ u.mT).mean(0) / 7, (u.mT @ u).mean(0) / 5
        errors.append(max(float((rows - torch.eye(5)).abs().max()), float((columns - torch.eye(7)).abs().max())))
    assert errors[1] < 0.03 and errors[1] < errors[0] / 5


def test_kl_shampoo_makes_a_constant_gradient_orthogonal() -> None:
    """The fixed point for one square gradient is sqrt(n) times its polar factor."""
    torch.manual_seed(0)
    g = from_spectrum(6, 6, spectrum(6, 0.03))
    (u,) = whitened([g], 0.5, 150)
    torch.testing.assert_close(u, math.sqrt(6) * exact(g), rtol=0, atol=1e-10)


def test_kl_shampoo_takes_matrices_only() -> None:
    for cls in (KLShampoo, ASGO, DASGO):
        with pytest.raises(ValueError, match="norm of matrices"):
            cls(params([VECTOR]))


# ASGO and DASGO ---------------------------------------------------------------------------------------------------


class PlainASGO(Plain):
    """ASGO and DASGO (arXiv 2503.20762) as infinity-stars/ASGO runs them, roots by singular values."""

    def move(
        self, p: Tensor, g: Tensor, s: dict[str, Any], lr: float, diagonal: bool, beta2: float, eps: float,
        momentum: float = 0.9, weight_decay: float = 0.1,
    ) -> None:  # fmt: skip
        m = s["m"] = momentum * s.get("m", 0) + (1 - momentum) * g
        wide = g.shape[0] < g.shape[1]
        v = (g**2).sum(0) if diagonal else g @ g.mT if wide else g.mT @ g
        v = s["v"] = beta2 * s.get("v", 0) + (1 - beta2) * v
        if diagonal:
            u = m * (v + eps) ** -0.5
        else:
            left, values, right = torch.linalg.svd(v.double())
            root = (left * values**-0.5) @ right
            u = (root @ m.double() if wide else m.double() @ root).float()
        u = u * 0.2 * math.sqrt(g.numel()) / u.norm()
        p.mul_(1 - lr * weight_decay).sub_(lr * u)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.5, "beta2": 0.95, "weight_decay": 0.5}], ids=str)
def test_asgo_is_the_authors(options: dict[str, Any]) -> None:
    theirs = {"lr": 0.01, "beta2": 0.8, "eps": 0.0, "diagonal": False, **options}
    assert_same_path(lambda p: ASGO(p, **options), lambda p: PlainASGO(p, **theirs), MATRICES, 2e-5)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.5, "beta2": 0.8, "weight_decay": 0.5, "eps": 1.0}], ids=str)
def test_dasgo_is_the_authors(options: dict[str, Any]) -> None:
    theirs = {"lr": 0.001, "beta2": 0.95, "eps": 1e-8, "diagonal": True, **options}
    assert_same_path(lambda p: DASGO(p, **options), lambda p: PlainASGO(p, **theirs), MATRICES, 2e-5)


# Limits: memory off ------------------------------------------------------------------------------------------------


def step_of(optimizer: Callable[[list[Tensor]], Optimizer], g: Tensor, times: int = 1) -> Tensor:
    """The step of an optimizer whose learning rate is 1 after ``times`` equal gradients."""
    w = nn.Parameter(torch.zeros_like(g))
    o = optimizer([w])
    for _ in range(times):
        w.grad = g.clone()
        o.step()
    return -w.detach()


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 6)], ids=str)
@pytest.mark.parametrize("rank", [2, None])
def test_without_memory_they_are_duality_maps(shape: tuple[int, int], rank: int | None) -> None:
    torch.manual_seed(0)
    g = from_spectrum(*shape, spectrum(rank or min(shape)))
    p, (m, n) = exact(g), shape

    def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)

    close(step_of(lambda w: Shampoo(w, 1.0, (0, 0), 0.0), g), p)
    none = {"momentum": 0.0, "beta2": 0.0, "weight_decay": 0.0, "eps": 0.0}
    close(step_of(lambda w: ASGO(w, 1.0, **none), g), p * 0.2 * math.sqrt(m * n) / p.norm())
    columns = g / g.norm(dim=0)
    close(step_of(lambda w: DASGO(w, 1.0, **none), g), columns * 0.2 * math.sqrt(m * n) / columns.norm())
    # Rotated entries that should be 0 are rounding errors, which eps makes small beside the others.
    soap = step_of(lambda w: SOAP(w, 1.0, (0, 0), 0, 1e-7, 0.0), g, times=2)
    close(soap, p, 1e-5)


def test_vectors_without_memory_are_normalized() -> None:
    g = torch.randn(7, dtype=torch.float64)
    torch.testing.assert_close(step_of(lambda w: Shampoo(w, 1.0, (0, 0), 0.0), g), g / g.norm())


# Blocks, grafts and rotations ---------------------------------------------------------------------------------------


@given(
    shape=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    lead=st.sampled_from([(), (1,), (3,), (2, 2)]),
    size=st.integers(1, 10),
)
def test_blocks_join_to_what_was_cut(shape: tuple[int, int], lead: tuple[int, ...], size: int) -> None:
    blocked = Blocked(Max(), size)
    x = torch.arange(math.prod((*lead, *shape)), dtype=torch.float32).reshape(*lead, *shape) + 1
    blocks = blocked.cut(x)
    assert max(blocks.shape[-2:]) <= size and blocks.shape[: len(lead)] == lead
    assert torch.equal(blocked.join(blocks, x.shape), x)
    assert (blocks != 0).sum() == x.numel()  # nothing but zeros besides
    tight = [-(-n // size) if n else 1 for n in shape]
    assert blocks.shape[-3] == math.prod(tight)


@pytest.mark.parametrize("shape", [(8, 12), (7, 10), (3, 11), (4, 4)], ids=str)
@pytest.mark.parametrize(
    "norm",
    [
        Smoothed(Spectral("unit"), 0.9, 1e-4),
        Grafted(Smoothed(Spectral("unit"), 0.9, 1e-4, frequency=3), Smoothed(Max())),
        Rotated(Smoothed(Max()), Eigenbasis(0.9, 3)),
        Euclidean("unit"),
        KLWhitened(0.9, frequency=2),
    ],
    ids=str,
)
def test_blocks_move_as_tensors_of_their_own(shape: tuple[int, int], norm: Any) -> None:
    size = 4
    whole = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    rows, columns = (-(-n // -(-n // size)) for n in shape)
    # Where sides cannot be cut evenly, the tensor of a block is filled up with zeros as well.
    padded = nn.functional.pad(torch.ones(shape), (0, -shape[1] % columns, 0, -shape[0] % rows))
    cuts = [(i, j) for i in range(0, padded.shape[0], rows) for j in range(0, padded.shape[1], columns)]

    def block(x: Tensor, i: int, j: int) -> Tensor:
        part = x[i : i + rows, j : j + columns]
        return nn.functional.pad(part, (0, columns - part.shape[1], 0, rows - part.shape[0]))

    parts = [nn.Parameter(block(whole.detach(), i, j)) for i, j in cuts]
    first = SteepestDescent([whole], 0.1, Blocked(norm, size), 0.5)
    second = SteepestDescent(parts, 0.1, norm, 0.5)
    for i in range(7):
        give_gradients([whole], i)
        for part, cut in zip(parts, cuts, strict=True):
            part.grad = block(whole.grad, *cut)
        first.step()
        second.step()
    for part, cut in zip(parts, cuts, strict=True):
        torch.testing.assert_close(block(whole.detach(), *cut), part.detach(), rtol=0, atol=1e-9)


def test_blocks_know_how_large_they_are() -> None:
    assert Blocked(Spectral("unit"), 4).rms((8, 16)) == Spectral("unit").rms((4, 4))
    g = torch.randn(2, 8, 8, dtype=torch.float64)
    norm = Spectral("unit", "exact")
    expected = sum(norm.dual_norm(g[:, i : i + 4, j : j + 4]) for i in (0, 4) for j in (0, 4))
    torch.testing.assert_close(Blocked(norm, 4).steepness(g, {}), expected)


def test_a_graft_takes_its_length_from_the_other() -> None:
    g = torch.randn(3, 4, 6)
    d = Grafted(Row("unit"), Identity())(g, {}, seeing(g))
    torch.testing.assert_close(d.norm(dim=(1, 2)), g.norm(dim=(1, 2)))
    row = Row("unit").dualize(g)
    torch.testing.assert_close(d / d.norm(dim=(1, 2), keepdim=True), row / row.norm(dim=(1, 2), keepdim=True))
    assert (Grafted(Row("unit"), Identity())(torch.zeros(1, 4, 6), {}, seeing(g)) == 0).all()


@pytest.mark.parametrize(
    "memory",
    [
        Smoothed(Max(), 0.9),
        Smoothed(Row("unit"), 0.9),
        Smoothed(Column("unit"), 0.9, maximum=True),
        Chain(Smoothed(Max(), 0.9), Euclidean()),
        Grafted(Smoothed(Column(), 0.9), Smoothed(Max(), 0.9)),
    ],
    ids=str,
)
def test_memory_follows_the_order_of_the_basis(memory: Any) -> None:
    """A basis whose columns are put in another order, with the memory, gives the same direction."""
    torch.manual_seed(0)
    rotated, g = Rotated(memory, Eigenbasis(0.9, 1)), torch.randn(2, 5, 6, dtype=torch.float64)
    state = rotated.init_state(g)
    rotated.look(g, state)
    context = seeing(g)
    rotated(g, state, context)
    expected = rotated.apply(g, state, context)
    left, right = torch.randperm(5), torch.randperm(6)
    for name, tensor in state.items():
        if name.endswith("basis"):
            tensor.copy_(tensor[..., left if "left" in name else right].clone())
        elif "gram" not in name:
            tensor = tensor.copy_(tensor[..., left, :].clone()) if tensor.shape[-2] == 5 else tensor
            tensor.copy_(tensor[..., right].clone()) if tensor.shape[-1] == 6 else None
    torch.testing.assert_close(rotated.apply(g, state, context), expected)


@pytest.mark.parametrize(
    "direction",
    [
        Smoothed(Spectral()),
        Euclidean(),
        Chain(Max(), EMA()),
        Smoothed(Max(), centered=True),
        Grafted(Max(), Smoothed(Max(), centered=True)),
        Rotated(Max(), Eigenbasis()),
        KLWhitened(),
    ],
    ids=str,
)
def test_what_would_have_to_turn_is_refused(direction: Any) -> None:
    with pytest.raises(ValueError, match="Rotated: "):
        Rotated(direction, Eigenbasis())


def test_what_looks_first_must_come_first() -> None:
    with pytest.raises(ValueError, match="must come first"):
        Chain(Row(), Rotated(Max(), Eigenbasis()))
    with pytest.raises(ValueError, match="must come first"):
        Chain(EMA(), KLWhitened())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: Shampoo(p, graft="adma"), "Shampoo: unknown graft 'adma'; did you mean 'adam'"),
        (lambda p: Shampoo(p, block_size=0), "Blocked: size must be a whole number"),
        (lambda p: Shampoo(p, preconditioning_frequency=0), "Smoothed: frequency must be a whole number"),
        (lambda p: Shampoo(p, exponent=-1.0), "Spectral: exponent must lie in"),
        (lambda p: Shampoo(p, betas=(0.9, 1.1)), "betas must lie in"),
        (lambda p: SOAP(p, shampoo_beta=1.0), "SOAP: shampoo_beta must lie in"),
        (lambda p: SOAP(p, precondition_frequency=2.5), "Eigenbasis: frequency must be a whole number"),
        (lambda p: KLShampoo(p, init_factor=0.0), "KLWhitened: init_factor must lie in"),
        (lambda p: KLShampoo(p, eps=-1.0), "KLWhitened: eps must lie in"),
        (lambda p: ASGO(p, beta2=1.0), "Smoothed: beta must lie in"),
        (lambda p: SteepestDescent(p, norm="Smoothed(Max(), frequency=3)"), "frequency is for norms whose"),
        (lambda p: SteepestDescent(p, norm="Spectral(sides='larger')"), "unknown sides 'larger'"),
    ],
)
def test_bad_arguments_are_refused(make: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(params([SQUARE]))


# Robustness --------------------------------------------------------------------------------------------------------


def params(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    noise = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=noise).to(dtype)) for s in shapes]


def give_gradients(weights: list[Tensor], seed: int, scale: float = 1.0) -> None:
    for p, g in zip(weights, params([tuple(p.shape) for p in weights], seed=seed + 1000), strict=True):
        p.grad = (g.detach() * scale).to(p.dtype)


def run(optimizers: list[Optimizer], weights: list[list[Tensor]], steps: int, first: int = 0) -> None:
    """The same gradients for several optimizers."""
    for i in range(first, first + steps):
        for optimizer, held in zip(optimizers, weights, strict=True):
            give_gradients(held, i)
            optimizer.step()


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

    assert steps_with(lambda p: Shampoo(p, preconditioning_frequency=4), eighs) == [1, 4, 8]
    assert steps_with(lambda p: Shampoo(p), eighs) == list(range(1, 10))
    # Their first call is no step.
    assert steps_with(lambda p: SOAP(p, precondition_frequency=4), eighs) == [1]
    assert steps_with(lambda p: SOAP(p, precondition_frequency=4), qrs) == [5, 9]
    assert steps_with(lambda p: KLShampoo(p, precondition_frequency=4), qrs) == [5, 9]


def test_a_matrix_whose_first_gradients_are_zero_does_not_wait_for_the_next_root() -> None:
    """And it does not get the root of nothing, ``eps ** -0.25``, which would blow its first gradients up."""
    (late, early, vector), (alone,) = params([SQUARE, SQUARE, VECTOR]), params([SQUARE])
    optimizer = Shampoo([late, early, vector], 0.1, (0.0, 0.9), preconditioning_frequency=6)
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


def test_matrices_with_rows_of_zeros_are_decomposed() -> None:
    """torch.linalg.eigh fails on some of these in float32, or returns NaNs: gradients of an embedding are such."""
    torch.manual_seed(0)
    for _ in range(100):
        a = torch.randn(64, 16)
        a[torch.randperm(64)[:40]] = 0
        gram = a @ a.mT
        values, vectors = eigh(gram)
        size = float(gram.abs().max())
        torch.testing.assert_close((vectors * values) @ vectors.mT, gram, rtol=0, atol=1e-5 * size)
        torch.testing.assert_close(vectors.mT @ vectors, torch.eye(64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["error", "nan"])
@pytest.mark.parametrize("failures", [1, 2])
def test_failed_decompositions_are_repeated(failures: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once: in float64 with a jitter. Twice: the diagonal stands for the matrix."""
    original, calls = torch.linalg.eigh, []

    def failing(x: Tensor) -> Any:
        calls.append(x.dtype)
        if len(calls) > failures:
            return original(x)
        if kind == "error":
            raise torch.linalg.LinAlgError("did not converge")
        return original(x)[0], torch.full_like(x, torch.nan)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    a = torch.randn(3, 5, 8)
    gram = a @ a.mT * 1e-20
    values, vectors = eigh(gram)
    assert calls == [torch.float32, torch.float64] and values.dtype == vectors.dtype == torch.float32
    again = (vectors * values.unsqueeze(-2)) @ vectors.mT
    if failures == 1:
        torch.testing.assert_close(again, gram, rtol=0, atol=1e-5 * float(gram.abs().max()))
    else:
        torch.testing.assert_close(again, torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1)))
    assert (values.diff() >= 0).all()


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


def test_powers_of_matrices() -> None:
    torch.manual_seed(0)
    a = torch.randn(4, 6, 9, dtype=torch.float64)
    gram = a @ a.mT
    root = matrix_power(gram, -0.5, 0.1)
    torch.testing.assert_close(torch.linalg.inv(root @ root), gram + 0.1 * torch.eye(6, dtype=torch.float64))
    low = gram.clone()
    low[0] = a[0, :, :2] @ a[0, :, :2].mT
    torch.testing.assert_close(matrix_power(low, -1.0), torch.linalg.pinv(low, hermitian=True))
    # An eps that counts holds where the eigenvalues are 0; one lost in rounding does not.
    values = torch.linalg.eigvalsh(matrix_power(low[0], -1.0, 1e-3))
    torch.testing.assert_close(values[-4:], torch.full((4,), 1e3, dtype=torch.float64))
    assert torch.linalg.eigvalsh(matrix_power(low[0], -1.0, 1e-18)).max() < 1e3
    assert (matrix_power(torch.zeros(3, 3), -0.5, 1e-12) == 0).all()
    broken = torch.eye(3).expand(3, 3, 3).clone()
    broken[0, 0, 1], broken[1, 2, 2] = torch.nan, torch.inf
    torch.testing.assert_close(matrix_power(broken, -0.5), torch.eye(3) * torch.tensor([0.0, 0, 1]).view(3, 1, 1))
    assert matrix_power(torch.zeros(2, 0, 0), -0.5).shape == (2, 0, 0)


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1.0, 1e37])
def test_eigenvalues_of_any_size(scale: float) -> None:
    torch.manual_seed(0)
    a = torch.randn(6, 9)
    gram = a @ a.mT / 30
    values, vectors = eigh(gram * scale)
    torch.testing.assert_close(values / scale, torch.linalg.eigvalsh(gram), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(6), rtol=0, atol=1e-5)
    assert eigh(torch.zeros(2, 0, 0))[1].shape == (2, 0, 0)
    assert all(torch.isfinite(x).all() for x in eigh(torch.full((3, 3), torch.inf)))
    assert all(torch.isfinite(x).all() for x in eigh(torch.full((3, 3), torch.nan)))


def test_power_iteration_finds_the_eigenvectors_in_order() -> None:
    torch.manual_seed(0)
    q = torch.linalg.qr(torch.randn(3, 6, 6, dtype=torch.float64))[0]
    gram = (q * torch.tensor([1e30, 4e29, 1e29, 3e28, 1e28, 0.0])) @ q.mT
    basis = torch.linalg.qr(torch.randn(3, 6, 6, dtype=torch.float64))[0]
    for _ in range(80):
        power_iteration_(basis, gram)
    identity = torch.eye(6, dtype=torch.float64).expand(3, 6, 6)
    torch.testing.assert_close((basis.mT @ q).abs(), identity, atol=1e-9, rtol=0)
    shuffled = basis[..., [3, 1, 0, 2, 5, 4]]
    order = power_iteration_(shuffled, gram)
    assert order.tolist() == [[2, 1, 3, 0, 5, 4]] * 3
    torch.testing.assert_close(shuffled.abs(), basis.abs())
    low = torch.linalg.qr(torch.randn(6, 6))[0]
    high = low.clone()
    gram = torch.ones(6, 6) + torch.diag(torch.arange(6.0)) / 10
    power_iteration_(low, gram)
    power_iteration_(high, gram * 2e38)  # sums of these overflow
    torch.testing.assert_close(high, low)
    assert power_iteration_(low, gram, ordered=False).tolist() == list(range(6))


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


# Whole models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_whole_models(name: str) -> None:
    torch.manual_seed(0)
    model = normopt.nn.GPT(vocab_size=64, d_model=16, n_layers=1, n_heads=2)
    start = copy.deepcopy(model)
    optimizer = normopt.create(name, model, lr=0.01)
    tokens = torch.randint(0, 64, (4, 9))
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    pairs = zip(model.named_parameters(), start.parameters(), strict=True)
    assert all(torch.isfinite(p).all() and (p != q).any() for (_, p), q in pairs)


def rules(optimizer: SteepestDescent) -> dict[str, str]:
    return {group["role"]: group["rule"] for group in optimizer.param_groups}


def test_every_tensor_is_preconditioned_by_shampoo_and_soap() -> None:
    model = normopt.nn.GPT(vocab_size=64, d_model=16, n_layers=1, n_heads=2)
    for optimizer in (Shampoo(model, block_size=32), SOAP(model, max_precond_dim=32)):
        tokens = torch.randint(0, 64, (2, 8))
        model(tokens).square().sum().backward()
        optimizer.step()
        ((embedding,),) = (g["params"] for g in optimizer.param_groups if g["role"] == "embedding")
        state = {name: tuple(v.shape) for name, v in optimizer.state[embedding].items()}
        if isinstance(optimizer, Shampoo):  # seen as (16 x 64), in two blocks
            assert state["second_moment"] == (1, 2, 16, 16) and state["second_moment1"] == (1, 2, 32, 32)
        else:  # the vocabulary is too long to be rotated
            assert state["left_basis"] == (1, 16, 16) and "right_basis" not in state
        optimizer.zero_grad()


def test_matrix_optimizers_leave_the_rest_to_adamw() -> None:
    model = nn.Sequential(nn.Embedding(11, 6), nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 11))
    for name, own in (("klshampoo", "KLWhitened"), ("asgo", "Chain"), ("dasgo", "Chain")):
        optimizer = normopt.create(name, model, lr=0.1, aux_betas=(0.5, 0.6), aux_weight_decay=0.3)
        found = rules(optimizer)
        with_head = {"linear", "unembedding"} if name != "klshampoo" else {"linear"}
        assert {role for role, rule in found.items() if f"norm={own}(" in rule} == with_head
        for group in optimizer.param_groups:
            if group["role"] not in with_head:
                assert (group["lr"], group["betas"], group["weight_decay"]) == (0.1, (0.5, 0.6), 0.3)
        assert normopt.create(name, model, lr=0.1, aux_lr=0.2).param_groups[0]["lr"] == 0.2


@pytest.mark.parametrize("name", ["klshampoo", "asgo", "dasgo"])
def test_the_rest_moves_exactly_as_by_adamw(name: str) -> None:
    model = nn.Sequential(nn.Embedding(11, 6), nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 11))
    twin = copy.deepcopy(model)
    optimizer = normopt.create(name, model, lr=0.01, aux_weight_decay=0.3)
    reference = torch.optim.AdamW(twin.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.3)
    run([optimizer, reference], [list(model.parameters()), list(twin.parameters())], 5)
    for path in ("0.weight", "1.weight", "2.bias"):
        torch.testing.assert_close(model.get_parameter(path), twin.get_parameter(path), rtol=0, atol=1e-6)
