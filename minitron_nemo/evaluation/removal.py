"""What a model says without each of some blocks of its layers: loss and final states on text, likelihood of choices.

Whole passes are shared by all blocks (`engine/removal.py`). Results are known on every rank, summed in rank order.

Shapes: V variants of the model: whole, then without each block. R requests. N tokens, H hidden_size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minitron_nemo.data.tasks import Request
from minitron_nemo.distributed.groups import Groups
from minitron_nemo.distributed.spread import Spread, merge
from minitron_nemo.engine.model import HeadlessGPT
from minitron_nemo.engine.removal import RemovalRuns
from minitron_nemo.engine.schedule import Batch
from minitron_nemo.losses.lm_head import HeadLoss
from minitron_nemo.losses.output import CROSS_ENTROPY, TOKENS

ROWS_AT_A_TIME = 1024  # bounds the float64 copies of hidden states


class OnLastStage:
    """Float64 sums `values`, zero but on the last stage; data-parallel ranks have summands."""

    def __init__(self, *shape: int, groups: Groups) -> None:
        self.groups = groups
        self.values = torch.zeros(shape, dtype=torch.float64, device=groups.device)

    def merged(self) -> Tensor:
        """The sums over all ranks, on every rank."""
        return merge(merge(self.values, Spread.PARTIAL, self.groups.pp), Spread.PARTIAL, self.groups.dp)

    def restore(self, total: Tensor) -> None:
        """Begin with the sums over all ranks of an earlier run."""
        if self.groups.pp_rank == self.groups.dp_rank == 0:
            self.values += total


class TextSums(OnLastStage):
    """Running sums of every variant over text: `values` [V, 4].

    Columns: unmasked tokens, their cross-entropy with the next token, and over all tokens the squared distance of the
    final hidden states from the whole model's and the squared norm of those.
    """

    def __init__(self, runs: RemovalRuns, blocks: Sequence[range], *, head: HeadLoss, groups: Groups) -> None:
        super().__init__(1 + len(blocks), 4, groups=groups)
        self.runs, self.blocks, self.head = runs, list(blocks), head

    def add(self, batch: Batch) -> None:
        """Count a micro-batch; on all stages."""
        model, whole = self.runs.gpt, list[Tensor]()

        def consume(hidden_SBH: Tensor, number: int) -> None:
            if number == 0:
                whole.append(hidden_SBH)
            sums = self._cross_entropy(model, hidden_SBH, batch)
            self.values[number] += torch.stack([*sums, *squares(hidden_SBH, whole[0])])

        self.runs.run(batch, self.blocks, consume=consume)

    def _cross_entropy(self, model: HeadlessGPT, hidden_SBH: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        output = self.head(
            (hidden_SBH.flatten(0, 1), model.head_weight()),
            labels_N=batch["labels"].T.flatten(),
            mask_N=batch["loss_mask"].T.flatten(),
        )
        return output.sums[TOKENS], output.sums[CROSS_ENTROPY]


def squares(hidden_SBH: Tensor, whole_SBH: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distance between two states and squared norm of the second, in float64: the parts of the NMSE."""
    distance, norm = hidden_SBH.new_zeros((), dtype=torch.float64), hidden_SBH.new_zeros((), dtype=torch.float64)
    for ours, theirs in zip(hidden_SBH.split(ROWS_AT_A_TIME), whole_SBH.split(ROWS_AT_A_TIME), strict=True):
        x, y = ours.double(), theirs.double()
        distance += (x - y).square_().sum()
        norm += y.square_().sum()
    return distance, norm


def log_likelihoods(
    runs: RemovalRuns, requests: Sequence[Request], *, blocks: Sequence[range], head: HeadLoss, groups: Groups
) -> Tensor:
    """Of each of this rank's micro-batch of requests, log p(continuation | context) under every variant: [R, V].

    Float64, zero but on the last stage. Requests are padded on the right, where causal attention does not look.
    """
    multiple = groups.layout.tp if groups.layout.sequence_parallel else 1
    longest = max(len(request.inputs) for request in requests)
    padded = -(-longest // multiple) * multiple
    tokens_RS = torch.zeros(len(requests), padded, dtype=torch.long)
    for row, request in enumerate(requests):
        tokens_RS[row, : len(request.inputs)] = torch.tensor(request.inputs)
    values_RV = torch.zeros(len(requests), 1 + len(blocks), dtype=torch.float64, device=groups.device)
    model = runs.gpt
    labels = [torch.tensor(request.continuation, device=groups.device) for request in requests]

    def consume(hidden_SRH: Tensor, number: int) -> None:
        for row, request in enumerate(requests):
            # The last input predicts the last token of the continuation: only its tokens go through the head.
            end = len(request.inputs)
            hidden_NH = hidden_SRH[end - len(request.continuation) : end, row]
            output = head((hidden_NH, model.head_weight()), labels_N=labels[row], mask_N=torch.ones_like(labels[row]))
            values_RV[row, number] = -output.sums[CROSS_ENTROPY]

    runs.run({"tokens": tokens_RS.to(groups.device)}, blocks, consume=consume)
    return values_RV
