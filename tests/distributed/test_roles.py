"""Every parameter of a sharded model plays the role that it plays in the whole one."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import normopt
from normopt.nn import GPT, anGPT, nGPT
from tests.support.ranks import Ranks


def gpt() -> nn.Module:
    return GPT(20, 8, 2, 2)


def angpt() -> nn.Module:
    return anGPT(20, 8, 2, 2)


def ngpt() -> nn.Module:
    return nGPT(20, 8, 2, 2)


def gpt2() -> nn.Module:
    """Its matrices are stored (in, out), in modules that only their class name tells from others."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2, tie_word_embeddings=False)
    return GPT2LMHeadModel(config)


def mixture() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
    )
    return MixtralForCausalLM(config)


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2),
        nn.BatchNorm2d(8),
        nn.ConvTranspose2d(8, 4, 2),
        nn.Flatten(),
        nn.Linear(16, 8),
        nn.Linear(8, 3),
    )


def recurrent() -> nn.Module:
    return nn.ModuleDict(
        {
            "embed": nn.Embedding(10, 8),
            "lstm": nn.LSTM(8, 8, proj_size=4),
            "gru": nn.GRU(4, 8),
            "attention": nn.MultiheadAttention(8, 2),
            "head": nn.Linear(8, 10),
        }
    )


MODELS = [gpt, angpt, ngpt, gpt2, mixture, convolutional, recurrent]


def before_and_after(make: Callable[[], nn.Module]) -> tuple[dict[str, normopt.Role], dict[str, normopt.Role]]:
    mesh = init_device_mesh("cpu", (2,))
    model = make()
    before = normopt.infer_roles(model)
    for _, module in reversed([*model.named_modules()]):
        if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            fully_shard(module, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return before, normopt.infer_roles(model)


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_roles_are_the_same_after_every_submodule_is_sharded(
    ranks_of: Callable[[int], Ranks], make: Callable[[], nn.Module]
) -> None:
    if make in (gpt2, mixture):
        pytest.importorskip("transformers")
    for before, after in ranks_of(2).run(before_and_after, make):
        assert before == after
