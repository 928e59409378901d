"""SigmaReparam: the weight's spectral norm is gamma; power iteration, gradients, copies, roles."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

import normopt
from normopt.nn import GPT, anGPT, nGPT, qk_clip_, record_logits, sigma_reparam
from normopt.nn.reparam import SigmaReparam

LAYERS = [
    nn.Linear(5, 7),
    nn.Conv1d(3, 4, 2),
    nn.Conv2d(3, 6, 2, groups=3),
    nn.Conv3d(2, 3, 2),
    nn.ConvTranspose2d(3, 4, 2),
]


def reparam(layer: nn.Module) -> SigmaReparam:
    return layer.parametrizations.weight[0]


def original(layer: nn.Module) -> nn.Parameter:
    return layer.parametrizations.weight.original


def sigma(weight: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(weight.detach().flatten(1), ord=2)


def moved() -> nn.Linear:
    """A parametrized layer in float64 whose weights have moved since."""
    layer = sigma_reparam(nn.Linear(6, 5).double())
    with torch.no_grad():
        original(layer).add_(torch.randn(5, 6))
    return layer


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_nothing_changes_at_first(layer: nn.Module) -> None:
    layer = copy.deepcopy(layer)
    weight = layer.weight.detach().clone()
    assert sigma_reparam(layer) is layer
    torch.testing.assert_close(layer.weight, weight)
    torch.testing.assert_close(reparam(layer).gamma.detach(), sigma(weight))
    assert reparam(layer).gamma.shape == ()


def test_gamma_init() -> None:
    layer = sigma_reparam(nn.Linear(5, 7), gamma_init=1.0)
    torch.testing.assert_close(sigma(layer.weight), torch.ones(()))
    torch.testing.assert_close(layer.weight, original(layer) / sigma(original(layer)))


def test_the_spectral_norm_comes_to_be_gamma() -> None:
    layer = moved()
    first = sigma(layer.weight)
    for _ in range(300):
        layer(torch.randn(2, 6, dtype=torch.float64))
    gamma = reparam(layer).gamma.detach()
    torch.testing.assert_close(sigma(layer.weight), gamma, rtol=1e-9, atol=0)
    assert (first - gamma).abs() > 1e-3


def test_one_step_of_power_iteration_a_forward_pass_in_training_and_none_in_evaluation() -> None:
    layer = moved()
    w, v = original(layer).detach(), reparam(layer).v.clone()
    for _ in range(3):
        u = w @ v / (w @ v).norm()
        v = w.T @ u / (w.T @ u).norm()
        x = torch.randn(2, 6, dtype=torch.float64)
        expected = x @ (reparam(layer).gamma / (u @ w @ v) * w).T + layer.bias
        torch.testing.assert_close(layer(x), expected)
        torch.testing.assert_close(reparam(layer).u, u)
        torch.testing.assert_close(reparam(layer).v, v)
    layer.eval()
    torch.testing.assert_close(layer(x), expected)
    layer(x)
    torch.testing.assert_close(reparam(layer).v, v)


def test_one_step_where_the_weight_is_cached() -> None:
    layer, reads = moved(), []
    layer.parametrizations.weight.register_forward_hook(lambda *_: reads.append(1))
    with parametrize.cached():
        first = layer.weight
        assert layer.weight is first and len(reads) == 1
    assert layer.weight is not first and len(reads) == 2


@given(st.integers(0, 10**6))
def test_gradient(seed: int) -> None:
    """u and v are constants, sigma is not: the weight does not change along itself, and the gradient knows."""
    torch.manual_seed(seed)
    layer, g = moved().train(seed % 2 == 0), torch.randn(5, 6, dtype=torch.float64)
    gamma, w = reparam(layer).gamma, original(layer)
    (layer.weight * g).sum().backward()
    u, v = reparam(layer).u, reparam(layer).v
    s = u @ w.detach() @ v
    torch.testing.assert_close(gamma.grad, (g * w).detach().sum() / s)
    expected = gamma.detach() / s * (g - (g * w).detach().sum() / s * torch.outer(u, v))
    torch.testing.assert_close(w.grad, expected)
    torch.testing.assert_close((w.grad * w).sum().detach(), torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-9)


def test_gradient_by_differences() -> None:
    parametrization = reparam(moved()).eval()
    assert torch.autograd.gradcheck(parametrization, torch.randn(5, 6, dtype=torch.float64, requires_grad=True))


def test_two_forward_passes_and_one_backward() -> None:
    layer, x = moved(), torch.randn(2, 6, dtype=torch.float64)
    layer.eval()
    first = layer(x)
    layer.train()
    (first.square() + layer(x).square() + layer(2 * x).square()).sum().backward()
    assert original(layer).grad.abs().max() > 0 and reparam(layer).u.grad is None


def test_state_dict_and_deepcopy() -> None:
    layer, x = moved().eval(), torch.randn(2, 6, dtype=torch.float64)
    other = sigma_reparam(nn.Linear(6, 5).double()).eval()
    assert not torch.allclose(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert set(layer.state_dict()) == {
        "bias",
        *(f"parametrizations.weight.{name}" for name in ("original", "0.gamma", "0.u", "0.v")),
    }
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))
    with torch.no_grad():
        reparam(twin).gamma.mul_(2)
    torch.testing.assert_close(twin.weight, 2 * layer.weight)


def test_low_precision() -> None:
    weight = torch.randn(40, 30).bfloat16()
    layer = nn.Linear(30, 40, dtype=torch.bfloat16)
    layer.weight.data.copy_(weight)
    sigma_reparam(layer)
    assert reparam(layer).gamma.dtype == reparam(layer).u.dtype == torch.float32
    assert layer.weight.dtype == torch.bfloat16 and torch.equal(layer.weight, weight)
    torch.testing.assert_close(reparam(layer).gamma.detach(), sigma(weight.float()))
    layer(torch.randn(3, 30).bfloat16()).sum().backward()
    assert original(layer).grad.dtype == torch.bfloat16 and reparam(layer).gamma.grad.dtype == torch.float32
    converted = sigma_reparam(nn.Linear(30, 40)).bfloat16()
    torch.testing.assert_close(
        sigma(converted.weight.float()), reparam(converted).gamma.detach().float(), rtol=0.01, atol=0
    )


def test_autocast_leaves_the_weight_alone() -> None:
    layer = sigma_reparam(nn.Linear(30, 40))
    plain = layer.eval().weight
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.weight, plain) and layer(torch.randn(2, 30)).dtype == torch.bfloat16
        layer.train()
        torch.testing.assert_close(layer.weight, plain, rtol=1e-5, atol=1e-6)


def test_meta_device() -> None:
    with torch.device("meta"):
        model = sigma_reparam(GPT(17, 16, 1, 2))
        assert model(torch.zeros(2, 5, dtype=torch.long)).shape == (2, 5, 17)


def test_it_can_be_removed() -> None:
    layer = moved().eval()
    weight = layer.weight.detach().clone()
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is nn.Linear and torch.equal(layer.weight, weight)
    assert isinstance(layer.weight, nn.Parameter)


def test_assignment_sets_gamma() -> None:
    layer, weight = sigma_reparam(nn.Linear(6, 5), gamma_init=1.0), torch.randn(5, 6)
    layer.weight = weight
    torch.testing.assert_close(layer.weight.detach(), weight)
    torch.testing.assert_close(reparam(layer).gamma.detach(), sigma(weight))


@pytest.mark.parametrize("kind", [GPT, anGPT, nGPT])
def test_models_keep_roles_and_views(kind: type[nn.Module]) -> None:
    model = kind(17, 16, 2, 2)
    before = normopt.infer_roles(model)
    found = normopt.infer_roles(sigma_reparam(model))
    new = {name.replace("parametrizations.weight.original", "weight"): role for name, role in found.items()}
    assert {name: (role.name, role.view) for name, role in before.items()} == {
        name: (role.name, role.view) for name, role in new.items() if not name.endswith("gamma")
    }
    assert found["blocks.1.attention.qkv.parametrizations.weight.original"].view.split == 3
    gammas = {role.name for name, role in found.items() if name.endswith("gamma")}
    assert gammas == {"scalar"} and len(found) == len(before) + 11


def test_other_models_keep_roles_and_views() -> None:
    model = sigma_reparam(nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(4, 3)))
    found = normopt.infer_roles(model)
    conv = found["0.parametrizations.weight.original"]
    assert (conv.name, conv.view) == ("conv", normopt.View(flatten=True))
    assert found["2.parametrizations.weight.original"].name == "unembedding"
    assert normopt.infer_roles(sigma_reparam(nn.Linear(3, 2)))["parametrizations.weight.original"].name == "linear"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training(optimizer: str) -> None:
    model, x = sigma_reparam(GPT(17, 16, 2, 2)), torch.randint(0, 17, (4, 12))
    trained, losses = normopt.create(optimizer, model, lr=0.02), []
    for _ in range(12):
        trained.zero_grad()
        losses.append(F.cross_entropy(model(x).flatten(0, 1), x.flatten()))
        losses[-1].backward()
        trained.step()
    assert losses[-1] < losses[0] - 1
    for block in model.blocks:
        gamma = reparam(block.mlp.up).gamma.detach()
        torch.testing.assert_close(sigma(block.mlp.up.weight), gamma, rtol=0.2, atol=0)


def test_attention_logits_are_clipped() -> None:
    torch.manual_seed(0)
    model, x = sigma_reparam(GPT(17, 16, 1, 2, qk_norm=False)), torch.randint(0, 17, (3, 12))
    record_logits(model)
    model(x)
    largest = qk_clip_(model, tau=0.2)["blocks.0.attention"]
    assert largest.min() > 0.2
    model(x)
    torch.testing.assert_close(model.blocks[0].attention.max_logits, torch.full((2,), 0.2), rtol=1e-4, atol=0)


def test_errors() -> None:
    with pytest.raises(ValueError, match="sigma_reparam: Embedding has no linear or convolutional layer"):
        sigma_reparam(nn.Embedding(3, 4))
    with pytest.raises(ValueError, match=r"the weight of '1' is parametrized already"):
        sigma_reparam(nn.Sequential(nn.Linear(2, 2), sigma_reparam(nn.Linear(2, 2))))
    with pytest.raises(ValueError, match="gamma_init must be positive, got 0"):
        sigma_reparam(nn.Linear(2, 2), gamma_init=0)
    layer = nn.Linear(2, 2)
    nn.init.zeros_(layer.weight)
    with pytest.raises(ValueError, match="the weight of the layer is zero; initialize it first"):
        sigma_reparam(layer)
    assert not parametrize.is_parametrized(layer)
