"""A norm and an optimizer of your own, checked, and trained on the benchmark's GPT beside Muon and AdamW.

The file is a plugin of the benchmark too: ``python -m benchmarks compare --optimizers muon,pairsdescent --lr
pairsdescent=0.02 --plugin examples/own_norm.py`` runs the full comparison; this script runs it in smoke mode, a tiny
model and few steps. Needs ``pip install -e '.[bench]'`` in a checkout.
"""

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from normopt import EMA, Norm, Rule
from normopt.ingredient import option
from normopt.zoo import MatrixOptimizer


@dataclass(frozen=True)
class Pairs(Norm):
    """Two rows are one row of complex numbers: the largest of their absolute values."""

    def sizes(self, x: Tensor) -> Tensor:
        """The absolute values, each twice, in the shape of ``x``."""
        if x.shape[-2] % 2:  # a last row without a partner is a pair with 0
            return self.sizes(torch.cat([x, torch.zeros_like(x[..., :1, :])], -2))[..., :-1, :]
        return x.unflatten(-2, (-1, 2)).norm(dim=-2).repeat_interleave(2, dim=-2)

    def unit_rms(self, m: int, n: int) -> float:
        return 2**0.5

    def unit_norm(self, w: Tensor) -> Tensor:
        return self.sizes(w).amax(dim=(-2, -1))

    def unit_dual_norm(self, g: Tensor) -> Tensor:
        return self.sizes(g)[..., ::2, :].sum(dim=(-2, -1))

    def unit_dualize(self, g: Tensor) -> Tensor:
        return g / self.sizes(g).clamp(min=1e-30)


class PairsDescent(MatrixOptimizer):
    """Averaged gradients, then steepest descent under ``Pairs``; AdamW for what is no hidden matrix."""

    lr: float | torch.Tensor = 0.002
    momentum: float = 0.95

    def rule(self) -> Rule:
        return Rule(Pairs(), EMA(option("momentum"), nesterov=True))


def check() -> None:
    """The two equations of a duality map: ``<g, d>`` is the dual norm, and ``d`` has norm 1."""
    norm, g = Pairs(), torch.randn(5, 6, 4, dtype=torch.float64)
    d = norm.dualize(g)
    torch.testing.assert_close((g * d).sum((-2, -1)), norm.dual_norm(g))
    torch.testing.assert_close(norm.norm(d), torch.ones(5, dtype=torch.float64))
    others = torch.randn(1000, 6, 4, dtype=torch.float64)
    others = others / norm.norm(others)[:, None, None]
    assert ((g[0] * others).sum((-2, -1)) <= norm.dual_norm(g)[0]).all()  # nothing else goes further down


if __name__ == "__main__":
    check()
    compare = [
        sys.executable,
        "-m",
        "benchmarks",
        "compare",
        "--smoke",
        "--data",
        "stdlib",
        "--out",
        tempfile.mkdtemp(),
    ]
    mine = [
        "--optimizers",
        "adamw,muon,pairsdescent",
        "--lr",
        "pairsdescent=0.002",
        "--plugin",
        str(Path(__file__).resolve()),
    ]
    sys.exit(subprocess.run([*compare, *mine], cwd=Path(__file__).resolve().parents[1]).returncode)
