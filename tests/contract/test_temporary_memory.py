"""A step needs the memory of one batch beside parameters, gradients and state, however many batches there are."""

from __future__ import annotations

import pytest
from torch.profiler import profile

from normopt import zoo
from normopt.engine import plan
from tests.support.memory import peak_bytes
from tests.support.optimizers import EVERY, Make
from tests.support.steps import give_gradients, tensors

#: Step sizes that must see all directions before they say how long a step is.
HOLDS_ALL = {"dual"}


def peak_of_step(make: Make, matrices: int) -> int:
    """The largest of two steps after the first, which makes the state; the profiler may lose one's events."""
    params = tensors([(16, 16)] * matrices)
    optimizer = make(params)
    peaks = []
    for i in range(3):
        give_gradients(params, i)
        peaks.append(peak_bytes(optimizer.step))
    return max(peaks[1:])


@pytest.mark.parametrize("name", EVERY)
def test_temporary_memory_does_not_grow_with_the_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "MAX_ENTRIES", 1024)
    monkeypatch.setattr(plan, "FLAT_ENTRIES", 512)
    few, many = (peak_of_step(EVERY[name], matrices) for matrices in (8, 32))
    if name in HOLDS_ALL:
        assert many > 2 * few
    else:
        assert many < 1.5 * few + 4096, (few, many)  # some matrices need an SVD where others do without


@pytest.mark.parametrize(("number", "gathered"), [(1, 0), (3, 2)])
def test_gradients_are_laid_end_to_end_once_a_step(number: int, gathered: int) -> None:
    """Prodigy asks for gradients three times, and for weights; a single tensor is taken as it is."""
    params = tensors([(8, 4 + i) for i in range(number)])
    optimizer = zoo.Prodigy(params)
    for i in range(2):  # the first step makes the state
        give_gradients(params, i)
        with profile() as seen:
            optimizer.step()
    # Step sizes stack numbers.
    cats = [
        event
        for event in seen.events()
        if event.name == "aten::cat" and getattr(event.cpu_parent, "name", "") != "aten::stack"
    ]
    assert len(cats) == gathered
