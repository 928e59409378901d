"""Modules that people train: mixtures, fused projections, grouped convolutions, weight_norm."""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm

import normopt
from normopt import Spectral, SteepestDescent, View, infer_roles, param_groups
from normopt.rule import rule_of
from tests.support.optimizers import EVERY, at_once

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
MIXTURES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},
    "GptOss": {"num_local_experts": 4, "head_dim": 8},
    "Qwen2Moe": {"num_experts": 4, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 24},
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 48, "head_dim": 8},
}


def language_model(kind: str, **changes: Any) -> nn.Module:
    """A tiny model of transformers, from a config alone."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **changes})
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return model


def gpt2() -> nn.Module:
    return language_model("GPT2", n_embd=32, n_head=4, n_layer=1, n_positions=32)


def found(model: nn.Module, end: str, **options: Any) -> normopt.Role:
    """The role of the one parameter whose name ends so."""
    (role,) = (role for name, role in infer_roles(model, **options).items() if name.endswith(end))
    return role


def parameter(model: nn.Module, end: str) -> nn.Parameter:
    (p,) = (p for name, p in model.named_parameters() if name.endswith(end))
    return p


def seen(model: nn.Module, end: str) -> tuple[int, int, int]:
    return found(model, end).view.shape(tuple(parameter(model, end).shape))


def spectral_share(model: nn.Module) -> float:
    """How much of what is neither embedding nor head Muon moves by the spectral norm."""
    groups = normopt.create("muon", model, lr=0.02).param_groups
    inner = [group for group in groups if group["role"] not in ("embedding", "unembedding")]
    sizes = [("Spectral" in group["rule"], sum(p.numel() for p in group["params"])) for group in inner]
    return sum(size for moves, size in sizes if moves) / sum(size for _, size in sizes)


def moved(model: nn.Module, gradients: dict[str, Tensor] | None = None, **options: Any) -> dict[str, Tensor]:
    """What one step of length 1 under the exact spectral norm, or the geometry's, does to every parameter."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = SteepestDescent(model, lr=1.0, norm=Spectral("unit", "exact"), **options)
    for name, p in model.named_parameters():
        p.grad = (gradients or {}).get(name, torch.randn_like(p))
    optimizer.step()
    return {name: before[name] - p.detach() for name, p in model.named_parameters()}


def are_orthogonal(matrices: Tensor) -> bool:
    values = torch.linalg.svdvals(matrices)
    return torch.allclose(values, torch.ones_like(values), atol=1e-4)


