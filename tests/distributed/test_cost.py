"""What a step on sharded models costs: collectives, bytes, layouts and plans that are made, memory; not time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import normopt
from normopt.engine.exchange import Item, Routes, owners
from normopt.engine.ranks import Ranks as Group
from tests.support import counted, sharded
from tests.support.counted import BOUNDED
from tests.support.ranks import Ranks

NAMES = normopt.list_optimizers()
#: Those that move gradients and updates, with weights, nothing, and with sums over all tensors.
SOME = ("muon", "muonh", "adamw", "lamb")
RanksOf = Callable[[int], Ranks]
#: All layouts, most of them in the slow tests.
EACH = ["fsdp 2", *(pytest.param(x, marks=pytest.mark.slow) for x in sharded.LAYOUTS if x != "fsdp 2")]


def check(found: dict[str, Any]) -> None:
    """One all-reduce that agrees, and one for each sum; two all-to-alls, three where some matrices bring weights."""
    looks = found["looks_back"]
    assert found["collectives"].get("allreduce", 0) == 1 + looks + found["sums"], found
    rest = {name: n for name, n in found["collectives"].items() if name != "allreduce"}
    assert {*rest} <= {"alltoall_base"} and (looks or rest.get("alltoall_base", 0) == found["all_to_alls"]), found
    assert found["all_to_alls"] <= 3 and (found["all_to_alls"] == 0) == (found["owned"] == 0), found
    assert found["is_kept"] and (looks or found["sent"] == found["foretold"]), found
    if found["is_entrywise"]:
        assert not found["all_to_alls"] and not found["sent"], found


@pytest.mark.slow
def test_collectives_of_every_optimizer(ranks_of: RanksOf) -> None:
    """As many for six layers as for two, and for entry-wise rules no all-to-all."""
    for few, many in zip(
        ranks_of(2).run(counted.costs_of_all, NAMES, 2), ranks_of(2).run(counted.costs_of_all, NAMES, 6), strict=True
    ):
        assert {name: each["collectives"] for name, each in few.items()} == {
            name: each["collectives"] for name, each in many.items()
        }
        for found in (*few.values(), *many.values()):
            check(found)
        silent = {name for name, each in many.items() if not each["all_to_alls"]}
        assert silent >= {"adamw", "adam", "sgd", "lion", "signum", "prodigy"}
        assert not silent & {"muon", "muonh", "scion", "shampoo", "soap"}
        assert many["scion"]["owned"] == 6 * 8 * 8 + 2 * 8, "rows of embedding and head move where they are"


@pytest.mark.slow
def test_collectives_do_not_depend_on_the_number_of_ranks(ranks_of: RanksOf) -> None:
    two, four = (ranks_of(n).run(counted.costs_of_all, SOME, 3)[0] for n in (2, 4))
    for name in SOME:
        check(four[name])
        assert two[name]["collectives"] == four[name]["collectives"]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("options", "carried"), [({}, 2), (BOUNDED, 3)])
def test_bytes_are_the_least(ranks_of: RanksOf, ranks: int, options: dict[str, Any], carried: int) -> None:
    """Of P entries on N ranks that divide everything each sends 2 P (N-1) / N^2 on average, with weights 3."""
    every = ranks_of(ranks).run(_costs, "muon", 8, 16, options)
    p, n = 8 * 16 * 16, ranks
    assert all(found["owned"] == p and found["sees_weights"] == (carried == 3) for found in every)
    assert sum(found["sent"] for found in every) / n == pytest.approx(4 * carried * p * (n - 1) / n**2, rel=0.01)
    for found in every:
        check(found)


def _costs(name: str, layers: int, dim: int, options: dict[str, Any]) -> dict[str, Any]:
    return counted.costs(name, layers, dim, **options)


@pytest.mark.parametrize("layout", EACH)
def test_placements_foretell_bytes(ranks_of: RanksOf, layout: str) -> None:
    for found in ranks_of(sharded.LAYOUTS[layout]).run(counted.foretold, layout, ["muon", "muonh", "scion", "soap"]):
        for name, (sent, expected) in found.items():
            assert sent == expected, name


@pytest.fixture
def one_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Makes this process the first of so many ranks, of which the others do not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def start(size: int) -> None:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
        # The meshes of another process group are no longer there.
        monkeypatch.setattr(sharded, "_MESHES", {})

    monkeypatch.setattr(Group, "total", counted.alike)
    yield start
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [2, 8, 64, 1024])
def test_steps_of_many_ranks(one_of: Callable[[int], None], ranks: int) -> None:
    """Three collectives, and the first rank sends what placements say."""
    one_of(ranks)
    found = counted.costs("muon", 8, 32)
    assert found["collectives"] == {"allreduce": 1, "alltoall_base": 2}
    check(found)


@pytest.mark.parametrize("ranks", [3, 8, 100])
def test_work_is_shared_out(ranks: int) -> None:
    """The most work of a rank is that of the largest matrix, or not more than 1.2 times the mean."""
    draws = torch.Generator().manual_seed(ranks)
    for count in (ranks, 4 * ranks, 50 * ranks):
        costs = (torch.rand(count, generator=draws) ** 4).tolist()
        loads = [0.0] * ranks
        for cost, owner in zip(costs, owners(costs, [1] * count, ranks), strict=True):
            loads[owner] += cost
        largest = sorted(costs, reverse=True)
        # Largest-first is within 4/3 of the best, which is no less than the mean, the largest, or two that share.
        best = max(sum(costs) / ranks, largest[0], sum(largest[ranks - 1 : ranks + 1]))
        assert max(loads) <= 4 / 3 * best
        if count == 50 * ranks:
            assert max(loads) <= max(1.2 * sum(costs) / ranks, largest[0])


def test_what_ranks_send_is_what_others_get(one_of: Callable[[int], None]) -> None:
    """In every layout of one mesh: all that owners lack comes in, and all that others lack goes out."""
    one_of(6)
    from torch.distributed.tensor import Replicate, Shard

    mesh = init_device_mesh("cpu", (2, 3))
    for placements in (
        (Replicate(), Shard(0)),
        (Replicate(), Shard(1)),
        (Shard(0), Shard(1)),
        (Replicate(), Replicate()),
    ):
        items = [Item((7, 5), placements, owner) for owner in (0, 4, 5)]
        every = [Routes(tuple(mesh.shape), items, rank) for rank in range(6)]
        for rank in range(6):
            owned = 35 * len(every[rank].owned)
            assert sum(other.entries_in[rank] for other in every) == owned
            held = sum(end - begin for begin, end in every[rank].parts[0][0])
            held *= sum(end - begin for begin, end in every[rank].parts[0][1])
            assert sum(other.entries_out[rank] for other in every) == 3 * held


@pytest.mark.parametrize(
    "layout", ["fsdp 2", *(pytest.param(x, marks=pytest.mark.slow) for x in ("replicate 2", "hsdp 2x2"))]
)
def test_layouts_and_plans_are_made_once(ranks_of: RanksOf, layout: str) -> None:
    for name in ("muon", "adamw", "muonh"):
        assert ranks_of(sharded.LAYOUTS[layout]).run(counted.remade, layout, name, 20)[0] == (0, 0), name


@pytest.mark.parametrize("layout", EACH)
def test_ingredients_see_plain_tensors(ranks_of: RanksOf, layout: str) -> None:
    for name in ("muon", "adamw", "muonh", "scion", "prodigy"):
        for seen in ranks_of(sharded.LAYOUTS[layout]).run(counted.types_seen, layout, name):
            assert seen <= {"Tensor", "Parameter"}, name


@pytest.mark.slow
def test_waves_change_nothing_but_memory(ranks_of: RanksOf) -> None:
    """Weights are those of one wave, and what a step takes beside them is a part of what one wave takes."""
    for name in ("muon", "muonh", "shampoo"):
        whole, in_parts = (ranks_of(2).run(counted.in_waves, name, 36, entries)[0] for entries in (1 << 24, 1 << 11))
        assert in_parts[1] >= 8 * whole[1]
        torch.testing.assert_close(in_parts[0], whole[0], rtol=1e-6, atol=1e-6)
        assert in_parts[2] < whole[2] / 2, name
