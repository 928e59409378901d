"""Values on the command line, from text; what cannot be read is an error that says what is wanted."""

import argparse
import ast
from collections.abc import Callable, Sequence
from typing import TypeVar

Value = TypeVar("Value")


def split(text: str) -> list[str]:
    """The parts between commas that are in no brackets and in no quotes, without spaces around; empty ones left out."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        else:
            depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def number(convert: Callable[[str], Value], holds: Callable[[Value], bool], meaning: str) -> Callable[[str], Value]:
    """A converter of texts to numbers for which `holds`; any other text is no `meaning`."""

    def read(text: str) -> Value:
        try:
            value = convert(text)
            if holds(value):
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"{text!r} is not {meaning}")

    return read


positive_int = number(int, lambda value: value > 0, "a whole number from 1 up")
tens = number(int, lambda value: value > 0 and value % 10 == 0, "a multiple of 10 from 10 up")
whole = number(int, lambda value: value >= 0, "a whole number from 0 up")
positive_float = number(float, lambda value: 0 < value < float("inf"), "a positive number")
share = number(float, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def threads(text: str) -> int | None:
    """A number of threads, or `None` for "default", which is torch's choice."""
    return None if text == "default" else number(int, lambda value: value > 0, "default or a number from 1 up")(text)


def list_of(convert: Callable[[str], Value], like: str) -> Callable[[str], list[Value]]:
    """A converter of a list; `like` is an example, for the error."""

    def read(text: str) -> list[Value]:
        try:
            values = [convert(part) for part in split(text)]
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{error}; give a list like {like}") from None
        if not values:
            raise argparse.ArgumentTypeError(f"the list is empty; give a list like {like}")
        return values

    return read


def among(known: Sequence[str]) -> Callable[[str], list[str]]:
    """A converter of a list of names."""

    def read(text: str) -> list[str]:
        names = split(text)
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name} is none of {', '.join(known)}")
        if not names:
            raise argparse.ArgumentTypeError(f"the list is empty; choose from {', '.join(known)}")
        return names

    return read


def options(text: str) -> dict[str, object]:
    """`name=1.0,other=False` as a dict; the values are literals."""
    found: dict[str, object] = {}
    for part in split(text):
        name, equals, value = part.partition("=")
        try:
            found[name.strip()] = ast.literal_eval(value.strip())
        except (SyntaxError, ValueError):
            equals = ""
        if not equals:
            raise argparse.ArgumentTypeError(f"{part!r} is not like gate_scale=1.0 or lerp=False")
    return found


def rates_by_name(text: str) -> dict[str, float]:
    """`muon=0.01,adamw=3e-3` as a dict."""
    found = {}
    for part in split(text):
        name, equals, rate = part.rpartition("=")
        if not equals:
            raise argparse.ArgumentTypeError(f"{part!r} has no '='; give NAME=RATE, like muon=0.01,adamw=3e-3")
        try:
            found[name.strip()] = positive_float(rate.strip())
        except argparse.ArgumentTypeError as error:
            like = "give NAME=RATE, like muon=0.01,adamw=3e-3"
            raise argparse.ArgumentTypeError(f"the rate of {name.strip()}: {error}; {like}") from None
    return found
