"""What each tensor is taken for, how it is seen, which norm it gets, and what Muon makes of it."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm

import normopt
from normopt import GEOMETRIES, Column, Max, Row, Spectral, SteepestDescent, View, infer_roles, param_groups
from normopt.nn import GPT
from tests.support.bounded import net

HIDDEN = {"linear", "conv"}


def names(model: nn.Module, **options: Any) -> dict[str, str]:
    return {name: role.name for name, role in infer_roles(model, **options).items()}


def gpt(vocab_size: int = 13, n_layers: int = 2) -> GPT:
    return GPT(vocab_size, 8, n_layers, 2)


class Tied(nn.Module):
    """A language model whose head is its embedding, registered in either order."""

    def __init__(self, head_first: bool) -> None:
        super().__init__()
        if head_first:
            self.head = nn.Linear(6, 11, bias=False)
        self.embed = nn.Embedding(11, 6)
        self.hidden = nn.Linear(6, 6)
        if not head_first:
            self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight


class Holder(nn.Module):
    """A raw parameter in a module of the user's own."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.zeros(shape))


# What is inferred ----------------------------------------------------------------------------------------------------


def test_mlp() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 7), nn.Linear(7, 3))
    expected = ["linear", "vector", "linear", "vector", "unembedding", "vector"]
    assert list(names(model).values()) == expected
    assert list(names(nn.Linear(5, 7)).values()) == ["linear", "vector"]  # the only one: hidden


def test_cnn() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8), nn.Linear(8, 10))
    found = infer_roles(model)
    matrices = {name: role.name for name, role in found.items() if role.name != "vector"}
    assert matrices == {"0.weight": "conv", "2.weight": "conv", "3.weight": "unembedding"}
    assert found["0.weight"].view.shape((8, 3, 3, 3)) == (1, 8, 27)
    assert found["2.weight"].view.shape((8, 1, 3, 3)) == (8, 1, 9)


