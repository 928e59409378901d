"""1-Lipschitz layers and orthogonal first weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import normopt
from normopt.nn import SLL, AOLLinear, orthogonal_
from normopt.nn.lipschitz import gram_sums


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_gram_sums_bound_the_gram_matrix() -> None:
    for _ in range(20):
        a, q = noise(6, 9), noise(6).exp()
        assert torch.linalg.eigvalsh(gram_sums(a, q).diag() - a @ a.mT).min() >= -1e-12
        assert torch.linalg.matrix_norm(gram_sums(a).rsqrt()[:, None] * a, ord=2) <= 1 + 1e-12
    torch.testing.assert_close(gram_sums(a, torch.ones(6).double()), gram_sums(a))


@pytest.mark.parametrize(
    "layer", [AOLLinear(7, 5), AOLLinear(5, 7, bias=False), SLL(6), SLL(6, 11), SLL(6, 3)], ids=str
)
def test_layers_are_lipschitz(layer: nn.Module) -> None:
    """The Jacobian's spectral norm at random points, for large and small weights, and with a row and a column of 0."""
    layer.double()
    for scale in (0.1, 1.0, 30.0):
        with torch.no_grad():
            for p in layer.parameters():
                p.copy_(scale * noise(*p.shape) if p.ndim > 1 else noise(*p.shape))
            matrix = next(p for p in layer.parameters() if p.ndim == 2)
            matrix[0], matrix[:, 0] = 0.0, 0.0
        width = matrix.shape[1]
        for _ in range(20):
            jacobian = torch.autograd.functional.jacobian(layer, noise(width))
            assert torch.linalg.matrix_norm(jacobian, ord=2) <= 1 + 1e-12
    layer(noise(3, width)).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


def test_orthogonal_layers_keep_length() -> None:
    layer = AOLLinear(4, 6, bias=False).double()
    orthogonal_(layer.weight, gain=3.0)
    x = noise(5, 4)
    torch.testing.assert_close(layer(x).norm(dim=-1), x.norm(dim=-1))
    sll = SLL(4).double()
    orthogonal_(sll.inner.weight)
    nn.init.constant_(sll.inner.bias, 100.0)  # all units on: x - 2 x and a shift
    torch.testing.assert_close(sll(x) - sll(0 * x), -x)


def test_lipschitz_nets_train_by_the_roles_of_linear_layers() -> None:
    model = nn.Sequential(AOLLinear(4, 6), SLL(6), AOLLinear(6, 1))
    roles = normopt.infer_roles(model)
    assert roles["0.weight"].name == roles["1.inner.weight"].name == "linear"
    optimizer, x = normopt.create("muon", model, lr=0.02), torch.randn(32, 4)
    losses = []
    for _ in range(30):
        loss = (model(x) - x.mean(dim=1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("shape", [(12, 12), (20, 7), (7, 20), (1, 5), (1, 1)])
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_orthogonal_first_weights(shape: tuple[int, int], density: float) -> None:
    w = torch.empty(shape, dtype=torch.float64)
    assert orthogonal_(w, 2.0, density, torch.Generator().manual_seed(0)) is w
    values = torch.linalg.svdvals(w)
    torch.testing.assert_close(values, torch.full_like(values, 2.0), rtol=1e-12, atol=0)
    share = w.count_nonzero().item() / w.numel()
    assert share >= density - 1e-12 and (density == 1 or min(shape) == 1 or share < density + 2 / max(shape) + 0.1)
    assert torch.equal(w, orthogonal_(w.clone(), 2.0, density, torch.Generator().manual_seed(0)))


def test_bad_first_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="needs a matrix"):
        orthogonal_(torch.empty(3))
    with pytest.raises(ValueError, match="density must lie in"):
        orthogonal_(torch.empty(3, 3), density=0.0)
    with pytest.raises(ValueError, match="gain must not be negative"):
        orthogonal_(torch.empty(3, 3), gain=-1.0)
