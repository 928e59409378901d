"""AdamMini and SubsetNorm beside pytorch_optimizer's, and by their recurrences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normopt
from normopt import Column, Euclidean, PerBlock, Row, SteepestDescent, zoo
from normopt.nn import GPT
from normopt.rule import rule_of
from tests.support.paths import MATRICES, assert_same_path
from tests.support.written import State, Written

ADAM_MINI = [{}, {"betas": (0.8, 0.9), "weight_decay": 0.1}]


@pytest.mark.parametrize("options", ADAM_MINI, ids=str)
@pytest.mark.parametrize(("name", "rows"), [("q_proj", 2), ("mlp", 8)])
def test_adam_mini_is_pytorch_optimizers(name: str, rows: int, options: dict[str, Any]) -> None:
    """Queries by heads of two rows; what has another name there is one block."""
    from pytorch_optimizer import AdamMini

    def reference(params: list[Tensor]) -> AdamMini:
        model = nn.Module()
        model.add_module(name, nn.Linear(8, 8, bias=False))
        model.get_submodule(name).weight = params[0]
        decay = {"weight_decay": options.get("weight_decay", 0.0)}
        return AdamMini(model, 1e-3, num_embeds=8, num_heads=4, **{**options, **decay})

    assert_same_path(lambda p: zoo.AdamMini(p, 1e-3, rows=rows, **options), reference, [(8, 8)], 1e-5)


@pytest.mark.parametrize("options", ADAM_MINI, ids=str)
@pytest.mark.parametrize("rows", [1, 2])
def test_adam_mini_by_its_recurrence(rows: int, options: dict[str, Any]) -> None:
    beta1, beta2 = options.get("betas", (0.9, 0.999))

    def update(g: Tensor, state: State, step: int) -> Tensor:
        m, v = (state.setdefault(key, torch.zeros_like(g)) for key in "mv")
        mean = g.square().reshape(-1, rows * g.shape[1]).mean(dim=1).repeat_interleave(rows)[:, None]
        m.mul_(beta1).add_((1 - beta1) * g)
        v.mul_(beta2).add_((1 - beta2) * mean)
        return 1e-3 * m / (1 - beta1**step) / ((v / (1 - beta2**step)).sqrt() + 1e-8)

    assert_same_path(
        lambda p: zoo.AdamMini(p, 1e-3, rows=rows, **options),
        lambda p: Written(p, update, 1e-3 * options.get("weight_decay", 0.0)),
        MATRICES,
        1e-5,
    )


def test_adam_mini_has_a_second_moment_for_each_head_row_and_token() -> None:
    model = GPT(vocab_size=32, d_model=16, n_layers=1, n_heads=2)
    optimizer = normopt.create("adammini", model, overrides={"*.qkv.weight": {"rows": 8}})
    norms = {name: rule_of(group).norm.norm for group in optimizer.param_groups for name in group["param_names"]}
    assert norms["blocks.0.attention.qkv.weight"] == PerBlock(Euclidean(), rows=8)
    assert norms["blocks.0.mlp.up.weight"] == norms["head.weight"] == Row("sqrt_in")
    assert norms["embed.weight"] == Column() and norms["norm.weight"] == Euclidean()
    model(torch.arange(8)[None]).sum().backward()
    optimizer.step()
    sizes = {name: optimizer.state[p]["second_moment"].numel() for name, p in model.named_parameters()}
    assert sizes["embed.weight"] == sizes["head.weight"] == 32 and sizes["norm.weight"] == 1
    assert sizes["blocks.0.attention.qkv.weight"] == 3 * 16 // 8


SUBSETS = [{}, {"betas": (0.8, 0.9), "weight_decay": 0.1}, {"subset_size": 2}]


@pytest.mark.parametrize("options", SUBSETS, ids=str)
def test_subset_norm_is_pytorch_optimizers(options: dict[str, Any]) -> None:
    from pytorch_optimizer import AdamWSN

    size = options.get("subset_size", 10)
    assert_same_path(
        lambda p: zoo.SubsetNorm(p, 0.05, **options),
        lambda p: AdamWSN([{"params": p, "sn": True}], 0.05, **{**options, "subset_size": size}),
        [(6, 10), (10, 10)],
        1e-5,
    )


def test_subset_norm_sums_up_with_a_beta_of_one() -> None:
    """The paper's AdaGrad-Subset-Norm: ``b_i^2 <- b_i^2 + |g_i|^2``, ``w_i <- w_i - lr g_i / b_i``."""

    def update(g: Tensor, state: State, step: int) -> Tensor:
        b = state.setdefault("b", torch.zeros_like(g[:, :1]))
        b.add_(g.square().sum(dim=1, keepdim=True))
        return 0.1 * g / b.sqrt()

    def make(params: list[Tensor]) -> SteepestDescent:
        return zoo.SubsetNorm(params, 0.1, betas=(0.0, 1.0), eps=0.0)

    assert_same_path(make, lambda p: Written(p, update), MATRICES, 1e-5)
