"""Statistics of what is heard at one site in every layer of a pipeline stage, and how they come together over ranks.

Statistics are float64 on the device of the activations: a sum over thousands of samples must not lose the
differences that rank units, and bf16 sums overflow. Merged statistics are the same bits on every rank.

Shapes: S sequence, B batch, U units on this rank, H hidden_size, l layers of this pipeline stage.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minitron_nemo.distributed.groups import Groups
from minitron_nemo.distributed.spread import Spread, group_size, merge
from minitron_nemo.importance import estimators
from minitron_nemo.importance.sites import Site


@dataclass(frozen=True)
class Hearing:
    """What a statistic is made for: `layers` of this stage, each with `units` of an axis over all ranks."""

    layers: int
    units: int
    sequence_aggregation: str = "mean"
    groups: Groups = field(default_factory=Groups)
    device: torch.device | None = None


class Statistic(ABC):
    """A running statistic of one site, a row for each layer of this stage. All ranks must merge together."""

    values: Tensor  # [l, ...], zero before anything is heard

    def __init__(self, site: Site, hearing: Hearing) -> None:
        self.site = site
        self.groups = hearing.groups
        self.device = hearing.device
        self.counts = [[0, 0] for _ in range(hearing.layers)]  # samples, tokens

    def add(self, row: int, *tensors: Tensor) -> None:
        """Count what a forward pass over B samples gave the site, each [S, B, ...], into layer `row`."""
        self.values[row].add_(self.measure(*tensors))
        S, B = tensors[0].shape[:2]
        self.counts[row][0] += B
        self.counts[row][1] += S * B

    def heard(self) -> Tensor:
        """Samples and tokens heard by each layer over all ranks, [l, 2]."""
        counts_l2 = torch.tensor(self.counts, dtype=torch.float64, device=self.device).reshape(-1, 2)
        samples_l, tokens_l = counts_l2.unbind(-1)
        return merge(torch.stack((samples_l, self.whole_sequence(tokens_l)), dim=-1), Spread.PARTIAL, self.groups.dp)

    def whole_sequence(self, x: Tensor) -> Tensor:
        """The sum over the ranks that heard a slice each of the same samples."""
        return merge(merge(x, self.site.sequence, self.groups.sequence), Spread.PARTIAL, self.groups.cp)

    def forget(self) -> None:
        """Begin again with nothing heard."""
        self.values.zero_()
        self.counts = [[0, 0] for _ in self.counts]

    @abstractmethod
    def measure(self, *tensors: Tensor) -> Tensor:
        """What a forward pass adds to a row of `values`."""

    @abstractmethod
    def merged(self) -> Tensor:
        """The statistic over all ranks, [l, ...]."""


class UnitMoments(Statistic):
    """Moments over samples of the units of each layer, `values` [l, 4, U]; merged [l, 4, units]."""

    def __init__(self, site: Site, hearing: Hearing) -> None:
        super().__init__(site, hearing)
        self.sequence_aggregation = hearing.sequence_aggregation
        shards = group_size(hearing.groups.tp) if site.units is Spread.SHARDED else 1
        shape = (hearing.layers, estimators.MOMENTS, hearing.units // shards)
        self.values = torch.zeros(shape, dtype=torch.float64, device=hearing.device)

    def measure(self, *tensors: Tensor) -> Tensor:
        (x_SBU,) = tensors
        if x_SBU.dim() != 3 or x_SBU.shape[-1] != self.values.shape[-1]:
            raise ValueError(f"activations {tuple(x_SBU.shape)}: expected [s, b, {self.values.shape[-1]}]")
        m_MBU = estimators.moments(x_SBU, of=self.sequence_aggregation)
        # Before the nonlinearity: slices of one sequence become one number only once they are whole.
        m_MBU = self.whole_sequence(m_MBU)
        return estimators.moments(estimators.aggregate(m_MBU, self.sequence_aggregation))

    def merged(self) -> Tensor:
        return merge(merge(self.values, Spread.PARTIAL, self.groups.dp), self.site.units, self.groups.tp)


class SignedUnitMoments(UnitMoments):
    """Moments over samples of the plain sum over each sequence, whatever the sequence aggregation."""

    def measure(self, *tensors: Tensor) -> Tensor:
        (x_SBU,) = tensors
        sums_BU = self.whole_sequence(x_SBU.sum(dim=0, dtype=torch.float64))
        return estimators.moments(sums_BU)


class CosineSums(Statistic):
    """Cosine between input and output of each layer, summed over tokens, and the tokens: `values` [l, 2]."""

    def __init__(self, site: Site, hearing: Hearing) -> None:
        super().__init__(site, hearing)
        self.values = torch.zeros(hearing.layers, 2, dtype=torch.float64, device=hearing.device)

    def measure(self, *tensors: Tensor) -> Tensor:
        before_SBH, after_SBH = tensors
        return estimators.cosine_sum(before_SBH, after_SBH)

    def merged(self) -> Tensor:
        """Slices of a sequence add like samples."""
        return merge(self.whole_sequence(self.values), Spread.PARTIAL, self.groups.dp)


class SecondMoments(Statistic):
    """Sums over tokens of x_i x_j, and below them those of x_i: `values` [l, U + 1, u], merged [l, U + 1, U].

    A tensor-parallel rank has the columns of its own u units; the rows are those of all, gathered from the others.
    """

    def __init__(self, site: Site, hearing: Hearing) -> None:
        super().__init__(site, hearing)
        shards = group_size(hearing.groups.tp) if site.units is Spread.SHARDED else 1
        shape = (hearing.layers, hearing.units + 1, hearing.units // shards)
        self.values = torch.zeros(shape, dtype=torch.float64, device=hearing.device)

    def measure(self, *tensors: Tensor) -> Tensor:
        (x_SBu,) = tensors
        x_SBu = x_SBu.to(torch.promote_types(x_SBu.dtype, torch.float32))
        x_TU = merge(x_SBu, self.site.units, self.groups.tp).flatten(0, 1)
        with_ones = torch.cat((x_TU, x_TU.new_ones(len(x_TU), 1)), dim=-1)
        return with_ones.T @ x_SBu.flatten(0, 1)

    def merged(self) -> Tensor:
        values = self.whole_sequence(self.values)
        return merge(merge(values, Spread.PARTIAL, self.groups.dp), self.site.units, self.groups.tp)

    def restore(self, values: Tensor, tokens: int) -> None:
        """Begin with what an earlier run heard: its merged `values`, [l, U + 1, u] of this rank's units, and tokens.

        On one rank of those whose values are added: the others begin with nothing.
        """
        slices = self.groups.sequence is not None and self.site.sequence is Spread.PARTIAL
        if self.groups.dp_rank > 0 or self.groups.cp_rank > 0 or (slices and self.groups.tp_rank > 0):
            return
        self.values.copy_(values)
        self.counts = [[0, tokens] for _ in self.counts]
