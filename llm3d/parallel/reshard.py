"""Weights from one layout to another: intersections of boxes, sent from rank to rank, without a file.

Who sends what to whom is a pure function of the boxes that each rank holds and wants, known to all ranks. What a rank
holds already it copies; the rest travels in buckets, so that no rank needs room for more than what it wants and two
buckets. The idea of handing weights from training to generation in place: Sheng et al. 2024 (HybridFlow), section 5.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from llm3d.parallel.boxes import Box, Piece
from llm3d.parallel.collectives import gather_bytes

BUCKET_BYTES = 64 * 2**20

Views = Iterable[tuple[Piece, Tensor]]  # boxes with local tensors of their sizes


class Transfer(NamedTuple):
    box: Box
    source: int
    target: int


class SyncStats(NamedTuple):
    """Of one hand-over, on this rank."""

    received_bytes: int
    sent_bytes: int
    seconds: float


def plan_transfers(held: Sequence[Sequence[Box]], requested: Sequence[Sequence[Box]]) -> list[Transfer]:
    """What makes every rank have what it wants: each element once, from the rank itself where it has it.

    held, requested: of each rank.  Of several other ranks that have the same box, the targets take turns.
    """
    holders: dict[str, dict[Box, list[int]]] = {}
    for rank, boxes in enumerate(held):
        for box in boxes:
            holders.setdefault(box.name, {}).setdefault(box, []).append(rank)
    transfers = []
    for target, boxes in enumerate(requested):
        for box in boxes:
            sources = sorted(holders.get(box.name, {}).items(), key=lambda item: target not in item[1])
            missing = [box]
            for other, ranks in sources:
                source = target if target in ranks else ranks[target % len(ranks)]
                parts = [part for hole in missing if (part := hole.intersect(other)) is not None]
                transfers += [Transfer(part, source, target) for part in parts]
                missing = [rest for hole in missing for rest in hole.without(other)]
            assert not missing, f"no rank holds {missing[0]}"
    return transfers


def in_buckets(transfers: Iterable[Transfer], elements: int) -> list[list[Transfer]]:
    """Between ranks, in an order that all ranks agree on: in a bucket no rank sends or receives more `elements`."""
    order = sorted(transfers, key=lambda t: (t.box.name, t.box.offset, t.target, t.source))
    buckets: list[list[Transfer]] = []
    room: dict[tuple[str, int], int] = {}
    for transfer in (part for whole in order for part in _cut(whole, elements)):
        ends, size = (("out", transfer.source), ("in", transfer.target)), transfer.box.numel
        if not buckets or any(room.get(end, elements) < size for end in ends):
            buckets.append([])
            room = {}
        buckets[-1].append(transfer)
        room |= {end: room.get(end, elements) - size for end in ends}
    return buckets


def _cut(transfer: Transfer, elements: int) -> Iterable[Transfer]:
    """Parts of at most so many elements."""
    for start in range(0, transfer.box.numel, elements):
        for box in transfer.box.elements(start, min(elements, transfer.box.numel - start)):
            yield transfer._replace(box=box)


class WeightSync:
    """From the boxes that ranks hold to those that they want, again and again; planned once, by all ranks together."""

    def __init__(
        self,
        held: Sequence[Box],
        requested: Sequence[Box],
        group: ProcessGroup,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        """held, requested: this rank's.  bucket_bytes: of four bytes an element."""
        self.group, self.rank = group, group.rank()
        everyones = [_decoded(part) for part in gather_bytes(_encoded(held, requested), group)]
        transfers = plan_transfers([one for one, _ in everyones], [other for _, other in everyones])
        self.copied = [t.box for t in transfers if t.source == t.target == self.rank]
        between = in_buckets((t for t in transfers if t.source != t.target), max(1, bucket_bytes // 4))
        self.buckets = [(self._side(bucket, "source"), self._side(bucket, "target")) for bucket in between]

    def _side(self, bucket: Iterable[Transfer], mine: Literal["source", "target"]) -> _Side:
        """Of a bucket what this rank sends, where it is the source, or receives."""
        by_rank: list[list[Box]] = [[] for _ in range(self.group.size())]
        for t in bucket:
            if getattr(t, mine) == self.rank:
                by_rank[t.target if mine == "source" else t.source].append(t.box)
        boxes = [box for some in by_rank for box in some]
        of_ranks = [sum(box.numel for box in some) for some in by_rank]
        return _Side([(box, box.numel) for box in boxes], of_ranks, sum(of_ranks))

    @torch.no_grad()
    def run(self, source: Views, target: Views) -> SyncStats:
        """Write what `source` has into `target`, of one dtype; their boxes are those that this was planned for."""
        started = time.perf_counter()
        having, wanting = _Places(source), _Places(target)
        for box in self.copied:
            wanting.part(box).copy_(having.part(box))
        packed = having.empty(max((leaving.size for leaving, _ in self.buckets), default=0))
        arrived = wanting.empty(max((coming.size for _, coming in self.buckets), default=0))
        for leaving, coming in self.buckets:
            for box, part in leaving.parts(packed):
                part.copy_(having.part(box))
            ends = arrived[: coming.size], packed[: leaving.size]
            dist.all_to_all_single(*ends, coming.of_ranks, leaving.of_ranks, group=self.group)
            for box, part in coming.parts(arrived):
                wanting.part(box).copy_(part)
        received, sent = (
            packed.itemsize * sum(bucket[side].size for bucket in self.buckets) for side in (1, 0)
        )
        return SyncStats(received, sent, time.perf_counter() - started)


class _Side(NamedTuple):
    """What a rank sends, or receives, in a bucket."""

    boxes: list[tuple[Box, int]]  # in the order of the other ends' ranks, with their elements
    of_ranks: list[int]  # elements for, or from, each rank
    size: int

    def parts(self, buffer: Tensor) -> Iterable[tuple[Box, Tensor]]:
        """Where the boxes lie in the buffer, one after the other."""
        start = 0
        for box, size in self.boxes:
            yield box, buffer[start : start + size].view(box.size)
            start += size


class _Places:
    """Where boxes lie in this rank's memory."""

    def __init__(self, views: Views) -> None:
        self.by_name: dict[str, list[tuple[Box, Tensor]]] = {}
        for piece, view in views:
            self.by_name.setdefault(piece.box.name, []).append((piece.box, view))
            self.example = view

    def part(self, box: Box) -> Tensor:
        """The view of a box that lies in one of the pieces."""
        outer, view = next(place for place in self.by_name[box.name] if box.intersect(place[0]) == box)
        return view[box.slices_within(outer)]

    def empty(self, size: int) -> Tensor:
        return self.example.new_empty(size)


def _encoded(held: Sequence[Box], requested: Sequence[Box]) -> bytes:
    return json.dumps(
        [[[b.name, b.shape, b.offset, b.size] for b in boxes] for boxes in (held, requested)]
    ).encode()


def _decoded(payload: bytes) -> tuple[list[Box], list[Box]]:
    held, requested = (
        [Box(name, tuple(shape), tuple(offset), tuple(size)) for name, shape, offset, size in boxes]
        for boxes in json.loads(payload)
    )
    return held, requested