@pytest.mark.parametrize("conv", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_convolutions_are_flattened(conv: type[nn.Module]) -> None:
    role = infer_roles(conv(2, 5, 3))["weight"]
    assert (role.name, role.view) == ("conv", View(flatten=True))


@pytest.mark.parametrize("conv", [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
def test_transposed_convolutions_have_their_input_first(conv: type[nn.Module]) -> None:
    model = conv(2, 5, 3)
    role = infer_roles(model)["weight"]
    kernel = model.weight[0, 0].numel()
    assert role.name == "conv" and role.view.shape(tuple(model.weight.shape)) == (1, 5 * kernel, 2)


def test_gpt() -> None:
    found = infer_roles(gpt())
    assert found["embed.weight"].name == "embedding" and found["embed.weight"].view == View(transpose=True)
    assert found["head.weight"].name == "unembedding" and found["head.weight"].view == View()
    assert found["blocks.0.attention.qkv.weight"].view == View(split=3)
    matrices = {name for name, role in found.items() if role.name == "linear"}
    expected = {"attention.qkv", "attention.out", "mlp.gate", "mlp.up", "mlp.down"}
    assert matrices == {f"blocks.{i}.{name}.weight" for i in range(2) for name in expected}
    assert all(role.name == "vector" for name, role in found.items() if "norm" in name or "gain" in name)
    assert list(found) == [name for name, _ in gpt().named_parameters()]
    assert all(role.reason for role in found.values())


@pytest.mark.parametrize("head_first", [False, True])
def test_tied_embeddings_keep_the_embeddings_role(head_first: bool) -> None:
    found = infer_roles(Tied(head_first))
    first, second = ("head", "embed") if head_first else ("embed", "head")
    role = found[f"{first}.weight"]
    assert f"{second}.weight" not in found
    assert (role.name, role.view) == ("embedding", View(transpose=True)) and "tied with" in role.reason
    assert found["hidden.weight"].name == "linear"


def test_attention_is_split() -> None:
    found = infer_roles(nn.TransformerEncoderLayer(8, 2, 16))
    assert found["self_attn.in_proj_weight"].view == View(split=3)
    assert found["self_attn.in_proj_weight"].name == "linear"
    assert found["self_attn.out_proj.weight"].name == "linear" and found["linear1.weight"].name == "linear"
    separate = infer_roles(nn.MultiheadAttention(8, 2, kdim=4, vdim=4, add_bias_kv=False))
    assert {separate[f"{x}_proj_weight"].name for x in "qkv"} == {"linear"}
    assert {separate[f"{x}_proj_weight"].view for x in "qkv"} == {View()}


@pytest.mark.parametrize(
    ("module", "gates"),
    [(nn.LSTM(3, 8, 2), 4), (nn.GRU(3, 8), 3), (nn.RNN(3, 8), 1), (nn.LSTMCell(3, 8), 4), (nn.GRUCell(3, 8), 3)],
    ids=lambda x: type(x).__name__,
)
def test_recurrent_layers_are_split_into_gates(module: nn.Module, gates: int) -> None:
    found = infer_roles(module)
    for name, p in module.named_parameters():
        expected = ("vector", View()) if p.ndim < 2 else ("linear", View(split=gates))
        assert (found[name].name, found[name].view) == expected


def test_lstm_projections_are_not_split() -> None:
    assert infer_roles(nn.LSTM(3, 8, proj_size=4))["weight_hr_l0"].view == View()


def test_positional_tables_are_embeddings() -> None:
    model = nn.ModuleDict({"wte": nn.Embedding(50, 8), "wpe": nn.Embedding(16, 8), "mlp": nn.Linear(8, 8)})
    assert names(model) == {
        "wte.weight": "embedding",
        "wpe.weight": "embedding",
        "mlp.weight": "linear",
        "mlp.bias": "vector",
    }


def test_classifiers_have_a_head_beside_embeddings() -> None:
    """A table of positions or words must not hide that the last layer, of another width, is the output."""
    text = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    assert [n for n in names(text).values() if n != "vector"] == ["embedding", "linear", "unembedding"]


def test_hidden_layers_as_wide_as_the_vocabulary_are_no_heads() -> None:
    """vocabulary == d_model == context: the last Linear of that width is the head, all before it are hidden."""
    model = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    assert [n for n in names(model).values() if n != "vector"] == ["embedding", "linear", "linear", "unembedding"]
    wide = names(gpt(vocab_size=32))  # d_ff
    assert [name for name, role in wide.items() if role == "unembedding"] == ["head.weight"]


def test_a_head_that_is_tied_leaves_hidden_layers_hidden() -> None:
    """Vocabulary == d_model and a tied head: no hidden layer may be taken for the head."""
    model = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[2].weight = model[0].weight
    assert names(model) == {"0.weight": "embedding", "1.weight": "linear"}


def test_unknown_matrices_are_other_and_say_so() -> None:
    for overrides in None, {"raw": {"lr": 0.1}}:
        with pytest.warns(UserWarning, match=r"no role known for raw: .*overrides"):
            found = infer_roles(Holder(3, 4), overrides)
        assert found["raw"].name == "other"
    assert names(Holder(3)) == {"raw": "vector"} and names(Holder()) == {"raw": "scalar"}


@pytest.mark.parametrize("override", ["linear", "other", Max(), {"norm": "max"}, {"role": "mine"}], ids=str)
def test_saying_what_they_are_ends_the_warning(override: Any) -> None:
    infer_roles(Holder(3, 4), {"raw": override})
    declared = Holder(3, 4)
    declared.normopt_roles = {"raw": "other"}
    infer_roles(declared)


def test_every_vector_and_scalar_is_one() -> None:
    model = nn.ModuleList([nn.LayerNorm(4), nn.PReLU(), nn.BatchNorm1d(4), Holder()])
    assert set(names(model).values()) == {"vector", "scalar"}


@pytest.mark.parametrize("name", normopt.list_optimizers())
def test_frozen_parameters_belong_to_the_optimizer_and_move_once_they_have_gradients(name: str) -> None:
    model = gpt()
    trained = [model.head.weight, model.norm.weight]
    frozen = [p for p in model.parameters() if all(p is not q for q in trained)]
    for p in frozen:
        p.requires_grad_(False)
    assert infer_roles(model) == infer_roles(gpt())
    optimizer = normopt.create(name, model, lr=0.1)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {*map(id, held)} == {*map(id, model.parameters())}
    before = [p.clone() for p in frozen]
    for _ in range(2):
        step_on(optimizer, trained)
    assert all(torch.equal(p, q) for p, q in zip(frozen, before, strict=True))
    assert not any(optimizer.state.get(p) for p in frozen)
    rows = [row for row in normopt.summary(optimizer) if "frozen, moves once it gets gradients" in row["reason"]]
    assert len(rows) == len(frozen)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p in frozen:
        p.requires_grad_(True)
    for _ in range(2):
        step_on(optimizer, [*frozen, *trained])
    assert all((p != q).any() for p, q in zip(frozen, before, strict=True))
    assert "frozen" not in normopt.describe(optimizer)


def test_warnings_name_trained_parameters_only() -> None:
    model = nn.ModuleDict({"a": Holder(3, 4), "b": Holder(3, 4)})
    model["a"].raw.requires_grad_(False)
    with pytest.warns(UserWarning, match="no role known for b.raw: "):
        infer_roles(model)
    model["b"].raw.requires_grad_(False)
    infer_roles(model)


def test_parameters_that_can_get_no_gradient_are_left_out() -> None:
    model = nn.Linear(3, 4)
    model.codes = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    assert list(infer_roles(model)) == ["weight", "bias"]


def test_shared_modules_count_once() -> None:
    layer = nn.Linear(4, 4)
    assert names(nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(4, 2))) == {
        "0.weight": "linear",
        "0.bias": "vector",
        "3.weight": "unembedding",
        "3.bias": "vector",
    }


# What is declared and overridden -------------------------------------------------------------------------------------


class Declared(Holder):
    normopt_roles: ClassVar = {"raw": "linear"}
    normopt_views: ClassVar = {"raw": {"flatten": False, "split": 2, "transpose": True}}


def test_modules_declare_roles_and_views() -> None:
    role = infer_roles(nn.Sequential(Declared(4, 6)))["0.raw"]
    assert (role.name, role.view, role.reason) == ("linear", View(False, True, 2), "declared by Declared")
    outer = Holder(4, 6)
    outer.inner = Holder(4, 6)
    outer.normopt_roles = {"raw": "expert", "inner.raw": "unembedding"}
    assert names(outer) == {"raw": "expert", "inner.raw": "unembedding"}


@pytest.mark.parametrize("attribute", ["normopt_roles", "normopt_views", "normopt_bounds"])
@pytest.mark.parametrize("name", ["mlp.up.weigth", "mlp.upp.weight", "mlp.up", "up.weight"])
def test_declarations_of_what_is_no_parameter_are_refused(attribute: str, name: str) -> None:
    model = gpt()
    setattr(model.blocks[1], attribute, {name: {}})
    message = rf"{attribute} of \w*Block \(blocks.1\): '{name}' is not .* parameters; did you mean 'mlp.up.weight'"
    with pytest.raises(ValueError, match=message):
        normopt.param_groups(model)


def test_declarations_outlive_absent_and_computed_parameters_and_wrappers() -> None:
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2))
    model.normopt_roles = {"0.bias": "mine", **{f"{i}.weight": "expert" for i in range(3)}}
    parametrizations.orthogonal(model[1])
    prune.identity(model[2], "weight")
    found = names(model)
    assert found["0.weight"] == found["1.parametrizations.weight.original"] == "expert"
    assert found["2.weight_orig"] == "linear"
    assert names(torch.compile(Declared(4, 6))) == {"_orig_mod.raw": "linear"}
    plain = Declared(4, 6)
    plain.bias = None
    plain.normopt_roles = {"bias": "mine", "raw": "linear"}
    assert "bias" not in names(plain)


