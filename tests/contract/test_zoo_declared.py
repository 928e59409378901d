"""Optimizers by declaration: fields are arguments, ``rule()`` is what they do, tables say which roles get it."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normopt
from normopt import EMA, Chain, Max, Nesterov, Row, Rule, Smoothed, Spectral, SteepestDescent, zoo
from normopt.ingredient import option
from normopt.nn import GPT
from normopt.roles.geometries import adam_options
from normopt.roles.options import Geometry
from normopt.rule import rule_of
from normopt.zoo.base import Declared, DeclaredOptimizer, FixedStepOptimizer, arg
from normopt.zoo.matrices import FixedStepMatrixOptimizer, MatrixOptimizer

pytestmark = pytest.mark.usefixtures("registry")

PUBLISHED = {cls.__name__: cls for cls in SteepestDescent.registry.values()}
DIRECTION = Chain(Spectral(), Row(scale="unit"))


def gpt() -> nn.Module:
    torch.manual_seed(0)
    return GPT(vocab_size=32, d_model=16, n_layers=2, n_heads=2)


def rules(optimizer: SteepestDescent) -> dict[str, Rule]:
    """The rule of every parameter."""
    return {name: rule_of(group) for group in optimizer.param_groups for name in group["param_names"]}


def losses(model: nn.Module, optimizer: SteepestDescent, steps: int = 30) -> list[float]:
    tokens, found = torch.randint(32, (4, 17), generator=torch.Generator().manual_seed(0)), []
    for _ in range(steps):
        optimizer.zero_grad()
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def check_trains(make: Callable[[nn.Module], SteepestDescent]) -> SteepestDescent:
    model = gpt()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make(model)
    found = losses(model, optimizer)
    assert found[-1] < 0.8 * found[0], found
    assert not [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    return optimizer


# Optimizers of the user's train a model -----------------------------------------------------------------------------


def test_a_declared_optimizer_of_matrices_leaves_the_rest_to_adamw() -> None:
    class RowMuon(MatrixOptimizer):
        """Muon, then every row normalized."""

        lr: float | Tensor = 0.02
        momentum: float = 0.95

        def rule(self) -> Rule:
            return Rule(DIRECTION, EMA(option("momentum")))

    check_trains(lambda model: RowMuon(model))
    found = rules(check_trains(lambda model: normopt.create("rowmuon", model, momentum=0.9, aux_lr=0.01)))
    assert found["blocks.0.mlp.up.weight"] == Rule(DIRECTION, EMA(option("momentum")))
    for name in "embed.weight", "head.weight", "norm.weight":
        assert isinstance(found[name].norm, Smoothed) and found[name].norm.norm == Max()


def test_a_table_may_name_some_roles_only() -> None:
    class Headed(MatrixOptimizer):
        momentum: float = 0.95

        def table(self) -> Geometry:
            return {"linear": {}, "unembedding": Row()}

        def rule(self) -> Rule:
            return Rule(DIRECTION, EMA(option("momentum")))

    class Named(DeclaredOptimizer):
        def table(self) -> Geometry:
            return {"embedding": {"norm": "column", "lr_ratio": 0.5}}

        def rule(self) -> Rule:
            return Rule(DIRECTION)

    class ByHand(SteepestDescent):
        def __init__(self, params: Any, lr: float = 0.02) -> None:
            super().__init__(params, lr, DIRECTION, 0.9)

        def table(self) -> Geometry:
            return {"unembedding": Max(), "vector": {"lr_ratio": 0.5}}

    found = rules(check_trains(lambda model: Headed(model, 0.02)))
    assert found["head.weight"].norm == Row() and isinstance(found["embed.weight"].norm, Smoothed)
    found = rules(check_trains(lambda model: Named(model, 0.02)))
    assert found["embed.weight"].norm == normopt.Column() and found["head.weight"].norm == DIRECTION
    assert isinstance(found["norm.weight"].norm, Smoothed)
    optimizer = check_trains(lambda model: normopt.create("byhand", model))
    found = rules(optimizer)
    assert found["head.weight"].norm == Max() and found["embed.weight"].norm == DIRECTION
    assert isinstance(found["norm.weight"].norm, Smoothed) and found["norm.weight"].momentum != EMA(0.9)
    (vectors,) = (group for group in optimizer.param_groups if group["role"] == "vector")
    assert vectors["lr"] == 0.01 and vectors["betas"] == (0.9, 0.95)


def test_a_constructor_of_ones_own_without_a_table() -> None:
    class RowMuon(SteepestDescent):
        def __init__(self, params: Any, lr: float = 0.02, momentum: float = 0.95, **common: Any) -> None:
            super().__init__(params, lr, DIRECTION, EMA(option("momentum")), options={"momentum": momentum}, **common)

    optimizer = check_trains(lambda model: normopt.create("rowmuon", model))
    found = rules(optimizer)
    assert {name for name, rule in found.items() if rule.norm != DIRECTION} == {
        name for name, p in gpt().named_parameters() if p.ndim < 2
    }
    again = RowMuon(gpt())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))


OWN_RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.95},
    "dual": {"step_size": "dual", "lr": 1e-3},
    "prodigy": {"step_size": "prodigy", "lr": 1.0},
    "decay": {"constraint": normopt.WeightDecay(0.1)},
    "ball": {"constraint": normopt.FrankWolfe(), "step_size": "Constant(10.0)", "momentum": 0.9},
    "cap": {"constraint": normopt.SpectralCap(10.0)},
}


@pytest.mark.parametrize("options", OWN_RULES.values(), ids=OWN_RULES)
def test_the_loop_itself_takes_a_whole_model_under_a_norm_of_matrices(options: dict[str, Any]) -> None:
    check_trains(lambda model: SteepestDescent(model, **{"lr": 0.02, "norm": "spectral", **options}))


def test_what_moves_by_adam_keeps_decay_and_nothing_else() -> None:
    constraints = (normopt.WeightDecay(0.1), normopt.SpectralCap(2.0))
    found = rules(SteepestDescent(gpt(), norm="spectral", step_size="dual", constraint=constraints))
    vector = Rule(**{name: adam_options()[name] for name in ("norm", "momentum")}, constraint=constraints[:1])
    assert found["norm.weight"] == vector and found["head.weight"].constraint == constraints


def test_roles_of_matrices_and_vectors_are_told_apart() -> None:
    overrides = {"blocks.*": {"role": "expert"}, "norm.weight": normopt.Euclidean()}
    optimizer = SteepestDescent(gpt(), norm="spectral", overrides=overrides)
    experts = [group for group in optimizer.param_groups if group["role"] == "expert"]
    assert {all(p.ndim < 2 for p in group["params"]) for group in experts} == {True, False}
    for group in optimizer.param_groups:
        assert len(group["params"]) == len(group["param_names"]) == len(group["reasons"])
    assert rules(optimizer)["norm.weight"].norm == normopt.Euclidean()


def test_norms_that_take_vectors_are_left_alone() -> None:
    assert {repr(rule.norm) for rule in rules(SteepestDescent(gpt(), norm="max")).values()} == {repr(Max())}


def test_errors_advise_what_can_be_done() -> None:
    with pytest.raises(ValueError, match=r"norm.weight' has .* role 'vector' .*geometry=\{'vector': 'max'\}") as error:
        SteepestDescent(gpt(), norm="max", geometry={"vector": "spectral"})
    assert "pass the model" not in str(error.value)
    with pytest.raises(ValueError, match=r"'norm.weight' has .*overrides=\{name: \{'norm': 'max'\}\}"):
        zoo.Muon(gpt(), overrides={"norm.weight": Spectral()})
    with pytest.raises(ValueError, match="pass the model instead of its parameters"):
        SteepestDescent(gpt().parameters(), norm="spectral")


# The registry ---------------------------------------------------------------------------------------------------------


def test_the_periodic_table_survives_every_class() -> None:
    before = normopt.periodic_table()

    class Needy(DeclaredOptimizer):
        needed: float = arg(doc="has no default.", kw_only=True)

        def rule(self) -> Rule:
            return Rule(Max())

    class Failing(MatrixOptimizer):
        def rule(self) -> Rule:
            raise RuntimeError("not today")

    class Unfinished(DeclaredOptimizer):
        width: int = 3

    class Finished(Unfinished):
        def rule(self) -> Rule:
            return Rule(Max())

    class Misbuilt(SteepestDescent):
        def __init__(self, params: Any) -> None:
            super().__init__(params, norm="no such norm")

    @dataclass(frozen=True)
    class Weighted(normopt.Norm):
        weights: tuple[float, ...] = field(kw_only=True)

    class Untold(SteepestDescent):
        def table(self) -> Geometry:
            raise KeyError("linear")

    table = normopt.periodic_table()
    assert re.sub(r"Finished, |[\s-]", "", table) == re.sub(r"[\s-]", "", before)
    for name in "Needy", "Failing", "Unfinished", "Misbuilt", "Weighted", "Untold":
        assert name not in table
    assert "unfinished" not in normopt.list_optimizers() and "finished" in normopt.list_optimizers()
    with pytest.raises(TypeError, match="needed"):
        Needy(gpt())
    Needy(gpt(), needed=1.0)
    with pytest.raises(NotImplementedError, match="Unfinished"):
        Unfinished(gpt())


def test_bases_are_not_in_the_registry() -> None:
    bases = Declared, FixedStepOptimizer, DeclaredOptimizer, FixedStepMatrixOptimizer, MatrixOptimizer
    assert not {base.__name__.lower() for base in bases} & SteepestDescent.registry.keys()
    assert {name for name in zoo.__all__ if name.lower() in normopt.list_optimizers()} == PUBLISHED.keys()


# Arguments ------------------------------------------------------------------------------------------------------------


def documented(cls: type) -> dict[str, str]:
    section = (inspect.getdoc(cls) or "").partition("Args:\n")[2].partition("\n\n")[0]
    return dict(re.findall(r"^    (\w+): (.+)", section, re.MULTILINE))


@pytest.mark.parametrize("name", PUBLISHED)
def test_help_says_what_every_argument_means(name: str) -> None:
    arguments = inspect.signature(PUBLISHED[name]).parameters
    assert list(documented(PUBLISHED[name])) == list(arguments)
    hints = typing.get_type_hints(PUBLISHED[name].__init__)
    assert hints.keys() >= arguments.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_docstrings_say_what_is_done_and_whose_it_is(name: str) -> None:
    text = (PUBLISHED[name].__doc__ or "").partition("Args:")[0]
    assert "<-" in text, "the update"
    published = name in ("NuclearDescent",) or re.search(
        r"arXiv \d{4}\.\d{5}|\d{4}\.\d{4}|(19|20)\d\d\)|torch.optim", text
    )
    assert published, "the source"


def test_every_argument_of_the_loop_is_handed_on() -> None:
    loop = inspect.signature(SteepestDescent.__init__).parameters
    words = {name for name, p in loop.items() if p.kind is p.KEYWORD_ONLY} - {"options", "view"}
    declared = inspect.signature(FixedStepOptimizer).parameters
    assert words == {name for name, p in declared.items() if p.kind is p.KEYWORD_ONLY}
    assert {name: loop[name].default for name in words} == {name: declared[name].default for name in words}


class Shrunk(DeclaredOptimizer):
    """Signs, shrunk.

    Raises:
        ValueError: a factor of 0.
    """

    _abstract: ClassVar[bool] = True
    lr: float | Tensor = 0.5
    momentum: float = 0.9
    factor: float = arg(default=2.0, doc="divides the learning rate.")
    quiet: bool = arg(default=False, kw_only=True)
    kind = "no argument"
    other: ClassVar[int] = 3

    def table(self) -> Geometry:
        """Given a whole model, nothing changes."""
        return {}

    def rule(self) -> Rule:
        if self.factor == 0:
            raise ValueError("Shrunk: factor must not be 0")
        self.momentum /= self.factor
        return Rule(Max(), EMA(option("momentum")))


def weights() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2, 3))]


def test_fields_are_arguments() -> None:
    names = list(inspect.signature(Shrunk).parameters)
    assert names[:4] == ["params", "lr", "momentum", "factor"] and {"kind", "other"}.isdisjoint(names)
    assert Shrunk.__doc__ is not None and re.match(
        r"Signs, shrunk\.\n\nGiven a whole model, nothing changes\.\n\nArgs:\n    params: .*"
        r"\n    factor: divides the learning rate\.\n.*\n\nRaises:\n    ValueError: a factor of 0\.",
        Shrunk.__doc__,
        re.DOTALL,
    )
    assert documented(Shrunk)["momentum"].startswith("decay rate")
    optimizer = Shrunk(weights(), 0.25, 0.8, factor=4.0)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["momentum"]) == (0.25, 0.2) and "factor" not in group
    assert not {"params", "lr", "momentum", "factor", "quiet", "geometry"} & vars(optimizer).keys()
    with pytest.raises(ValueError, match="factor must not be 0"):
        Shrunk(weights(), factor=0)


def test_calls_that_do_not_fit_name_the_class() -> None:
    with pytest.raises(TypeError, match=r"Shrunk\(\) .*'factr'; did you mean 'factor'"):
        Shrunk(weights(), factr=1.0)
    with pytest.raises(TypeError, match=r"Shrunk\(\) missing a required argument: 'params'"):
        Shrunk()
    with pytest.raises(TypeError, match=r"Shrunk\(\) too many positional arguments"):
        Shrunk(weights(), 0.1, 0.9, 2.0, True)
    with pytest.raises(TypeError, match=r"Shrunk\(\) multiple values for argument 'lr'"):
        Shrunk(weights(), 0.1, lr=0.1)
    with pytest.raises(TypeError, match="Stepping: an argument cannot be called 'step'"):

        class Stepping(DeclaredOptimizer):
            step: int = 3

    with pytest.raises(TypeError, match="Disordered: non-default argument"):

        class Disordered(DeclaredOptimizer):
            late: int

    assert not {"stepping", "disordered"} & SteepestDescent.registry.keys()


@pytest.mark.parametrize("default", [[1.0], {"a": 1.0}, {1.0}, bytearray(b"1")], ids=str)
@pytest.mark.parametrize("how", ["value", "arg", "new default"])
def test_defaults_that_can_be_changed_are_refused(default: Any, how: str) -> None:
    """As in dataclasses: all optimizers of the class would share them."""
    kind = type(default).__name__
    with pytest.raises(TypeError, match=f"Shared: the default of 'factor' is a {kind}, .*declare a tuple, or None"):
        if how == "new default":

            class Shared(Shrunk):
                factor = default

        else:

            class Shared(DeclaredOptimizer):
                factor: Any = default if how == "value" else arg(default=default)

    assert "shared" not in SteepestDescent.registry


CALLS = """
from torch import nn
from normopt import Rule
from normopt.zoo import Adam, Muon, Prodigy
from normopt.zoo.base import arg
from normopt.zoo.matrices import MatrixOptimizer

