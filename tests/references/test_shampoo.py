"""Shampoo, SOAP, KL-Shampoo, ASGO and DASGO: beside their references, in their limits, on whole models."""

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
from normopt import L2, SteepestDescent
from normopt.directions.whitening import KLWhitened
from normopt.polar import exact
from normopt.zoo import ASGO, DASGO, SOAP, KLShampoo, Shampoo, SPlus
from tests.support.paths import MATRICES, assert_same_path
from tests.support.preconditioned import NAMES, SQUARE, VECTOR, params, run, seeing
from tests.support.strategies import from_spectrum, spectrum


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


# Shampoo -------------------------------------------------------------------------------------------------------------


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
    # With so large an eps that no old root magnifies a new gradient, where ours would compute another.
    "frequency": {"frequency": 3, "eps": 30.0, "betas": (0.9, 0.99)},
    "frequency of sums": {"frequency": 4, "eps": 30.0, "graft": "adam"},
    "blocks": {"block": 4, "graft": "adam"},
    "blocks without a graft": {"block": 5, "betas": (0.9, 0.99)},
    "blocks and frequency": {"block": 5, "frequency": 3, "eps": 30.0},
}


@pytest.mark.parametrize("case", SHAMPOO)
def test_shampoo_is_the_distributed_one(case: str) -> None:
    options = {"lr": 0.05, "betas": (0.9, 1.0), "eps": 1e-12, **SHAMPOO[case]}
    names = {"frequency": "preconditioning_frequency", "block": "block_size"}
    ours = {names.get(name, name): value for name, value in options.items()} | {"staggered": False}
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


# SOAP ----------------------------------------------------------------------------------------------------------------


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
        lambda p: SOAP(p, **common, **options, staggered=False),
        lambda p: Reference(p, **common, **renamed, **theirs),
        [*MATRICES, VECTOR],
        1e-4,
        share=share_bases,
    )


@pytest.mark.parametrize("frequency", [1, 3, 10])
def test_soap_needs_no_shared_bases_where_they_are_determined(frequency: int) -> None:
    from pytorch_optimizer import SOAP as Reference

    common = {"lr": 0.01, "precondition_frequency": frequency}
    assert_same_path(
        lambda p: SOAP(p, **common, staggered=False), lambda p: Reference(p, **common), [SQUARE, VECTOR], 1e-4
    )


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


def test_soap_treats_a_matrix_with_one_row_as_a_vector() -> None:
    """A deviation from the reference, which rotates it whatever ``precondition_1d`` is."""
    (a,), (b,) = params([(1, 7)]), params([(7,)])
    first, second = SOAP([a], 0.1), SOAP([b], 0.1)
    run([first, second], [[a], [b]], 12)
    assert torch.equal(a[0], b)
    assert not any("basis" in name for name in first.state[a])


# KL-Shampoo ----------------------------------------------------------------------------------------------------------


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
        lambda p: KLShampoo(p, precondition_frequency=frequency, **ours, staggered=False),
        lambda p: PlainKLShampoo(p, frequency=frequency, **options),
        MATRICES,
        2e-5,
        share=share_bases,
    )


def test_kl_shampoo_eigenvalues_have_a_lower_bound() -> None:
    """Gradients of 0 let them fall, but no inverse root exceeds the side, or 10."""
    w = nn.Parameter(torch.zeros(4, 12))
    optimizer = KLShampoo([w], betas=(0.9, 0.5))
    for _ in range(20):
        w.grad = torch.zeros_like(w)
        optimizer.step()
    assert (optimizer.state[w]["left_eigenvalues"] == torch.tensor(1 / 100)).all()
    assert (optimizer.state[w]["right_eigenvalues"] == torch.tensor(1 / 144)).all()


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


# ASGO and DASGO ------------------------------------------------------------------------------------------------------


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


# Limits: memory off --------------------------------------------------------------------------------------------------


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
def test_shampoo_asgo_and_soap_without_memory_are_duality_maps(shape: tuple[int, int], rank: int | None) -> None:
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


def test_shampoo_without_memory_normalizes_vectors() -> None:
    g = torch.randn(7, dtype=torch.float64)
    torch.testing.assert_close(step_of(lambda w: Shampoo(w, 1.0, (0, 0), 0.0), g), g / g.norm())


# Bad arguments -------------------------------------------------------------------------------------------------------


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
def test_shampoo_family_refuses_bad_arguments(make: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(params([SQUARE]))


# Whole models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_shampoo_family_trains_whole_models(name: str) -> None:
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


def test_shampoo_and_soap_precondition_every_tensor() -> None:
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


def test_klshampoo_and_asgo_leave_the_rest_to_adamw() -> None:
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
def test_klshampoo_and_asgo_move_the_rest_exactly_as_adamw(name: str) -> None:
    model = nn.Sequential(nn.Embedding(11, 6), nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 11))
    twin = copy.deepcopy(model)
    optimizer = normopt.create(name, model, lr=0.01, aux_weight_decay=0.3)
    reference = torch.optim.AdamW(twin.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.3)
    run([optimizer, reference], [list(model.parameters()), list(twin.parameters())], 5)
    for path in ("0.weight", "1.weight", "2.bias"):
        torch.testing.assert_close(model.get_parameter(path), twin.get_parameter(path), rtol=0, atol=1e-6)


# SPlus ---------------------------------------------------------------------------------------------------------------


class PlainSPlus(Plain):
    """SPlus, whose first gradient only builds the bases."""

    def move(self, p: Tensor, g: Tensor, s: dict[str, Any], lr: float, **options: Any) -> None:
        (beta1, beta2), often = options["betas"], options["inverse_steps"]
        first = "m" not in s
        m = s.setdefault("m", torch.zeros_like(g))
        if not first:
            m.lerp_(g, 1 - beta1)
            turned = s["left"].mT @ m @ s["right"]
            p.sub_(lr * 2 / sum(g.shape) * s["left"] @ turned.sign() @ s["right"].mT)
            p.mul_(1 - lr * options["weight_decay"])
        for side, gram in ("left", g @ g.mT), ("right", g.mT @ g):
            s.setdefault(f"{side}_gram", torch.zeros_like(gram)).lerp_(gram, 1 - beta2)
            if first or (s["step"] - 1) % often == 0:
                s[side] = torch.linalg.eigh(s[f"{side}_gram"])[1]


@pytest.mark.parametrize("often", [1, 5])
def test_splus_by_its_recurrence(often: int) -> None:
    """In full-rank bases, where eigenvectors are known but for their signs, which the rotation takes out again."""
    options = {"betas": (0.9, 0.8), "inverse_steps": often, "weight_decay": 0.1}
    start = torch.randn(6, 6, dtype=torch.float64)
    ours, theirs = (nn.Parameter(start.clone()) for _ in range(2))
    first, second = SPlus([ours], 0.1, **options), PlainSPlus([theirs], 0.1, **options)
    for _ in range(25):
        ours.grad = torch.randn(6, 6, dtype=torch.float64)
        theirs.grad = ours.grad.clone()
        first.step()
        second.step()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    assert (ours - start).abs().max() > 0.1


def test_splus_moves_vectors_by_signs() -> None:
    model = nn.Linear(3, 3)
    before = model.bias.detach().clone()
    optimizer = SPlus(model, 0.5)
    for _ in range(3):
        model(torch.ones(3)).sum().backward()
        optimizer.step()
    torch.testing.assert_close(before - model.bias, torch.full((3,), 0.5e-3 * 3), rtol=1e-4, atol=0)