def test_overrides_by_pattern() -> None:
    model = gpt()
    found = infer_roles(
        model,
        {
            "blocks.*.mlp.*": {"lr": 0.5},
            "blocks.1.*": {"weight_decay": 0.0},
            "*.down.weight": "other",
            "head.*": Row(scale="unit"),
            "*qkv*": {"view": {"split": 1}, "norm": "max"},
            "embed*": {"view": View()},
            "norm.weight": {"role": "mine"},
        },
    )
    assert found["blocks.1.mlp.up.weight"].options == {"lr": 0.5, "weight_decay": 0.0}
    assert found["blocks.0.mlp.down.weight"].name == "other"
    assert found["head.weight"].options == {"norm": Row(scale="unit")} and found["head.weight"].name == "unembedding"
    assert found["blocks.0.attention.qkv.weight"].view == View()
    assert found["embed.weight"].view == View() and found["norm.weight"].name == "mine"
    assert found["head.weight"].reason == "override 'head.*'"


@pytest.mark.filterwarnings("ignore:no role known")
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"heed.weight": "linear"}, "'heed.weight' matches no parameter; did you mean 'head.weight'"),
        ({"blocks.7.*": "linear"}, "matches no parameter"),
        ({"head.weight": "lienar"}, "unknown role 'lienar'; did you mean 'linear'"),
        ({"*qkv*": {"view": {"splits": 3}}}, r"overrides\['\*qkv\*'\]: View: no field 'splits'; did you mean 'split'"),
        (
            {"*qkv*": {"view": {"flatten": 2}}},
            r"overrides\['\*qkv\*'\]: View: flatten must be True, False or None, got 2",
        ),
        ({"*qkv*": {"view": 3}}, r"overrides\['\*qkv\*'\]: expected a View .* got 3"),
        ({"*qkv*": {"view": {"split": 5}}}, "cannot be cut into split=5"),
        ({"*qkv*": {"nrom": "max"}}, "reads 'nrom'; did you mean 'norm'"),
        ({"*qkv*": {"norm": "maxx"}}, "did you mean 'max'"),
    ],
)
def test_bad_overrides_are_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        SteepestDescent(gpt(), lr=0.1, geometry="scion", overrides=overrides)


