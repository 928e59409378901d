from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from normopt.ingredient import (
    Ingredient,
    Option,
    Stage,
    check_choice,
    check_range,
    choices,
    coarsest,
    get,
    nearest,
    parse,
    substate,
)


@dataclass(frozen=True)
class Herb(Ingredient):
    """What the tests below cook with."""

    _abstract: ClassVar[bool] = True


@dataclass(frozen=True)
class WildThyme(Herb):
    amount: Any = 1.0
    dried: bool = True
    name: str | None = None


@dataclass(frozen=True)
class Bouquet(Herb):
    herbs: tuple[Any, ...] = ()
    string: Ingredient | None = None


@dataclass(frozen=True)
class Jar(Ingredient):
    label: str
    content: tuple[Any, ...] = field(default_factory=tuple)


# repr and parse ------------------------------------------------------------------------------------------------

literals = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.floats(allow_nan=False, allow_infinity=False),
    st.just(math.inf),
    st.text(),
)
options = st.builds(Option, st.text(), st.none() | st.integers(0, 3))
ingredients = st.recursive(
    st.builds(WildThyme, literals, st.booleans(), st.none() | st.text()) | options,
    lambda inner: st.builds(
        Bouquet,
        st.lists(inner | literals | st.tuples(inner, st.tuples(literals))).map(tuple),
        st.none() | inner,
    ),
    max_leaves=6,
)


@given(ingredients)
def test_parse_reads_repr_back(ingredient: Ingredient) -> None:
    back = parse(repr(ingredient))
    assert back == ingredient and repr(back) == repr(ingredient)
    assert hash(back) == hash(ingredient)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("WildThyme()", WildThyme()),
        ("WildThyme(2)", WildThyme(2)),
        ("WildThyme(-2.5e-3, dried=False)", WildThyme(-2.5e-3, dried=False)),
        ("WildThyme(amount=inf)", WildThyme(math.inf)),
        ("WildThyme(amount=None, name='a, b')", WildThyme(None, name="a, b")),
        ("Bouquet((WildThyme(), (1,), ()), Option('betas', 1))", Bouquet((WildThyme(), (1,), ()), Option("betas", 1))),
        ("Jar('x')", Jar("x")),
    ],
)
def test_parse(text: str, expected: Ingredient) -> None:
    assert parse(text) == expected
    assert type(parse(text)) is type(expected)


@pytest.mark.parametrize("amount", [math.inf, -math.inf])
def test_infinities_read_back(amount: float) -> None:
    assert parse(repr(WildThyme(amount))) == WildThyme(amount)


@pytest.mark.parametrize(
    ("ingredient", "text"),
    [
        (WildThyme(), "WildThyme()"),
        (WildThyme(amount=1.0, dried=False), "WildThyme(dried=False)"),
        (Bouquet((WildThyme(2.0),)), "Bouquet(herbs=(WildThyme(amount=2.0, dried=True, name=None),))"),
        (Bouquet(string=WildThyme(2.0)), "Bouquet(string=WildThyme(amount=2.0))"),
        (Bouquet(string=Option("betas", 0)), "Bouquet(string=betas[0])"),
        (WildThyme(Option("lr")), "WildThyme(amount=lr)"),
        (Jar("x"), "Jar(label='x', content=())"),
    ],
)
def test_str_leaves_defaults_out(ingredient: Ingredient, text: str) -> None:
    assert str(ingredient) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "3",
        "inf",
        "'WildThyme()'",
        "(WildThyme(),)",
        "WildThyme",
        "WildThyme(",
        "WildThyme() + WildThyme()",
        "WildThyme(1 + 1)",
        "WildThyme(amount=math.inf)",
        "WildThyme(amount=dried)",
        "WildThyme(amount=max(1, 2))",
        "WildThyme(*(1, True))",
        "WildThyme(**{'amount': 2.0})",
        "WildThyme().resolve({})",
        "[WildThyme() for _ in (1,)]",
        "(lambda: WildThyme())()",
        "__import__('os').getcwd()",
        "open('/tmp/thyme', 'w')",
        "Ingredient._classes.clear()",
        "WildThyme(amount=__import__('os'))",
        "WildThyme(amount=f'{1}')",
        "WildThyme(name=(x := 'y'))",
        "import os",
        "WildThyme(); WildThyme()",
        "Herb()",
    ],
)
def test_parse_refuses_all_but_ingredients_of_literals(text: str) -> None:
    with pytest.raises(ValueError):
        parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("WildThime()", "unknown ingredient 'WildThime'; did you mean 'WildThyme'?"),
        ("Bouquet((WildThime(),))", "unknown ingredient 'WildThime'; did you mean 'WildThyme'?"),
        ("print(1)", "unknown ingredient 'print'"),
        ("WildThyme(", "cannot read the ingredient 'WildThyme('"),
    ],
)
def test_parse_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        parse(text)
    assert message in str(raised.value)


