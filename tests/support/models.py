"""Models to optimize."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from normopt.nn import GPT


class Net(nn.Module):
    """Something for every role."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, 8)
        self.down = nn.Linear(8, 6)
        self.gain = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(6, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.conv(self.embed(tokens).mT).mT
        return self.head(self.gain * self.down(self.up(self.norm(h)).relu()))

    def loss(self) -> Tensor:
        tokens = torch.arange(22).reshape(2, 11) % 11
        return nn.functional.cross_entropy(self(tokens).flatten(0, 1), tokens.flatten())


class Language(nn.Module):
    """An embedding, a hidden layer, a vector and a head, of the tensors that are handed in."""

    def __init__(self, params: list[Tensor]) -> None:
        super().__init__()
        (vocabulary, d), (hidden, _) = params[0].shape, params[1].shape
        self.embed = nn.Embedding(vocabulary, d)
        self.hidden = nn.Linear(d, hidden)
        self.head = nn.Linear(hidden, vocabulary, bias=False)
        self.embed.weight, self.hidden.weight, self.hidden.bias, self.head.weight = params  # type: ignore[assignment]


LANGUAGE: list[tuple[int, ...]] = [(9, 6), (8, 6), (8,), (9, 8)]


def gpt(**options: Any) -> GPT:
    torch.manual_seed(0)
    return GPT(13, 8, 2, 2, **options)
