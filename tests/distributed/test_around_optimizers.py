"""What stands around optimizers, on several ranks: averages, and steps within the softmax's radius."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.ranks import Ranks
from tests.support.sharded import (
    AVERAGED,
    LAYOUTS,
    averaged,
    evaluated_between_steps,
    softmax_limited,
)

Of = Callable[[int], Ranks]


#: A mean of all steps, and a bound whose state one rank has.
FEW = ("schedule-free NorMuon", "Frobenius sphere")
SLOW = ("fsdp 2", "mesh 2", "fsdp+tp 2x2", "hsdp 2x2")


@pytest.mark.parametrize(
    ("layout", "names"),
    [("fsdp 2", FEW), *(pytest.param(layout, (*AVERAGED,), marks=pytest.mark.exhaustive) for layout in SLOW)],
)
def test_averaged(ranks_of: Of, tmp_path: Path, layout: str, names: tuple[str, ...]) -> None:
    """In training and in evaluation, from a distributed checkpoint, and from the state of one process."""
    for name in names:
        for training, evaluated, is_resumed, is_loaded in ranks_of(LAYOUTS[layout]).run(
            averaged, name, layout, str(tmp_path / name)
        ):
            assert training <= 1e-5, name
            assert evaluated <= 1e-5, name
            assert is_resumed, name
            assert is_loaded, name


def test_a_sharded_model_sees_new_weights_after_reshard(ranks_of: Of) -> None:
    """What a forward pass without a backward pass has gathered stays, in torch 2.13 too, until the model is told."""
    for plain, sharded in ranks_of(2).run(evaluated_between_steps, "fsdp 2"):
        assert sharded == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize(
    "layout",
    [
        "fsdp 2",
        pytest.param("hsdp 2x2", marks=pytest.mark.exhaustive),
        pytest.param("mesh 2", marks=pytest.mark.exhaustive),
    ],
)
def test_softmax_limited_step(ranks_of: Of, layout: str) -> None:
    """Each rank has a part of the batch; the ratio is that of all of it, to the accuracy of a difference."""
    every = ranks_of(LAYOUTS[layout]).run(softmax_limited, layout)
    assert all(each == every[0] for each in every)
    for plain, sharded, distance in every[0]:
        assert plain > 2  # steps are cut
        assert sharded == pytest.approx(plain, rel=1e-3)
        assert distance <= 1e-3
