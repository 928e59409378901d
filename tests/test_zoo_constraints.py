"""Optimizers that act on the weights beside the update, and one that looks back: AdamP, SGDP, cautious weight decay,
Scion's initialization, QK-clip, Muon++ and STORM+."""

from __future__ import annotations

import copy
import functools
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import adamp
import pytest
import torch
from torch import Tensor, nn

import normopt
from normopt import (
    L2,
    Chain,
    Complement,
    Max,
    Norm,
    Nuclear,
    Option,
    Recursive,
    Smoothed,
    Spectral,
    SteepestDescent,
    TangentProjection,
    WeightDecay,
    zoo,
)
from normopt.ingredient import parse
from normopt.nn import GPT, qk_clip_, record_logits
from normopt.nn.clip import largest_logits
from normopt.nn.layers import Attention
from normopt.numerics.singular import singular_values
from tests import test_optimizer
from tests.paths import assert_same_path

SHAPES: list[tuple[int, ...]] = [(6, 10), (10, 6), (8, 8), (7,), (1, 7), (4, 3, 2)]

# AdamP and SGDP -----------------------------------------------------------------------------------------------------

#: Never, nearly never, sometimes the rows and sometimes the whole, always the rows.
DELTAS = [0.0, 0.1, 1.5, 5.0]
ADAMP = [
    {},
    {"weight_decay": 0.5},
    {"weight_decay": 0.5, "wd_ratio": 0.7, "nesterov": True},
    {"betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1, "nesterov": True},
]
SGDP = [
    {},
    {"momentum": 0.9, "weight_decay": 0.05, "nesterov": True},
    {"momentum": 0.8, "weight_decay": 0.05, "wd_ratio": 0.7, "nesterov": True},
]


@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("options", ADAMP, ids=str)
def test_adamp_is_the_packages(options: dict[str, Any], delta: float) -> None:
    options = {"lr": 0.02, "delta": delta, **options}
    assert_same_path(lambda p: zoo.AdamP(p, **options), lambda p: adamp.AdamP(p, **options), SHAPES, 2e-5)


@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("options", SGDP, ids=str)
def test_sgdp_is_the_packages(options: dict[str, Any], delta: float) -> None:
    options = {"lr": 0.02, "delta": delta, **options}
    assert_same_path(lambda p: zoo.SGDP(p, **options), lambda p: adamp.SGDP(p, **options), SHAPES, 2e-5)


class Copying(adamp.SGDP):
    """The reference without its defect: it projects a copy of the momentum."""

    def _projection(self, p: Tensor, grad: Tensor, perturb: Tensor, *numbers: Any) -> Any:
        return super()._projection(p, grad, perturb.clone(), *numbers)


HEAVY = [{"momentum": 0.9}, {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.05}]


@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("options", HEAVY, ids=str)
def test_sgdp_projects_the_step_and_not_the_momentum(options: dict[str, Any], delta: float) -> None:
    """Without nesterov the package subtracts the projection from its momentum, in place, so that the momentum forgets
    what was along the weights; in the paper the step alone is projected. Ours is the package's on a copy."""
    options = {"lr": 0.02, "delta": delta, **options}
    assert_same_path(lambda p: zoo.SGDP(p, **options), lambda p: Copying(p, **options), SHAPES, 2e-5)


def test_sgdps_momentum_in_the_package_is_not_the_sum_of_gradients() -> None:
    noise = torch.Generator().manual_seed(0)
    start = torch.randn(6, 10, generator=noise)
    gradients = torch.randn(3, 6, 10, generator=noise)
    momenta = []
    for make in (zoo.SGDP, adamp.SGDP):
        w = nn.Parameter(start.clone())
        optimizer = make([w], lr=0.1, momentum=0.9, delta=5.0)
        for g in gradients:
            w.grad = g.clone()
            optimizer.step()
        momenta.append(optimizer.state[w]["momentum"])
    total = 0.81 * gradients[0] + 0.9 * gradients[1] + gradients[2]
    torch.testing.assert_close(momenta[0], total)
    assert (momenta[1] - total).abs().max() > 0.1


@pytest.mark.parametrize("delta", [1.5, 5.0])
def test_the_three_cases_of_the_projection(delta: float) -> None:
    """By rows, as a whole, not at all: each leaves what it should of the update, and of the decay."""
    noise = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(60):
        w, g, d = torch.randn(3, 5, 8, generator=noise, dtype=torch.float64)
        rule = TangentProjection(delta, 1e-12, wd_ratio=0.5, weight_decay=0.2)
        context = normopt.ingredient.Context(g, g, 1, 0.1, None, lambda w=w: w[None], shrink=0.75)
        context.g = context.raw = g[None]
        new = rule.update(d[None], context)[0]
        cosines = (w * g).sum(1) / w.norm(dim=1) / g.norm(dim=1)
        rows = bool((cosines.abs() < delta / math.sqrt(8)).all())
        whole = not rows and bool((w * g).sum().abs() / w.norm() / g.norm() < delta / math.sqrt(40))
        case = "rows" if rows else "whole" if whole else "none"
        seen.add(case)
        if case == "rows":
            torch.testing.assert_close((new * w).sum(1), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-10)
            expected = d - w * ((d * w).sum(1) / w.norm(dim=1) ** 2)[:, None]
        else:
            expected = d - w * (d * w).sum() / w.norm() ** 2 if case == "whole" else d
        torch.testing.assert_close(new, expected)
        assert float(context.shrink) == pytest.approx(0.75 * (1 - 0.1 * 0.2 * (1.0 if case == "none" else 0.5)))
    assert seen == ({"rows"} if delta == 5.0 else {"rows", "whole", "none"})


def test_each_matrix_of_a_batch_is_projected_by_itself() -> None:
    """Two matrices of one shape, one at right angles to its gradient, and a vector as long as their rows."""
    w = torch.eye(4, dtype=torch.float64)
    across = torch.roll(w, 1, 1)
    params = [nn.Parameter(w.clone()), nn.Parameter(w.clone()), nn.Parameter(w[0].clone())]
    optimizer = zoo.SGDP(params, lr=0.1, momentum=0.5, weight_decay=0.5, wd_ratio=0.0)
    for p, g in zip(params, (across, w, across[0]), strict=True):
        p.grad = g.clone()
    optimizer.step()
    torch.testing.assert_close(params[0].detach(), w - 0.1 * across)  # no decay: wd_ratio is 0
    torch.testing.assert_close(params[1].detach(), (1 - 0.1 * 0.5 / 0.5) * w - 0.1 * w)
    torch.testing.assert_close(params[2].detach(), (1 - 0.1 * 0.5 / 0.5) * w[0] - 0.1 * across[0])


def test_embeddings_are_projected_token_by_token() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
    table = model[0].weight
    before = table.detach().clone()
    optimizer = zoo.AdamP(model, lr=0.1, delta=5.0)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    radial = ((table.detach() - before) * before).sum(dim=1)
    assert radial.abs().max() < 1e-6 < (table.detach() - before).abs().min()


# Cautious weight decay ----------------------------------------------------------------------------------------------


def cautiously(w: Tensor, d: Tensor, lr: float, decay: float) -> Tensor:
    return w - lr * d - lr * decay * torch.where(d * w >= 0, w, 0.0)


def gradients(seed: int, *shapes: tuple[int, ...]) -> Iterator[list[Tensor]]:
    noise = torch.Generator().manual_seed(seed)
    while True:
        yield [torch.randn(shape, generator=noise, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("norm", [Max(), Spectral(method="exact")], ids=["laid end to end", "matrices"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_cautious_weight_decay_is_its_recurrence(norm: Norm, dtype: torch.dtype) -> None:
    lr, decay, shape = 0.1, 0.5, (4, 6)
    stream = gradients(0, shape)
    w = nn.Parameter(next(stream)[0].to(dtype))
    optimizer = SteepestDescent([w], lr=lr, norm=norm, constraint=WeightDecay(decay, cautious=True))
    for _ in range(10):
        g = next(stream)[0].to(dtype)
        g[0] = 0.0  # where nothing is gained or lost the decay is that of AdamW
        before = w.detach().to(torch.promote_types(dtype, torch.float32), copy=True)
        w.grad = g.clone()
        optimizer.step()
        expected = cautiously(before, norm.dualize(g.to(before.dtype)), lr, decay).to(dtype)
        torch.testing.assert_close(w.detach(), expected, rtol=torch.finfo(dtype).eps * 8, atol=1e-7)


NAMED: dict[str, Callable[..., SteepestDescent]] = {
    "adamw": zoo.AdamW,
    "adam": lambda p, **o: zoo.Adam(p, decoupled_weight_decay=True, **o),
    "lion": zoo.Lion,
    "muon": lambda p, **o: zoo.Muon(p, orthogonalize="exact", orthogonalize_dtype=None, **o),
    "muon++": lambda p, **o: zoo.MuonPlusPlus(p, orthogonalize="exact", **o),
}


@pytest.mark.parametrize("make", NAMED.values(), ids=NAMED)
def test_cautious_weight_decay_of_the_named_optimizers(make: Callable[..., SteepestDescent]) -> None:
    """Against the same optimizer without decay, whose step tells the update."""
    lr, decay, shapes = 0.05, 0.8, ((4, 6), (6, 4))
    stream = gradients(1, *shapes)
    start = next(stream)
    ours, bare = ([nn.Parameter(w.clone()) for w in start] for _ in range(2))
    first, second = make(ours, lr=lr, weight_decay=decay, cautious=True), make(bare, lr=lr, weight_decay=0.0)
    decayed = kept = 0
    for _ in range(8):
        for p, q, g in zip(ours, bare, next(stream), strict=True):
            p.grad, q.grad = g.clone(), g.clone()
            q.detach().copy_(p.detach())
        before = [p.detach().clone() for p in ours]
        first.step()
        second.step()
        for p, q, w in zip(ours, bare, before, strict=True):
            d = (w - q.detach()) / lr
            torch.testing.assert_close(p.detach(), cautiously(w, d, lr, decay), rtol=0, atol=1e-13)
            decayed, kept = decayed + int((d * w >= 0).sum()), kept + int((d * w < 0).sum())
    assert min(decayed, kept) > 20


def test_cautious_decay_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="after"):
        WeightDecay(after=True, cautious=True)
    with pytest.raises(ValueError, match="decoupled"):
        zoo.Adam([nn.Parameter(torch.zeros(2))], cautious=True)


# Scion on its spheres -----------------------------------------------------------------------------------------------


def gpt(**options: Any) -> GPT:
    torch.manual_seed(0)
    return GPT(13, 8, 2, 2, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("constrained", [False, True])
def test_scion_puts_every_tensor_of_a_gpt_on_its_sphere(constrained: bool, dtype: torch.dtype) -> None:
    model = gpt().to(dtype)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = zoo.Scion(model, constrained=constrained)
    optimizer.initialize(torch.Generator().manual_seed(0))
    held = 0
    for group in optimizer.param_groups:
        rule = parse(group["rule"]).resolve(group)
        for p in group["params"]:
            sizes = rule.norm.norm(rule.view.apply(p.detach().double()))
            torch.testing.assert_close(
                sizes, torch.full_like(sizes, group["radius"]), rtol=torch.finfo(dtype).eps * 50, atol=0
            )
            held += 1
    assert held == len(before)
    assert {group["radius"] for group in optimizer.param_groups} == ({50.0, 3000.0} if constrained else {1.0, 60.0})
    for p, old in zip(model.parameters(), before, strict=True):
        if p.ndim > 1:
            assert (p.detach() != old).any(dim=1).all()
        else:
            assert (p.detach() > 0).all()  # gains keep their signs


def test_scions_initialization_is_determined_by_the_generator() -> None:
    models = [gpt() for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        torch.manual_seed(hash(id(model)) % 1000)  # the global generator has no part in it
        zoo.Scion(model).initialize(torch.Generator().manual_seed(seed))
    first, same, other = ([p.detach() for p in model.parameters()] for model in models)
    assert all(map(torch.equal, first, same))
    assert not any(torch.equal(p, q) for p, q in zip(first, other, strict=True) if p.ndim > 1)


def test_scions_initialization_keeps_zeros_and_refuses_what_has_no_ball() -> None:
    layer = nn.Linear(4, 4)
    layer.bias.detach().zero_()
    model = nn.Sequential(layer, nn.Linear(4, 4))
    optimizer = zoo.Scion(model)
    optimizer.initialize()
    assert (layer.bias == 0).all()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    with pytest.raises(RuntimeError, match="before the first step"):
        optimizer.initialize()
    with pytest.raises(ValueError, match="no ball"):
        zoo.Scion(model, geometry={"vector": Smoothed(Max())}).initialize()


# QK-clip ------------------------------------------------------------------------------------------------------------

TAU = 2.0


def logits(layer: Attention, x: Tensor) -> Tensor:
    """The largest causal logit of each head, from attention's own inputs."""
    seen: list[Tensor] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def spy(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        future = torch.ones(query.shape[-2], query.shape[-2], dtype=torch.bool).triu(1)
        seen.append((query @ key.mT).masked_fill(future, -torch.inf).amax(dim=(0, 2, 3)))
        return attend(query, key, value, **options)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        layer(x)
    return seen[0]


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("time", [7, 300])
def test_after_the_clip_the_largest_logit_is_tau(qk_norm: bool, time: int) -> None:
    """Of the heads that exceeded it; the others, and the values, are left as they are."""
    torch.manual_seed(0)
    layer, x = Attention(12, 3, rope_fraction=0.5, qk_norm=qk_norm).double(), torch.randn(2, time, 12).double()
    with torch.no_grad():
        if layer.gain is not None:
            layer.gain.copy_(torch.tensor([5.0, 0.5, 9.0]))
        else:
            layer.qkv.weight.unflatten(0, (3, 3, 4))[0].mul_(torch.tensor([9.0, 0.1, 20.0])[:, None, None])
    before, weights, values = logits(layer, x), copy.deepcopy(layer.state_dict()), layer.qkv.weight[24:].clone()
    assert before[0] > TAU and before[2] > TAU and before[1] < TAU
    record_logits(layer)
    layer(x)
    recorded = qk_clip_(layer, tau=TAU)
    torch.testing.assert_close(recorded[""], before)
    after = logits(layer, x)
    torch.testing.assert_close(after, torch.stack([torch.tensor(TAU).double(), before[1], torch.tensor(TAU).double()]))
    assert torch.equal(layer.qkv.weight[24:], values)
    changed = {name for name, w in layer.state_dict().items() if not torch.equal(w, weights[name])}
    assert changed == ({"gain"} if qk_norm else {"qkv.weight"})
    if not qk_norm:  # queries and keys by the same factor, one for each head
        factors = (layer.qkv.weight / weights["qkv.weight"])[:24].unflatten(0, (2, 3, 4))
        torch.testing.assert_close(factors, factors[:1, :, :1, :1].expand_as(factors))


def test_logits_are_recorded_over_batches_in_training_when_asked() -> None:
    model, tokens = gpt(qk_norm=False), torch.arange(24).reshape(2, 12) % 13
    attentions = [block.attention for block in model.blocks]
    model(tokens)
    assert all(layer.max_logits is None for layer in attentions)
    record_logits(model)
    model.eval()
    model(tokens)
    assert all(layer.max_logits is None for layer in attentions)
    model.train()
    model(tokens[:1])
    first = attentions[0].max_logits
    model(tokens[1:])
    model(tokens[:1])
    both = attentions[0].max_logits
    found = qk_clip_(model, tau=1e-3)
    assert set(found) == {"blocks.0.attention", "blocks.1.attention"}
    torch.testing.assert_close(both, torch.maximum(first, logits_of(model, tokens[1:], clipped=False)))
    model(tokens)
    assert all((layer.max_logits < 1e-2).all() for layer in attentions)
    record_logits(model, on=False)
    model(tokens)
    assert all(layer.max_logits is None for layer in attentions)


def logits_of(model: GPT, tokens: Tensor, clipped: bool) -> Tensor:
    fresh = model if clipped else gpt(qk_norm=False)
    return logits(fresh.blocks[0].attention, fresh.blocks[0].attention_norm(fresh.embed(tokens)))


def test_blocks_of_queries_do_not_matter() -> None:
    query, key = torch.randn(2, 2, 3, 23, 4, generator=torch.Generator().manual_seed(0))
    for block in (1, 5, 23, 100):
        torch.testing.assert_close(largest_logits(query, key, block), largest_logits(query, key))


def test_qk_clip_refuses_what_it_cannot_do() -> None:
    for refused in (qk_clip_, record_logits):
        with pytest.raises(ValueError, match="Linear has no attention module"):
            refused(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"'blocks.0.attention' has no logits; call record_logits"):
        qk_clip_(gpt())
    with pytest.raises(ValueError, match="tau must be positive"):
        qk_clip_(gpt(), tau=0.0)


def test_infinite_logits_do_not_zero_a_head() -> None:
    layer = Attention(8, 2)
    layer.max_logits = torch.tensor([torch.inf, torch.nan])
    before = layer.gain.detach().clone()
    qk_clip_(layer)
    assert torch.equal(layer.gain, before)


def test_a_gpt_without_qk_norm_trains_with_clipped_logits() -> None:
    model, tokens = gpt(qk_norm=False), torch.arange(24).reshape(2, 12) % 13
    record_logits(model)
    optimizer = zoo.Muon(model, lr=0.05)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        qk_clip_(model, tau=0.5)
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


# Muon++ -------------------------------------------------------------------------------------------------------------


def with_gap(m: int, n: int, second: float, top: int = 1) -> Tensor:
    """A matrix of spectral norm sqrt(m / n), whose other singular values are at most ``second`` of it."""
    noise = torch.Generator().manual_seed(m * n)
    u, s, vh = torch.linalg.svd(torch.randn(m, n, generator=noise, dtype=torch.float64), full_matrices=False)
    s = s / s[0] * second
    s[:top] = torch.linspace(1.0, 0.9, top, dtype=torch.float64) if top > 1 else 1.0
    return (u * s) @ vh * math.sqrt(m / n)


@pytest.mark.parametrize("power_iterations", [None, 2])
@pytest.mark.parametrize("protect", [1, 3])
@pytest.mark.parametrize(("m", "n"), [(6, 10), (10, 6), (8, 8)])
def test_muon_plus_plus_keeps_the_spectral_norm(m: int, n: int, protect: int, power_iterations: int | None) -> None:
    """With S = sqrt(m / n), w = sum s_i u_i v_i^T and k protected pairs, the update d = polar(P) satisfies U_k^T d = 0
    and d V_k = 0, because P does and d has the row and column spaces of P. So (w - lr S d) v_i = w v_i = s_i u_i and
    (w - lr S d)^T u_i = s_i v_i for i <= k: these pairs stay. The rest, r = sum over i > k, moves at right angles to
    them, and |r - lr S d| <= |r| + lr S |d| = s_(k+1) + lr S (Weyl). Hence the norm is s_1 as long as
    s_(k+1) + lr S <= s_1, which is S: here for 20 steps of 0.02 from a second value of at most 0.5 S."""
    w = nn.Parameter(with_gap(m, n, 0.5, protect))
    u, s, vh = torch.linalg.svd(w.detach(), full_matrices=False)
    optimizer = zoo.MuonPlusPlus(
        [w], lr=0.02, protect=protect, power_iterations=power_iterations, orthogonalize="exact"
    )
    stream = gradients(3, (m, n))
    scale = math.sqrt(m / n)
    for _ in range(20):
        second = singular_values(w.detach())[protect]
        assert second + 0.02 * scale <= scale
        w.grad, before = next(stream)[0] + 3 * u[:, :1] @ vh[:1], w.detach().clone()
        optimizer.step()
        d = (before - w.detach()) / (0.02 * scale)
        torch.testing.assert_close(singular_values(d)[: min(m, n) - protect].min(), torch.tensor(1.0).double())
        torch.testing.assert_close(singular_values(w.detach())[:protect], s[:protect], rtol=1e-9, atol=0)
        torch.testing.assert_close(w.detach() @ vh[:protect].mT, u[:, :protect] * s[:protect], rtol=0, atol=1e-9)


def test_muon_lets_the_spectral_norm_go() -> None:
    """The same gradients, which push the leading pair, without protection."""
    w = nn.Parameter(with_gap(8, 8, 0.5))
    u, _, vh = torch.linalg.svd(w.detach())
    optimizer = zoo.Muon([w], lr=0.02, weight_decay=0.0, orthogonalize="exact", orthogonalize_dtype=None)
    for _ in range(20):
        w.grad = -u[:, :1] @ vh[:1]
        optimizer.step()
    assert singular_values(w.detach())[0] == pytest.approx(1.4)


def test_when_the_gap_closes_the_norm_grows() -> None:
    """The condition above is needed: the second value passes the first, and is then the one that stays."""
    w = nn.Parameter(with_gap(8, 8, 0.5))
    u, s, vh = torch.linalg.svd(w.detach())
    optimizer = zoo.MuonPlusPlus([w], lr=0.2, power_iterations=None, orthogonalize="exact")
    for i in range(6):
        w.grad = -u[:, 1:2] @ vh[1:2]
        optimizer.step()
        pushed = float(s[1]) + min(i + 1, 4) * 0.2
        assert singular_values(w.detach())[0] == pytest.approx(max(1.0, pushed))
    assert s[1] + 3 * 0.2 < 1 < s[1] + 4 * 0.2
    torch.testing.assert_close(singular_values(w.detach())[1:], torch.cat((s[:1], s[2:])))  # not moved by roundings


@pytest.mark.parametrize("orthogonalize", ["polar-express", "newton-schulz"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_rounding_errors_of_the_iteration_do_not_reach_the_protected_pair(orthogonalize: str, dtype: Any) -> None:
    w = nn.Parameter(with_gap(16, 24, 0.4).float())
    top = singular_values(w.detach())[0]
    optimizer = zoo.MuonPlusPlus([w], lr=0.01, orthogonalize=orthogonalize, orthogonalize_dtype=dtype)
    stream = gradients(4, (16, 24))
    for _ in range(20):
        w.grad = next(stream)[0].float()
        optimizer.step()
    torch.testing.assert_close(singular_values(w.detach())[0], top, rtol=1e-5, atol=0)


def test_the_power_method_finds_the_leading_pairs_of_moving_weights() -> None:
    """Weights that something else moves too: warm vectors follow."""
    noise, w = torch.Generator().manual_seed(0), nn.Parameter(with_gap(9, 7, 0.5, 2))
    optimizer = zoo.MuonPlusPlus([w], lr=1e-3, protect=2, power_iterations=2)
    for _ in range(10):
        with torch.no_grad():
            w.add_(torch.randn(w.shape, generator=noise, dtype=torch.float64), alpha=0.01)
        before = w.detach().clone()
        u, _, vh = torch.linalg.svd(before, full_matrices=False)
        w.grad = torch.randn(w.shape, generator=noise, dtype=torch.float64)
        optimizer.step()
        left, right = optimizer.state[w]["left"], optimizer.state[w]["right"]
        for mine, exact in ((left[0], u[:, :2]), (right[0], vh[:2].mT)):
            torch.testing.assert_close(mine @ mine.mT, exact @ exact.mT, rtol=0, atol=2e-2)
        assert (left[0].mT @ before @ right[0]).fill_diagonal_(0.0).abs().max() < 1e-12  # pair by pair


def test_complements_of_what_has_none() -> None:
    """A row has no complement that an update could move in, and moves as under Muon; so do weights that are 0."""
    for shape in ((1, 5), (5, 1), (4, 4)):
        a, b = (nn.Parameter(torch.zeros(shape)) for _ in range(2))
        first = zoo.MuonPlusPlus([a], lr=0.1, orthogonalize="exact")
        second = zoo.Muon(
            [b], 0.1, 0.0, adjust_lr_fn="spectral_unclamped", orthogonalize="exact", orthogonalize_dtype=None
        )
        for p, optimizer in ((a, first), (b, second)):
            p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            optimizer.step()
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="changes with the basis"):
        Complement(Max())
    with pytest.raises(ValueError, match="protect must be a whole number"):
        zoo.MuonPlusPlus([nn.Parameter(torch.zeros(2, 2))], protect=0)


def test_the_complements_dual_norm() -> None:
    """<g, d> is the nuclear norm of what is left of g, in any rotation-invariant norm its dual norm."""
    noise = torch.Generator().manual_seed(0)
    w, g = torch.randn(2, 6, 4, generator=noise, dtype=torch.float64)
    for norm in (Spectral("unit", method="exact"), Nuclear("unit")):
        direction = Complement(norm, 2)
        state = direction.init_state(g)
        context = normopt.ingredient.Context(g, g, 1, 1.0, direction, lambda: w)
        d = direction(g, state, context)
        torch.testing.assert_close((g * d).sum(), direction.steepness(g, state))
        assert norm.norm(d) == pytest.approx(1.0)


# STORM+ -------------------------------------------------------------------------------------------------------------


class Sampled:
    """0.5 |A (w - target)|^2 over two tensors, with a sample's noise in curvature and in gradient."""

    def __init__(self, noise: float, shapes: tuple[tuple[int, ...], ...] = ((4, 3), (5,)), seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.noise, self.draw = noise, draw
        self.params = [nn.Parameter(torch.randn(shape, generator=draw, dtype=torch.float64)) for shape in shapes]
        self.targets = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]
        self.curvatures = [0.5 + torch.rand(shape, generator=draw, dtype=torch.float64) for shape in shapes]
        self.calls = 0
        self.resample()

    def resample(self) -> None:
        def randn(p: Tensor) -> Tensor:
            return self.noise * torch.randn(p.shape, generator=self.draw, dtype=torch.float64)

        self.sample = [(1 + randn(p), randn(p)) for p in self.params]

    def gradients(self, weights: list[Tensor]) -> list[Tensor]:
        return [
            factor * curvature * (w.detach() - target) + shift
            for w, target, curvature, (factor, shift) in zip(
                weights, self.targets, self.curvatures, self.sample, strict=True
            )
        ]

    def full(self) -> list[Tensor]:
        return [c * (p.detach() - t) for p, t, c in zip(self.params, self.targets, self.curvatures, strict=True)]

    def loss(self) -> Tensor:
        terms = zip(self.params, self.targets, self.curvatures, self.sample, strict=True)
        return torch.stack([(0.5 * f * c * (p - t).square() + s * p).sum() for p, t, c, (f, s) in terms]).sum()

    def closure(self) -> Tensor:
        self.calls += 1
        for p in self.params:
            p.grad = None
        loss = self.loss()
        loss.backward()
        return loss

    def distance(self) -> float:
        pairs = zip(self.params, self.targets, strict=True)
        return math.sqrt(sum(float((p - t).detach().square().sum()) for p, t in pairs))


def test_without_noise_storm_follows_the_gradient() -> None:
    problem = Sampled(0.0)
    optimizer = zoo.STORMPlus(problem.params)
    for step in range(30):
        expected = problem.full()
        optimizer.step(problem.closure)
        assert problem.calls == 1 + 2 * step  # the first step evaluates once
        for p, g in zip(problem.params, expected, strict=True):
            torch.testing.assert_close(optimizer.state[p]["momentum"], g, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_storm_converges_without_tuning(scale: float) -> None:
    """From near and far, with the paper's numbers."""
    problem = Sampled(0.0)
    for p, target in zip(problem.params, problem.targets, strict=True):
        p.detach().sub_(target).mul_(scale).add_(target)
    optimizer, start = zoo.STORMPlus(problem.params), problem.distance()
    for _ in range(400):
        optimizer.step(problem.closure)
    assert problem.distance() < 0.05 * start


def test_storms_divisors_are_the_scale_of_the_gradients() -> None:
    """A problem whose gradients and distances are c times as large takes the same path with a0 = b0 = c^2."""
    small, large, c = Sampled(0.0), Sampled(0.0), 10.0
    for p in (*large.params, *large.targets):
        p.detach().mul_(c)
    first, second = zoo.STORMPlus(small.params), zoo.STORMPlus(large.params, a0=c**2, b0=c**2)
    for _ in range(20):
        first.step(small.closure)
        second.step(large.closure)
    for p, q in zip(small.params, large.params, strict=True):
        torch.testing.assert_close(c * p.detach(), q.detach())


@pytest.mark.parametrize("numbers", [{}, {"a0": 3.0, "b0": 0.2, "lr": 0.5}, {"weight_decay": 0.3}], ids=str)
def test_storm_is_its_recurrence(numbers: dict[str, float]) -> None:
    """With noise, the same sample at both points; written out by hand."""
    problem = Sampled(0.5, seed=2)
    optimizer = zoo.STORMPlus(problem.params, **numbers)
    lr, a0, b0 = (numbers.get(name, 1.0) for name in ("lr", "a0", "b0"))
    decay = numbers.get("weight_decay", 0.0)
    w = [p.detach().clone() for p in problem.params]
    before: list[Tensor] = []
    d: list[Tensor] = []
    squares = moved = 0.0
    for step in range(25):
        problem.resample()
        g = [x + decay * y for x, y in zip(problem.gradients(w), w, strict=True)]
        a = (1 + squares / a0) ** (-2 / 3)
        if step == 0:
            d = g
        else:
            past = [x + decay * y for x, y in zip(problem.gradients(before), before, strict=True)]
            d = [x + (1 - a) * (old - y) for x, y, old in zip(g, past, d, strict=True)]
        squares += sum(float(x.square().sum()) for x in g)
        moved += sum(float(x.square().sum()) for x in d) * (1 + squares / a0) ** (2 / 3)
        eta = lr * (moved / b0) ** (-1 / 3)
        before = w
        w = [x - eta * y for x, y in zip(w, d, strict=True)]
        optimizer.step(problem.closure)
        for p, expected in zip(problem.params, w, strict=True):
            torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-12)


def test_recursive_momentum_has_less_noise_than_the_gradient() -> None:
    """Its point: averaged over the last steps, it is much closer to the full gradient than a sample is."""
    problem = Sampled(0.3, ((30, 20),))
    optimizer = SteepestDescent(problem.params, lr=0.05, norm="identity", momentum=Recursive(0.9))
    errors = torch.zeros(2, dtype=torch.float64)
    for step in range(200):
        problem.resample()
        full, (sampled,) = problem.full()[0], problem.gradients(problem.params)
        optimizer.step(problem.closure)
        if step >= 100:
            d = optimizer.state[problem.params[0]]["momentum"]
            errors += torch.stack([(d - full).norm(), (sampled - full).norm()])
    assert errors[0] < 0.4 * errors[1]


def test_storm_resumes_to_the_bit() -> None:
    def run(steps: int, problem: Sampled, optimizer: SteepestDescent, first: int) -> None:
        for i in range(first, first + steps):
            problem.draw.manual_seed(i)
            problem.resample()
            optimizer.step(problem.closure)

    whole, half, rest = (Sampled(0.5) for _ in range(3))
    through, saving, loading = (zoo.STORMPlus(problem.params) for problem in (whole, half, rest))
    run(7, whole, through, 0)
    run(3, half, saving, 0)
    for p, q in zip(rest.params, half.params, strict=True):
        p.detach().copy_(q.detach())
    loading.load_state_dict(pickle.loads(pickle.dumps(saving.state_dict())))
    run(4, rest, loading, 3)
    for p, q in zip(whole.params, rest.params, strict=True):
        assert torch.equal(p, q)
        for name, value in through.state[p].items():
            assert torch.equal(value, loading.state[q][name]), name
    for name in ("gradient_squares", "average_squares"):
        assert torch.equal(through.param_groups[0][name], loading.param_groups[0][name])
    assert set(through.param_groups[0]) == set(zoo.STORMPlus(whole.params).param_groups[0])


def test_a_momentum_that_looks_back_needs_a_closure() -> None:
    problem = Sampled(0.0)
    optimizer = zoo.STORMPlus(problem.params)
    problem.closure()
    before = [p.detach().clone() for p in problem.params]
    with pytest.raises(ValueError, match=r"optimizer\.step\(closure\)"):
        optimizer.step()
    assert all(map(torch.equal, before, problem.params)) and not optimizer.state


@pytest.mark.parametrize("zeroing", ["none", "zero", "never"])
def test_looking_back_leaves_gradients_as_they_were(zeroing: str) -> None:
    """However the closure clears gradients: afterwards they are the tensors of its first call, unchanged."""
    problem = Sampled(0.5)
    optimizer, seen = zoo.STORMPlus(problem.params), []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        if zeroing != "never":
            optimizer.zero_grad(set_to_none=zeroing == "none")
        loss = problem.loss()
        loss.backward()
        seen.append(([p.grad for p in problem.params], [p.grad.clone() for p in problem.params]))
        return loss

    for step in range(3):
        problem.resample()
        for p in problem.params:
            p.grad = None if zeroing != "zero" else torch.zeros_like(p)
        expected = problem.loss().item()
        loss = optimizer.step(closure)
        assert loss.item() == expected  # that of the first call
        tensors, values = seen[0 if step == 0 else -2]
        assert all(p.grad is g for p, g in zip(problem.params, tensors, strict=True))
        assert all(torch.equal(p.grad, g) for p, g in zip(problem.params, values, strict=True))
    assert len(seen) == 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_closure_that_raises_at_the_second_call_changes_nothing(dtype: torch.dtype) -> None:
    problem = Sampled(0.5)
    problem.params = [nn.Parameter(p.detach().to(dtype)) for p in problem.params]
    optimizer = zoo.STORMPlus(problem.params)
    for _ in range(2):
        optimizer.step(problem.closure)
    weights, state = [p.detach().clone() for p in problem.params], copy.deepcopy(optimizer.state_dict())
    calls = []

    def failing() -> Tensor:
        calls.append(problem.closure())
        if len(calls) == 2:
            assert not any(map(torch.equal, weights, problem.params))
            raise KeyboardInterrupt
        gradients[:] = [p.grad for p in problem.params]
        return calls[-1]

    gradients: list[Any] = []
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(failing)
    assert all(map(torch.equal, weights, problem.params))
    assert all(p.grad is g for p, g in zip(problem.params, gradients, strict=True))
    for i, old in state["state"].items():
        for name, value in old.items():
            assert torch.equal(value, optimizer.state_dict()["state"][i][name])


def test_the_second_call_is_at_the_previous_weights() -> None:
    """Of the tensors whose momentum looks back; others stay where they are, and new ones begin anew."""
    problem = Sampled(0.0, ((3, 2), (4,), (2, 2)))
    a, b, c = problem.params
    optimizer = SteepestDescent(
        [{"params": [a]}, {"params": [b], "momentum": "EMA(0.9)"}], lr=0.1, norm="max", momentum=Recursive(0.5)
    )
    points: list[list[Tensor]] = []

    def closure() -> None:
        points.append([p.detach().clone() for p in problem.params])
        problem.closure()

    before = [p.detach().clone() for p in problem.params]
    optimizer.step(closure)
    after = [p.detach().clone() for p in problem.params]
    optimizer.add_param_group({"params": [c]})
    optimizer.step(closure)
    assert len(points) == 3
    assert torch.equal(points[2][0], before[0]) and not torch.equal(before[0], after[0])
    assert torch.equal(points[2][1], after[1]) and not torch.equal(before[1], after[1])
    assert torch.equal(points[2][2], before[2])
    assert optimizer.state[c]["step"] == 1 and torch.equal(optimizer.state[c]["previous"], before[2])


def test_storm_of_a_parameter_that_the_past_does_not_reach() -> None:
    """Its gradient there is 0."""
    w = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer, calls = SteepestDescent([w], lr=0.1, norm="identity", momentum=Recursive(0.5)), []

    def closure() -> None:
        calls.append(None)
        w.grad = None if len(calls) == 3 else torch.ones_like(w)

    optimizer.step(closure)
    optimizer.step(closure)
    torch.testing.assert_close(optimizer.state[w]["momentum"], torch.full_like(w, 1.5))


def test_maximize_and_regularization_reach_the_gradient_of_the_past() -> None:
    up, down = Sampled(0.5), Sampled(0.5)
    first = zoo.STORMPlus(up.params, weight_decay=0.2, maximize=True)
    second = zoo.STORMPlus(down.params, weight_decay=0.2)

    def negated() -> None:
        up.closure()
        for p in up.params:
            p.grad = -p.grad

    for _ in range(5):
        up.resample()
        down.resample()
        first.step(negated)
        second.step(down.closure)
        assert all(map(torch.equal, up.params, down.params))


def test_looking_back_where_it_makes_no_sense_is_refused() -> None:
    params = [nn.Parameter(torch.zeros(2, 2))]
    for step_size in ("prodigy", "dadaptation", "trust-ratio", "gradient-trust"):
        with pytest.raises(ValueError, match="would weigh only one"):
            SteepestDescent(params, norm="max", momentum="recursive", step_size=step_size)
    with pytest.raises(ValueError, match="takes its weight from the step size Storm"):
        SteepestDescent(params, norm="max", momentum=Recursive(None))
    with pytest.raises(ValueError, match="only a rule's momentum can"):
        Chain(Max(), Recursive())
    with pytest.raises(ValueError, match="beta must lie in"):
        Recursive(1.5)
    with pytest.raises(ValueError, match="a0 must lie in"):
        zoo.STORMPlus(params, a0=0.0)
    assert Recursive(Option("a")).options() == {"a"} and L2(0.1).options() == frozenset()


def test_storm_stays_where_the_gradient_is_zero() -> None:
    w = nn.Parameter(torch.ones(3))
    optimizer = zoo.STORMPlus([w])

    def closure() -> None:
        w.grad = torch.zeros_like(w)

    for _ in range(3):
        optimizer.step(closure)
    assert torch.equal(w, torch.ones(3))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_storm_trains_a_model_and_its_copies_go_on(copied: Callable[[Any], Any]) -> None:
    model, tokens = gpt(), torch.arange(24).reshape(2, 12) % 13
    optimizer = normopt.create("stormplus", model)

    def closure(model: GPT = model, optimizer: SteepestDescent = optimizer) -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(8)]
    assert losses[-1] < losses[0] - 0.1
    twin, other = copied((model, optimizer))
    assert optimizer.step(closure).item() == other.step(lambda: closure(twin, other)).item()
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


#: What test_optimizer.py asks of every optimizer, of those tests that give a closure.
ASKED: dict[str, list[dict[str, Any]]] = {
    "test_add_param_group_in_mid_run": [{}],
    "test_duplicates_and_empty_lists_are_refused": [{}],
    "test_names_are_kept_in_state_dicts": [{}],
    "test_tensor_lr": [{"shape": ()}, {"shape": (1,)}],
    "test_any_number_of_dimensions": [{"shape": shape} for shape in ((), (3,), (2, 3, 4), (2, 3, 2, 4))],
    "test_empty_tensors_pass": [{"shape": shape} for shape in ((0,), (0, 4), (2, 0, 3))],
    "test_the_same_run_twice_is_equal_to_the_bit": [{}],
    "test_the_order_of_groups_does_not_matter": [{}],
    "test_hooks": [{}],
    "test_repr_shows_the_rule_and_the_options": [{}],
    "test_lr_zero_stops": [{}],
    "test_options_may_change_between_steps": [{}],
    "test_averaged_models": [{}],
    "test_state_dicts_are_plain_data": [{}],
    "test_loading_other_ingredients_names_them_and_changes_nothing": [{}],
    "test_bad_learning_rates_are_refused": [{"lr": lr} for lr in (-1, float("nan"), True, None)],
    "test_typos_are_refused": [{}],
}


@pytest.mark.parametrize("name", ASKED)
def test_storm_is_an_optimizer_like_all_others(name: str) -> None:
    make = functools.partial(normopt.create, "stormplus")
    for arguments in ASKED[name]:
        getattr(test_optimizer, name)(make, **arguments)


def test_storm_loads_every_bit_whatever_the_dtype(tmp_path: Path) -> None:
    make = functools.partial(normopt.create, "stormplus")
    for dtype in (torch.float32, torch.bfloat16):
        test_optimizer.test_loading_restores_every_bit(make, dtype, tmp_path)


def test_storms_batches_may_have_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    make = functools.partial(normopt.create, "stormplus")
    test_optimizer.test_the_size_of_batches_does_not_matter(make, monkeypatch)
