"""What ``optimizer.metrics()`` says of a step is true, and changes nothing."""

from __future__ import annotations

import gc
import json
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normopt
from normopt import SteepestDescent
from normopt.metrics import MEASURES, own_norm, write_jsonl, write_scalars
from normopt.numerics import singular
from normopt.rule import rule_of
from tests.support.models import Net
from tests.support.optimizers import Make, everyone, whole
from tests.support.steps import assert_equal, give_gradients, run, snapshot, tensors


def train(make: Make, measures: bool) -> tuple[SteepestDescent, list[dict[str, Any]]]:
    torch.manual_seed(0)
    net = Net()
    optimizer = make(net)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = net.loss()
        loss.backward()
        return loss

    rows: list[dict[str, Any]] = []
    for _ in range(3):
        if measures:
            with optimizer.metrics() as measured:
                optimizer.step(closure)
            rows = measured.rows()
        else:
            optimizer.step(closure)
    return optimizer, rows


@whole
def test_measured_steps_are_the_same_to_the_bit_and_the_numbers_are_those_of_the_weights(make: Make) -> None:
    optimizer, rows = train(make, measures=True)
    plain, _ = train(make, measures=False)
    assert_equal(snapshot(optimizer), snapshot(plain))
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert [row["parameter"] for row in rows] == names
    for group in optimizer.param_groups:
        rule = rule_of(group).resolve(group)
        norm = own_norm(rule.norm)
        for name, p in zip(group["param_names"], group["params"], strict=True):
            (row,) = (row for row in rows if row["parameter"] == name)
            assert [*row] == ["parameter", "role", "norm", *MEASURES] and row["role"] == group["role"]
            assert row["norm"] == str(norm)
            w, g = rule.view.apply(p.detach()), rule.view.apply(p.grad)
            assert row["weight_norm"] == pytest.approx(norm.norm(w).max().item())
            assert row["dual_norm"] == pytest.approx(norm.dual_norm(g).sum().item())
            if p.ndim > 1:
                ranks = [m.square().sum() / torch.linalg.matrix_norm(m, 2) ** 2 for m in w]
                assert row["stable_rank"] == pytest.approx(float(sum(ranks)) / len(ranks), rel=1e-4)
            else:
                assert math.isnan(row["stable_rank"])
            assert math.isfinite(row["update_rms"]) and row["update_norm"] >= 0


@everyone
def test_the_update_is_the_difference_of_the_weights(make: Make) -> None:
    params = tensors()
    optimizer = make(params)
    run(optimizer, params, 2)
    before = [p.detach().clone() for p in params]
    with optimizer.metrics() as measured:
        run(optimizer, params, 1, first=2)
    for row, old, p in zip(measured.rows(), before, params, strict=True):
        update, size = (p.detach() - old).square().mean().sqrt(), old.square().mean().sqrt()
        assert row["update_rms"] == pytest.approx(update.item())
        assert row["update_ratio"] == pytest.approx((update / size).item())


@pytest.mark.parametrize("name", ["spectral", "column", "row", "max", "euclidean", "nuclear"])
def test_steepest_descent_moves_by_the_learning_rate_in_its_own_norm(name: str) -> None:
    norm = normopt.norms.get(name)
    norm = normopt.Spectral(method="exact") if name == "spectral" else norm
    params = tensors([(6, 4), (4, 6)])
    optimizer = SteepestDescent(params, lr=0.25, norm=norm)
    with optimizer.metrics() as measured:
        run(optimizer, params, 1)
    for row in measured.rows():
        assert row["update_norm"] == pytest.approx(0.25)
        assert row["effective_lr"] == pytest.approx(row["update_rms"])


def test_the_effective_lr_is_that_of_this_step() -> None:
    """The schedule's number before the step, with the step size's own schedule and what it has found so far."""
    params = tensors([(4, 4)])
    optimizer = SteepestDescent(params, lr=1.0, norm="max", step_size="InverseTime(0.5)")
    for step in range(1, 4):
        with optimizer.metrics() as measured:
            run(optimizer, params, 1, first=step)
            optimizer.param_groups[0]["lr"] = 2.0**step
        (row,) = measured.rows()
        assert row["effective_lr"] == pytest.approx(row["update_rms"])


# When there is nothing to measure ------------------------------------------------------------------------------------


def test_nothing_is_held_after_the_block_and_nothing_is_done_outside_of_it() -> None:
    params = tensors([(32, 32)])
    optimizer = normopt.zoo.Muon(params)
    copies: list[Any] = []
    with optimizer.metrics() as measured:
        run(optimizer, params, 1)
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    with pytest.raises(RuntimeError, match="no loss"), optimizer.metrics() as failed:
        optimizer.register_step_pre_hook(lambda *_: copies.extend(map(weakref.ref, failed._before.values())))
        optimizer.step(fail)
    assert copies
    gc.collect()
    assert all(copy() is None for copy in copies) and failed.rows() == []
    held = [x for x in gc.get_referents(vars(measured)) if isinstance(x, Tensor) and x.numel() > 1]
    assert not held and len(measured.rows()) == 1


def fail() -> None:
    raise RuntimeError("no loss")


