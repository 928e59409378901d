"""Sharded tensors come whole to the ranks that own them, and what was made of them goes back."""

from __future__ import annotations

import functools
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


#: Models have many tensors of few shapes.
_part_of = functools.lru_cache(maxsize=1 << 14)(part_of)


class Routes:
    """What one rank of a mesh has of each tensor, and what it sends to whom: from placements alone.

    Of equal copies the owner gets that of its own replica, so that on a mesh of replicas nothing crosses them on the
    way in.

    Args:
        sizes: the shape of the mesh.
        items: the tensors.
        me: the rank's number in the mesh.
    """

    def __init__(self, sizes: tuple[int, ...], items: Sequence[Item], me: int) -> None:
        self.sizes, self.items, self.me = sizes, [*items], me
        places = coordinates(sizes)
        here = places[me]
        #: What the rank has of each tensor.
        self.parts: list[Part] = [_part_of(item.shape, item.placements, sizes, here) for item in self.items]
        #: The tensors that it owns.
        self.owned = [i for i, item in enumerate(self.items) if item.owner == me]
        # For each rank, and each of these tensors, what that rank has of it.
        self._theirs = [
            {i: _part_of(self.items[i].shape, self.items[i].placements, sizes, place) for i in self.owned}
            for place in places
        ]
        self._sends = [self._is_replica(item, here, places[item.owner]) for item in self.items]
        self._receives = [[i for i in self.owned if self._is_replica(self.items[i], place, here)] for place in places]
        #: How many entries it sends to each rank, itself among them, when tensors come to their owners.
        self.entries_in = [0] * len(places)
        for item, part, is_sent in zip(self.items, self.parts, self._sends, strict=True):
            self.entries_in[item.owner] += math.prod(shape_of(part)) if is_sent else 0
        #: The same when they go back.
        self.entries_out = [sum(math.prod(shape_of(part)) for part in theirs.values()) for theirs in self._theirs]

    @staticmethod
    def _is_replica(item: Item, place: Sequence[int], owner: Sequence[int]) -> bool:
        """Whether the rank at ``place`` is in the owner's replica of the tensor."""
        each = zip(item.placements, place, owner, strict=True)
        return all(a == b for placement, a, b in each if isinstance(placement, Replicate))

    @property
    def leaving_in(self) -> int:
        """How many entries it sends to others when tensors come to their owners."""
        return sum(self.entries_in) - self.entries_in[self.me]

    @property
    def leaving_out(self) -> int:
        """The same when they go back."""
        return sum(self.entries_out) - self.entries_out[self.me]


class Exchange(Routes):
    """Tensors of one mesh that come to their owners, each whole, and go back to where they are placed.

    Either way is one all-to-all, for which each rank knows what comes.
    """

    def __init__(self, mesh: DeviceMesh, items: Sequence[Item]) -> None:
        super().__init__(tuple(mesh.shape), items, coordinates(mesh.shape).index(place_in(mesh)))
        self._group, self._world = group_of(mesh), mesh.size()
        # In the order in which parts are sent to their owners, and come back.
        self._order = sorted(range(len(self.items)), key=lambda i: self.items[i].owner)
        #: How many bytes this rank has sent to others.
        self.bytes_sent = 0

    def collect(self, parts: Sequence[Tensor]) -> dict[int, Tensor]:
        """The whole tensors that this rank owns, by their places among the items, from all ranks' parts."""
        sent = [parts[i].reshape(-1) for i in self._order if self._sends[i]]
        shapes = [[shape_of(self._theirs[rank][i]) for i in self._receives[rank]] for rank in range(self._world)]
        expected = [sum(map(math.prod, each)) for each in shapes]
        came = self._exchange(sent, self.entries_in, expected, parts[0])
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
        sizes = [math.prod(shape_of(part)) for part in self.parts]
        expected = [0] * self._world
        for item, size in zip(self.items, sizes, strict=True):
            expected[item.owner] += size
        came = self._exchange(sent, self.entries_out, expected, like)
        pieces = torch.split(came, [sizes[i] for i in self._order])
        found = {i: piece.view(shape_of(self.parts[i])) for i, piece in zip(self._order, pieces, strict=True)}
        return [found[i] for i in range(len(self.items))]

    def _exchange(self, sent: list[Tensor], counts: list[int], expected: list[int], like: Tensor) -> Tensor:
        outgoing = torch.cat(sent) if sent else like.new_empty(0)
        incoming = like.new_empty(sum(expected))
        self.bytes_sent += (outgoing.numel() - counts[self.me]) * outgoing.element_size()
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
