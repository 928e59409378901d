"""Pre-LN transformers as Pre-RMSNorm and Pre-CRMSNorm transformers: the same outputs and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import normopt
from normopt.nn import GPT, to_rmsnorm


def disturbed(model: nn.Module) -> nn.Module:
    """Every parameter away from its first value, gains and biases too."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def gpt() -> nn.Module:
    return disturbed(GPT(vocab_size=19, d_model=12, n_layers=3, n_heads=3, norm="layernorm"))


def encoder(bias: bool = True) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(12, 3, 20, 0.0, batch_first=True, norm_first=True, bias=bias)
    norm = nn.LayerNorm(12, bias=bias)
    return nn.TransformerEncoder(layer, 3, norm, enable_nested_tensor=False)


MODELS = {"gpt": gpt, "encoder": lambda: disturbed(encoder()), "encoder-no-bias": lambda: disturbed(encoder(False))}


def sample(name: str) -> Tensor:
    return torch.randint(0, 19, (2, 7)) if name == "gpt" else (torch.randn(2, 7, 12) + 1).requires_grad_()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_outputs_and_gradients_are_those_of_pre_ln(name: str, compressed: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype)
    twin = copy.deepcopy(model)
    assert to_rmsnorm(twin, compressed) is twin
    assert not any(isinstance(module, nn.LayerNorm) for module in twin.modules())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    x = sample(name)
    x = x.to(dtype).detach().requires_grad_() if x.is_floating_point() else x
    y = x.detach().clone().requires_grad_(x.requires_grad)
    for training in (True, False):
        a, b = model.train(training)(x), twin.train(training)(y)
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        with torch.no_grad():
            torch.testing.assert_close(twin(y), a, rtol=tolerance, atol=tolerance)
    weights = torch.randn_like(a)
    (a * weights).sum().backward()
    (b * weights).sum().backward()
    theirs = dict(twin.named_parameters())
    for key, p in model.named_parameters():
        head, _, last = key.rpartition(".")
        q = theirs.get(key, theirs.get(f"{head}.parametrizations.{last}.original"))
        size = p.grad.abs().max()
        assert (p.grad - q.grad).abs().max() <= tolerance * max(1.0, size), key
    if x.grad is not None:
        torch.testing.assert_close(x.grad, y.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("compressed", [False, True])
def test_the_stream_has_mean_zero_and_the_model_trains_on(compressed: bool) -> None:
    model = to_rmsnorm(gpt(), compressed)
    h = model.embed(torch.arange(5))
    assert h.shape == (5, 11 if compressed else 12)
    if not compressed:
        assert model.blocks[0](model.embed(torch.arange(5))[None]).mean(dim=-1).abs().max() < 1e-6
    roles = normopt.infer_roles(model)
    assert roles["embed.parametrizations.weight.original"].name == "embedding"
    assert roles["blocks.0.mlp.down.parametrizations.weight.original"].name == "linear"
    optimizer, tokens = normopt.create("muon", model, lr=0.02), torch.randint(0, 19, (4, 8))
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_what_is_not_pre_ln_is_refused_and_stays() -> None:
    post = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(12, 3, 20, 0.0), 1, nn.LayerNorm(12), enable_nested_tensor=False
    )
    open_end = encoder()
    open_end.norm = None
    dropping = encoder()
    dropping.layers[0].dropout1.p = 0.1
    for model, message in [
        (nn.Linear(3, 3), "has no GPT"),
        (GPT(vocab_size=5, d_model=8, n_layers=1, n_heads=2), "has no LayerNorms"),
        (post, "is not Pre-LN"),
        (open_end, "needs a final norm"),
        (nn.Sequential(encoder(), dropping), "gives the residual stream a mean"),
    ]:
        before = str(model)
        with pytest.raises(ValueError, match=message):
            to_rmsnorm(model)
        assert str(model) == before


@pytest.mark.parametrize("compressed", [False, True])
def test_an_encoder_takes_its_input_by_name(compressed: bool) -> None:
    model = to_rmsnorm(disturbed(encoder()), compressed)
    x, padding = sample("encoder"), torch.zeros(2, 7, dtype=torch.bool)
    for training in (True, False):
        model.train(training)
        expected = model(x, src_key_padding_mask=padding)
        torch.testing.assert_close(model(src=x, src_key_padding_mask=padding), expected)
