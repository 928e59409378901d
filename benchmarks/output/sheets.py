"""The tables and figures of a page: cells with the keys that they are sorted by, and figures as inline SVG."""

import io
import math
import re
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from benchmarks.output import figures
from benchmarks.output.palette import BASELINE, BLACK, color
from benchmarks.output.statistics import Estimate
from benchmarks.output.targets import Reach


@dataclass(frozen=True)
class Cell:
    """A cell of a table: what is shown, what it is sorted by (empty: after all others), and a colour beside it."""

    text: str
    key: str
    shade: str = ""


@dataclass(frozen=True)
class Sheet:
    """A table of the page."""

    header: list[str]
    lines: list[list[Cell]]


@dataclass(frozen=True)
class Drawing:
    """A figure of the page, as SVG, with what it shows."""

    svg: str
    caption: str


@dataclass
class Part:
    """The runs of one study within a section: figures, tables, and (what is said, command) of their folders."""

    title: str = ""
    figures: list[Drawing] = field(default_factory=list)
    tables: list[Sheet] = field(default_factory=list)
    commands: list[tuple[str, str]] = field(default_factory=list)


def drawings(*drawn: tuple[Figure | None, str]) -> list[Drawing]:
    """The figures that there are, with their captions."""
    return [Drawing(svg(figure), caption) for figure, caption in drawn if figure is not None]


def svg(figure: Figure) -> Any:
    """The figure as an SVG element for HTML, as wide as its place allows, without any address in it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    width = figure.get_figwidth()
    return Markup(re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', _opening(width), text, count=1))


def _opening(width: float) -> str:
    return rf'<svg viewBox="\1" role="img" style="max-width:{96 * width:.0f}px">'


def name_cell(name: str) -> Cell:
    """An optimizer's name, with the colour of its family."""
    return Cell(name, name, BLACK if name == BASELINE else color(name))


def number(value: float, form: str) -> Cell:
    """A number and itself as the key; NaN and infinite values are sorted after all others."""
    if isinstance(value, float) and not math.isfinite(value):
        return Cell("" if math.isnan(value) else "diverged", "")
    return Cell(format(value, form), repr(float(value)))


def bounded(found: Reach, unit: float, form: str = ",.0f") -> Cell:
    """Steps in a unit of which a step takes `unit`, with the bound before them."""
    return Cell(f"{found.bound}{format(found.steps * unit, form)}", repr(found.steps * unit))


def interval(value: Estimate | None, form: str) -> list[Cell]:
    """The mean, the ends of its interval and the number of seeds, each empty where there is none."""
    if value is None:
        return [Cell("", "")] * 4
    ends = [math.nan if end is None else end for end in (value.low, value.high)]
    return [number(value.mean, form), *(number(end, form) for end in ends), number(value.n, "d")]


def drawable(middle: float, low: float | None, high: float | None) -> figures.Interval:
    """(middle, low, high), without an interval the middle three times."""
    return (middle, middle, middle) if low is None or high is None else (middle, low, high)
