"""Sharded tensors come whole to the ranks that own them, and what was made of them goes back."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate

from normopt.engine.mesh import Part, coordinates, group_of, part_of, place_in, put, shape_of, take


class Item(NamedTuple):
    """One tensor of an exchange: its shape, its placements, and the number in the mesh of the rank that owns it."""

    shape: tuple[int, ...]
    placements: tuple[Any, ...]
    owner: int


class Exchange:
    """Tensors of one mesh that come to their owners, each whole, and go back to where they are placed.

    Either way is one all-to-all, for which each rank knows what comes from placements alone. Of equal copies the owner
    gets that of its own replica, so that on a mesh of replicas nothing crosses them on the way in.
    """

    def __init__(self, mesh: DeviceMesh, items: Sequence[Item]) -> None:
        self.items, self._group = [*items], group_of(mesh)
        sizes, places = tuple(mesh.shape), coordinates(mesh)
        self._me, self._world = places.index(place_in(mesh)), len(places)
        here = places[self._me]
        #: What this rank has of each tensor.
        self.parts: list[Part] = [part_of(item.shape, item.placements, sizes, here) for item in self.items]
        #: The tensors that this rank owns.
        self.owned = [i for i, item in enumerate(self.items) if item.owner == self._me]
        # For each rank, and each of these tensors, what that rank has of it.
        self._theirs = [
            {i: part_of(self.items[i].shape, self.items[i].placements, sizes, place) for i in self.owned}
            for place in places
        ]
        self._sends = [self._is_replica(item, here, places[item.owner]) for item in self.items]
        self._receives = [[i for i in self.owned if self._is_replica(self.items[i], place, here)] for place in places]
        # In the order in which parts are sent to their owners, and come back.
        self._order = sorted(range(len(self.items)), key=lambda i: self.items[i].owner)
        #: How many bytes this rank has sent to others.
        self.bytes_sent = 0

    @staticmethod
    def _is_replica(item: Item, place: Sequence[int], owner: Sequence[int]) -> bool:
        """Whether the rank at ``place`` is in the owner's replica of the tensor."""
        each = zip(item.placements, place, owner, strict=True)
        return all(a == b for placement, a, b in each if isinstance(placement, Replicate))

    def collect(self, parts: Sequence[Tensor]) -> dict[int, Tensor]:
        """The whole tensors that this rank owns, by their places among the items, from all ranks' parts."""
        counts = [0] * self._world
        sent = []
        for i in self._order:
            if self._sends[i]:
                sent.append(parts[i].reshape(-1))
                counts[self.items[i].owner] += parts[i].numel()
        shapes = [[shape_of(self._theirs[rank][i]) for i in self._receives[rank]] for rank in range(self._world)]
        expected = [sum(map(math.prod, each)) for each in shapes]
        came = self._exchange(sent, counts, expected, parts[0])
        pieces = torch.split(came, [math.prod(shape) for each in shapes for shape in each])
        found = {i: parts[0].new_empty(self.items[i].shape) for i in self.owned}
        coming = iter(pieces)
        for rank in range(self._world):
            for i, shape in zip(self._receives[rank], shapes[rank], strict=True):
                put(found[i], self._theirs[rank][i], next(coming).view(shape))
        return found

    def distribute(self, wholes: Mapping[int, Tensor], like: Tensor) -> list[Tensor]:
        """This rank's parts of all tensors, from their owners; in the dtype and on the device of ``like``."""
        sent = [take(wholes[i], self._theirs[rank][i]).reshape(-1) for rank in range(self._world) for i in self.owned]
        each = len(self.owned)
        counts = [sum(x.numel() for x in sent[rank * each : (rank + 1) * each]) for rank in range(self._world)]
        sizes = [math.prod(shape_of(part)) for part in self.parts]
        expected = [0] * self._world
        for item, size in zip(self.items, sizes, strict=True):
            expected[item.owner] += size
        came = self._exchange(sent, counts, expected, like)
        pieces = torch.split(came, [sizes[i] for i in self._order])
        found = {i: piece.view(shape_of(self.parts[i])) for i, piece in zip(self._order, pieces, strict=True)}
        return [found[i] for i in range(len(self.items))]

    def _exchange(self, sent: list[Tensor], counts: list[int], expected: list[int], like: Tensor) -> Tensor:
        outgoing = torch.cat(sent) if sent else like.new_empty(0)
        incoming = like.new_empty(sum(expected))
        self.bytes_sent += (outgoing.numel() - counts[self._me]) * outgoing.element_size()
        dist.all_to_all_single(incoming, outgoing, expected, counts, group=self._group)
        return incoming


def owners(costs: Sequence[float], sizes: Sequence[int], ranks: int) -> list[int]:
    """Who owns what: the largest cost first, to the rank with the least so far; the same on all ranks, untold."""
    found = [0] * len(costs)
    loads = [(0.0, 0, rank) for rank in range(ranks)]  # a heap: the least comes first
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], -sizes[i], i)):
        cost, size, rank = loads[0]
        found[i] = rank
        heapq.heapreplace(loads, (cost + costs[i], size + sizes[i], rank))
    return found