def test_overrides_reach_the_param_groups() -> None:
    overrides = {"*.mlp.*": {"lr": 0.5, "norm": Column()}, "head.weight": {"lr_ratio": 0.1}}
    optimizer = normopt.create("muon", gpt(), lr=0.2, overrides=overrides)
    by_name = {name: group for group in optimizer.param_groups for name in group["param_names"]}
    assert by_name["blocks.0.mlp.up.weight"]["lr"] == 0.5
    assert by_name["blocks.0.mlp.up.weight"]["rule"].startswith("Rule(norm=Column(")
    assert by_name["blocks.0.attention.out.weight"]["lr"] == 0.2
    assert by_name["head.weight"]["lr"] == pytest.approx(0.01)  # a tenth of what the role has, half of lr
    assert "Smoothed(norm=Max(" in by_name["head.weight"]["rule"]


# Geometries ----------------------------------------------------------------------------------------------------------


def step_once(optimizer: SteepestDescent) -> None:
    step_on(optimizer, [p for group in optimizer.param_groups for p in group["params"]])


def step_on(optimizer: SteepestDescent, params: list[Tensor]) -> None:
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step(lambda: None)  # for momenta that ask for the gradient at other weights: here the same


@pytest.mark.parametrize("name", [None, *normopt.list_optimizers()])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_every_geometry_fits_every_optimizer(name: str | None, geometry: str) -> None:
    model = gpt()
    if name is None:
        optimizer = SteepestDescent(param_groups(model, geometry), lr=0.1)
    else:
        optimizer = normopt.create(name, model, lr=0.1, geometry=geometry)
    step_once(optimizer)
    held = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert sorted(held) == sorted(name for name, _ in model.named_parameters())
    for group in optimizer.param_groups:
        expected = GEOMETRIES[geometry].get(group["role"], GEOMETRIES[geometry].get("*"))
        norm = expected["norm"] if isinstance(expected, dict) else expected
        assert norm is None or group["rule"].startswith(f"Rule(norm={norm!r}")


MODELS = {
    "gpt": gpt,
    "mlp": lambda: nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)),
    "cnn": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 4, 3), nn.Flatten(), nn.Linear(4, 3)),
    "tied": lambda: Tied(False),
    "tied, head first": lambda: Tied(True),
    "transformer": lambda: nn.TransformerEncoderLayer(8, 2, 16),
    "lstm": lambda: nn.Sequential(nn.Embedding(9, 3), nn.LSTM(3, 8), nn.Linear(8, 9)),
    "gru": lambda: nn.GRU(8, 3, bidirectional=True),
    "embedding bag": lambda: nn.Sequential(nn.EmbeddingBag(9, 3), nn.Linear(3, 2)),
    "bilinear": lambda: nn.Bilinear(3, 4, 5),
    "experts": lambda: Declared(3, 4, 6),
    "grouped": lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ConvTranspose1d(8, 4, 3, groups=4)),
    "grouped alike": lambda: nn.ModuleList(nn.ConvTranspose2d(4, 4, 3, groups=2) for _ in range(2)),
    "weight norm": lambda: nn.Sequential(
        parametrizations.weight_norm(nn.Linear(3, 4)), weight_norm(nn.Conv1d(4, 4, 3))
    ),
}


