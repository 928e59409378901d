"""nGPT: a naive forward pass, a residual stream of length 1, matrices on the sphere."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import normopt
from normopt.ingredient import parse
from normopt.nn import nGPT, qk_clip_, record_logits
from tests.support.naive_transformer import attend, declared, disturbed, matrices, rotated, silu, stream, unit

COLUMNS = ("attention.out.weight", "mlp.down.weight")


def small(**options: Any) -> nGPT:
    torch.manual_seed(0)
    return nGPT(17, 16, 2, 2, **options)


def tokens(batch: int, time: int) -> Tensor:
    return torch.randint(0, 17, (batch, time), generator=torch.Generator().manual_seed(1))


def loss(model: torch.nn.Module, x: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, 1), x.roll(-1, dims=1).flatten())


def lengths(model: nGPT) -> Tensor:
    """Of all rows and columns that are to be 1."""
    return torch.cat([w.norm(dim=0 if name.endswith(COLUMNS) else 1) for name, w in matrices(model).items()])


def test_parameter_count_of_the_paper() -> None:
    with torch.device("meta"):
        model = nGPT(50304, 1024, 24, 16)
    assert sum(p.numel() for p in model.parameters()) == 505_996_416


def naive(weights: dict[str, Tensor], x: Tensor, *, heads: int, base: float, init: dict[str, float]) -> Tensor:
    """NVIDIA/ngpt's forward pass for one sequence: positions first, then the normalization of queries and keys."""
    h = weights["embed.weight"][x]
    d = h.shape[1]
    for layer in range(2):
        own = {name.removeprefix(f"blocks.{layer}."): w for name, w in weights.items()}
        query, key, value = (h @ w.T for w in own["attention.qkv.weight"].chunk(3))
        s = own["attention.qk_scale.weight"] * init["qk"] / base
        mixed = []
        for head in range(heads):
            part = slice(head * d // heads, (head + 1) * d // heads)
            q, k = (s[part] * unit(rotated(y[:, part], d // heads // 2)) for y in (query, key))
            mixed.append(attend((d / heads) ** 0.5 * q, k, value[:, part]))
        h_a = unit(torch.cat(mixed, dim=1) @ own["attention.out.weight"].T)
        a = (own["attention_residual.alpha.weight"] * init["alpha"] / base).abs()
        h = unit(unit(h) + a * (h_a - unit(h)))
        u = own["mlp.up.factor.weight"] * init["uv"] * d**0.5 * (h @ own["mlp.up.weight"].T)
        v = own["mlp.gate.factor.weight"] * init["uv"] * d**0.5 * (h @ own["mlp.gate.weight"].T)
        h_m = unit(u * silu(v) @ own["mlp.down.weight"].T)
        a = (own["mlp_residual.alpha.weight"] * init["alpha"] / base).abs()
        h = unit(h + a * (h_m - h))
    return weights["head.factor.weight"] * init["logit"] / base * (h @ weights["head.weight"].T)


@pytest.mark.parametrize(
    ("options", "base", "init"),
    [
        ({}, 0.25, {"qk": 1, "uv": 1, "alpha": 0.05, "logit": 1}),
        (
            {"base_scale": 0.02, "qk_init": 2, "uv_init": 0.5, "alpha_init": 0.3, "logit_init": 4, "d_ff": 24},
            0.02,
            {"qk": 2, "uv": 0.5, "alpha": 0.3, "logit": 4},
        ),
    ],
)
def test_forward_pass_against_a_naive_one(options: dict[str, Any], base: float, init: dict[str, float]) -> None:
    model, x = disturbed(small(**options)), tokens(2, 9)
    with torch.no_grad():
        model.blocks[0].mlp_residual.alpha.weight[::2].neg_()
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    expected = torch.stack([naive(weights, row, heads=2, base=base, init=init) for row in x])
    torch.testing.assert_close(model(x), expected, rtol=1e-11, atol=1e-11)


def test_first_values_of_the_scales() -> None:
    block = small().blocks[1]
    torch.testing.assert_close(block.mlp_residual.alpha(), torch.full((16,), 0.05))
    torch.testing.assert_close(block.mlp_residual.alpha.weight.data, torch.full((16,), 0.25))
    torch.testing.assert_close(block.attention.qk_scale(), torch.ones(16))
    torch.testing.assert_close(block.mlp.gate.factor(), torch.full((64,), 4.0))
    torch.testing.assert_close(block.mlp.up.factor.weight.data, torch.ones(64))
    torch.testing.assert_close(small().head.factor(), torch.ones(17))


def test_the_stream_has_length_1_whatever_the_weights() -> None:
    model, x = disturbed(small()), tokens(2, 10)
    norms = torch.stack(stream(model, x)).norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-14, atol=0)
    assert norms.shape[0] == 4
    assert (model.embed(x).norm(dim=-1) - 1).abs().min() > 1e-3, "the weights themselves are no longer normalized"


def test_matrices_start_on_the_sphere_and_say_so() -> None:
    model = small(d_ff=24)
    torch.testing.assert_close(lengths(model), torch.ones_like(lengths(model)), rtol=1e-6, atol=0)
    bounds = declared(model, "normopt_bounds")
    assert set(bounds) == set(matrices(model))
    for name, text in bounds.items():
        assert parse(text) == parse(f"Sphere(radius=1.0, axis={-2 if name.endswith(COLUMNS) else -1})")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_matrices_stay_on_the_sphere_in_training(optimizer: str) -> None:
    model, x = small(), tokens(4, 12)
    trained = normopt.create(optimizer, model, lr=0.05, weight_decay=0.0)
    before = loss(model, x).item()
    for _ in range(20):
        trained.zero_grad()
        loss(model, x).backward()
        trained.step()
    torch.testing.assert_close(lengths(model), torch.ones_like(lengths(model)), rtol=1e-6, atol=0)
    assert loss(model, x) < before - 1


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
    vectors = {"head.factor.weight", "blocks.0.attention.qk_scale.weight", "blocks.1.mlp.up.factor.weight"}
    assert {found[name].name for name in vectors} == {"vector"}


def test_logits_are_recorded_and_clipped() -> None:
    model, x = small(), tokens(3, 12)
    record_logits(model)
    model(x)
    largest = qk_clip_(model, tau=0.5)["blocks.0.attention"]
    assert largest.shape == (2,) and largest.min() > 0.5
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
        model = nGPT(17, 16, 2, 2)
        assert model(torch.zeros(3, 5, dtype=torch.long)).shape == (3, 5, 17)
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    model.to_empty(device="cpu").reset_parameters()
    torch.testing.assert_close(lengths(model), torch.ones_like(lengths(model)), rtol=1e-6, atol=0)
    torch.testing.assert_close(model.blocks[0].mlp.gate.factor(), torch.full((64,), 4.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_ff": 0}, "d_ff must be positive, got 0"),
        ({"rope_fraction": -0.5}, r"rope_fraction must lie between 0 and 1, got -0\.5"),
        ({"base_scale": 0.0}, r"base_scale must be positive, got 0\.0"),
        ({"alpha_init": -0.05}, r"alpha_init must be positive, got -0\.05"),
        ({"qk_init": 0}, "qk_init must be positive, got 0"),
        ({"uv_init": 0}, "uv_init must be positive, got 0"),
        ({"logit_init": -2}, "logit_init must be positive, got -2"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_bad_sizes() -> None:
    with pytest.raises(ValueError, match="n_heads must divide d_model, got d_model=16 and n_heads=5"):
        nGPT(17, 16, 2, 5)
    with pytest.raises(ValueError, match="vocab_size must be positive, got 0"):
        nGPT(0, 16, 2, 2)
