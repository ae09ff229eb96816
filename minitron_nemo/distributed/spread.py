"""How a number lies over the ranks of a group is data, a `Spread`, and `merge` is the one function that acts on it.

A group is a torch process group; None means alone. Every rank ends with the same bits: gathered values are combined
in rank order.
"""

import functools
from collections.abc import Sequence
from enum import Enum

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup


class Spread(Enum):
    """How a value lies over the ranks of a group."""

    SHARDED = "sharded"  # each rank holds its units: concatenate
    REPLICATED = "replicated"  # every rank holds the value: take it
    PARTIAL = "partial"  # each rank holds a summand: add


def group_size(group: ProcessGroup | None) -> int:
    return 1 if group is None else distributed.get_world_size(group)


def merge(tensor: Tensor, spread: Spread, group: ProcessGroup | None) -> Tensor:
    """The whole value, the same on every rank of `group`; shards are concatenated on the last dimension."""
    if spread is Spread.REPLICATED or group_size(group) == 1 or tensor.numel() == 0:
        return tensor
    pieces = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(group_size(group))]
    distributed.all_gather(pieces, tensor.contiguous(), group=group)
    if spread is Spread.SHARDED:
        return torch.cat(pieces, dim=-1)
    # Summed here and not by an all-reduce, whose order of summands may differ between runs and layouts.
    return functools.reduce(torch.add, pieces)


def by_layer(rows: Tensor, layers: Sequence[int], *, num_layers: int, group: ProcessGroup | None) -> Tensor:
    """Rows of all stages at their global layer, counted from 0: [l, ...] -> [L, ...]. Adds where two claim one."""
    table = rows.new_zeros((num_layers, *rows.shape[1:]))
    table.index_add_(0, torch.tensor(list(layers), dtype=torch.long, device=rows.device), rows)
    return merge(table, Spread.PARTIAL, group)
