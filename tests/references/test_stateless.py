"""SCALE, SWAN, SinkGD and ARO beside their references, and what each of them promises."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

import normopt
from normopt import Aligned, Row, Sinkhorn, Spectral, zoo
from normopt.report import state_bytes
from tests.support.models import LANGUAGE, Language
from tests.support.paths import MATRICES, assert_same_path
from tests.support.strategies import assert_close, from_spectrum, spectrum
from tests.support.written import EXACT, State, Written, average, gaussian, polar, rms, single

# SCALE ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"momentum": 0.7, "weight_decay": 0.1, "aux_lr": 0.01}], ids=str)
def test_scale_by_its_recurrence(options: dict[str, Any]) -> None:
    """OptimAI-Lab/Minimalist_LLM_Pretraining: embed_tokens over the vocabulary, the rest over inputs; AdamW in 1-D."""
    lr, beta = 0.02, options.get("momentum", 0.9)

    def over(dim: int, momentum: bool = False) -> Callable[[Tensor, State, int], Tensor]:
        def update(g: Tensor, state: State, step: int) -> Tensor:
            g = average(g, state, beta, nesterov=False) if momentum else g
            return lr * g / g.square().mean(dim=dim, keepdim=True).sqrt().clamp(min=1e-8)

        return update

    def adam(g: Tensor, state: State, step: int) -> Tensor:
        m = average(g, state, 0.9, nesterov=False) / (1 - 0.9**step)
        v = state.setdefault("v", torch.zeros_like(g))
        v.mul_(0.999).add_(0.001 * g**2)
        return options.get("aux_lr", lr) * m / ((v / (1 - 0.999**step)).sqrt() + 1e-8)

    def reference(p: list[Tensor]) -> Optimizer:
        decay = lr * options.get("weight_decay", 0.0)
        rules = [over(0), over(1), adam, over(1, momentum=True)]
        decays = [decay, decay, 0.0, decay]
        groups = [{"params": [w], "update": u, "decay": d} for w, u, d in zip(p, rules, decays, strict=True)]
        return Written(groups, adam)

    assert_same_path(lambda p: zoo.SCALE(Language(p), lr, **options), reference, LANGUAGE, 2e-5)


def test_scale_ignores_the_size_of_each_row() -> None:
    """Each output's row has a root mean square of 1 whatever its gradient's size; one of zeros stays where it is."""
    g = gaussian(6, 10)
    update = single(zoo.SCALE, g)
    assert_close(update.square().mean(dim=1), torch.ones(6, dtype=torch.float64), 1e-9)
    sizes = torch.tensor([1e-6, 1.0, 1e6, 2.0, 3.0, 0.0], dtype=torch.float64)[:, None]
    assert_close(single(zoo.SCALE, sizes * g), update * (sizes > 0), 1e-9)


def test_scale_keeps_less_than_half_of_adams_state() -> None:
    """A head of V d numbers, against 2 (2 V d + the rest): here a tenth; at a large vocabulary at most a quarter."""

    def state_of(name: str) -> int:
        model = normopt.nn.GPT(64, d_model=32, n_layers=2, n_heads=2)
        optimizer = normopt.create(name, model)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        return sum(state_bytes(optimizer.state[p]) for p in model.parameters())

    head = 4 * 64 * 32
    assert head < state_of("scale") < 1.3 * head
    assert state_of("scale") < 0.5 * state_of("adamw")
    assert state_of("sinkgd") < 0.5 * state_of("adamw")


# SWAN and SinkGD -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "scale": 0.5}], ids=str)
def test_swan_by_its_formula(options: dict[str, Any]) -> None:
    lr, ratio = 0.5, options.get("scale", 0.05)

    def update(g: Tensor, state: State, step: int) -> Tensor:
        rows = g / g.square().mean(dim=1, keepdim=True).sqrt()
        whitened = polar(rows)
        return lr * ratio * rows.norm() / whitened.norm() * whitened

    assert_same_path(
        lambda p: zoo.SWAN(p, lr, **EXACT, **options),
        lambda p: Written(p, update, lr * options.get("weight_decay", 0.0)),
        MATRICES,
        2e-5,
    )


@pytest.mark.parametrize(("m", "n"), MATRICES)
def test_swan_whitens_rows_of_one_size(m: int, n: int) -> None:
    """The wide update is ``sqrt(n) polar(h)``: its rows are orthogonal, and ||h||_F = sqrt(m n) of rms 1 for any shape.

    Rows of another size change nothing, for they are normalized first.
    """
    g = gaussian(m, n)
    update = single(zoo.SWAN, g, scale=1.0, **EXACT)
    assert_close(rms(update), torch.ones((), dtype=torch.float64), 1e-9)
    short = update @ update.mT if m <= n else update.mT @ update
    assert_close(short, max(m, n) * torch.eye(min(m, n), dtype=torch.float64), 1e-9)
    assert_close(single(zoo.SWAN, torch.logspace(-3, 3, m).double()[:, None] * g, scale=1.0, **EXACT), update, 1e-8)


def test_swans_own_polar_factor_is_near_the_exact_one() -> None:
    """Four steps bring singular values above 1e-2 of the largest into [0.77, 1.06]."""
    g = gaussian(16, 64)
    update, exact = single(zoo.SWAN, g), single(zoo.SWAN, g, **EXACT)
    assert (update - exact).norm() < 0.23 * exact.norm()
    ratios = torch.linalg.svdvals(update) / torch.linalg.svdvals(exact)
    assert ratios.max() / ratios.min() <= 1.06 / 0.77  # both updates are scaled to one length


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "scale": 0.5, "iterations": 1}], ids=str)
def test_sinkgd_by_its_formula(options: dict[str, Any]) -> None:
    """Rows to length sqrt(n), then columns to sqrt(m), L times."""
    lr = 0.5

    def update(g: Tensor, state: State, step: int) -> Tensor:
        m, n = g.shape
        for _ in range(options.get("iterations", 5)):
            g = math.sqrt(n) * g / g.norm(dim=1, keepdim=True)
            g = math.sqrt(m) * g / g.norm(dim=0, keepdim=True)
        return lr * options.get("scale", 0.05) * g

    assert_same_path(
        lambda p: zoo.SinkGD(p, lr, **options),
        lambda p: Written(p, update, lr * options.get("weight_decay", 0.0)),
        MATRICES,
        2e-5,
    )


def sinkhorn(g: Tensor, iterations: int) -> Tensor:
    return Sinkhorn(iterations)(g, {}, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(("m", "n"), [(6, 10), (10, 6), (8, 8), (16, 64)])
def test_sinkhorns_limit_has_rows_and_columns_of_one_size(m: int, n: int) -> None:
    """The fixed point ``D1 G D2`` is unique, so it is the same for every ``D G D'``, and more iterations keep it."""
    g = gaussian(m, n)
    limit = sinkhorn(g, 200)
    assert_close(limit.square().mean(dim=1), torch.ones(m, dtype=torch.float64), 1e-9)
    assert_close(limit.square().mean(dim=0), torch.ones(n, dtype=torch.float64), 1e-9)
    assert_close(sinkhorn(limit, 1), limit, 1e-9)
    factors = limit / g  # D1 and D2: positive, of rank one
    assert (factors > 0).all() and torch.linalg.svdvals(factors)[1] < 1e-9 * factors.norm()
    scaled = torch.rand(m, 1, dtype=torch.float64).add(0.1) * g * torch.rand(1, n, dtype=torch.float64).add(0.1)
    assert_close(sinkhorn(scaled, 200), limit, 1e-8)


