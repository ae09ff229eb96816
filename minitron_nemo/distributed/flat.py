"""A layer's parameters one after another in one flat tensor, of which each of some ranks has an equal share."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 256  # bytes between which parameters begin, so that the same matrix products run as on tensors of their own


@dataclass(frozen=True)
class FlatLayer:
    """Where each parameter begins, and how many elements the flat tensor has, padding included."""

    starts: tuple[int, ...]
    size: int
    ranks: int

    @classmethod
    def of(cls, sizes: Sequence[int], *, item: int, ranks: int) -> "FlatLayer":
        """For parameters of so many elements of `item` bytes each."""
        unit, starts, end = ALIGNMENT // item, [], 0
        for size in sizes:
            starts.append(end)
            end += math.ceil(size / unit) * unit
        return cls(tuple(starts), math.ceil(end / (unit * ranks)) * unit * ranks, ranks)

    @property
    def share(self) -> int:
        """Elements of a rank's share."""
        return self.size // self.ranks
