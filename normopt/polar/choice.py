"""The form and dtype of the polar iteration's products for a shape: measured on CPUs, by capability elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from normopt.polar.coefficients import Quintic
from normopt.polar.newton_schulz import is_halved, products_of

#: Matrices are measured from this number of multiplications in ``X X^T`` on; smaller ones take the rule.
MEASURED_FROM = 1 << 16

#: Products that are timed have about this many multiplications: a stack of several small matrices, or a smaller matrix
#: of the same aspect ratio in place of a large one.
TIMED = 1 << 23

#: Rounds of timings, of which the first is for warming up: at least so many, since another process may interrupt a
#: round, and no more once the seconds are over.
ROUNDS, SECONDS = 4, 3e-3

#: What the rule would take is kept unless another choice takes less than this part of its time.
PAYS = 0.85

#: What part of its time a product takes of which a quarter is left out.
HALVED = 0.9

#: The rule, on a CPU: bfloat16 from this number of multiplications in ``X X^T`` on.
BFLOAT16_FROM = 5_000_000

#: The rule: the Gram form from this aspect ratio on; in bfloat16, with a shorter side of at most ``LARGE``, from the
#: second one on.
GRAM_FROM, GRAM_FROM_SMALL, LARGE = 2, 4, 256


#: The dtypes that products can have, by name.
PRODUCTS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Choice(NamedTuple):
    """A way to the polar factor: the form, ``"direct"``, ``"gram"`` or ``"exact"``, and the dtype of the products."""

    form: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.form} {str(self.dtype).removeprefix('torch.')}"


#: What has been measured in this process, by key.
_measured: dict[str, Choice] = {}

#: Seconds of the three products of matrices, see :func:`_seconds`, by their shorter and longer side.
_timed: dict[tuple[int, int], dict[torch.dtype, list[float]]] = {}


class _Use:
    """What holds inside of :func:`using`. Not a ContextVar, which torch.compile does not trace."""

    own: dict[str, Choice] | None = None
    by_rule: bool = False


def fastest(
    shape: tuple[int, ...], device: torch.device | str, key: str, rows: list[Quintic], candidates: list[Choice]
) -> Choice:
    """The fastest of several ways to the polar factor.

    The choice belongs to the shape of one matrix, whatever their number. On a CPU it is measured, when the shape is
    first seen in the process: the products that the candidates are made of are timed for a few milliseconds, on
    matrices without random numbers. The rule is taken instead for small matrices (``m^2 n < 65536``) and float64, where
    nothing may be measured (``torch.use_deterministic_algorithms``, :func:`using`, ``torch.compile``), and on all other
    devices:

    * bfloat16, if it is a candidate; on a CPU from ``m^2 n >= 5e6`` on.
    * The Gram form, ``4 m^2 n + 26 m^3`` FLOPs for four steps, or ``8 m^2 n + 20 m^3`` in bfloat16, which needs a
      restart, in place of ``16 m^2 n + 8 m^3``: where n >= 2 m, or n >= 4 m in bfloat16 if m <= 256.

    Args:
        shape: that of the matrices, ``(..., m, n)``; in what is said here m is the shorter side.
        device: where they are.
        key: what the choice is kept under: a text in which all is said that it depends on.
        rows: the coefficients of its steps.
        candidates: the choices that are accurate enough, at least one.
    """
    short, long = sorted(int(size) for size in shape[-2:])
    kind = torch.device(device).type
    if len(candidates) == 1:
        return candidates[0]
    preferred = _by_rule(candidates, short, long, kind)
    if kind != "cpu" or short * short * long < MEASURED_FROM or preferred.dtype == torch.float64:
        return preferred
    own = _Use.own
    choice = own.get(key) if own is not None else None
    if choice not in candidates:
        choice = None
        if not (_Use.by_rule or torch.are_deterministic_algorithms_enabled()):
            choice = _measured.get(key)
            if choice not in candidates:
                choice = None if torch.compiler.is_compiling() else _fastest(candidates, preferred, rows, short, long)
                if choice is not None:
                    _measured[key] = choice
        choice = preferred if choice is None else choice
        if own is not None and not torch.compiler.is_compiling():
            own[key] = choice
    return choice


@contextmanager
def using(own: dict[str, Choice], by_rule: bool = False) -> Iterator[None]:
    """Inside, choices in ``own`` go before what this process has measured, and every choice is written to it.

    Args:
        own: choices by key.
        by_rule: whether the rule is taken for all others, so that nothing is measured.
    """
    before = _Use.own, _Use.by_rule
    _Use.own, _Use.by_rule = own, by_rule
    try:
        yield
    finally:
        _Use.own, _Use.by_rule = before


def to_text(choices: Mapping[str, Choice]) -> str:
    """Choices as text, ``"96x384 newton-schulz: gram float32; 96x96 ..."``; ``""`` if there are none."""
    return "; ".join(f"{name}: {choices[name]}" for name in sorted(choices))


def from_text(text: str) -> dict[str, Choice]:
    """The inverse of :func:`to_text`; a ``ValueError`` for any other text."""
    found: dict[str, Choice] = {}
    if not isinstance(text, str):
        raise ValueError(f"products must be text like '96x384 auto: gram float32', or '', got {text!r}")
    for part in text.split("; ") if text else ():
        name, _, choice = part.partition(": ")
        form, _, dtype = choice.partition(" ")
        if form not in ("direct", "gram") or dtype not in PRODUCTS:
            raise ValueError(f"products must be text like '96x384 auto: gram float32', or '', got {part!r}")
        found[name] = Choice(form, PRODUCTS[dtype])
    return found


def _by_rule(candidates: list[Choice], short: int, long: int, kind: str) -> Choice:
    halves = [choice for choice in candidates if choice.dtype == torch.bfloat16]
    pays = kind != "cpu" or short * short * long >= BFLOAT16_FROM
    others = [choice for choice in candidates if choice.dtype != torch.bfloat16]
    left = (halves if pays else others) or candidates
    ratio = GRAM_FROM_SMALL if left[0].dtype == torch.bfloat16 and short <= LARGE else GRAM_FROM
    wanted = "gram" if long >= ratio * short else "direct"
    return next((choice for choice in left if choice.form == wanted), left[0])


def _fastest(candidates: list[Choice], preferred: Choice, rows: list[Quintic], short: int, long: int) -> Choice | None:
    """The candidate whose products take least time; ``None`` if they cannot be timed here."""
    seconds = _seconds(short, long, {choice.dtype for choice in candidates})
    if seconds is None:
        return None

    def cost(choice: Choice) -> float:
        grams, squares, applied = products_of(choice.form, rows, choice.dtype)
        of_gram, of_square, of_applied = seconds[choice.dtype]
        part = HALVED if is_halved(short, choice.dtype, torch.device("cpu")) else 1.0
        total = part * (grams * of_gram + squares * of_square) + applied * of_applied
        return total * (PAYS if choice == preferred else 1.0)

    return min(candidates, key=cost)


@torch.no_grad()
def _seconds(short: int, long: int, dtypes: Iterable[torch.dtype]) -> dict[torch.dtype, list[float]] | None:
    """By dtype, the least seconds of ``X X^T``, ``A + A A`` and ``X + A X`` on the CPU; ``None`` without numbers.

    They are seconds for one matrix, all of them smaller by one factor where a smaller matrix is timed.
    All products are timed in turn, so that what else the machine does falls on all alike.
    """
    found = _timed.get((short, long), {})
    if found.keys() >= set(dtypes):
        return found
    shrink = min(1.0, (TIMED / (short * short * long)) ** (1 / 3))
    m, n = (side if shrink == 1 else 16 * max(1, round(side * shrink / 16)) for side in (short, long))
    counts = [max(1, min(64, TIMED // size)) for size in (m * m * n, m**3, m * m * n)]
    timed: dict[tuple[torch.dtype, int], Callable[[], Tensor]] = {}
    for dtype in dtypes:
        x = torch.full((counts[0], m, n), n**-0.5, dtype=dtype)
        a = torch.full((counts[1], m, m), 1 / m, dtype=dtype)
        if type(x) is not Tensor:  # torch's fake tensors
            return None
        left = torch.full((counts[2], m, m), 1 / m, dtype=dtype)
        calls = partial(torch.bmm, x, x.mT), partial(torch.baddbmm, a, a, a), partial(torch.baddbmm, x, left, x)
        timed |= {(dtype, i): call for i, call in enumerate(calls)}
    least = dict.fromkeys(timed, float("inf"))
    end, rounds = time.perf_counter() + SECONDS, 0
    while rounds < ROUNDS or (rounds < 3 * ROUNDS and time.perf_counter() < end):
        for place, call in timed.items():
            start = time.perf_counter()
            call()
            took = time.perf_counter() - start
            least[place] = min(least[place], took) if rounds else least[place]
        rounds += 1
    found = found | {dtype: [least[dtype, i] / count for i, count in enumerate(counts)] for dtype in dtypes}
    _timed[short, long] = found
    return found


def has_bfloat16(kind: str) -> bool:
    """Whether devices of this kind, ``"cpu"`` or ``"cuda"``, have instructions for products in bfloat16."""
    if kind not in _BFLOAT16:
        _BFLOAT16[kind] = _has_bfloat16(kind)
    return _BFLOAT16[kind]


def _has_bfloat16(kind: str) -> bool:
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported") if kind == "cpu" else ()
    has_onednn: Callable[[], bool] = torch.backends.mkldnn.is_available
    return has_onednn() and any(getattr(torch.cpu, name, bool)() for name in names)


#: The answers so far, in a dict, because torch.compile does not trace functools.cache.
_BFLOAT16 = {"cpu": _has_bfloat16("cpu")}