# Mixtures ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_are_stacks_of_matrices(kind: str) -> None:
    model = language_model(kind, **MIXTURES[kind])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert spectral_share(model) > 0.95  # biases and gains are the rest
    halves = 1 if kind == "GptOss" else 2  # GPT-OSS takes every second row for the gate
    assert seen(model, "experts.gate_up_proj") == (4 * halves, 96 // halves, 32)
    assert seen(model, "experts.down_proj") == (4, 32, 48)
    is_transposed = kind == "GptOss"
    for end in "experts.gate_up_proj", "experts.down_proj":
        role = found(model, end)
        assert role.name == "linear" and role.view.transpose == is_transposed and role.view.flatten is False
        assert "one matrix for each of 4 experts" in role.reason
    router = "router.weight" if kind == "GptOss" else "mlp.gate.weight"
    assert found(model, router).name == "linear" and seen(model, router) == (1, 4, 32)
    update = moved(model)
    for name, d in update.items():
        if name.endswith("experts.down_proj"):
            assert are_orthogonal(d)
        if name.endswith("experts.gate_up_proj"):
            assert are_orthogonal(d if kind == "GptOss" else d.view(8, 48, 32))


def test_biases_of_experts_are_vectors() -> None:
    model = language_model("GptOss", **MIXTURES["GptOss"])
    for end, width in ("gate_up_proj_bias", 96), ("down_proj_bias", 32):
        assert found(model, end).name == "vector" and seen(model, end) == (4, 1, width)
    optimizer = normopt.create("adamw", model, weight_decay=0.1)
    group = next(g for g in optimizer.param_groups if any("down_proj_bias" in name for name in g["param_names"]))
    assert group["weight_decay"] == 0.0


@pytest.mark.parametrize("override", ["linear", {"role": "linear"}, {"role": "expert"}, {"norm": "spectral"}], ids=str)
def test_no_override_makes_all_experts_one_matrix(override: Any) -> None:
    model = language_model("Mixtral", **MIXTURES["Mixtral"])
    role = found(model, "experts.down_proj", overrides={"*.experts.*": override})
    assert role.view == View(flatten=False)
    table = found(model, "experts.down_proj", overrides={"*.experts.*": "embedding"})
    assert table.view == View(flatten=False, transpose=True)


class Stack(nn.Module):
    """A parameter that nothing is known of."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("override", ["linear", {"role": "linear"}, {"role": "mine", "norm": "spectral"}], ids=str)
def test_unknown_stacks_ask_how_they_are_seen(override: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"'raw' has shape .* two ways.*'flatten': False.*'flatten': True"):
        normopt.create("muon", Stack(*shape), overrides={"raw": override})
    declared = Stack(*shape)
    declared.normopt_roles = {"raw": "linear"}
    with pytest.raises(ValueError, match=r"'raw' has shape .* two ways"):
        normopt.create("muon", declared)
    given = override if isinstance(override, dict) else {"role": override}
    role = found(Stack(*shape), "raw", overrides={"raw": {**given, "view": {"flatten": False}}})
    assert role.view == View(flatten=False)
    assert found(Stack(*shape), "raw", overrides={"raw": "conv"}).view == View(flatten=True)
    table = found(Stack(*shape), "raw", overrides={"raw": "embedding"}).view
    assert table.shape(shape)[1:] == (5, 4)


class Experts(nn.Module):
    """Experts of a library that says nothing of how they are stored; ``gate_up`` is fused or not."""

    def __init__(self, up: str, shape: tuple[int, ...], down: tuple[int, ...], width: int | None = None) -> None:
        super().__init__()
        self.down_proj = nn.Parameter(torch.randn(down))
        self.register_parameter(up, nn.Parameter(torch.randn(shape)))
        if width is not None:
            self.hidden_size = width


@pytest.mark.parametrize(
    ("experts", "is_transposed"),
    [
        (Experts("gate_up_proj", (2, 24, 8), (2, 8, 12)), False),
        (Experts("gate_up_proj", (2, 8, 24), (2, 12, 8)), True),
        (Experts("gate_up_proj", (2, 16, 8), (2, 8, 8)), False),
        (Experts("up_proj", (2, 12, 8), (2, 8, 12), width=8), False),
        (Experts("up_proj", (2, 8, 12), (2, 12, 8), width=8), True),
        (Experts("up_proj", (2, 8, 8), (2, 8, 8), width=8), False),
        (Experts("up_proj", (2, 12, 8), (2, 8, 12)), False),
    ],
)
def test_widths_tell_how_experts_are_stored(experts: Experts, is_transposed: bool) -> None:
    for role in infer_roles(experts).values():
        assert role.name == "linear" and (role.view.flatten, role.view.transpose) == (False, is_transposed)


# Fused projections ---------------------------------------------------------------------------------------------------


def test_gpt2s_projections_are_split_and_transposed() -> None:
    model = gpt2()
    role = found(model, "attn.c_attn.weight")
    assert role.view == View(transpose=True, split=3) and "query, key and value, split into 3" in role.reason
    assert seen(model, "attn.c_attn.weight") == (3, 32, 32)
    assert seen(model, "mlp.c_fc.weight") == (1, 128, 32)
    by_head = found(model, "attn.c_attn.weight", overrides={"*c_attn.weight": {"view": {"split": 12}}})
    assert by_head.view == View(transpose=True, split=12)
    replaced = found(model, "attn.c_attn.weight", overrides={"*c_attn.weight": {"view": View(split=4)}})
    assert replaced.view == View(split=4)
    update = moved(model)["transformer.h.0.attn.c_attn.weight"]
    assert all(are_orthogonal(part) for part in update.split(32, dim=1))
    assert "query, key and value, split into 3 matrices" in normopt.describe(normopt.create("muon", model))


@pytest.mark.parametrize("heads", [4, 2, 1])
def test_phi3s_projections_are_split_into_what_they_stack(heads: int) -> None:
    model = language_model("Phi3", num_key_value_heads=heads)
    assert seen(model, "gate_up_proj.weight") == (2, 48, 32)
    role = found(model, "qkv_proj.weight")
    if heads == 4:
        assert role.view == View(split=3) and "split into 3" in role.reason
        return
    keys = 8 * heads
    rows = 32 + 2 * keys
    assert role.view == View(split=(32, keys, keys))
    assert f"query (32 rows), key and value ({keys} rows each), a matrix each" in role.reason
    update = moved(model)["model.layers.0.self_attn.qkv_proj.weight"]
    assert all(are_orthogonal(part) for part in update.split((32, keys, keys)))
    text = normopt.describe(normopt.create("muon", model))
    assert f"1x(32+{keys}+{keys})x32" in text and "a matrix each" in text
    by_head = found(model, "qkv_proj.weight", overrides={"*qkv_proj*": {"view": {"split": rows // 8}}})
    assert by_head.view.shape((rows, 32)) == (rows // 8, 8, 32)
    whole = found(model, "qkv_proj.weight", overrides={"*qkv_proj*": {"view": {"split": 1}}})
    assert whole.view == View()


#: Query, key and value of grouped-query attention.
HEIGHTS = (8, 4, 4)


class GroupedQuery(nn.Module):
    """The layers of grouped-query attention, with query, key and value in one layer or in three."""

    def __init__(self, weight: Tensor, *, fused: bool) -> None:
        super().__init__()
        parts = {"qkv_proj": weight} if fused else dict(zip("qkv", weight.split(HEIGHTS), strict=True))
        for name, part in parts.items():
            self.add_module(name, nn.Linear(part.shape[1], part.shape[0], bias=False))
            self.get_parameter(f"{name}.weight").data = part.clone()
        self.o_proj = nn.Linear(8, weight.shape[1], bias=False)
        nn.init.ones_(self.o_proj.weight)

    def weight(self) -> Tensor:
        return torch.cat([p.detach() for name, p in self.named_parameters() if name != "o_proj.weight"])

    def stepped(self, optimizer: SteepestDescent, gradients: list[Tensor]) -> None:
        """Steps along these gradients of query, key and value."""
        inner = [p for name, p in self.named_parameters() if name != "o_proj.weight"]
        heights = [p.shape[0] for p in inner]

        for gradient in gradients:

            def closure(gradient: Tensor = gradient) -> float:
                self.o_proj.weight.grad = torch.ones_like(self.o_proj.weight)
                for p, part in zip(inner, gradient.split(heights), strict=True):
                    p.grad = part + 0.1 * p.detach()
                return 1.0

            optimizer.step(closure)


def rules_see_parts(optimizer: SteepestDescent) -> bool:
    """Whether direction alone looks at more than one entry of the fused layer, the first of its model."""
    name = optimizer.param_groups[0]["param_names"][0]
    assert name.startswith("q")
    rule = rule_of(optimizer.param_groups[0])
    return all(each.reduces == "entry" for each in (rule.momentum, rule.step_size, *rule.constraint))


@pytest.mark.parametrize("name", [*EVERY, "stormplus"])
def test_parts_of_unequal_height_move_as_parameters_of_their_own(name: str) -> None:
    make = at_once(EVERY).get(name) or partial(normopt.create, name)
    noise = torch.Generator().manual_seed(0)
    start, *gradients = (torch.randn(sum(HEIGHTS), 12, generator=noise) for _ in range(5))
    fused, separate = GroupedQuery(start, fused=True), GroupedQuery(start, fused=False)
    optimizers = make(fused), make(separate)
    fused.stepped(optimizers[0], gradients)
    separate.stepped(optimizers[1], gradients)
    assert infer_roles(fused)["qkv_proj.weight"].view == View(split=HEIGHTS)
    ours, theirs = fused.weight() - start, separate.weight() - start
    assert ours.isfinite().all() and ours.abs().max() > 0
    if rules_see_parts(optimizers[0]):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6 * float(theirs.abs().max()))
    # Where step size or constraint measure, they measure one matrix.


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler
@pytest.mark.parametrize("name", ["muon", "normuon"])
def test_parts_are_compiled_and_captured(name: str) -> None:
    noise = torch.Generator().manual_seed(0)
    start, *gradients = (torch.randn(sum(HEIGHTS), 12, generator=noise) for _ in range(4))
    found = []
    for options in {}, {"compile": True}, {"capturable": True}:
        model = GroupedQuery(start, fused=True)
        model.stepped(normopt.create(name, model, lr=0.1, **options), gradients)
        found.append(model.weight())
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[2], found[0])


@pytest.mark.parametrize("name", ["muon", "soap", "shampoo", "adamw", "normuon"])
def test_state_of_parts_is_saved_and_loaded(name: str) -> None:
    noise = torch.Generator().manual_seed(0)
    start, *gradients = (torch.randn(sum(HEIGHTS), 12, generator=noise) for _ in range(5))
    a, b = GroupedQuery(start, fused=True), GroupedQuery(start, fused=True)
    first = normopt.create(name, a, lr=0.1, state_dtype="bfloat16")
    a.stepped(first, gradients[:2])
    second = normopt.create(name, b, lr=0.1, state_dtype="bfloat16")
    second.load_state_dict(first.state_dict())
    b.load_state_dict(a.state_dict())
    a.stepped(first, gradients[2:])
    b.stepped(second, gradients[2:])
    assert torch.equal(a.weight(), b.weight())


def test_reports_measure_every_part() -> None:
    noise = torch.Generator().manual_seed(0)
    start, gradient = (torch.randn(sum(HEIGHTS), 12, generator=noise) for _ in range(2))
    model = GroupedQuery(start, fused=True)
    optimizer = SteepestDescent(model, lr=0.1, norm=Spectral("unit", "exact"), step_size="sharp")
    (row,) = (each for each in normopt.summary(optimizer) if each["parameter"] == "qkv_proj.weight")
    assert row["view"] == (1, HEIGHTS, 12)
    assert row["effective_lr"] == pytest.approx(0.1 / math.sqrt(12))  # that of an orthogonal part, wide ones
    with optimizer.metrics() as measured:
        model.stepped(optimizer, [gradient])
    (row,) = (each for each in measured.rows() if each["parameter"] == "qkv_proj.weight")
    g = gradient + 0.1 * start
    assert row["dual_norm"] == pytest.approx(sum(float(torch.linalg.svdvals(x).sum()) for x in g.split(HEIGHTS)))
    largest = [float(torch.linalg.svdvals(x)[0]) for x in model.weight().split(HEIGHTS)]
    assert row["weight_norm"] == pytest.approx(max(largest))
    # the dual norm times the learning rate is how far a sharp step goes, in all parts alike
    assert row["update_norm"] == pytest.approx(0.1 * row["dual_norm"], rel=1e-4)


def test_scions_weights_lie_on_the_balls_of_their_parts() -> None:
    model = GroupedQuery(torch.randn(sum(HEIGHTS), 12), fused=True)
    optimizer = normopt.create("scion", model, radius=2.0, geometry={"linear": Spectral("unit", "exact")})
    assert isinstance(optimizer, normopt.zoo.Scion)
    optimizer.initialize()
    assert all(are_orthogonal(part / 2) for part in model.weight().split(HEIGHTS))


def test_vectors_have_no_parts() -> None:
    weights = [nn.Parameter(torch.randn(16, 12)), nn.Parameter(torch.randn(16))]
    optimizer = SteepestDescent(weights, lr=0.1, norm="euclidean", view=View(split=HEIGHTS))
    for p in weights:
        p.grad = torch.ones_like(p)
    optimizer.step()


def test_a_bound_on_whole_matrices_is_refused_for_parts() -> None:
    weight = nn.Parameter(torch.zeros(16, 12))
    with pytest.raises(ValueError, match="needs to know how large updates can be"):
        SteepestDescent([weight], norm=Spectral(), constraint="SoftSpectralCap()", view=View(split=HEIGHTS))


def test_grouped_query_attention_without_fusion_is_left_as_it_is() -> None:
    roles = infer_roles(language_model("Llama"))
    assert all(role.view == View() for role in roles.values() if role.name == "linear")


class VisionAttention(nn.Module):
    """Attention with timm's names and shapes."""

    def __init__(self, dim: int, num_heads: int, inner: int | None = None) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.qkv = nn.Linear(dim, inner or 3 * dim)
        self.proj = nn.Linear(dim, dim)


class GPTBigCodeAttention(VisionAttention):
    """Attention whose fused rows go head by head."""


@pytest.mark.parametrize("heads", [4, 2])
def test_multi_query_attention_is_split(heads: int) -> None:
    sizes = {"num_attention_heads": heads}
    model = language_model("GPTBigCode", multi_query=True, **sizes)
    assert found(model, "c_attn.weight").view == View(split=(32, 32 // heads, 32 // heads))
    model = language_model("GPTBigCode", multi_query=False, **sizes)
    assert found(model, "c_attn.weight").view == View()


def test_fused_layers_by_name_and_shape() -> None:
    def qkv(attention: nn.Module) -> normopt.Role:
        return found(nn.Sequential(nn.Embedding(50, 8), attention, nn.Linear(8, 50)), "qkv.weight")

    assert qkv(VisionAttention(8, 2)).view == View(split=3)
    by_output_layer = qkv(VisionAttention(8, 2, inner=16))
    assert by_output_layer.view == View(split=HEIGHTS) and "key and value (4 rows each)" in by_output_layer.reason
    unknown = qkv(VisionAttention(8, 2, inner=20))
    assert unknown.view == View() and "parts are not known, kept as one matrix" in unknown.reason
    other = qkv(GPTBigCodeAttention(8, 2))
    assert other.view == View() and "an order of the model's own, kept as one matrix" in other.reason


# Convolutions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("conv", "matrices"),
    [
        (nn.Conv1d(6, 12, 3, groups=3), (3, 4, 6)),
        (nn.Conv2d(6, 12, 3, groups=2), (2, 6, 27)),
        (nn.Conv2d(6, 6, 3, groups=6), (6, 1, 9)),
        (nn.ConvTranspose1d(6, 12, 3, groups=3), (3, 12, 2)),
        (nn.ConvTranspose2d(6, 12, 3, groups=2), (2, 54, 3)),
        (nn.ConvTranspose2d(6, 6, 3, groups=6), (6, 9, 1)),
    ],
    ids=str,
)
def test_every_group_of_a_convolution_is_a_matrix(conv: Any, matrices: tuple[int, int, int]) -> None:
    """A group with gradients 1000 times smaller moves as far as the others."""
    groups = matrices[0]
    role = infer_roles(conv)["weight"]
    assert role.view.shape(tuple(conv.weight.shape)) == matrices and f"each of {groups} groups" in role.reason
    gradient = torch.randn_like(conv.weight)
    scales = torch.logspace(-3, 0, groups).repeat_interleave(conv.weight.shape[0] // groups)
    gradient *= scales.view(-1, *[1] * (gradient.ndim - 1))
    update = moved(conv, {"weight": gradient})["weight"]
    assert are_orthogonal(update.unflatten(0, (groups, -1)).flatten(2))
    lengths = role.view.apply(update).norm(dim=(-2, -1))
    torch.testing.assert_close(lengths, lengths[0].expand(groups))


def test_state_of_grouped_convolutions_is_saved_and_loaded() -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleList([nn.ConvTranspose2d(4, 4, 3, groups=2) for _ in range(2)] + [nn.Conv2d(4, 4, 3, groups=2)])

    def steps(optimizer: SteepestDescent, count: int, seed: int) -> None:
        noise = torch.Generator().manual_seed(seed)
        for _ in range(count):
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = torch.randn(p.shape, generator=noise)
            optimizer.step()

    for name in "muon", "soap", "adamw":
        a, b = model(), model()
        first = normopt.create(name, a, lr=0.1)
        steps(first, 2, 1)
        second = normopt.create(name, b, lr=0.1)
        second.load_state_dict(first.state_dict())
        b.load_state_dict(a.state_dict())
        steps(first, 2, 2)
        steps(second, 2, 2)
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("conv", [nn.Conv2d(4, 4, 3, groups=2), nn.ConvTranspose2d(4, 4, 3, groups=2)], ids=str)
def test_bounds_across_groups_are_refused(conv: Any) -> None:
    conv.normopt_bounds = {"weight": "RowBound(axis=-2)"}
    with pytest.raises(ValueError, match="run across the 2 matrices"):
        SteepestDescent(conv, norm="spectral")
    conv.normopt_bounds = {"weight": "RowBound(radius=0.1)"}
    moved(conv)
    assert conv.weight.detach().flatten(1).norm(dim=1).max() <= 0.1001


# weight_norm ---------------------------------------------------------------------------------------------------------


def normed(module: nn.Module, way: str, dim: int | None = 0) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one of the two is deprecated
        return weight_norm(module, dim=dim) if way == "hook" else parametrizations.weight_norm(module, dim=dim)


WAYS = {
    "hook": ("weight_g", "weight_v"),
    "parametrization": ("parametrizations.weight.original0", "parametrizations.weight.original1"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(6, 4),
        lambda: nn.Conv2d(6, 4, 3),
        lambda: nn.ConvTranspose1d(6, 4, 3),
        lambda: nn.Embedding(9, 4),
    ],
    ids=["linear", "conv", "transposed", "embedding"],
)
def test_weight_norms_gains_are_vectors_and_its_directions_weights(make: Any, dim: int | None, way: str) -> None:
    plain = make()
    module = normed(make(), way, dim)
    gain, direction = WAYS[way]
    roles = infer_roles(module)
    assert roles[gain].name == ("scalar" if dim is None else "vector") and "weight_norm: gains" in roles[gain].reason
    size = module.get_parameter(gain).numel()
    assert roles[gain].view.shape(tuple(module.get_parameter(gain).shape)) == (1, 1, size)
    wanted = infer_roles(plain)["weight"]
    assert (roles[direction].name, roles[direction].view) == (wanted.name, wanted.view)
    update = moved(module, geometry={"embedding": "column"})
    if plain.weight.ndim > 2 or isinstance(plain, nn.Linear):
        assert are_orthogonal(update[direction].flatten(1))
    torch.testing.assert_close(update[gain].abs(), torch.ones_like(update[gain]))  # Adam's first step


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", normopt.list_optimizers())
def test_no_optimizer_decays_the_gains_of_weight_norm(name: str, way: str) -> None:
    model = nn.Sequential(nn.Linear(6, 4), normed(nn.Linear(4, 4), way), nn.Linear(4, 3))
    optimizer = normopt.create(name, model, lr=0.1)
    gain = f"1.{WAYS[way][0]}"
    by_name = {name: group for group in optimizer.param_groups for name in group["param_names"]}
    of_gain, of_bias = by_name[gain], by_name["1.bias"]
    assert of_gain.get("weight_decay", 0.0) == of_bias.get("weight_decay", 0.0) == 0.0
    ours, bias = normopt.rule.rule_of(of_gain), normopt.rule.rule_of(of_bias)
    assert (ours.norm, ours.momentum, ours.constraint) == (bias.norm, bias.momentum, bias.constraint)


def test_declarations_reach_directions_under_weight_norm() -> None:
    for way, (gain, direction) in WAYS.items():
        model = nn.Sequential(normed(nn.Linear(6, 4), way), nn.Linear(4, 3))
        model.normopt_roles = {"0.weight": "mine"}
        roles = infer_roles(model)
        assert roles[f"0.{direction}"].name == "mine" and roles[f"0.{gain}"].name == "vector"


def test_norms_of_matrices_refuse_gains() -> None:
    with pytest.raises(ValueError, match=r"'weight_g' has shape \(4, 1\), .* norm of matrices"):
        SteepestDescent(param_groups(normed(nn.Linear(6, 4, bias=False), "hook"), {"*": "spectral"}))


# Architectures -------------------------------------------------------------------------------------------------------

DECODERS = ["Bloom", "CodeGen", "Cohere", "Falcon", "Gemma", "Gemma2", "Glm", "GPT2"]
DECODERS += ["GPTBigCode", "GPTJ", "GPTNeoX", "GptOss", "Granite", "Helium", "Llama", "Mistral"]
DECODERS += ["Mixtral", "Mpt", "Nemotron", "Olmo", "Olmo2", "OPT", "Persimmon", "Phi"]
DECODERS += ["Phi3", "Qwen2", "Qwen2Moe", "Qwen3", "Qwen3Moe", "SmolLM3", "StableLm", "Starcoder2"]
ENCODERS = ["Albert", "Bert", "DebertaV2", "DistilBert", "Electra", "ModernBert", "Roberta"]
#: What small configs need beside the sizes.
ALSO = {
    "CodeGen": {"rotary_dim": 4},
    "GPTJ": {"rotary_dim": 4},
    "Helium": {"head_dim": 8},
    "Qwen3Moe": {"num_experts_per_tok": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*DECODERS, *ENCODERS])
def test_architectures_of_transformers_train_by_role(kind: str) -> None:
    """Every matrix has a role, and one step of Muon moves what has a gradient, and nothing to NaN."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **MIXTURES.get(kind, {}), **ALSO.get(kind, {})})
    auto = transformers.AutoModelForCausalLM if kind in DECODERS else transformers.AutoModelForMaskedLM
    torch.manual_seed(0)
    model = auto.from_config(config).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        roles = infer_roles(model)
    assert not [name for name, role in roles.items() if role.name == "other"]
    assert spectral_share(model) > 0.9
    optimizer = normopt.create("muon", model, lr=0.02)
    model(torch.randint(3, 64, (2, 8))).logits.square().mean().backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    for name, p in model.named_parameters():
        assert p.isfinite().all(), name
        assert p.grad is None or not p.grad.any() or not torch.equal(p, before[name]), name
