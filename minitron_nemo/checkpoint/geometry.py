"""Boxes of tensors: where a chunk lies in its global tensor, what two of them share, whether all of them cover it."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from minitron_nemo.checkpoint.buffers import new_tensor

PAIRS_LIMIT = 1000  # boxes that are compared each with each


@dataclass(frozen=True)
class Box:
    """The elements from `offset` on, `size` along each dimension."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def end(self) -> tuple[int, ...]:
        return tuple(o + s for o, s in zip(self.offset, self.size, strict=True))

    def shared_with(self, other: "Box") -> "Box | None":
        """The box that both have, None when they have nothing in common."""
        begin = tuple(map(max, self.offset, other.offset))
        end = tuple(map(min, self.end, other.end))
        if any(b >= e for b, e in zip(begin, end, strict=True)):
            return None
        return Box(begin, tuple(e - b for b, e in zip(begin, end, strict=True)))

    def slices(self, origin: Sequence[int] | None = None) -> tuple[slice, ...]:
        """Indices of this box in a tensor whose first element lies at `origin` (the global tensor's by default)."""
        origin = (0,) * len(self.offset) if origin is None else origin
        return tuple(slice(b - o, e - o) for b, e, o in zip(self.offset, self.end, origin, strict=True))

    def check_inside(self, shape: Sequence[int], key: str) -> None:
        """Refuse to be asked of a tensor of this shape when part of this box is no part of it."""
        if min(self.offset, default=0) < 0 or any(e > s for e, s in zip(self.end, shape, strict=True)):
            raise IndexError(f"{key}: box at {self.offset} of size {self.size} leaves the shape {tuple(shape)}")


def whole(shape: Sequence[int]) -> Box:
    """The box of a whole tensor."""
    return Box((0,) * len(shape), tuple(shape))


@dataclass(frozen=True)
class Chunk(Box):
    """A box of a global tensor and where its bytes lie: `[start, start + length)` of `file`."""

    file: str
    start: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """A global tensor of a checkpoint: its shape, its dtype and the chunks it is stored in."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


Stored = TypeVar("Stored", bound=Box)


def read_box(
    box: Box, dtype: torch.dtype, chunks: Iterable[Stored], read: Callable[[Stored, Box, Tensor], None]
) -> Tensor:
    """A box of a tensor that lies in chunks: `read(chunk, shared, out)` fills `out` with the box that both have.

    What one chunk has alone is read into the result, without a copy.
    """
    result = new_tensor(box.size, dtype)
    for chunk in chunks:
        if (shared := box.shared_with(chunk)) is not None:
            part = result if shared.size == box.size else torch.empty(shared.size, dtype=dtype)
            read(chunk, shared, part)
            if part is not result:
                result[shared.slices(box.offset)] = part
    return result


def coverage_fault(stored: StoredTensor) -> str | None:
    """What is wrong with the chunks of a tensor, None when they cover it exactly: no gap, no overlap."""
    chunks = [chunk for chunk in stored.chunks if math.prod(chunk.size)]
    for chunk in chunks:
        if any(end > full for end, full in zip(chunk.end, stored.shape, strict=True)):
            return f"the chunk at {chunk.offset} of size {chunk.size} leaves the shape {stored.shape}"
    for group in _overlapping(chunks, dim=0):
        if len(group) > PAIRS_LIMIT:
            return f"{len(group)} of its chunks lie across each other; no layout makes such"
        for one, other in itertools.combinations(group, 2):
            if one.shared_with(other) is not None:
                return f"the chunks at {one.offset} and {other.offset} overlap"
    covered, full = sum(math.prod(chunk.size) for chunk in chunks), math.prod(stored.shape)
    return None if covered == full else f"its chunks hold {covered} of {full} elements"


def _overlapping(boxes: Sequence[Box], *, dim: int) -> Iterator[Sequence[Box]]:
    """Groups of boxes outside of which nothing is shared; the boxes are alike before `dim`.

    Layouts make grids, where few are left to compare: those that begin and end alike along one dimension are told apart
    by the next one.
    """
    if len(boxes) < 2 or dim == len(boxes[0].size):
        yield boxes
        return
    ordered = sorted(boxes, key=lambda box: box.offset[dim])
    begin, reach = 0, ordered[0].end[dim]
    for index, box in enumerate([*ordered, None]):
        if box is not None and box.offset[dim] < reach:
            reach = max(reach, box.end[dim])
            continue
        group = ordered[begin:index]
        is_alike = len({(other.offset[dim], other.size[dim]) for other in group}) == 1
        yield from _overlapping(group, dim=dim + 1) if is_alike else [group]
        begin, reach = index, 0 if box is None else box.end[dim]