def test_sinkgd_needs_five_iterations() -> None:
    """Columns come last, so they are exact after every iteration; the rest is within 1e-4 for badly scaled ones."""
    g = torch.logspace(-2, 2, 64).double()[:, None] * gaussian(64, 256) * torch.logspace(2, -2, 256).double()
    update = single(zoo.SinkGD, g, scale=1.0)
    assert_close(update.square().mean(dim=0), torch.ones(256, dtype=torch.float64), 1e-9)
    assert (update.square().mean(dim=1).sqrt() - 1).abs().max() < 1e-4
    assert (single(zoo.SinkGD, g, scale=1.0, iterations=1).square().mean(dim=1).sqrt() - 1).abs().max() > 1e-3


def test_sinkhorn_is_no_duality_map() -> None:
    """A duality map maximizes <g, d> over a ball, so <g, map(g)> >= <g, map(h)> for all h; Sinkhorn's can be beaten."""
    g, h = torch.tensor([[9.0, 1.0], [1.0, 1.0]]).double(), torch.tensor([[5.0, 1.0], [1.0, 5.0]]).double()
    assert (g * sinkhorn(g, 50)).sum() < (g * sinkhorn(h, 50)).sum() - 0.1


# ARO -----------------------------------------------------------------------------------------------------------------

INNER: dict[str, Callable[[Tensor], Tensor]] = {
    "sinkhorn": lambda x: sinkhorn(x, 5),
    "max": torch.sign,
    "row": lambda x: math.sqrt(x.shape[1]) * x / x.norm(dim=1, keepdim=True),
}


@pytest.mark.parametrize("base", INNER)
@pytest.mark.parametrize("options", [{}, {"momentum": 0.8, "weight_decay": 0.1, "scale": 0.5}], ids=str)
def test_aro_by_its_recurrence(base: str, options: dict[str, Any]) -> None:
    """The paper's rule with Householder's QR and a root mean square of 0.2, tall matrices transposed first.

    The last of the rotated rows of a square matrix are nearly 0, and their signs are a matter of rounding errors.
    """
    lr, f = 0.1, INNER[base]

    def update(g: Tensor, state: State, step: int) -> Tensor:
        tall = g.shape[0] > g.shape[1]
        m = average(g, state, options.get("momentum", 0.95), nesterov=False)
        m = m.mT if tall else m
        rotation = state.get("R", torch.eye(m.shape[0]))
        rotation = state["R"] = torch.linalg.qr(m @ f(rotation.mT @ m).mT).Q
        d = rotation @ f(rotation.mT @ m)
        return lr * options.get("scale", 0.2) * (d.mT if tall else d) / rms(d)

    assert_same_path(
        lambda p: zoo.ARO(p, lr, base=base, **options),
        lambda p: Written(p, update, lr * options.get("weight_decay", 0.01)),
        [(6, 16), (16, 6)] if base == "max" else MATRICES,
        2e-5,
    )