@pytest.mark.filterwarnings("ignore:no role known", "ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("name", normopt.list_optimizers())
def test_every_optimizer_takes_every_model(name: str, model: Any) -> None:
    model = model()
    optimizer = normopt.create(name, model, lr=0.1)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    step_once(optimizer)
    step_once(optimizer)
    for key, p in model.named_parameters():
        assert torch.isfinite(p).all() and (p != before[key]).any()


@pytest.mark.filterwarnings("ignore:no role known", "ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_muon_never_orthogonalizes_embeddings_heads_and_vectors(model: Any) -> None:
    optimizer = normopt.create("muon", model(), lr=0.1)
    for group in optimizer.param_groups:
        assert ("Spectral" in group["rule"]) == (group["role"] in HIDDEN)
        assert ("Smoothed(norm=Max(" in group["rule"]) == (group["role"] not in HIDDEN)


def test_users_may_name_roles_of_their_own() -> None:
    geometry = {"router": {"norm": Row(), "momentum": 0.5}, "linear": "spectral", "*": Max()}
    groups = param_groups(gpt(), geometry, {"*gate*": {"role": "router"}})
    optimizer = SteepestDescent(groups, lr=0.1)
    router = next(group for group in optimizer.param_groups if group["role"] == "router")
    assert router["param_names"] == ["blocks.0.mlp.gate.weight", "blocks.1.mlp.gate.weight"]
    assert router["rule"].startswith("Rule(norm=Row(") and router["momentum"] == 0.5
    step_once(optimizer)


def test_roles_that_a_geometry_does_not_cover_are_refused() -> None:
    with pytest.raises(ValueError, match=r"has no entry for role 'embedding' \(parameter 'embed.weight'\)"):
        param_groups(gpt(), {"linear": Spectral()})
    with pytest.raises(ValueError, match="unknown geometry 'sion'; did you mean 'scion'"):
        param_groups(gpt(), "sion")
    with pytest.raises(ValueError, match="unknown geometry 'sion'; did you mean 'scion'"):
        normopt.create("muon", gpt(), geometry="sion")


def test_models_without_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        normopt.create("muon", nn.ReLU())


def test_scions_geometry_has_the_papers_sizes() -> None:
    """One step of size 1 with no momentum: columns, spectral, 1/fan_in signs and root mean squares of 1."""
    model = gpt()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = SteepestDescent(model, lr=1.0, geometry="scion", overrides={"*": {"momentum": None}})
    step_once(optimizer)
    update = {name: before[name] - p.detach() for name, p in model.named_parameters()}
    torch.testing.assert_close(update["embed.weight"].square().mean(dim=1).sqrt(), torch.ones(13))
    torch.testing.assert_close(update["head.weight"].abs(), torch.full((13, 8), 1 / 8))
    for part in update["blocks.0.attention.qkv.weight"].split(8):
        assert torch.linalg.matrix_norm(part, 2).item() == pytest.approx(1.0, abs=0.01)
    torch.testing.assert_close(update["norm.weight"].square().mean(), torch.tensor(1.0))


# Views ---------------------------------------------------------------------------------------------------------------


@given(st.data())
def test_views_round_trip(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 4), max_size=5)))
    flatten, transpose = data.draw(st.sampled_from([None, True, False])), data.draw(st.booleans())
    groups = [g for g in range(1, shape[0] + 1) if shape[0] % g == 0] if len(shape) > 1 and flatten is not False else []
    view = View(flatten, transpose, groups=data.draw(st.sampled_from(groups or [1])))
    _, out, _ = view.shape(shape)
    splits: list[Any] = [s for s in range(1, out + 1) if out % s == 0] if len(shape) > 1 else []
    unequal = [(1, out - 1), (out - 2, 1, 1)] if len(shape) > 1 and out > 2 else []
    view = replace(view, split=data.draw(st.sampled_from([*splits, *unequal] or [1])))
    x = torch.arange(float(math.prod(shape))).reshape(shape)
    seen = view.apply(x)
    assert seen.shape == view.shape(shape)
    assert torch.equal(view.invert(seen.contiguous(), shape), x)
    assert view.invert(seen.contiguous(), shape).shape == shape


