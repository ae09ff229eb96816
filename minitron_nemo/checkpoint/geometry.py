"""Boxes of tensors: where a chunk lies in its global tensor, what two of them share, whether all of them cover it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


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


def coverage_fault(stored: StoredTensor) -> str | None:
    """What is wrong with the chunks of a tensor, None when they cover it exactly: no gap, no overlap."""
    chunks = sorted((c for c in stored.chunks if math.prod(c.size)), key=lambda chunk: chunk.offset)
    for index, chunk in enumerate(chunks):
        if any(end > full for end, full in zip(chunk.end, stored.shape, strict=True)):
            return f"the chunk at {chunk.offset} of size {chunk.size} leaves the shape {stored.shape}"
        for other in chunks[index + 1 :]:
            if stored.shape and other.offset[0] >= chunk.end[0]:
                break
            if chunk.shared_with(other) is not None:
                return f"the chunks at {chunk.offset} and {other.offset} overlap"
    covered, full = sum(math.prod(chunk.size) for chunk in chunks), math.prod(stored.shape)
    return None if covered == full else f"its chunks hold {covered} of {full} elements"
