"""anGPT: a naive forward pass, constants that cancel, bounded rows, a residual stream that stays compact."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import normopt
from normopt.ingredient import parse
from normopt.nn import anGPT, qk_clip_, record_logits
from normopt.nn.angpt import Residual
from normopt.nn.scaled import Scale, ScaledLinear
from tests.support.naive_transformer import attend, declared, disturbed, matrices, rotated, silu, stream, unit


def small(**options: Any) -> anGPT:
    torch.manual_seed(0)
    return anGPT(17, 16, 2, 2, **options)


def tokens(batch: int, time: int) -> Tensor:
    return torch.randint(0, 17, (batch, time), generator=torch.Generator().manual_seed(1))


def loss(model: torch.nn.Module, x: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, 1), x.roll(-1, dims=1).flatten())


def test_parameter_count_of_the_paper() -> None:
    with torch.device("meta"):
        model = anGPT(50304, 1024, 24, 16)
    gains = sum(p.numel() for name, p in model.named_parameters() if name.endswith("attention.gain"))
    assert gains == 24 * 16
    assert sum(p.numel() for p in model.parameters()) - gains == 505_775_232


def naive(
    weights: dict[str, Tensor], x: Tensor, *, heads: int, gate_scale: float, to_alpha: float, to_logits: float
) -> Tensor:
    """Table 1 of arXiv 2505.22014 for one sequence, without the constants that cancel."""
    h = weights["embed.weight"][x]
    d = h.shape[1]
    for layer in range(2):
        own = {name.removeprefix(f"blocks.{layer}."): w for name, w in weights.items()}
        query, key, value = (h @ w.T for w in own["attention.qkv.weight"].chunk(3))
        mixed = []
        for head in range(heads):
            part = slice(head * d // heads, (head + 1) * d // heads)
            q, k = (rotated(unit(y[:, part]), d // heads // 2) for y in (query, key))
            mixed.append(attend(own["attention.gain"][head] * q, k, value[:, part]))
        h_a = unit(torch.cat(mixed, dim=1) @ own["attention.out.weight"].T)
        a = own["attention_residual.alpha.weight"] * to_alpha
        h = ((1 - a) * h + a * h_a) / (a**2 + (1 - a) ** 2) ** 0.5
        z = h @ own["mlp.gate.weight"].T * math.sqrt(d / len(own["mlp.gate.weight"])) * gate_scale
        h_m = unit((h @ own["mlp.up.weight"].T * silu(z)) @ own["mlp.down.weight"].T)
        a = own["mlp_residual.alpha.weight"] * to_alpha
        h = ((1 - a) * h + a * h_m) / (a**2 + (1 - a) ** 2) ** 0.5
    return weights["head.factor.weight"] * to_logits * (h @ weights["head.weight"].T)


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ({}, {"gate_scale": 4.0, "to_alpha": 5.0, "to_logits": 100.0}),
        ({"gate_scale": 1.0, "d_ff": 24}, {"gate_scale": 1.0, "to_alpha": 5.0, "to_logits": 100.0}),
        (
            {"s_scale": 0.001, "alpha_init": 0.2, "logit_init": 3.0, "gain_init": 1.0},
            {"gate_scale": 4.0, "to_alpha": 200.0, "to_logits": 3000.0},
        ),
    ],
)
def test_forward_pass_against_a_naive_one(options: dict[str, Any], numbers: dict[str, float]) -> None:
    model, x = disturbed(small(**options)), tokens(2, 9)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    expected = torch.stack([naive(weights, row, heads=2, **numbers) for row in x])
    torch.testing.assert_close(model(x), expected, rtol=1e-11, atol=1e-11)


def test_first_values_of_the_scales() -> None:
    block = small().blocks[1]
    torch.testing.assert_close(block.mlp_residual.alpha(), torch.full((16,), 0.05))
    torch.testing.assert_close(small().head.factor(), torch.ones(17))
    torch.testing.assert_close(block.attention.gain.data, torch.full((2,), math.sqrt(8)))
    assert block.mlp.gate.factor == pytest.approx(math.sqrt(16) * 0.5)
    torch.testing.assert_close(small(gain_init=3.0).blocks[0].attention.gain.data, torch.full((2,), 3.0))


@pytest.mark.parametrize("d_ff", [64, 24])
def test_the_other_constants_cancel(d_ff: int) -> None:
    plain, full, x = small(d_ff=d_ff).double(), small(d_ff=d_ff, cancelling_factors=True).double(), tokens(3, 8)
    full.load_state_dict(plain.state_dict())
    block = full.blocks[0]
    found = [layer.factor for layer in (block.attention.qkv, block.attention.out, block.mlp.up, block.mlp.down)]
    assert found == pytest.approx([math.sqrt(2), math.sqrt(1 / 2), math.sqrt(16 / d_ff), math.sqrt(d_ff / 16) * 3.74])
    assert not any(isinstance(layer, ScaledLinear) for layer in (plain.blocks[0].attention.qkv, plain.blocks[0].mlp.up))
    torch.testing.assert_close(full(x), plain(x), rtol=1e-12, atol=1e-13)
    for model in (plain, full):
        loss(model, x).backward()
    for (name, own), other in zip(plain.named_parameters(), full.parameters(), strict=True):
        assert own.grad.abs().max() > 1e-6, name
        torch.testing.assert_close(other.grad, own.grad, rtol=1e-10, atol=1e-14, msg=name)
    with torch.no_grad():
        block.mlp.gate.factor *= 2  # while the gate's does not
    assert (full(x) - plain(x)).abs().max() > 1e-4


def test_rows_have_length_1_and_bounds_are_declared_for_all_matrices() -> None:
    model = small(d_ff=24)
    for weight in matrices(model).values():
        torch.testing.assert_close(weight.norm(dim=1), torch.ones(len(weight)), rtol=1e-6, atol=0)
        assert weight.std() > 0.5 * weight.shape[1] ** -0.5
    bounds = declared(model, "normopt_bounds")
    assert bounds == dict.fromkeys(matrices(model), "RowBound(radius=1.0)")
    assert {parse(text) for text in bounds.values()} == {parse("RowBound(radius=1.0, axis=-1)")}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_rows_stay_in_the_ball_and_the_stream_compact_in_training(optimizer: str) -> None:
    model, x = small(), tokens(4, 12)
    trained = normopt.create(optimizer, model, lr=0.05, weight_decay=0.0)
    before = loss(model, x).item()
    for _ in range(12):
        trained.zero_grad()
        loss(model, x).backward()
        trained.step()
    lengths = torch.cat([weight.norm(dim=1) for weight in matrices(model).values()])
    assert lengths.max() < 1 + 1e-6 and lengths.min() < 0.99, "within the ball, and not all on its sphere"
    assert loss(model, x) < before - 1
    norms = torch.stack(stream(model, x)).norm(dim=-1)
    assert norms.min() > 0.25 and norms.max() < 4


def test_the_stream_keeps_its_length_at_first_by_the_residual_factor() -> None:
    x = tokens(2, 16)
    torch.manual_seed(0)
    model, without = anGPT(17, 128, 12, 2), anGPT(17, 128, 12, 2, residual_factor=False)
    without.load_state_dict(model.state_dict())
    norms = torch.stack(stream(model, x)).norm(dim=-1)
    assert norms.min() > 0.75 and norms.max() < 1.35
    assert stream(without, x)[-1].norm(dim=-1).max() < 0.6


@given(
    st.floats(0, 1),
    st.integers(0, 10**6),
)
def test_orthogonal_unit_vectors_stay_of_length_1(alpha: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    h, f = torch.linalg.qr(torch.randn(6, 2, dtype=torch.float64, generator=generator)).Q.T
    residual = Residual(6, 0.05, 0.01, residual_factor=True, lerp=True).double()
    residual.alpha.weight.data.fill_(alpha / 5)
    found = residual(h, 7 * f)
    torch.testing.assert_close(found.norm(), torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(found @ f / (found @ h + found @ f), torch.tensor(alpha, dtype=torch.float64))
    plain = Residual(6, 0.05, 0.01, residual_factor=True, lerp=False)
    torch.testing.assert_close(plain(h, 7 * f), (h + f) / math.sqrt(2))
    summed = Residual(6, 0.05, 0.01, residual_factor=False, lerp=False)
    torch.testing.assert_close(summed(h, 7 * f), h + f)


def test_residual_factor_carries_a_gradient() -> None:
    residual = Residual(5, 0.3, 0.1, residual_factor=True, lerp=True).double()
    h, f = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)

    def of(alpha: Tensor, h: Tensor, f: Tensor) -> Tensor:
        return torch.func.functional_call(residual, {"alpha.weight": alpha}, (h, f))

    alpha = torch.rand(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(of, (alpha, h, f))


def test_without_interpolation_there_is_no_alpha() -> None:
    model, x = small(lerp=False, residual_factor=False), tokens(1, 5)
    assert not any("alpha" in name for name, _ in model.named_parameters())
    embedded, first = model.embed(x), stream(model, x)[0]
    attended = model.blocks[0].attention(embedded)
    torch.testing.assert_close(first, embedded + unit(attended))


def test_scale_moves_as_fast_as_its_numbers_say() -> None:
    scale = Scale(3, init=0.05, scale=0.01)
    optimizer = torch.optim.Adam(scale.parameters(), lr=1e-3)
    scale().sum().backward()
    optimizer.step()
    torch.testing.assert_close(scale(), torch.full((3,), 0.05 - 5 * 1e-3))


def test_the_future_does_not_change_the_past_and_any_length_works() -> None:
    model, x = small(), tokens(2, 40)
    changed = x.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 17
    torch.testing.assert_close(model(x)[:, :7], model(changed)[:, :7], rtol=0, atol=0)
    assert (model(x) - model(changed))[:, 7:].abs().amax(dim=(0, 2)).min() > 1e-6
    torch.testing.assert_close(model(x[:, :7]), model(x)[:, :7], rtol=1e-4, atol=1e-5)


def test_gradients_reach_every_parameter() -> None:
    model = small()
    loss(model, tokens(4, 20)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_roles_and_views() -> None:
    found = normopt.infer_roles(small())
    assert found["embed.weight"].name == "embedding" and found["head.weight"].name == "unembedding"
    assert found["blocks.0.attention.qkv.weight"].view.split == 3
    assert {found[f"blocks.1.mlp.{name}.weight"].name for name in ("gate", "up", "down")} == {"linear"}
    vectors = {"head.factor.weight", "blocks.0.attention.gain", "blocks.1.mlp_residual.alpha.weight"}
    assert {found[name].name for name in vectors} == {"vector"}


def test_logits_are_recorded_and_clipped() -> None:
    model, x = small(), tokens(3, 12)
    record_logits(model)
    model(x)
    largest = qk_clip_(model, tau=0.5)["blocks.0.attention"]
    assert largest.min() > 0.5 and largest.max() <= math.sqrt(8) * (1 + 1e-6)
    model(x)
    torch.testing.assert_close(model.blocks[0].attention.max_logits, torch.full((2,), 0.5))


def test_low_precision() -> None:
    model, x = small(), tokens(2, 40)
    exact = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = model(x)
    assert cast.dtype == torch.bfloat16
    torch.testing.assert_close(cast.float(), exact, rtol=0, atol=0.03)
    halved = model.bfloat16()(x)
    assert halved.dtype == torch.bfloat16
    torch.testing.assert_close(halved.float(), exact, rtol=0, atol=0.06)


def test_meta_device_then_memory() -> None:
    with torch.device("meta"):
        model = anGPT(17, 16, 2, 2, gain_init=2.0)
        assert model(torch.zeros(3, 5, dtype=torch.long)).shape == (3, 5, 17)
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    model.to_empty(device="cpu").reset_parameters()
    torch.manual_seed(5)
    model.reset_parameters()
    torch.manual_seed(5)
    other = small(gain_init=2.0)
    torch.manual_seed(5)
    other.reset_parameters()
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_ff": 0}, "d_ff must be positive, got 0"),
        ({"rope_fraction": 1.5}, r"rope_fraction must lie between 0 and 1, got 1\.5"),
        ({"gate_scale": 0.0}, r"gate_scale must be positive, got 0\.0"),
        ({"alpha_init": -0.05}, r"alpha_init must be positive, got -0\.05"),
        ({"s_scale": float("nan")}, "s_scale must be positive, got nan"),
        ({"logit_init": 0}, "logit_init must be positive, got 0"),
        ({"gain_init": -1.0}, r"gain_init must be positive, got -1\.0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_bad_sizes() -> None:
    with pytest.raises(ValueError, match="n_heads must divide d_model, got d_model=16 and n_heads=3"):
        anGPT(17, 16, 2, 3)
    with pytest.raises(ValueError, match="n_layers must be positive, got 0"):
        anGPT(17, 16, 0, 2)
