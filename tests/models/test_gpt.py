"""The GPT baseline: parameter counts, causality, rotary positions, QK-norm, initialization, roles."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import normopt
from normopt.nn import GPT
from normopt.nn.layers import Attention, SwiGLU, rope_tables, rotate


def small(**options: float) -> GPT:
    torch.manual_seed(0)
    return GPT(17, 16, 2, 2, **options)  # type: ignore[arg-type]


def tokens(batch: int, time: int) -> Tensor:
    return torch.randint(0, 17, (batch, time), generator=torch.Generator().manual_seed(1))


def test_parameter_count_of_the_paper() -> None:
    with torch.device("meta"):
        model = GPT(50304, 1024, 24, 16)
    gains = [parameter for name, parameter in model.named_parameters() if name.endswith("attention.gain")]
    assert sum(gain.numel() for gain in gains) == 24 * 16
    assert sum(parameter.numel() for parameter in model.parameters()) - 24 * 16 == 505_725_952
    assert all(parameter.is_meta for parameter in model.parameters())


def test_meta_forward_and_state_of_parameters_only() -> None:
    with torch.device("meta"):
        model = GPT(17, 16, 2, 2)
        assert model(torch.zeros(3, 5, dtype=torch.long)).shape == (3, 5, 17)
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


def test_the_future_does_not_change_the_past() -> None:
    model, x = small(), tokens(2, 12)
    changed = x.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 17
    before, after = model(x), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=0, atol=0)
    assert (before[:, 7:] - after[:, 7:]).abs().amax(dim=(0, 2)).min() > 1e-4


@pytest.mark.parametrize("time", [1, 7, 300])
def test_any_length_extends_the_shorter_one(time: int) -> None:
    model, x = small(), tokens(2, 301)
    torch.testing.assert_close(model(x[:, :time]), model(x)[:, :time], rtol=1e-4, atol=1e-5)


def test_order_of_the_past_matters_through_rotary_positions() -> None:
    x = tokens(1, 12)
    swapped = x[:, [1, 0, *range(2, 12)]]
    assert x[0, 0] != x[0, 1]
    assert (small()(x) - small()(swapped))[:, -1].abs().max() > 1e-3
    flat = small(rope_fraction=0.0)
    flat.blocks = flat.blocks[:1]  # with one layer and without positions the last token sees a set
    torch.testing.assert_close(flat(x)[:, -1], flat(swapped)[:, -1])


def test_rotary_inner_products_depend_on_the_distance_only() -> None:
    query, key = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tables = rope_tables(20, 6, query)
    queries, keys = rotate(query.expand(20, 8), *tables), rotate(key.expand(20, 8), *tables)
    products = queries @ keys.mT
    for distance in range(-15, 16):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert products[0].unique().numel() == 20
    torch.testing.assert_close(queries.norm(dim=-1), query.norm().expand(20))
    torch.testing.assert_close(queries[0], query)
    torch.testing.assert_close(queries[:, 6:], query[6:].expand(20, 2), rtol=0, atol=0)


def test_rotary_angles() -> None:
    cos, sin = rope_tables(5, 4, torch.empty(0))
    angle = torch.tensor([[position * 10000.0 ** (-i / 2) for i in range(2)] for position in range(5)])
    torch.testing.assert_close(cos, angle.cos())
    torch.testing.assert_close(sin, angle.sin())


def test_attention_is_softmax_of_normalized_queries_and_keys() -> None:
    torch.manual_seed(0)
    layer, x = Attention(12, 2, rope_fraction=0.0).double(), torch.randn(1, 5, 12, dtype=torch.float64)
    layer.gain.data = torch.tensor([0.5, 3.0], dtype=torch.float64)
    query, key, value = (x @ weight.mT for weight in layer.qkv.weight.view(3, 12, 12))
    mixed = []
    for head, part in enumerate((slice(0, 6), slice(6, 12))):
        q, k = (y[0, :, part] / y[0, :, part].norm(dim=-1, keepdim=True) for y in (query, key))
        logits = layer.gain[head] * q @ k.mT + torch.full((5, 5), -math.inf).triu(1)
        mixed.append(logits.softmax(-1) @ value[0, :, part])
    torch.testing.assert_close(layer(x)[0], torch.cat(mixed, -1) @ layer.out.weight.mT)


def test_attention_logits_are_bounded_by_the_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer, seen = Attention(16, 2), []
    attend = F.scaled_dot_product_attention

    def spy(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, scale: float) -> Tensor:
        seen.append(scale * query @ key.mT)
        return attend(query, key, value, is_causal=is_causal, scale=scale)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    torch.testing.assert_close(layer.gain.data, torch.full((2,), math.sqrt(8)))
    layer.gain.data = torch.tensor([1.0, 5.0])
    layer(1000 * torch.randn(4, 30, 16))
    bound = seen[0].abs().amax(dim=(0, 2, 3))
    assert (bound <= layer.gain * (1 + 1e-5)).all()
    assert (bound > 0.8 * layer.gain).all()


def test_swiglu() -> None:
    torch.manual_seed(0)
    layer, x = SwiGLU(6, 10), torch.randn(3, 6)
    gate, up = x @ layer.gate.weight.mT, x @ layer.up.weight.mT
    torch.testing.assert_close(layer(x), (gate * gate.sigmoid() * up) @ layer.down.weight.mT)


def test_width_of_the_mlp() -> None:
    assert small().blocks[0].mlp.gate.weight.shape == (64, 16)
    assert small(d_ff=24).blocks[1].mlp.down.weight.shape == (16, 24)


def test_gradients_reach_every_parameter() -> None:
    model, x = small(), tokens(4, 20)
    F.cross_entropy(model(x).flatten(0, 1), x.roll(-1, dims=1).flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_initial_sizes() -> None:
    torch.manual_seed(0)
    model = GPT(500, 64, 3, 2)
    block = model.blocks[0]
    for weight, std in (
        (model.embed.weight, 1),
        (model.head.weight, 64**-0.5),
        (block.attention.qkv.weight, 64**-0.5),
        (block.attention.out.weight, (6 * 64) ** -0.5),
        (block.mlp.down.weight, (6 * 256) ** -0.5),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.05)


def test_the_seed_decides_the_initial_weights() -> None:
    first, second, other = small(), small(), GPT(17, 16, 2, 2)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
    assert not torch.equal(first.head.weight, other.head.weight)


def test_low_precision() -> None:
    model, x = small(), tokens(2, 40)
    exact = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(x).float(), exact, rtol=0, atol=0.1)
    halved = model.bfloat16()(x)
    assert halved.dtype == torch.bfloat16
    torch.testing.assert_close(halved.float(), exact, rtol=0, atol=0.2)


def test_roles() -> None:
    found = normopt.infer_roles(small())
    named = {name: role.name for name, role in found.items() if not name.startswith("blocks")}
    assert named == {"embed.weight": "embedding", "norm.weight": "vector", "head.weight": "unembedding"}
    assert found["blocks.0.attention.qkv.weight"].view.split == 3
    assert {found[f"blocks.1.{name}.weight"].name for name in ("attention.qkv", "attention.out", "mlp.up")} == {
        "linear"
    }
    assert found["blocks.1.attention.gain"].name == "vector"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((17, 16, 2, 3), "n_heads must divide d_model, got d_model=16 and n_heads=3"),
        ((0, 16, 2, 2), "vocab_size must be positive, got 0"),
        ((17, 0, 2, 2), "d_model must be positive"),
        ((17, 16, 0, 2), "n_layers must be positive"),
        ((17, 16, 2, 0), "n_heads must be positive"),
        ((17, 18, 2, 2), "rope_fraction must rotate an even number of dimensions, got 0.5 of d_head=9"),
    ],
)
def test_bad_sizes(arguments: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPT(*arguments)


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="d_ff must be positive, got 0"):
        small(d_ff=0)
    with pytest.raises(ValueError, match=r"rope_fraction must lie between 0 and 1, got 1\.5"):
        small(rope_fraction=1.5)