@pytest.mark.parametrize("base", INNER)
@pytest.mark.parametrize(("m", "n", "rank"), [(6, 10, 6), (10, 6, 6), (40, 6, 6), (8, 8, 3), (10, 6, 3), (6, 10, 3)])
def test_aro_rotates_nothing_that_the_momentum_has_not_got(base: str, m: int, n: int, rank: int) -> None:
    """Rows of R^T M beyond the rank are rounding errors, and f would make them as large as all others.

    ``R f(R^T M)`` is in the range of M if f is 0 there, whatever it does to the other rows. M is the wide one of the
    momentum and its transpose: for a tall matrix that is the space of its rows. It ends where ``M f(R^T M)^T`` has not
    got the rank of M, from two rows with the same signs: its factor Q then has columns that come from rounding errors.
    """
    g = from_spectrum(m, n, spectrum(rank))
    u, _, vh = torch.linalg.svd(g)
    u, v = u[:, :rank], vh[:rank].mT
    direction = Aligned(zoo.stateless.BASES[base])
    state = direction.init_state(g)
    wide = (g if m <= n else g.mT) / g.norm()
    for i in range(4):
        cross = wide @ direction._inner(wide, state["rotation"], None).mT  # type: ignore[arg-type]
        if base == "max" and i and torch.linalg.matrix_rank(cross) < rank:
            break
        update = direction(g, state, None)  # type: ignore[arg-type]
        assert_close(u @ u.mT @ update if m <= n else update @ v @ v.mT, update, 1e-7)
        if base == "row":  # a multiple of each row: R D R^T M, whose rows are those of M
            assert_close(u @ u.mT @ update @ v @ v.mT, update, 1e-7)


@pytest.mark.parametrize("base", INNER)
def test_aro_rotating_the_longer_side_would_leave_the_range(base: str) -> None:
    """The authors' code rotates the rows of a tall matrix: of R^T M, (10 x 6), 4 rows are rounding errors.

    f gives all rows one size, so that 4/10 of the update's square are outside of the range of M; exactly so where f
    divides by the lengths of rows, about that with the others: the sign of a rounding error may be 0.
    """
    g, f, rotation = from_spectrum(10, 6, spectrum(6)), INNER[base], torch.eye(10, dtype=torch.float64)
    for _ in range(4):
        rotation = torch.linalg.qr(g @ f(rotation.mT @ g).mT).Q
        update = rotation @ f(rotation.mT @ g)
    u = torch.linalg.svd(g, full_matrices=False).U
    share = ((update - u @ u.mT @ update).norm() / update.norm()).square().item()
    assert share == pytest.approx(0.4, abs=1e-9 if base == "row" else 0.1)
    ours = single(zoo.ARO, g, base=base)
    if base == "row":
        assert_close(u @ u.mT @ ours, ours, 1e-7)


def test_aro_with_rows_tends_to_the_polar_factor() -> None:
    """``R <- QR(M f(R^T M)^T)``, f dividing rows by their lengths, is a subspace iteration of M M^T.

    In the left singular vectors, R^T M has orthogonal rows, and divided by their lengths they are R^T U V^T.
    """
    for m, n in (6, 10), (10, 6):
        g = from_spectrum(m, n, 2.0 ** -torch.arange(6, dtype=torch.float64))
        direction = Aligned(Row("unit"))
        state = direction.init_state(g)
        for _ in range(60):
            update = direction(g, state, None)  # type: ignore[arg-type]
        assert_close(update, Spectral("unit", "exact").dualize(g), 1e-8)


@pytest.mark.parametrize("base", INNER)
def test_aro_has_one_length(base: str) -> None:
    """Also where f leaves rows at 0, and whatever the length of the gradient."""
    g = gaussian(6, 10)
    for x in g, g.mT, from_spectrum(6, 10, spectrum(2)):
        assert_close(rms(single(zoo.ARO, x, base=base)), torch.tensor(0.2, dtype=torch.float64), 1e-9)
    assert_close(single(zoo.ARO, 1e-30 * g), single(zoo.ARO, g), 1e-9)


@pytest.mark.parametrize("name", ["SWAN", "SinkGD", "COSMOS"])
def test_a_group_may_name_the_scale_and_a_ratio_of_rates(name: str) -> None:
    def length(**said: float) -> float:
        w = torch.nn.Parameter(torch.zeros(6, 4))
        w.grad = torch.ones(6, 4).tril()
        getattr(zoo, name)([{"params": [w], **said}], 0.1, weight_decay=0.0).step()
        return float(w.detach().norm())

    assert (
        length(scale=0.5) == pytest.approx(5 * length(scale=0.1)) == pytest.approx(10 * length(scale=0.1, lr_ratio=0.5))
    )
