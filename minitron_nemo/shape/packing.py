"""How the units of an axis lie along a dimension of a tensor: one class for each way.

A packing knows how long the dimension is, which of its elements the kept units cover, how tensor parallelism cuts it,
and how the tensor is put together from Hugging Face's. Whoever needs one of these facts asks the packing; nothing
else knows how rows are ordered. Units and elements count from 0.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from minitron_nemo.shape.arch import ModelArch

if TYPE_CHECKING:
    from torch import Tensor

Kept = Mapping[str, "Tensor"]  # axis -> kept units of the source, ascending int64; an axis that is absent stays whole


@dataclass(frozen=True)
class Piece:
    """`length` elements that lie at `local` in a rank's part of a dimension and at `start` in the whole of it."""

    local: int
    start: int
    length: int


class Packing(Protocol):
    """The order of elements along one dimension."""

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes whose units lie along the dimension."""

    def size(self, arch: ModelArch) -> int:
        """Elements along the dimension, unsharded."""

    def keep(self, kept: Kept, arch: ModelArch) -> "Tensor | None":
        """Elements of the source `arch` that the kept units cover, ascending int64; None when all of them stay."""

    def tensor_parallel_pieces(self, local_size: int, *, rank: int, tp: int) -> list[Piece]:
        """Where the `local_size` elements that a rank holds lie in the whole dimension, its padding included."""

    def hf_sizes(self, arch: ModelArch) -> list[int]:
        """Elements along the same dimension of each Hugging Face tensor that this one is packed from."""

    def from_hf(self, tensors: "Sequence[Tensor]", arch: ModelArch, *, out: "Tensor | None" = None) -> "Tensor":
        """The packed tensor [size, ...] from Hugging Face's, in the memory of `out` where several are packed."""

    def to_hf(self, tensor: "Tensor", arch: ModelArch) -> "list[Tensor]":
        """The inverse of `from_hf`."""


class _InOneRun(ABC):
    """What most packings share: a rank's part is one run of elements, and one Hugging Face tensor is the tensor."""

    @abstractmethod
    def size(self, arch: ModelArch) -> int: ...

    def tensor_parallel_pieces(self, local_size: int, *, rank: int, tp: int) -> list[Piece]:
        return [Piece(0, rank * local_size, local_size)]

    def hf_sizes(self, arch: ModelArch) -> list[int]:
        return [self.size(arch)]

    def from_hf(self, tensors: "Sequence[Tensor]", arch: ModelArch, *, out: "Tensor | None" = None) -> "Tensor":
        (tensor,) = tensors
        return tensor

    def to_hf(self, tensor: "Tensor", arch: ModelArch) -> "list[Tensor]":
        return [tensor]


@dataclass(frozen=True)
class Plain(_InOneRun):
    """Element i is unit i."""

    axis: str

    @property
    def axes(self) -> tuple[str, ...]:
        return (self.axis,)

    def size(self, arch: ModelArch) -> int:
        return int(getattr(arch, self.axis))

    def keep(self, kept: Kept, arch: ModelArch) -> "Tensor | None":
        return kept.get(self.axis)


@dataclass(frozen=True)
class Gated:
    """Gate rows, then up rows: unit i is elements i and i + units."""

    axis: str

    @property
    def axes(self) -> tuple[str, ...]:
        return (self.axis,)

    def _units(self, arch: ModelArch) -> int:
        return int(getattr(arch, self.axis))

    def size(self, arch: ModelArch) -> int:
        return 2 * self._units(arch)

    def keep(self, kept: Kept, arch: ModelArch) -> "Tensor | None":
        units = kept.get(self.axis)
        if units is None:
            return None
        import torch

        return torch.cat((units, units + self._units(arch)))

    def tensor_parallel_pieces(self, local_size: int, *, rank: int, tp: int) -> list[Piece]:
        """A rank holds [its gate rows; its up rows], which lie apart in the whole tensor."""
        half = local_size // 2
        return [Piece(side * half, side * half * tp + rank * half, half) for side in range(2)]

    def hf_sizes(self, arch: ModelArch) -> list[int]:
        return [self._units(arch)] * 2

    def from_hf(self, tensors: "Sequence[Tensor]", arch: ModelArch, *, out: "Tensor | None" = None) -> "Tensor":
        import torch

        return torch.cat(list(tensors), out=out)

    def to_hf(self, tensor: "Tensor", arch: ModelArch) -> "list[Tensor]":
        return list(tensor.chunk(2))


