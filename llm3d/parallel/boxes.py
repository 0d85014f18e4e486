"""The one coordinate system: every tensor on a rank is a list of boxes of global tensors.

A global tensor is named and shaped as in a Hugging Face model (`model.layers.3.self_attn.q_proj.weight`,
`[out, in]`). A parameter on a rank is boxes of such tensors laid under each other (a fused gate-up weight is
two boxes). Initialization, checkpoints, imports and changes of layout are intersections of boxes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Box:
    """A rectangular part of the global tensor `name` of shape `shape`."""

    name: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]

    @classmethod
    def whole(cls, name: str, shape: Sequence[int]) -> Box:
        return cls(name, tuple(shape), (0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        count = 1
        for extent in self.size:
            count *= extent
        return count

    def rows(self, start: int, count: int) -> Box:
        """The box narrowed to `count` rows (dimension 0) from its own row `start` on."""
        return Box(self.name, self.shape, (self.offset[0] + start, *self.offset[1:]), (count, *self.size[1:]))

    def columns(self, start: int, count: int) -> Box:
        """The box narrowed to `count` columns (dimension 1) from its own column `start` on."""
        return Box(self.name, self.shape, (self.offset[0], self.offset[1] + start), (self.size[0], count))

    def elements(self, start: int, count: int) -> list[Box]:
        """`count` of the box's elements in row-major order from `start` on: part of a row, whole rows, part of a row.

        At most three boxes, in order; of a box of one dimension, one.
        """
        if not count:
            return []
        if len(self.size) == 1:
            return [self.rows(start, count)]
        columns = self.size[1]
        first, offset = divmod(start, columns)
        if offset or count < columns:
            head = min(count, columns - offset)
            return [self.rows(first, 1).columns(offset, head), *self.elements(start + head, count - head)]
        whole, rest = divmod(count, columns)
        return [self.rows(first, whole), *self.elements(start + whole * columns, rest)]

    def intersect(self, other: Box) -> Box | None:
        """The part that both boxes hold, or None."""
        if self.name != other.name:
            return None
        start = tuple(map(max, self.offset, other.offset))
        stop = tuple(
            min(a + n, b + m)
            for a, n, b, m in zip(self.offset, self.size, other.offset, other.size, strict=True)
        )
        if any(last <= first for first, last in zip(start, stop, strict=True)):
            return None
        return Box(
            self.name, self.shape, start, tuple(last - first for first, last in zip(start, stop, strict=True))
        )

    def without(self, other: Box) -> list[Box]:
        """Boxes that together are what this box has and the other has not."""
        shared = self.intersect(other)
        if shared is None:
            return [self]
        rest, offset, size = [], list(self.offset), list(self.size)
        for i, (start, extent) in enumerate(zip(shared.offset, shared.size, strict=True)):
            for first, last in ((offset[i], start), (start + extent, offset[i] + size[i])):
                if first < last:
                    part = Box(
                        self.name,
                        self.shape,
                        (*offset[:i], first, *offset[i + 1 :]),
                        (*size[:i], last - first, *size[i + 1 :]),
                    )
                    rest.append(part)
            offset[i], size[i] = start, extent
        return rest

    def slices_within(self, outer: Box) -> tuple[slice, ...]:
        """Where this box lies in a local array that holds `outer`."""
        return tuple(
            slice(a - b, a - b + n) for a, b, n in zip(self.offset, outer.offset, self.size, strict=True)
        )


@dataclass(frozen=True)
class Piece:
    """One box of a local parameter: its rows `row .. row + box.size[0]`.

    owned: exactly one rank of each model replica (tensor x pipeline) owns an element that several hold;
        it is the one that counts it in norms and writes it to checkpoints.
    partial: the gradients that ranks of this group hold for this box are partial sums over it
        (norms under sequence parallelism, replicated key/value heads, embeddings tied across stages).
    """

    box: Box
    row: int = 0
    owned: bool = True
    partial: ProcessGroup | None = None

    def view(self, local: Tensor) -> Tensor:
        """The piece's part of a tensor shaped like the local parameter."""
        return local[self.row : self.row + self.box.size[0]]


class ShardedParameter(nn.Parameter):
    """A local parameter that knows which boxes of global tensors it holds.

    pieces: boxes under each other along dimension 0; they cover the parameter.
    uses: how often one backward pass of a microbatch adds to its gradient (2 for tied embeddings).
    main_grad: same shape; gradients of all microbatches are summed here, never in `.grad`. None while ZeRO keeps
        no memory for it.
    main_grad_is_stale: the next addition replaces what main_grad holds.
    """

    pieces: tuple[Piece, ...]
    uses: int
    main_grad: Tensor | None
    main_grad_is_stale: bool
    on_accumulated: Callable[[], None] | None

    def __new__(
        cls, data: Tensor, pieces: Sequence[Piece], uses: int = 1, requires_grad: bool = True
    ) -> ShardedParameter:
        parameter = super().__new__(cls, data, requires_grad=requires_grad)
        parameter.pieces = tuple(pieces)
        parameter.uses = uses
        parameter.main_grad = None
        parameter.main_grad_is_stale = False
        parameter.on_accumulated = None
        return parameter

    def accumulated(self) -> None:
        """Say that one use's gradient has been added to main_grad."""
        if self.on_accumulated is not None:
            self.on_accumulated()

    @classmethod
    def on_meta(cls, pieces: Sequence[Piece]) -> ShardedParameter:
        """A parameter without storage yet, as large as its pieces; `FlatParameters` gives it storage."""
        rows = sum(piece.box.size[0] for piece in pieces)
        return cls(torch.empty(rows, *pieces[0].box.size[1:], device="meta"), pieces)


def stack(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    """The same pieces laid under each other."""
    stacked, row = [], 0
    for piece in pieces:
        stacked.append(replace(piece, row=row))
        row += piece.box.size[0]
    return tuple(stacked)
