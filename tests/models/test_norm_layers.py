"""Normalization layers: formulas, gradients, and GPT with each of them."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normopt
from normopt.nn import GPT
from normopt.nn.norms import NORMS, DyT, SeeDNorm, make_norm


def disturbed(layer: nn.Module) -> nn.Module:
    """In float64, with parameters away from their first values."""
    layer.double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter))
    return layer


def layernorm(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    centred = x - x.mean()
    return centred / (centred.square().mean() + 1e-5).sqrt() * p["weight"] + p["bias"]


def dyt(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    y = p["alpha"] * x
    return p["weight"] * (y.exp() - (-y).exp()) / (y.exp() + (-y).exp()) + p["bias"]


def seednorm(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    s = x @ p["beta"]
    s = (s.exp() - (-s).exp()) / (s.exp() + (-s).exp())
    return (s * p["alpha"] + p["weight"]) * x / x.square().mean().sqrt()


def gated(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    y = x / x.square().mean().sqrt() * p["rms.weight"]
    inner = p["down.weight"] @ y
    return y / (1 + (-p["up.weight"] @ (inner / (1 + (-inner).exp()))).exp())


FORMULAS: dict[str, Callable[[Tensor, dict[str, Tensor]], Tensor]] = {
    "rmsnorm": lambda x, p: x / x.square().mean().sqrt() * p["weight"],
    "layernorm": layernorm,
    "dyt": dyt,
    "seednorm": seednorm,
    "power": lambda x, p: x / (1 + 1e-5) ** 0.5 * p["weight"] + p["bias"],
    "unified": lambda x, p: x / (1 + 1e-5) ** 0.5 * p["weight"] + p["bias"],
    "gated": gated,
}


def test_every_layer_is_tested() -> None:
    assert FORMULAS.keys() == NORMS.keys()


@pytest.mark.parametrize("name", NORMS)
def test_formula(name: str) -> None:
    layer, x = disturbed(make_norm(name, 6)), torch.randn(2, 3, 6, dtype=torch.float64)
    parameters = dict(layer.named_parameters())
    expected = torch.stack([FORMULAS[name](row, parameters) for row in x.flatten(0, 1)]).view_as(x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", [DyT, SeeDNorm])
def test_gradients(kind: type[nn.Module]) -> None:
    layer = disturbed(kind(4))
    names = [name for name, _ in layer.named_parameters()]

    def of(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    inputs = [torch.randn(3, 4, dtype=torch.float64), *(p.detach().clone() for p in layer.parameters())]
    assert torch.autograd.gradcheck(of, [tensor.requires_grad_() for tensor in inputs])


def test_first_values() -> None:
    assert DyT(3).alpha.item() == 0.5 and DyT(3, alpha_init=0.8).alpha.item() == pytest.approx(0.8)
    x = 10 * torch.randn(5, 7)
    torch.testing.assert_close(DyT(7)(x), torch.tanh(x / 2))
    layer = SeeDNorm(7, alpha_init=0.1)
    assert (layer.alpha == 0.1).all() and (layer.beta == 0).all() and (layer.weight == 1).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_seednorm_starts_as_rmsnorm(dtype: torch.dtype) -> None:
    x = torch.randn(20, 12, dtype=dtype)
    found = SeeDNorm(12).to(dtype)(x)
    assert found.dtype == dtype
    exact = x.double() / x.double().square().mean(dim=-1, keepdim=True).sqrt()
    torch.testing.assert_close(found, nn.RMSNorm(12).to(dtype)(x), rtol=torch.finfo(dtype).eps, atol=0)
    torch.testing.assert_close(found.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_seednorm_computes_in_float32() -> None:
    layer = disturbed(SeeDNorm(64)).bfloat16()
    x = torch.randn(10, 64).bfloat16()
    exact = layer.float()(x.float())
    torch.testing.assert_close(layer.bfloat16()(x), exact.bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("name", NORMS)
def test_gpt(name: str) -> None:
    torch.manual_seed(0)
    model, x = GPT(17, 16, 2, 2, norm=name), torch.randint(0, 17, (3, 9))
    layers = [model.norm, *(layer for block in model.blocks for layer in (block.attention_norm, block.mlp_norm))]
    assert {type(layer) for layer in layers} == {NORMS[name]}
    before = {key: value.clone() for key, value in model.named_parameters() if "norm." in key}
    optimizer = normopt.create("adamw", model, lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
        optimizer.step()
    assert all(not torch.equal(value, before[key]) for key, value in model.named_parameters() if key in before)
    model.reset_parameters()
    drawn = {key for key, value in before.items() if value.ndim > 1}
    assert all(
        torch.equal(value, before[key]) for key, value in model.named_parameters() if key in before.keys() - drawn
    )


@pytest.mark.parametrize("name", NORMS)
def test_gpt_on_the_meta_device_and_in_low_precision(name: str) -> None:
    with torch.device("meta"):
        model = GPT(17, 16, 1, 2, norm=name)
    model.to_empty(device="cpu").eval().reset_parameters()
    x = torch.randint(0, 17, (3, 9))
    exact = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(x).float(), exact, rtol=0, atol=0.1)
    torch.testing.assert_close(model.bfloat16()(x).float(), exact, rtol=0, atol=0.15)


def test_the_default_is_rmsnorm() -> None:
    models = []
    for options in ({}, {"norm": "rmsnorm"}, {"norm": "seednorm"}):
        torch.manual_seed(3)
        models.append(GPT(17, 16, 2, 2, **options))
    x = torch.randint(0, 17, (2, 9))
    assert torch.equal(models[0](x), models[1](x))
    torch.testing.assert_close(models[2](x), models[0](x), rtol=1e-5, atol=1e-6)


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="norm: unknown normalization layer 'seenorm'; did you mean 'seednorm'"):
        GPT(17, 16, 1, 2, norm="seenorm")
    with pytest.raises(ValueError, match="unknown normalization layer None; Known: dyt, gated"):
        GPT(17, 16, 1, 2, norm=None)  # type: ignore[arg-type]


# Statistics of past batches -------------------------------------------------------------------------------------------


def test_power_and_unified_norm_by_their_recurrences() -> None:
    power, unified = make_norm("power", 5).double(), make_norm("unified", 5).double()
    squares: list[Tensor] = []
    for i in range(7):
        x = (1 + i) * torch.randn(3, 4, 5, dtype=torch.float64)
        phi = torch.ones(5, dtype=torch.float64) if not squares else squares[0]
        for square in squares[1:]:
            phi = 0.9 * phi + 0.1 * square
        torch.testing.assert_close(power(x), x / (phi + 1e-5).sqrt())
        last = [squares[0]] * max(0, 4 - len(squares)) + squares[-4:] if squares else [torch.ones(5).double()]
        mean = torch.stack(last).log().mean(dim=0).exp()
        torch.testing.assert_close(unified(x), x / (mean + 1e-5).sqrt())
        squares.append(x.square().mean(dim=(0, 1)))
    for layer in (power.eval(), unified.eval()):
        kept = layer.phi.clone()
        torch.testing.assert_close(layer(x), x / (kept + 1e-5).sqrt())
        assert torch.equal(layer.phi, kept), "evaluation takes nothing in"
        layer.reset_parameters()
        assert (layer.phi == 1).all() and layer.batches == 0


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("training", [True, False])
def test_no_position_sees_a_later_one(name: str, training: bool) -> None:
    """Neither its logits nor its gradients, after some batches have been seen."""
    torch.manual_seed(0)
    model = GPT(vocab_size=11, d_model=8, n_layers=2, n_heads=2, norm=name).double()
    for _ in range(3):
        model(torch.randint(0, 11, (2, 6)))
    model.train(training)
    twin = copy.deepcopy(model)
    tokens = torch.randint(0, 11, (2, 6))
    changed = tokens.clone()
    changed[:, 4:] = (changed[:, 4:] + 1 + torch.randint(0, 10, (2, 2))) % 11
    a, b = model(tokens)[:, :4], twin(changed)[:, :4]
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    a.square().sum().backward()
    b.square().sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)


def test_statistics_of_the_batch_itself_are_refused() -> None:
    with pytest.raises(ValueError, match="let a causal model see future tokens; 'power' and 'unified'"):
        GPT(vocab_size=11, d_model=8, n_layers=1, n_heads=2, norm="batchnorm")
