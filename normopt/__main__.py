"""What there is and what an optimizer would do to a model, from the command line: ``python -m normopt --help``."""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from torch import nn

import normopt


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``list``, ``table`` or ``describe``."""
    parser = argparse.ArgumentParser("python -m normopt", description="Optimizers by norm and memory.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the names of all optimizers")
    commands.add_parser("table", help="the periodic table of norms and memories")
    describe = commands.add_parser("describe", help="what an optimizer would do to each tensor of a model, and why")
    describe.add_argument("model", metavar="package.module:factory", help="a callable that returns the model")
    describe.add_argument("--optimizer", default="muon", metavar="NAME", help="one of list; by default muon")
    describe.add_argument("--lr", type=float, help="the learning rate; by default the optimizer's own")
    describe.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="another argument, such as weight_decay=0.1"
    )
    describe.add_argument("--full", action="store_true", help="a row for each parameter")
    given = parser.parse_args(arguments)
    if given.command == "list":
        show("\n".join(normopt.list_optimizers()))
    elif given.command == "table":
        show(normopt.periodic_table())
    else:
        try:
            options = dict(map(_option, given.set)) | ({} if given.lr is None else {"lr": given.lr})
            optimizer = normopt.create(given.optimizer, model_of(given.model), **options)
        except (ValueError, TypeError) as error:
            describe.error(str(error))
        show(normopt.describe(optimizer, full=given.full))


def show(text: str) -> None:
    """Print, with numbers and names in colour if this is a terminal and rich is installed."""
    if sys.stdout.isatty():
        try:
            from rich.console import Console
        except ImportError:
            pass
        else:
            Console(soft_wrap=True).print(text, markup=False, emoji=False)
            return
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader, such as head, has seen enough; Python would complain once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def model_of(place: str) -> nn.Module:
    """The model that ``package.module:factory`` returns.

    Raises:
        ValueError: there is no such module or callable, it fails, or what it returns is no model.
    """
    name, _, attribute = place.partition(":")
    if not name or not attribute:
        raise ValueError(f"{place!r} does not say where the model is; write package.module:factory")
    try:
        factory: Any = importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"cannot import {name!r} from here: {error}") from error
    for part in attribute.split("."):
        if not hasattr(factory, part):
            raise ValueError(f"{name!r} has no {attribute!r}")
        factory = getattr(factory, part)
    if not callable(factory) or isinstance(factory, nn.Module):
        raise ValueError(f"{place} is {type(factory).__name__}, not a callable that returns a model")
    try:
        model = factory()
    except Exception as error:
        raise ValueError(f"{place}() raised {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{place}() returned {type(model).__name__}, not a torch.nn.Module")
    return model


def _option(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    if not name or not value:
        raise ValueError(f"--set {text}: write NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


if __name__ == "__main__":
    main()
