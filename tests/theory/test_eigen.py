"""Eigenvalues, powers and power iterations of symmetric matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from normopt.numerics.eigen import eigh, matrix_power, power_iteration_


def test_eigh_of_matrices_with_rows_of_zeros() -> None:
    """torch.linalg.eigh fails on some of these in float32, or returns NaNs: gradients of an embedding are such."""
    torch.manual_seed(0)
    for _ in range(100):
        a = torch.randn(64, 16)
        a[torch.randperm(64)[:40]] = 0
        gram = a @ a.mT
        values, vectors = eigh(gram)
        size = float(gram.abs().max())
        torch.testing.assert_close((vectors * values) @ vectors.mT, gram, rtol=0, atol=1e-5 * size)
        torch.testing.assert_close(vectors.mT @ vectors, torch.eye(64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["error", "nan"])
@pytest.mark.parametrize("failures", [1, 2])
def test_eigh_repeats_failed_decompositions(failures: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once: in float64 with a jitter. Twice: the diagonal stands for the matrix."""
    original, calls = torch.linalg.eigh, []

    def failing(x: Tensor) -> Any:
        calls.append(x.dtype)
        if len(calls) > failures:
            return original(x)
        if kind == "error":
            raise torch.linalg.LinAlgError("did not converge")
        return original(x)[0], torch.full_like(x, torch.nan)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    a = torch.randn(3, 5, 8)
    gram = a @ a.mT * 1e-20
    values, vectors = eigh(gram)
    assert calls == [torch.float32, torch.float64] and values.dtype == vectors.dtype == torch.float32
    again = (vectors * values.unsqueeze(-2)) @ vectors.mT
    if failures == 1:
        torch.testing.assert_close(again, gram, rtol=0, atol=1e-5 * float(gram.abs().max()))
    else:
        torch.testing.assert_close(again, torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1)))
    assert (values.diff() >= 0).all()


def test_matrix_power() -> None:
    torch.manual_seed(0)
    a = torch.randn(4, 6, 9, dtype=torch.float64)
    gram = a @ a.mT
    root = matrix_power(gram, -0.5, 0.1)
    torch.testing.assert_close(torch.linalg.inv(root @ root), gram + 0.1 * torch.eye(6, dtype=torch.float64))
    low = gram.clone()
    low[0] = a[0, :, :2] @ a[0, :, :2].mT
    torch.testing.assert_close(matrix_power(low, -1.0), torch.linalg.pinv(low, hermitian=True))
    # An eps that counts holds where the eigenvalues are 0; one lost in rounding does not.
    values = torch.linalg.eigvalsh(matrix_power(low[0], -1.0, 1e-3))
    torch.testing.assert_close(values[-4:], torch.full((4,), 1e3, dtype=torch.float64))
    assert torch.linalg.eigvalsh(matrix_power(low[0], -1.0, 1e-18)).max() < 1e3
    assert (matrix_power(torch.zeros(3, 3), -0.5, 1e-12) == 0).all()
    broken = torch.eye(3).expand(3, 3, 3).clone()
    broken[0, 0, 1], broken[1, 2, 2] = torch.nan, torch.inf
    torch.testing.assert_close(matrix_power(broken, -0.5), torch.eye(3) * torch.tensor([0.0, 0, 1]).view(3, 1, 1))
    assert matrix_power(torch.zeros(2, 0, 0), -0.5).shape == (2, 0, 0)


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1.0, 1e37])
def test_eigh_of_any_size(scale: float) -> None:
    torch.manual_seed(0)
    a = torch.randn(6, 9)
    gram = a @ a.mT / 30
    values, vectors = eigh(gram * scale)
    torch.testing.assert_close(values / scale, torch.linalg.eigvalsh(gram), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(6), rtol=0, atol=1e-5)
    assert eigh(torch.zeros(2, 0, 0))[1].shape == (2, 0, 0)
    assert all(torch.isfinite(x).all() for x in eigh(torch.full((3, 3), torch.inf)))
    assert all(torch.isfinite(x).all() for x in eigh(torch.full((3, 3), torch.nan)))


def test_power_iteration_finds_the_eigenvectors_in_order() -> None:
    torch.manual_seed(0)
    q = torch.linalg.qr(torch.randn(3, 6, 6, dtype=torch.float64))[0]
    gram = (q * torch.tensor([1e30, 4e29, 1e29, 3e28, 1e28, 0.0])) @ q.mT
    basis = torch.linalg.qr(torch.randn(3, 6, 6, dtype=torch.float64))[0]
    for _ in range(80):
        power_iteration_(basis, gram)
    identity = torch.eye(6, dtype=torch.float64).expand(3, 6, 6)
    torch.testing.assert_close((basis.mT @ q).abs(), identity, atol=1e-9, rtol=0)
    shuffled = basis[..., [3, 1, 0, 2, 5, 4]]
    order = power_iteration_(shuffled, gram)
    assert order.tolist() == [[2, 1, 3, 0, 5, 4]] * 3
    torch.testing.assert_close(shuffled.abs(), basis.abs())
    low = torch.linalg.qr(torch.randn(6, 6))[0]
    high = low.clone()
    gram = torch.ones(6, 6) + torch.diag(torch.arange(6.0)) / 10
    power_iteration_(low, gram)
    power_iteration_(high, gram * 2e38)  # sums of these overflow
    torch.testing.assert_close(high, low)
    assert power_iteration_(low, gram, ordered=False).tolist() == list(range(6))