def test_a_step_that_was_not_taken_has_no_rows() -> None:
    """As of a ``GradScaler`` that has found Inf; a step that only leaves the gradient out has updates of 0."""
    params = tensors(dtype=torch.float32)
    optimizer = normopt.zoo.AdamW(params, lr=0.1, nonfinite="skip")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for bad in (True, False):
        give_gradients(params, 0)
        loss = scaler.scale(sum(p.sum() for p in params))
        for p in params:
            p.grad = p.grad * 2
        params[0].grad[0, 0] = math.inf if bad else 1.0
        assert loss.requires_grad
        with optimizer.metrics() as measured:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert len(measured.rows()) == (0 if bad else 4)
    give_gradients(params, 0)
    params[0].grad[0, 0] = math.nan
    with optimizer.metrics() as measured:
        optimizer.step()
    first, *others = measured.rows()
    assert math.isnan(first["dual_norm"]) and first["update_rms"] == 0
    assert all(math.isfinite(row["dual_norm"]) for row in others)


def test_tensors_without_a_gradient_have_no_row() -> None:
    params = [*tensors(), nn.Parameter(torch.zeros(0, 3))]
    optimizer = normopt.zoo.Muon(params)
    give_gradients(params[:2], 0)
    params[-1].grad = torch.zeros(0, 3)
    with optimizer.metrics() as measured:
        optimizer.step()
    assert [row["parameter"] for row in measured.rows()] == ["#0", "#1"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_every_dtype(dtype: torch.dtype) -> None:
    params = tensors(dtype=dtype)
    optimizer = normopt.create("scion", params, lr=torch.tensor(0.1))
    with optimizer.metrics() as measured:
        run(optimizer, params, 1)
    for row in measured.rows():
        assert all(math.isfinite(row[name]) for name in MEASURES)
        assert row["effective_lr"] == pytest.approx(row["update_rms"], rel=0.2)  # polar factors, bfloat16


def test_autocast_changes_no_number() -> None:
    found = []
    for enabled in (True, False):
        params = tensors(dtype=torch.float32)
        optimizer = normopt.zoo.Muon(params)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), optimizer.metrics() as measured:
            run(optimizer, params, 1)
        found.append(measured.rows())
    assert [repr(row) for row in found[0]] == [repr(row) for row in found[1]]


# By role, and where the numbers go -----------------------------------------------------------------------------------


def test_rows_by_role_are_means() -> None:
    _, rows = train(normopt.zoo.Muon, measures=True)
    optimizer = normopt.zoo.Muon(net := Net())
    net.loss().backward()
    with optimizer.metrics() as measured:
        optimizer.step()
    rows, roles = measured.rows(), measured.rows("role")
    assert [row["role"] for row in roles] == [*dict.fromkeys(row["role"] for row in rows)]
    for role in roles:
        several = [row for row in rows if row["role"] == role["role"]]
        assert role["tensors"] == len(several)
        assert role["update_rms"] == pytest.approx(sum(row["update_rms"] for row in several) / len(several))
    params = tensors()
    groups = SteepestDescent([{"params": params[:1]}, {"params": params[1:]}])
    with groups.metrics() as measured:
        run(groups, params, 1)
    assert [(row["role"], row["tensors"]) for row in measured.rows("role")] == [("group 0", 1), ("group 1", 3)]
    with pytest.raises(ValueError, match="by must be 'parameter' or 'role', got 'layer'"):
        measured.rows("layer")


class Writer:
    def __init__(self) -> None:
        self.written: dict[tuple[str, int], float] = {}

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.written[tag, global_step] = scalar_value


def test_numbers_are_written(tmp_path: Path) -> None:
    net = Net()
    optimizer = normopt.zoo.Muon(net)
    net.loss().backward()
    writer, file = Writer(), tmp_path / "metrics.jsonl"
    for step in range(2):
        with optimizer.metrics() as measured:
            optimizer.step()
        rows = measured.rows()
        write_scalars(writer, rows, step)
        write_scalars(writer, measured.rows("role"), step)
        write_jsonl(file, rows, step)
    assert (
        writer.written["update_rms/up.weight", 1]
        == next(r for r in rows if r["parameter"] == "up.weight")["update_rms"]
    )
    assert ("dual_norm/embedding", 1) in writer.written and all(x == x for x in writer.written.values())
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == 2 * len(rows) and [*lines[0]] == ["step", *rows[0]]
    assert {line["step"] for line in lines} == {0, 1}
    assert all(line["stable_rank"] is None for line in lines if line["role"] == "vector")
    write_jsonl(tmp_path / "summary.jsonl", normopt.summary(optimizer), 2)
    assert len((tmp_path / "summary.jsonl").read_text().splitlines()) == len(rows)


# On accelerators -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 40, 70), (64, 64), (5, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_the_spectral_norm_from_products_alone(shape: tuple[int, ...], scale: float) -> None:
    noise = torch.Generator().manual_seed(0)
    for x in torch.randn(shape, generator=noise), torch.eye(*shape[-2:]), torch.ones(shape):
        size = torch.linalg.matrix_norm(x, keepdim=True)
        exact = torch.linalg.matrix_norm(x, 2)
        found = singular._largest_of_unit(x / size) * size[..., 0, 0]
        assert (found / exact >= 1 - 1e-5).all() and (found / exact <= 1.001).all()
    assert singular._largest_of_unit(torch.zeros(3, 2)) == 0
    assert singular.largest_singular_value(torch.zeros(0, 2)) == 0