def test_views_show_the_operators() -> None:
    x = torch.arange(24.0)
    assert torch.equal(View().apply(x), x.reshape(1, 1, 24))
    assert torch.equal(View().apply(x.reshape(2, 3, 2, 2)), x.reshape(1, 2, 12))
    assert torch.equal(View(flatten=False).apply(x.reshape(2, 3, 4)), x.reshape(2, 3, 4))
    assert torch.equal(View(flatten=False).apply(x.reshape(2, 2, 3, 2)), x.reshape(4, 3, 2))
    assert torch.equal(View(transpose=True).apply(x.reshape(6, 4)), x.reshape(1, 6, 4).mT)
    assert torch.equal(View(split=3).apply(x.reshape(6, 4))[1], x.reshape(6, 4)[2:4])
    assert torch.equal(View(flatten=True).apply(x.reshape(2, 3, 4)), x.reshape(1, 2, 12))
    experts = View(flatten=False, transpose=True, split=2).apply(x.reshape(2, 3, 4))
    assert torch.equal(experts[1], x.reshape(2, 3, 4)[0].mT[2:])


def test_views_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"7 rows of shape \(7, 2\) cannot be cut into split=3"):
        View(split=3).apply(torch.zeros(7, 2))
    with pytest.raises(ValueError, match=r"7 rows of shape \(7, 2\) cannot be cut into split=\(4, 2\)"):
        View(split=(4, 2)).apply(torch.zeros(7, 2))
    with pytest.raises(ValueError, match=r"7 rows of shape \(7, 2\) cannot be cut into 3 groups"):
        View(groups=3).apply(torch.zeros(7, 2))
    for name in "split", "groups":
        with pytest.raises(ValueError, match=f"{name} must be at least 1"):
            View(**{name: 0})
    with pytest.raises(ValueError, match=r"split must be at least 1, got \(4, 0\)"):
        View(split=(4, 0))
    with pytest.raises(ValueError, match=r"split must name the rows of one part at least, got \(\)"):
        View(split=())
    with pytest.raises(ValueError, match="groups=2 cut one matrix, not the stack that flatten=False says"):
        View(flatten=False, groups=2)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("flatten", 2, "flatten must be True, False or None, got 2"),
        ("flatten", "False", "flatten must be True, False or None, got 'False'"),
        ("transpose", None, "transpose must be True or False, got None"),
        ("split", 2.0, "split must be a whole number, or a tuple with the rows of each part, got 2.0"),
        ("split", True, "split must be a whole number, .* got True"),
        ("split", (4, 2.0), r"split must be a whole number, or a tuple with the rows of each part, got \(4, 2.0\)"),
        ("groups", None, "groups must be a whole number, got None"),
    ],
)
def test_views_of_another_type_are_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"View: {message}"):
        View(**{field: value})
    with pytest.raises(TypeError, match=f"View: {message}"):
        SteepestDescent([torch.zeros(8, 2, requires_grad=True)], view={field: value})
    model = Holder(8, 2)
    model.normopt_views = {"raw": {field: value}}
    with pytest.raises(TypeError, match=f"normopt_views of Holder for raw: View: {message}"):
        infer_roles(model)


@pytest.mark.parametrize(
    "view",
    [View(False, False, 3), View(False, True, 2), View(True, False, 3), View(True, groups=3), View(True, True, 2, 3)],
    ids=str,
)
@pytest.mark.parametrize("shape", [(12, 2), (6, 8), (6, 6, 4)], ids=str)
def test_each_part_of_a_split_moves_by_itself(view: View, shape: tuple[int, ...]) -> None:
    g = torch.randn(shape)
    w = nn.Parameter(torch.zeros(shape))
    w.grad = g.clone()
    norm = Spectral(method="exact")
    SteepestDescent([{"params": [w], "view": view}], lr=1.0, norm=norm).step()
    expected = torch.stack([norm.dualize(part) for part in view.apply(g)])
    torch.testing.assert_close(view.apply(-w.detach()), expected)


