"""Cosine between what enters and what leaves every contiguous block of layers, from one forward pass.

Block importance of ShortGPT (2403.03853) for blocks of any length n, as in Gromov et al. (2403.17887):

    BI(a, n) = 1 - mean over tokens of cos( x_a, x_(a+n) )        x_a enters layer a

The two states of a block may lie on two pipeline stages: each stage sends the inputs of its layers to the others once,
and the stage that holds a block's last layer takes its cosine.

Shapes: S sequence (a slice of it under sequence parallelism), B batch, H hidden_size, L layers of the model.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, distributed

from minitron_nemo.distributed.groups import Groups
from minitron_nemo.distributed.spread import Spread, merge
from minitron_nemo.importance.estimators import block_importance, cosine_sum


class BlockCosines:
    """Running sums of cosines over tokens, and the tokens, of every block: `values` [L, L + 1, 2], float64.

    Row a, column b is the block of layers a to b - 1, counted from 0. `stages`: the layers of each pipeline stage.
    """

    def __init__(self, stages: Sequence[int], groups: Groups) -> None:
        self.groups = groups
        self.owners = [stage for stage, layers in enumerate(stages) for _ in range(layers)]
        self.first = sum(stages[: groups.pp_rank])
        size = (len(self.owners), len(self.owners) + 1, 2)
        self.values = torch.zeros(size, dtype=torch.float64, device=groups.device)

    def add(self, states: Sequence[Tensor]) -> None:
        """Count a micro-batch by the states between the layers of this stage, [S, B, H] each; on all stages."""
        for start, owner in enumerate(self.owners):
            entering_SBH = states[start - self.first] if owner == self.groups.pp_rank else torch.empty_like(states[0])
            if self.groups.pp is not None:
                entering_SBH = entering_SBH.contiguous()
                source = distributed.get_process_group_ranks(self.groups.pp)[owner]
                distributed.broadcast(entering_SBH, src=source, group=self.groups.pp)
            for stop in range(max(start, self.first) + 1, self.first + len(states)):
                self.values[start, stop] += cosine_sum(entering_SBH, states[stop - self.first])

    def merged(self) -> Tensor:
        """The sums over all ranks: slices of a sequence and samples add, and a block is counted on one stage."""
        sums = merge(self.values, Spread.PARTIAL, self.groups.sequence)
        return merge(merge(sums, Spread.PARTIAL, self.groups.pp), Spread.PARTIAL, self.groups.dp)

    def restore(self, total: Tensor) -> None:
        """Begin with the sums over all ranks of an earlier run."""
        first_slice = self.groups.sequence is None or self.groups.tp_rank == 0
        if first_slice and self.groups.pp_rank == self.groups.dp_rank == 0:
            self.values += total

    def scores(self) -> Tensor:
        """One minus the mean cosine of every block, [L, L + 1]; nan where there is none. On all ranks together."""
        return block_importance(self.merged())
