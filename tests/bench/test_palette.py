"""Colours: every optimizer has its family's, and lines of one family can be told apart."""

from __future__ import annotations

import normopt
from benchmarks.output.palette import COLORS, DASHES, LIBRARIES, NO_NORM, OTHER, color, family, lines
from normopt.ingredient import choices
from normopt.norms import Norm


def test_every_norm_and_every_optimizer_has_a_colour() -> None:
    ours = [cls for cls in choices(Norm).values() if cls.__module__.startswith("normopt.")]
    assert {cls.__name__ for cls in ours} == set(COLORS)
    assert len({*COLORS.values(), NO_NORM, OTHER}) == len(COLORS) + 2
    assert {color(name) for name in normopt.list_optimizers()} <= {*COLORS.values(), NO_NORM}


def test_variants_are_of_their_optimizers_family() -> None:
    assert family("muon@angpt alpha_init=0.25") == family("muonplus-soap") == family("shampoo") == "Spectral"
    assert color("adamw") == color("soap") == COLORS["Max"] and color("sinkgd") == NO_NORM
    assert color("lion_pytorch:Lion") == OTHER


def test_lines_of_one_family_differ() -> None:
    drawn = lines(["muon", "normuon", "scion", "shampoo", "muonplus", "muonh", "adamw"])
    assert len({tuple(style.values()) for style in drawn.values()}) == len(drawn)


def test_lines_may_be_coloured_by_what_is_compared() -> None:
    drawn = lines(["muon", "adam", "scion", "lion"], lambda name: "red" if name in ("muon", "scion", "lion") else OTHER)
    assert [style["color"] for style in drawn.values()] == ["red", OTHER, "red", "red"]
    assert [style["linestyle"] for style in drawn.values()] == [DASHES[0], DASHES[0], *DASHES[1:3]]


def test_libraries_have_fixed_colours() -> None:
    assert len({*LIBRARIES.values(), OTHER}) == len(LIBRARIES) + 1
