"""A norm that a user defines, in one class, is a full member of the library: it trains, remembers, rotates, resumes."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import normopt
from normopt import Chain, Clipped, Direction, Eigenbasis, FrankWolfe, Norm, Prodigy, Rotated, Smoothed, SteepestDescent
from normopt.nn import GPT
from tests.support.strategies import assert_close, inner

pytestmark = pytest.mark.usefixtures("registry")

TEXT = (Path(__file__).parents[2] / "README.md").read_bytes()


def define() -> type[Norm]:
    @dataclass(frozen=True)
    class Pairs(Norm):
        """Two rows are one row of complex numbers, as for rotary embeddings: the largest of their absolute values."""

        def sizes(self, x: Tensor) -> Tensor:
            """The absolute values, each twice, shape ``(..., out, in)``."""
            return x.unflatten(-2, (-1, 2)).norm(dim=-2).repeat_interleave(2, dim=-2)

        def unit_rms(self, m: int, n: int) -> float:
            return 2**0.5

        def unit_norm(self, w: Tensor) -> Tensor:
            return self.sizes(w).amax(dim=(-2, -1))

        def unit_dual_norm(self, g: Tensor) -> Tensor:
            return self.sizes(g).sum(dim=(-2, -1)) / 2

        def unit_dualize(self, g: Tensor) -> Tensor:
            return g / self.sizes(g).clamp(min=1e-30)

        def unit_project(self, w: Tensor, radius: float) -> Tensor:
            return w * (radius / self.sizes(w).clamp(min=1e-30)).clamp(max=1.0)

        def unit_update_rms(self, m: int, n: int) -> float:
            return 0.5**0.5

        def second_moment(self, g: Tensor) -> tuple[Tensor, ...]:
            return (self.sizes(g).square(),)

    return Pairs


@pytest.fixture
def pairs(registry: None) -> Iterator[type[Norm]]:
    yield define()


def test_it_is_a_norm(pairs: type[Norm]) -> None:
    norm, g, w = pairs(), torch.randn(3, 6, 5), torch.randn(3, 6, 5)
    d, p = norm.dualize(g), norm.project(w, 0.3)
    assert_close(inner(g, d), norm.dual_norm(g), 1e-6)
    assert_close(norm.norm(d), torch.ones(3), 1e-6)
    assert_close(d.square().mean().sqrt(), torch.tensor(norm.rms((6, 5))), 1e-6)
    assert_close(norm.whiten(g, norm.second_moment(g)), d, 1e-6)
    assert (norm.norm(p) <= 0.3 + 1e-6).all() and (norm.norm(w) > 0.3).all()
    assert_close(0.3 * norm.dual_norm(w - p), inner(w - p, p), 1e-5)  # the nearest point
    assert_close(norm.norm(norm.initialize_(w)), torch.ones(3), 1e-6)


def test_it_is_known_by_name(pairs: type[Norm]) -> None:
    assert "pairs" in normopt.norms.names()
    for spec in ("pairs", "Pairs", "Pairs()"):
        assert normopt.norms.get(spec) == pairs()
    assert normopt.norms.get(repr(pairs(scale=0.5))) == pairs(scale=0.5)
    rows = normopt.periodic_table().splitlines()
    (row,) = (row for row in rows if row.startswith("Pairs"))
    smoothed = "Smoothed(norm=Pairs())"
    for cell in ("(Pairs())", f"({smoothed})", f"(Rotated(direction={smoothed},"):  # broken there
        assert cell in row


def test_it_is_forgotten_after_the_test() -> None:
    assert "pairs" not in normopt.norms.names()


class Run:
    """A GPT on the bytes of a text: its hidden matrices move by a direction of the user's, the rest by Adam."""

    def __init__(self, direction: str | Direction, lr: float, **rule: Any) -> None:
        torch.manual_seed(0)
        self.model = GPT(128, 16, 2, 2)
        rest = {"norm": Smoothed(normopt.Max(), beta=0.95)}
        geometry = {"embedding": rest, "unembedding": rest, "vector": rest}
        self.optimizer = SteepestDescent(self.model, lr, direction, 0.9, geometry=geometry, **rule)
        self.windows = torch.frombuffer(bytearray(TEXT[:2048]), dtype=torch.uint8).long().clamp(max=127).view(-1, 64)

    def step(self) -> float:
        self.optimizer.zero_grad()
        logits = self.model(self.windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), self.windows[:, 1:].flatten())
        loss.backward()
        self.optimizer.step()
        return loss.item()


#: In the order of the periodic table, then with everything around it.
RULES: dict[str, Any] = {
    "no memory": lambda norm: Run("pairs", 0.01),
    "by repr": lambda norm: Run("Smoothed(Pairs(scale='rms'), beta=0.95)", 0.01),
    "second moment": lambda norm: Run(Smoothed(norm(), beta=0.95), 0.01),
    "rotated": lambda norm: Run(Rotated(Smoothed(norm(), beta=0.95), Eigenbasis(frequency=5)), 0.01),
    "chain": lambda norm: Run(Chain(norm(), Clipped(norm(), 0.5)), 0.02),
    "prodigy": lambda norm: Run(norm(), 1.0, step_size=Prodigy(d0=1e-3)),
    "prodigy, second moment": lambda norm: Run(Smoothed(norm(), beta=0.95), 1.0, step_size=Prodigy(d0=1e-3)),
    "ball": lambda norm: Run(norm(), 0.01, constraint=FrankWolfe()),
}


@pytest.mark.parametrize("make", RULES.values(), ids=RULES)
def test_it_trains_a_language_model_and_resumes(make: Any, pairs: type[Norm]) -> None:
    run = make(pairs)
    losses = [run.step() for _ in range(10)]
    file = io.BytesIO()
    torch.save({"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}, file)
    losses += [run.step() for _ in range(10)]
    assert all(map(math.isfinite, losses))
    assert losses[-1] < 0.9 * losses[0], losses

    file.seek(0)
    saved = torch.load(file)
    resumed = make(pairs)
    resumed.model.load_state_dict(saved["model"])
    resumed.optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
    assert [resumed.step() for _ in range(10)] == losses[10:]
    assert all(map(torch.equal, resumed.model.parameters(), run.model.parameters()))


def test_every_hidden_matrix_moves_by_the_learning_rate_in_its_norm(pairs: type[Norm]) -> None:
    run = Run("pairs", 0.01)
    hidden = {name: w for name, w in run.model.named_parameters() if w.ndim == 2 and name.startswith("blocks")}
    before = {name: w.detach().clone() for name, w in hidden.items()}
    run.step()
    assert len(hidden) == 10
    for name, w in hidden.items():
        assert float(pairs().norm(w.detach() - before[name])) == pytest.approx(0.01, rel=1e-3)


def test_the_report_names_it(pairs: type[Norm]) -> None:
    report = normopt.describe(Run(Smoothed(pairs()), 0.01).optimizer)
    assert "Smoothed(norm=Pairs(), beta=0.999, eps=1e-08)" in report


def test_the_definition_is_short() -> None:
    lines = Path(__file__).read_text().split("def define()")[1].split("return Pairs")[0].splitlines()
    assert len(lines) < 40