def test_parse_passes_the_ingredients_own_errors_on() -> None:
    with pytest.raises(ValueError, match=r"cannot read .*WildThyme.*unexpected keyword argument 'salt'"):
        parse("WildThyme(salt=1)")


# Names ---------------------------------------------------------------------------------------------------------


def test_choices_are_the_concrete_classes_of_a_kind() -> None:
    assert choices(Herb) == {"wild-thyme": WildThyme, "bouquet": Bouquet}
    assert {"wild-thyme", "bouquet", "jar", "option"} <= set(choices(Ingredient))
    assert {"herb", "stage", "ingredient"}.isdisjoint(choices(Ingredient))


@pytest.mark.parametrize("spec", ["wild-thyme", "wild_thyme", "WildThyme", "WildThyme()", WildThyme()])
def test_get(spec: str | Ingredient) -> None:
    assert get(Herb, spec) == WildThyme()


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("wild-time", ValueError, "unknown herb 'wild-time'; did you mean 'wild-thyme'? Known: bouquet, wild-thyme"),
        ("salt", ValueError, "unknown herb 'salt'; Known: bouquet, wild-thyme"),
        ("herb", ValueError, "unknown herb 'herb'"),
        ("jar", ValueError, "unknown herb 'jar'"),
        ("Jar('x')", TypeError, "expected a Herb or the name of one, got Jar(label='x', content=())"),
        (Jar("x"), TypeError, "expected a Herb or the name of one, got Jar("),
        (WildThyme, TypeError, "expected a Herb or the name of one, got <class"),
        (None, TypeError, "expected a Herb or the name of one, got None"),
    ],
)
def test_get_says_what_is_wrong(spec: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        get(Herb, spec)
    assert message in str(raised.value)


def test_nearest() -> None:
    assert nearest("spectrl", ["row", "spectral"]) == "did you mean 'spectral'? Known: row, spectral"
    assert nearest("xyz", {"b": 1, "a": 2}) == "Known: a, b"
    assert nearest("learning_rate", ["gamma", "lr"]) == "did you mean 'lr'? Known: gamma, lr"
    assert nearest("learnrate", ["gamma", "lr"]) == "did you mean 'lr'? Known: gamma, lr"
    assert nearest("learnrate", ["gamma"]) == "Known: gamma", "another name is a hint where what it means is known"
    assert nearest("wd", ["lr", "weight_decay"]) == "did you mean 'weight_decay'? Known: lr, weight_decay"
    assert nearest("l", ["lr", "r"]).startswith("did you mean 'lr'?"), "one word has no initials"


@pytest.mark.usefixtures("registry")
def test_a_new_class_is_known_at_once_and_may_be_defined_again() -> None:
    def define(amount: float) -> type[Ingredient]:
        @dataclass(frozen=True)
        class Basil(Herb):
            leaves: float = amount

        return Basil

    with pytest.raises(ValueError, match="unknown ingredient 'Basil'"):
        parse("Basil()")
    define(1.0)
    assert parse("Basil()").leaves == 1.0
    again = define(2.0)
    # As in a notebook: the new definition replaces the old one, and what was parsed before is forgotten.
    assert choices(Herb)["basil"] is again
    assert parse("Basil()").leaves == 2.0 and type(get(Herb, "basil")) is again


@pytest.mark.usefixtures("registry")
def test_another_class_of_the_same_name_is_refused() -> None:
    with pytest.raises(TypeError, match=f"{__name__} has an ingredient named Jar already; choose another name"):

        @dataclass(frozen=True)
        class Jar(Ingredient):
            pass

    assert choices(Ingredient)["jar"] is globals()["Jar"]


@pytest.mark.usefixtures("registry")
def test_classes_that_are_no_dataclasses_are_abstract() -> None:
    class Mint(WildThyme):
        pass

    assert "mint" not in choices(Herb)


# Options -------------------------------------------------------------------------------------------------------

GROUP = {"lr": 0.1, "betas": (0.9, 0.99), "name": "x"}


def test_options_are_found_at_any_depth() -> None:
    deep = Bouquet((1.0, (Option("betas", 1), WildThyme(Option("lr")))), string=Bouquet(string=Option("name")))
    assert deep.options() == {"betas", "lr", "name"}
    assert WildThyme().options() == frozenset()


def test_resolve_replaces_options_and_nothing_else() -> None:
    deep = Bouquet((1.0, (Option("betas", 1), WildThyme(Option("lr")))), string=Bouquet(string=WildThyme(name="lr")))
    resolved = deep.resolve(GROUP)
    assert resolved == Bouquet((1.0, (0.99, WildThyme(0.1))), string=Bouquet(string=WildThyme(name="lr")))
    assert resolved.options() == frozenset()
    assert deep.options() == {"betas", "lr"}, "the original stays as it is"
    assert resolved.resolve(GROUP) is resolved


def test_option_value() -> None:
    assert Option("lr").value(GROUP) == 0.1
    assert Option("betas", 0).value(GROUP) == 0.9
    assert Option("betas").value(GROUP) == (0.9, 0.99)
    with pytest.raises(ValueError, match="option 'momentum' is missing from the param group"):
        WildThyme(Option("momentum")).resolve(GROUP)


def test_resolving_checks_the_values() -> None:
    @dataclass(frozen=True)
    class _Pinch(Herb):
        grams: Any = 0.5

        def __post_init__(self) -> None:
            check_range(self, "grams", self.grams, 0.0, 1.0)

    pinch = _Pinch(Option("lr"))
    assert pinch.resolve({"lr": 0.25}).grams == 0.25
    with pytest.raises(ValueError, match=r"_Pinch: grams must lie in \[0.0, 1.0\), got 1.5"):
        pinch.resolve({"lr": 1.5})


# Checks and helpers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "closed"), [(0.0, False), (0.5, False), (1.0, True), (Option("lr"), False)])
def test_check_range_accepts(value: Any, closed: bool) -> None:
    check_range(WildThyme(), "amount", value, 0.0, 1.0, closed=closed)


@pytest.mark.parametrize(
    ("value", "closed", "end"),
    [(1.0, False, ")"), (1.1, True, "]"), (-1e-9, False, ")"), (math.nan, True, "]"), (math.inf, False, ")")],
)
def test_check_range_refuses(value: float, closed: bool, end: str) -> None:
    with pytest.raises(ValueError) as raised:
        check_range(WildThyme(), "amount", value, 0.0, 1.0, closed=closed)
    assert str(raised.value) == f"WildThyme: amount must lie in [0.0, 1.0{end}, got {value!r}"


def test_check_choice() -> None:
    check_choice(WildThyme(), "colour", "green", ["green", "grey"])
    with pytest.raises(ValueError) as raised:
        check_choice(WildThyme(), "colour", "gren", ["green", "grey"])
    assert str(raised.value) == "WildThyme: unknown colour 'gren'; did you mean 'green'? Known: green, grey"


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        ([], "entry"),
        (["entry", "entry"], "entry"),
        (["entry", "row"], "row"),
        (["row", "row"], "row"),
        (["row", "column"], "matrix"),
        (["all", "matrix"], "matrix"),
        (["all", "entry"], "all"),
    ],
)
def test_coarsest(levels: list[str], expected: str) -> None:
    assert coarsest(levels) == expected


def test_substate_is_a_view() -> None:
    state = {"a.x": 1, "a.y": 2, "b.x": 3}
    assert substate(state, "a.") == {"x": 1, "y": 2}
    assert substate(state, "c.") == {}


def test_a_stage_must_say_what_it_does() -> None:
    stage = Stage()
    assert stage.init_state(None) == {} and stage.reduces == "matrix"
    with pytest.raises(NotImplementedError):
        stage(None, {}, None)
