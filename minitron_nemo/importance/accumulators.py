"""Running importance statistics, and how they come together over ranks.

How a number lies over the ranks of a group is data, a `Spread`, and `merge` is the one function that acts on it.
A group is a torch process group; None means alone. Every rank ends with the same bits: gathered values are
combined in rank order.

Statistics are float64 on the device of the activations: a sum over thousands of samples must not lose the
differences that rank units, and bf16 sums overflow.

Shapes: S sequence, B batch, U units on this rank, l layers of this pipeline stage, L layers of the model.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from minitron_nemo.importance import estimators


class Spread(Enum):
    """How a value lies over the ranks of a group."""

    SHARDED = "sharded"  # each rank holds its units: concatenate
    REPLICATED = "replicated"  # every rank holds the value: take it
    PARTIAL = "partial"  # each rank holds a summand: add


@dataclass(frozen=True)
class RankGroups:
    """The groups this rank belongs to; None where it is alone."""

    tp: ProcessGroup | None = None
    pp: ProcessGroup | None = None
    dp: ProcessGroup | None = None
    sequence_parallel: bool = False  # norms and layers then see a slice of the sequence on each tp rank

    @property
    def sequence(self) -> ProcessGroup | None:
        """The ranks that hold the slices of one sequence."""
        return self.tp if self.sequence_parallel else None


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


class UnitAccumulator:
    """Moments over samples of the units heard at one place in every layer of this stage, `values` [l, 4, U]."""

    def __init__(
        self,
        sequence_aggregation: str,
        *,
        layers: int,
        units: int,
        sequence_group: ProcessGroup | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.sequence_aggregation = sequence_aggregation
        self.sequence_group = sequence_group
        self.values = torch.zeros(layers, estimators.MOMENTS, units, dtype=torch.float64, device=device)

    def add(self, row: int, x_SBU: Tensor) -> None:
        """Count the activations of B samples into layer `row`."""
        if x_SBU.dim() != 3 or x_SBU.shape[-1] != self.values.shape[-1]:
            raise ValueError(f"activations {tuple(x_SBU.shape)}: expected [s, b, {self.values.shape[-1]}]")
        m_MBU = estimators.moments(x_SBU)
        # Before the nonlinearity: slices of one sequence become one number only once they are whole.
        m_MBU = merge(m_MBU, Spread.PARTIAL, self.sequence_group)
        sample_BU = estimators.aggregate(m_MBU, self.sequence_aggregation)
        self.values[row] += estimators.moments(sample_BU)

    def samples(self, groups: RankGroups) -> Tensor:
        """Samples heard by each layer of this stage over all data-parallel ranks, [l]."""
        return merge(self.values[:, 0, 0], Spread.PARTIAL, groups.dp)

    def scores(self, batch_aggregation: str, *, spread: Spread, groups: RankGroups) -> Tensor:
        """Scores of all units of this stage's layers, [l, units]; `spread` is that of the units over tp."""
        values = merge(self.values, Spread.PARTIAL, groups.dp)
        return merge(estimators.aggregate(values.movedim(1, 0), batch_aggregation), spread, groups.tp)


class TokenAccumulator:
    """Cosine between input and output of every layer of this stage, summed over tokens, `values` [l, 2]."""

    def __init__(self, *, layers: int, device: torch.device | None = None) -> None:
        self.values = torch.zeros(layers, 2, dtype=torch.float64, device=device)

    def add(self, row: int, before_SBH: Tensor, after_SBH: Tensor) -> None:
        self.values[row] += estimators.cosine_sum(before_SBH, after_SBH)

    def totals(self, groups: RankGroups) -> Tensor:
        """Summed cosine and tokens of each layer over all ranks, [l, 2]; slices of a sequence add like samples."""
        return merge(merge(self.values, Spread.PARTIAL, groups.sequence), Spread.PARTIAL, groups.dp)