class Mine(MatrixOptimizer):
    momentum: float = 0.95
    quiet: bool = arg(default=False, kw_only=True)

    def rule(self) -> Rule:
        return Rule()

model = nn.Linear(2, 2)
Adam(model, 1e-3, (0.9, 0.99), step_size="prodigy", compile=True)
Muon(model, 1e-3, cautious=True, aux_lr=0.1)
Mine(model, 0.1, 0.9, quiet=True, overrides={})
Adam(model, lr="fast")  # wrong
Prodigy(model, step_size="dual")  # wrong
Mine(model, momentun=0.5)  # wrong
Mine(model, 0.1, 0.9, True)  # wrong
Muon()  # wrong
"""


@pytest.mark.slow
def test_type_checkers_know_the_constructors(tmp_path: Path) -> None:
    api = pytest.importorskip("mypy.api")
    file, root = tmp_path / "calls.py", Path(__file__).parents[2]
    file.write_text(CALLS)
    found, _, _ = api.run(["--config-file", str(root / "pyproject.toml"), "--cache-dir", str(tmp_path), str(file)])
    wrong = {int(line) for line in re.findall(r"calls\.py:(\d+): error", found)}
    assert wrong == {i for i, line in enumerate(CALLS.splitlines(), 1) if line.endswith("# wrong")}, found


def test_they_are_copied_and_pickled() -> None:
    for optimizer in Shrunk(weights()), zoo.Muon(gpt()), zoo.NaP(gpt(), base="muon"), zoo.Scion(gpt(), radius=3.0):
        for again in copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer)):
            assert type(again) is type(optimizer) and again.own_table == optimizer.own_table
            late = (
                {"params": [("late", p) for p in weights()]} if len(again.param_groups) > 1 else {"params": weights()}
            )
            again.add_param_group({**late, "role": "linear"})
            for ours, theirs in zip(optimizer.param_groups, again.param_groups, strict=False):
                assert {**ours, "params": ()} == {**theirs, "params": ()}


def test_subclasses_change_what_they_name() -> None:
    class Slow(zoo.AdamW):
        lr: float | Tensor = 1e-5
        extra: float = 1.0

    class Same(Slow):
        """Nothing new."""

    class ByHand(zoo.AdamW):
        def __init__(self, params: Any, speed: float) -> None:
            super().__init__(params, speed / 1000, betas=(0.5, 0.5))

    class Nested(zoo.Muon):
        def rule(self) -> Rule:
            return super().rule().updated({"momentum": Nesterov(0.5)})

    assert list(inspect.signature(Slow).parameters)[1:7] == ["lr", "betas", "eps", "weight_decay", "amsgrad", "extra"]
    for cls in Slow, Same:
        assert cls(weights()).param_groups[0]["lr"] == 1e-5
    assert "Nothing new." in (Same.__doc__ or "") and documented(Same).keys() == documented(Slow).keys()
    (group,) = ByHand(weights(), 3.0).param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.003, (0.5, 0.5), 0.01)
    assert list(inspect.signature(ByHand).parameters) == ["params", "speed"]
    assert rule_of(Nested(weights()).param_groups[0]).momentum == Nesterov(0.5)


def test_nap_takes_declared_optimizers_of_the_users() -> None:
    class Tabled(MatrixOptimizer):
        def table(self) -> Geometry:
            return {"linear": {"constraint": normopt.WeightDecay(0.1)}, "conv": {}}

        def rule(self) -> Rule:
            return Rule(DIRECTION)

    class ByHand(SteepestDescent):
        pass

    model = gpt()
    before = {name: p.detach().norm() for name, p in model.named_parameters()}
    losses(model, zoo.NaP(model, 0.02, "tabled"), 3)
    kept = {name for name, p in model.named_parameters() if abs(p.detach().norm() / before[name] - 1) < 1e-5}
    assert kept == {name for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("blocks")}
    with pytest.raises(ValueError, match="NaP: 'byhand' has a constructor that was written by hand"):
        zoo.NaP(weights(), base="byhand")
    with pytest.raises(TypeError, match=r"Tabled\(\) got an unexpected keyword argument 'momentum'"):
        zoo.NaP(weights(), 0.1, "tabled", momentum=0.9)


# What subclasses may leave out, and what they may not -----------------------------------------------------------------


def test_a_default_without_a_type_counts(registry: None) -> None:
    class Slower(zoo.Muon):
        momentum = 0.5

    class Faster(Slower):
        lr = 0.3

    (group,) = Faster([nn.Parameter(torch.zeros(2, 2))]).param_groups
    assert group["momentum"] == 0.5 and group["lr"] == 0.3 and Faster.__name__.lower() in normopt.list_optimizers()


@pytest.mark.parametrize("name", ["rule", "rates", "table", "step", "state"])
def test_an_argument_cannot_have_the_name_of_what_every_optimizer_has(name: str, registry: None) -> None:
    with pytest.raises(TypeError, match=f"an argument cannot be called '{name}'"):
        type("Shadow", (zoo.Muon,), {"__annotations__": {name: int}, name: 3})


def test_a_constructor_written_by_hand_is_not_bypassed(registry: None) -> None:
    class ByHand(zoo.Muon):
        def __init__(self, params: Any, lr: float = 0.3, **others: Any) -> None:
            super().__init__(params, lr=lr, **others)

    with pytest.raises(TypeError, match="ByHand has an __init__ of its own"):

        class Below(ByHand):
            more: int = 3

    class Beside(ByHand):
        pass

    assert Beside([nn.Parameter(torch.zeros(2, 2))]).param_groups[0]["lr"] == 0.3


def test_a_rule_that_is_none_is_refused(registry: None) -> None:
    class Half(zoo.MatrixOptimizer):
        def rule(self) -> Any:
            return Max()

    with pytest.raises(TypeError, match=r"Half: rule\(\) must return a Rule, got Max"):
        Half([nn.Parameter(torch.zeros(2, 2))])
