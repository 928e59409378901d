"""What `--optimizers` means: names and patterns of them, optimizers of other libraries, and own combinations.

Texts are read, never evaluated: the arguments of a combination are literals, or ingredients of normopt by their text.
"""

import ast
import difflib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import normopt
from benchmarks import controls, peers
from benchmarks.harness import PlanError

#: Between the name of a recipe and that of the part that is left out.
WITHOUT = "-without-"
#: The optimizer that is made of ingredients alone, beside the named ones.
BARE = "steepestdescent"


@dataclass(frozen=True)
class Contender:
    """An optimizer under the name that tables show: the optimizer `base`, with some of its options set.

    `base` is an optimizer of normopt, an entry of `tuned.json`, or `library:Class`.
    """

    name: str
    base: str
    options: dict[str, Any] = field(default_factory=dict)


def read_contenders(texts: Iterable[str], variants: Iterable[str]) -> list[Contender]:
    """The contenders that the parts of `--optimizers` name, without repetitions; `variants` are names of `tuned.json`.

    A part is `all` (every optimizer of normopt), a pattern like `*muon*` or `torch:*`, a name, `torch:AdamW`, or
    `NAME=OPTIMIZER(option=value,...)`, of which `NAME=` and the options may be left out. Recipes without one of their
    parts are matched by patterns that say so, like `*-without-*`.

    Raises:
        PlanError: an unknown name, with the nearest known one; a text that cannot be read; a name that is given twice.
    """
    names = sorted({*normopt.list_optimizers(), *variants, *controls.NAMES})
    found: dict[str, Contender] = {}
    for text in texts:
        for contender in _read(text, names):
            if found.setdefault(contender.name, contender) != contender:
                raise PlanError(f"--optimizers has two different optimizers named {contender.name}: rename one")
    return list(found.values())


def _read(text: str, names: list[str]) -> list[Contender]:
    if text == "all":
        return [Contender(name, name) for name in normopt.list_optimizers()]
    if re.search(r"[*?\[]", text) and "(" not in text and "=" not in text:
        return [Contender(name, name) for name in _matching(text, names)]
    label, call = _label(text)
    base, options = (call, {}) if "(" not in call else _call(call)
    if peers.is_peer(base):
        peers.find(base)
    else:
        base = _known(base, names)
    if label is None:
        return [Contender(base if not options else text, base, options)]
    if label in names:
        raise PlanError(f"--optimizers {text}: there is an optimizer named {label} already; choose another name")
    if not re.fullmatch(r"[\w.+-]+", label):
        raise PlanError(f"--optimizers {text}: the name {label!r} is not of letters, digits and _ . + - alone")
    return [Contender(label, base, options)]


def _matching(pattern: str, names: list[str]) -> list[str]:
    """The names that a pattern matches: of `library:pattern` those of the library."""
    library, colon, of_class = pattern.partition(":")
    of_library = bool(colon) and not any(name.startswith(f"{library}:") for name in names)  # of negative controls
    if of_library:
        found = [f"{library}:{name}" for name in sorted(peers.classes(library)) if fnmatchcase(name, of_class)]
    else:
        found = [
            name for name in names if fnmatchcase(name, pattern.lower()) and (WITHOUT in pattern or WITHOUT not in name)
        ]
    if not found:
        known = f"{library}'s are {', '.join(sorted(peers.classes(library)))}" if of_library else f"{', '.join(names)}"
        raise PlanError(f"--optimizers {pattern} matches none: choose from {known}")
    return found


def _known(name: str, names: list[str]) -> str:
    """A name as normopt spells it; an unknown one raises `PlanError` with the nearest known one."""
    for spelled in (name, name.lower()):
        if spelled in names or spelled == BARE:
            return spelled
    nearest = difflib.get_close_matches(name.lower(), [*names, BARE], n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"choose from all, torch:NAME, {', '.join(names)}"
    raise PlanError(f"--optimizers: unknown optimizer {name!r}: {hint}")


def _label(text: str) -> tuple[str | None, str]:
    """The name before `=`, if there is one, and the rest."""
    label, equals, call = text.partition("=")
    return (label.strip(), call.strip()) if equals and "(" not in label else (None, text)


def _call(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the options of `name(option=value, ...)`: literals, and ingredients as their texts."""
    name, _, rest = text.partition("(")
    like = "give it as NAME=muon(momentum=0.9,nesterov=False)"
    try:
        node = ast.parse(f"_({rest}", mode="eval").body
    except SyntaxError as error:
        raise PlanError(f"--optimizers {text} cannot be read, {error.msg}: {like}") from None
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        raise PlanError(f"--optimizers {text} cannot be read: {like}")
    if node.args or not all(word.arg for word in node.keywords):
        raise PlanError(f"--optimizers {text}: all options need their names: {like}")
    return name.strip(), {str(word.arg): _value(text, str(word.arg), word.value) for word in node.keywords}


def _value(text: str, option: str, node: ast.expr) -> Any:
    if isinstance(node, ast.Call):
        return ast.unparse(node)  # an ingredient, which normopt reads, and refuses if it is none
    try:
        value = ast.literal_eval(node)
        json.dumps(value, allow_nan=False)  # rows of results keep it
    except (ValueError, TypeError):
        kinds = "a number, text, True, False, None, a list, a dict or an ingredient"
        raise PlanError(f"--optimizers {text}: {option} is {ast.unparse(node)}, and not {kinds}") from None
    return value
