"""Steps that are like the last one: the same to the bit, and nothing that has changed is overlooked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normopt import SteepestDescent, optimizer, zoo
from tests.support.optimizers import ZOO, Make


def parameters() -> list[nn.Parameter]:
    noise = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=noise)) for shape in [(4, 6), (4, 6), (3, 5), (6, 4)]]


def give(params: list[nn.Parameter], i: int) -> None:
    noise = torch.Generator().manual_seed(100 + i)
    for p in params:
        p.grad = torch.randn(p.shape, generator=noise)


def cold_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the steps that look at everything."""
    taken, original = list[int](), optimizer.prepared

    def counted(*args: Any) -> Any:
        taken.append(1)
        return original(*args)

    monkeypatch.setattr(optimizer, "prepared", counted)
    return taken


@pytest.mark.parametrize("name", ZOO)
def test_warm_steps_are_cold_ones_to_the_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make: Make = ZOO[name]
    runs = [parameters(), parameters()]
    warm, cold = (make(params) for params in runs)
    for i in range(8):
        for params in runs:
            give(params, i)
        if i == 5:
            for each in (warm, cold):
                each.param_groups[0]["lr"] *= 0.5
        warm.step()
        cold._warm = None
        cold.step()
    assert all(map(torch.equal, *runs))
    for p, q in zip(*runs, strict=True):
        for entry, value in warm.state[p].items():
            assert torch.equal(value, cold.state[q][entry])


@pytest.mark.parametrize("cls", [zoo.SGD, zoo.AdamW, zoo.Lion, zoo.RMSprop, zoo.Muon, zoo.SOAP])
def test_which_steps_are_warm(cls: type[SteepestDescent], monkeypatch: pytest.MonkeyPatch) -> None:
    """New gradients and new learning rates leave them so."""
    taken, params = cold_steps(monkeypatch), parameters()
    made = cls(params)
    for i in range(8):
        give(params, i)
        made.param_groups[0]["lr"] = 0.1 / (i + 1)
        made.step()
    assert len(taken) <= 3  # products that have been measured are a change of the group, once


def _option(made: SteepestDescent, params: list[nn.Parameter]) -> None:
    made.param_groups[0]["weight_decay"] = 0.3


def _maximize(made: SteepestDescent, params: list[nn.Parameter]) -> None:
    made.param_groups[0]["maximize"] = True


def _missing(made: SteepestDescent, params: list[nn.Parameter]) -> None:
    params[1].grad = None


def _data(made: SteepestDescent, params: list[nn.Parameter]) -> None:
    params[1].data = params[1].data.double()
    params[1].grad = torch.ones_like(params[1])


def _state(made: SteepestDescent, params: list[nn.Parameter]) -> None:
    held: dict[str, Tensor] = made.state[params[0]]
    held.update({name: x.clone() for name, x in held.items()})


def _added(made: SteepestDescent, params: list[nn.Parameter]) -> None:
    params.append(nn.Parameter(torch.ones(4, 6)))
    params[-1].grad = torch.ones(4, 6)
    made.add_param_group({"params": params[-1:]})


@pytest.mark.parametrize("change", [_option, _maximize, _missing, _data, _state, _added])
@pytest.mark.parametrize("cls", [zoo.SGD, zoo.AdamW, zoo.Lion, zoo.Muon])
def test_what_has_changed_is_looked_at(
    cls: type[SteepestDescent],
    change: Callable[[SteepestDescent, list[nn.Parameter]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken, params = cold_steps(monkeypatch), parameters()
    made = cls(params, lr=0.1, **({"momentum": 0.9} if cls is zoo.SGD else {}))
    for i in range(4):
        give(params, i)
        made.step()
    taken.clear()
    give(params, 4)
    change(made, params)
    made.step()
    assert taken == [1]


@pytest.mark.parametrize("cls", [zoo.SGD, zoo.Lion, zoo.Muon])
def test_a_bad_gradient_after_warm_steps_is_an_error_and_moves_nothing(cls: type[SteepestDescent]) -> None:
    params = parameters()
    made = cls(params)
    for i in range(4):
        give(params, i)
        made.step()
    before = [p.detach().clone() for p in params]
    params[2].grad = torch.full((3, 5), torch.nan)
    with pytest.raises(ValueError, match="NaN or Inf in the gradient of parameter 2 of its group"):
        made.step()
    assert all(map(torch.equal, before, params))
    give(params, 5)
    made.step()
    assert not any(map(torch.equal, before, params))
