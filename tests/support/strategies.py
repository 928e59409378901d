"""Matrices of known singular values, and what the tests of the norms share."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from normopt import norms
from normopt.ingredient import choices

SCALES = (*norms.SCALES, "rms", 2.5)

#: Arguments under which the identities are exact and nothing is trivial, for norms that need other ones than defaults.
ARGUMENTS = {
    "Spectral": {"method": "exact"},
    "KyFan": {"k": 3},
    "DualKyFan": {"k": 3},
    "PerBlock": {"inner": norms.Euclidean(scale="unit"), "rows": 3, "columns": 5},
}

# Every registered norm under every scale.
NORMS = [
    cls(scale=scale, **ARGUMENTS.get(cls.__name__, {}))
    for _, cls in sorted(choices(norms.Norm).items())
    for scale in SCALES
]
UNIT = [norm for norm in NORMS if norm.scale == "unit"]
RMS = [norm for norm in NORMS if norm.scale == "rms"]


def label(norm: norms.Norm) -> str:
    return f"{type(norm).__name__}-{norm.scale}"


def inner(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> of each matrix."""
    return (a * b).sum(dim=(-2, -1))


def orthogonal(m: int, n: int) -> Tensor:
    """A random (m x n) matrix with orthonormal columns or rows."""
    q = torch.linalg.qr(torch.randn(max(m, n), min(m, n), dtype=torch.float64)).Q
    return q if m >= n else q.mT


def from_spectrum(m: int, n: int, s: Tensor) -> Tensor:
    """A random (m x n) matrix with the singular values ``s``."""
    return (orthogonal(m, len(s)) * s) @ orthogonal(len(s), n)


def spectrum(r: int, smallest: float = 0.1) -> Tensor:
    """``r`` singular values from 1 down to ``smallest``, each the same fraction of the one before."""
    return torch.logspace(0, math.log10(smallest) if r > 1 else 0, r, dtype=torch.float64)


def _integers(m: int, n: int) -> Tensor:
    return torch.randint(-2, 3, (m, n), dtype=torch.float64)


def _sparse(m: int, n: int) -> Tensor:
    """Some rows, some columns and some entries are 0."""
    keep = (torch.rand(m, 1) < 0.7) & (torch.rand(1, n) < 0.7) & (torch.rand(m, n) < 0.7)
    return torch.randn(m, n, dtype=torch.float64) * keep


#: Condition number at most 10 on the range, so that squaring the matrix leaves 14 of 16 digits.
WELL_CONDITIONED = {
    "zero": lambda m, n: torch.zeros(m, n, dtype=torch.float64),
    "full rank": lambda m, n: from_spectrum(m, n, spectrum(min(m, n))),
    "orthogonal": orthogonal,
    "rank one": lambda m, n: from_spectrum(m, n, spectrum(1)),
    "rank deficient": lambda m, n: from_spectrum(m, n, spectrum(max(1, min(m, n) // 2))),
}
KINDS = WELL_CONDITIONED | {
    "gaussian": lambda m, n: torch.randn(m, n, dtype=torch.float64),
    "decaying": lambda m, n: from_spectrum(m, n, spectrum(min(m, n), 1e-6)),
    "integers": _integers,
    "sparse": _sparse,
}


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    """Shapes of matrices from 1x1 to 40x70 and 70x40, with up to two leading dimensions."""
    m = draw(st.one_of(st.integers(1, 3), st.integers(1, 40)))
    n = draw(st.one_of(st.integers(1, 3), st.integers(1, 70)))
    sides = (n, m) if draw(st.booleans()) else (m, n)
    return (*draw(st.sampled_from([(), (), (1,), (3,), (2, 2)])), *sides)


@st.composite
def matrices(draw: st.DrawFn, kinds: dict = KINDS, shape: tuple[int, ...] | None = None, scaled: bool = True) -> Tensor:
    """Float64 matrices; each of a batch is of its own kind, and all have one of a few sizes."""
    shape = shape or draw(shapes())
    torch.manual_seed(draw(st.integers(0, 2**16)))
    names = st.sampled_from(sorted(kinds))
    batch = [kinds[draw(names)](*shape[-2:]) for _ in range(math.prod(shape[:-2]))]
    size = draw(st.sampled_from([1.0, 1e-6, 1e6])) if scaled else 1.0
    return torch.stack(batch).reshape(shape) * size


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Two independent matrices (or batches of them) of one shape."""
    shape = draw(shapes())
    return draw(matrices(shape=shape)), draw(matrices(shape=shape))


def assert_close(actual: Tensor, expected: Tensor, tol: float = 1e-12) -> None:
    """Equal up to ``tol`` times the largest entry of ``expected``; by default what float64 leaves after a few sums."""
    size = float(expected.abs().amax()) if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=tol * size)
