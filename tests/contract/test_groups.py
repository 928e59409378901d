"""Param groups: their options, their names, their order, and how they are batched."""

from __future__ import annotations

import pytest

import normopt
from tests.support.optimizers import LOCAL, Make, everyone, local, whole
from tests.support.steps import assert_equal, give_gradients, run, snapshot, tensors


@local
def test_groups_have_their_own_options_and_ingredients(make: Make) -> None:
    """Each group moves as it would in an optimizer of its own."""
    ingredients = {"norm": "max", "momentum": "EMA(beta=0.5)", "lr": 0.03}
    own = [{"lr": 0.2}, ingredients, {"constraint": "WeightDecay(0.5)"}, {}]
    together, apart = tensors(), tensors()
    optimizer = make([{"params": [p], **o} for p, o in zip(together, own, strict=True)], lr=0.1)
    alone = [make([{"params": [p], **o}], lr=0.1) for p, o in zip(apart, own, strict=True)]
    for i in range(4):
        give_gradients(together, i)
        give_gradients(apart, i)
        optimizer.step()
        for single in alone:
            single.step()
    assert_equal(together, apart)


@whole
def test_groups_that_agree_are_one_group(make: Make) -> None:
    """Also where all tensors are looked at before one moves."""
    together, apart = tensors(), tensors()
    one, several = make(together, lr=0.1), make([{"params": apart[:1]}, {"params": apart[1:]}], lr=0.1)
    run(one, together, 3)
    run(several, apart, 3)
    assert_equal(together, apart, 1e-2 if "bfloat16" in one.param_groups[0]["rule"] else 1e-12)


@whole
def test_a_group_has_a_learning_rate_of_its_own(make: Make) -> None:
    params = tensors()
    optimizer = make([{"params": params[:2], "lr": 0.0}, {"params": params[2:]}], lr=0.1)
    before = [p.detach().clone() for p in params]
    run(optimizer, params, 3)
    assert_equal([p.detach() for p in params[:2]], before[:2])
    assert all((p != q).any() for p, q in zip(params[2:], before[2:], strict=True))


@everyone
def test_add_param_group_in_mid_run(make: Make) -> None:
    params = tensors()
    optimizer = make(params[:2], lr=0.1)
    run(optimizer, params[:2], 3)
    optimizer.add_param_group({"params": params[2:], "lr": 0.0})
    before = [p.detach().clone() for p in params]
    run(optimizer, params, 1, first=3)
    assert_equal([p.detach() for p in params[2:]], before[2:])
    assert all((p.detach() != q).any() for p, q in zip(params[:2], before[:2], strict=True))
    assert optimizer.state_dict()["state"][2]["step"] == 1


@everyone
def test_duplicates_and_empty_lists_are_refused(make: Make) -> None:
    w = tensors()[0]
    with pytest.raises(ValueError, match="empty parameter list"):
        make([], lr=0.1)
    with pytest.raises(ValueError, match="more than one parameter group"):
        make([{"params": [w]}, {"params": [w]}], lr=0.1)
    optimizer = make([w], lr=0.1)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [w]})
    assert len(optimizer.param_groups) == 1


@everyone
def test_names_are_kept_in_state_dicts(make: Make) -> None:
    names = ["a", "b", "c", "d"]
    optimizer = make(list(zip(names, tensors(), strict=True)), lr=0.1)
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == names


@everyone
def test_the_order_of_groups_does_not_matter(make: Make) -> None:
    a, b = tensors(), tensors()
    first = make([{"params": a[:2]}, {"params": a[2:], "lr": 0.03}], lr=0.1)
    second = make([{"params": b[2:], "lr": 0.03}, {"params": b[:2]}], lr=0.1)
    run(first, a, 3)
    run(second, b, 3)
    assert_equal(a, b, 0.0 if make in LOCAL.values() else 1e-12)


@everyone
def test_the_size_of_batches_does_not_matter(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for limit in (1 << 22, 50, 1):
        monkeypatch.setattr(normopt.batch, "MAX_ENTRIES", limit)
        params = tensors()
        optimizer = make(params, lr=0.1)
        run(optimizer, params, 3)
        results.append(snapshot(optimizer))
    loose = 1e-2 if "bfloat16" in optimizer.param_groups[0]["rule"] else 1e-12
    assert_equal(results[1], results[0], loose)
    assert_equal(results[2], results[0], loose)