@dataclass(frozen=True)
class Heads(_InOneRun):
    """`kv_channels` elements for each query head: unit i is the elements from i * kv_channels on."""

    axes = ("num_query_groups", "num_attention_heads")

    def size(self, arch: ModelArch) -> int:
        return arch.query_size

    def keep(self, kept: Kept, arch: ModelArch) -> "Tensor | None":
        if kept.keys().isdisjoint(self.axes):
            return None
        return _channels(_kept_heads(kept, arch), arch)


@dataclass(frozen=True)
class GroupedQuery(_InOneRun):
    """For each query group: its query heads, one key head, one value head, `kv_channels` elements each."""

    axes = ("num_query_groups", "num_attention_heads")

    def size(self, arch: ModelArch) -> int:
        return arch.qkv_size

    def keep(self, kept: Kept, arch: ModelArch) -> "Tensor | None":
        if kept.keys().isdisjoint(self.axes):
            return None
        import torch

        blocks = arch.heads_per_group + 2
        heads, groups = _kept_heads(kept, arch), _kept_groups(kept, arch)
        queries = heads // arch.heads_per_group * blocks + heads % arch.heads_per_group
        keys = groups * blocks + arch.heads_per_group
        return _channels(torch.cat((queries, keys, keys + 1)).sort().values, arch)

    def hf_sizes(self, arch: ModelArch) -> list[int]:
        key = arch.num_query_groups * arch.kv_channels
        return [arch.query_size, key, key]

    def from_hf(self, tensors: "Sequence[Tensor]", arch: ModelArch, *, out: "Tensor | None" = None) -> "Tensor":
        import torch

        rest = tensors[0].shape[1:]
        grouped = [tensor.reshape(arch.num_query_groups, -1, *rest) for tensor in tensors]
        blocks = None if out is None else out.view(arch.num_query_groups, -1, *rest)
        return torch.cat(grouped, dim=1, out=blocks).reshape(arch.qkv_size, *rest)

    def to_hf(self, tensor: "Tensor", arch: ModelArch) -> "list[Tensor]":
        rest = tensor.shape[1:]
        rows = [arch.heads_per_group * arch.kv_channels, arch.kv_channels, arch.kv_channels]
        parts = tensor.reshape(arch.num_query_groups, sum(rows), *rest).split(rows, dim=1)
        return [part.reshape(-1, *rest) for part in parts]


def _kept_groups(kept: Kept, arch: ModelArch) -> "Tensor":
    return kept.get("num_query_groups", _range(arch.num_query_groups))


def _kept_heads(kept: Kept, arch: ModelArch) -> "Tensor":
    """Kept query heads, counted over the whole source; those of a group that goes go with it."""
    import torch

    heads = kept.get("num_attention_heads", _range(arch.num_attention_heads))
    return heads[torch.isin(heads // arch.heads_per_group, _kept_groups(kept, arch))]


def _channels(blocks: "Tensor", arch: ModelArch) -> "Tensor":
    """Elements of blocks of `kv_channels` elements each."""
    return (blocks[:, None] * arch.kv_channels + _range(arch.kv_channels)).flatten()


# The table of tensors is paper, which dry runs read; torch, which takes seconds to import, comes with the first cut.


def _range(size: int) -> "Tensor":
    import torch

    return torch.arange(size)