# Muon on a whole model -----------------------------------------------------------------------------------------------


def test_one_scheduler_scales_all_of_muon() -> None:
    optimizer = normopt.create("muon", gpt(), lr=0.2)
    rates = {group["role"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {"linear": 0.2, "embedding": 0.1, "vector": 0.1, "unembedding": 0.1}
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
    step_once(optimizer)
    schedule.step()
    assert {group["role"]: group["lr"] for group in optimizer.param_groups} == pytest.approx(
        {role: 0.1 * lr for role, lr in rates.items()}
    )
    fixed = normopt.create("muon", gpt(), lr=0.2, aux_lr=0.003, aux_weight_decay=0.5, aux_betas=(0.8, 0.9))
    for group in fixed.param_groups:
        hidden = group["role"] in HIDDEN
        assert group["lr"] == (0.2 if hidden else 0.003) and group["weight_decay"] == (0.1 if hidden else 0.5)
        assert hidden or group["betas"] == (0.8, 0.9)
    matched = normopt.create("muon", gpt(), lr=0.2, adjust_lr_fn="match_rms_adamw")
    assert {group["lr"] for group in matched.param_groups} == {0.2}


@pytest.mark.parametrize("kind", ["mlp", "gpt"])
def test_muon_is_torchs_muon_beside_torchs_adamw(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a model and its own gradients, for 10 steps; torch's cast to bfloat16 is taken out."""
    monkeypatch.setattr(Tensor, "bfloat16", Tensor.clone)
    a, b = MODELS[kind](), MODELS[kind]()
    b.load_state_dict(a.state_dict())
    ours = normopt.create(
        "muon",
        a,
        lr=0.02,
        aux_lr=0.003,
        aux_weight_decay=0.05,
        orthogonalize_dtype=torch.float32,
        overrides={"*qkv*": {"view": {"split": 1}}} if kind == "gpt" else None,
    )
    hidden = [p for name, p in b.named_parameters() if p.ndim == 2 and name.split(".")[0] in ("blocks", "0")]
    rest = [p for p in b.parameters() if all(p is not q for q in hidden)]
    theirs = [
        torch.optim.Muon(hidden, lr=0.02),
        torch.optim.AdamW(rest, lr=0.003, betas=(0.9, 0.95), weight_decay=0.05),
    ]
    travelled = {name: 0.0 for name, _ in b.named_parameters()}
    for i in range(10):
        backward(b, kind, i)
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            p.grad = q.grad.clone()
        before = {name: q.detach().clone() for name, q in b.named_parameters()}
        ours.step()
        for optimizer in theirs:
            optimizer.step()
        for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
            travelled[name] += (q - before[name]).abs().max().item()
            assert (p - q).abs().max() <= 2e-5 * travelled[name], name
    assert min(travelled.values()) > 0


def backward(model: nn.Module, kind: str, seed: int) -> None:
    noise = torch.Generator().manual_seed(seed)
    model.zero_grad()
    if kind == "gpt":
        tokens = torch.randint(13, (2, 7), generator=noise)
        nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    else:
        model(torch.randn(16, 5, generator=noise)).square().mean().backward()


def test_roles_of_our_own_model_warn_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        normopt.create("scion", gpt())


def test_width_scaled_rates_and_decays() -> None:
    """Four times as wide: a quarter of the rate, twice the decay, for hidden matrices alone."""
    optimizer = normopt.create(
        "adamw", net(), lr=0.01, weight_decay=0.3, geometry=normopt.width_scaled(512, 128, weight_decay=0.1)
    )
    found = {name: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for name in g["param_names"]}
    assert found["free.weight"] == found["layer.up.weight"] == (0.0025, 0.2)
    assert found["embed.weight"] == found["head.weight"] == found["free.bias"] == (0.01, 0.0)
    with pytest.raises(ValueError, match="width_scaled: width must be positive"):
        normopt.width_scaled(0, 128, 0.1)
