"""The memory of a step that a page states is what is measured."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import normopt
from tests.support.memory import peak_bytes
from tests.support.steps import give_gradients

PAGE = " ".join((Path(__file__).parents[2] / "docs" / "running.md").read_text(encoding="utf-8").split())
STATED = re.search(r"On ([\d.]+) million parameters \(d (\d+), (\d+) layers, vocabulary (\d+): .*?\.", PAGE)
assert STATED, "docs/running.md says what a step takes"
MILLIONS, WIDTH, LAYERS, VOCABULARY = STATED.groups()
#: By optimizer the least and the most MB.
SIZES = {
    name.lower(): [int(size) for size in re.findall(r"\d+", sizes)] or [0]
    for sizes, names in re.findall(r"(nothing|\d+(?: to \d+)? MB) for (\w+(?: and \w+)?)", STATED[0])
    for name in names.split(" and ")
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_a_step_takes_the_memory_that_the_page_states(name: str) -> None:
    """Beside parameters, gradients and state, which the first step makes; in MB, to a tenth."""
    model = normopt.nn.GPT(vocab_size=int(VOCABULARY), d_model=int(WIDTH), n_layers=int(LAYERS), n_heads=8)
    params: list[torch.Tensor] = [*model.parameters()]
    assert f"{sum(p.numel() for p in params) / 1e6:.1f}" == MILLIONS
    optimizer, peaks = normopt.create(name, model), []
    for i in range(3):
        torch.manual_seed(i)
        give_gradients(params, i)
        peaks.append(peak_bytes(optimizer.step))
    assert 0.9 * SIZES[name][0] <= max(peaks[1:]) / 1e6 <= 1.1 * SIZES[name][-1] + 0.5
