"""One global batch through the pipeline: forward and backward (1F1B), or forward only."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from minitron_nemo.distillation.head import HeadLoss
from minitron_nemo.engine.model import HeadlessGPT
from minitron_nemo.parallel import Groups

Batch = dict[str, Tensor]  # tokens, labels, loss_mask: [b, s] each


class Objective(Protocol):
    """What training minimizes: prepares a context for every micro-batch, then turns hidden states into a loss."""

    head: HeadLoss
    has_teacher: bool

    def contexts(self, batches: list[Batch]) -> Iterator[Any]:
        """One context for each micro-batch, in order; the teacher's hidden states in distillation.

        Not a generator function: what it sends between pipeline stages must be sent before the schedule starts.
        """

    def loss(self, model: HeadlessGPT, hidden_SBH: Tensor, batch: Batch, context: Any) -> tuple[Tensor, Tensor]:
        """(loss summed over tokens, sums [tokens, forward KL, cross-entropy, agreement]); last stage only."""


def unwrap(model: Any) -> HeadlessGPT:
    """The GPT inside data-parallel wrappers."""
    while not isinstance(model, HeadlessGPT):
        model = model.module
    return model


def run_batch(model: Any, batches: list[Batch], objective: Objective, *, groups: Groups, train: bool) -> Tensor:
    """Sums over the whole global batch, known on every rank; gradients accumulate when `train`.

    Returns [tokens, forward KL, cross-entropy, agreement] in float64.
    """

    def forward_step(items: Iterator, part: Any) -> tuple[Tensor, Callable]:
        batch, context = next(items)
        hidden_SBH = _forward(part, batch)

        def loss(output_SBH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            total, sums = objective.loss(unwrap(part), output_SBH, batch, context)
            return total, sums[0].to(torch.int), sums

        return hidden_SBH, loss

    contexts = objective.contexts(batches)
    records = _schedule(model, zip(batches, contexts, strict=True), forward_step, batches, not train)
    sums = torch.zeros(4, dtype=torch.float64, device=groups.device)
    if groups.is_last_stage:
        sums += torch.stack(records).sum(dim=0)
    return groups.sum_over_data_ranks(sums)


def forward_hidden(model: Any, batches: list[Batch]) -> list[Tensor]:
    """Final hidden states [s, b, h] of every micro-batch on the last stage, an empty list elsewhere."""

    def forward_step(items: Iterator, part: Any) -> tuple[Tensor, Callable]:
        return _forward(part, next(items)), lambda output, non_loss_data: output

    with torch.no_grad():
        return _schedule(model, iter(batches), forward_step, batches, True, collect_non_loss_data=True)


def _forward(model: Any, batch: Batch) -> Tensor:
    tokens = batch["tokens"]
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return model(tokens, positions, None)


def _schedule(
    model: Any, items: Iterable, forward_step: Callable, batches: list[Batch], forward_only: bool, **options: Any
) -> list[Tensor]:
    micro_batch_size, seq_length = batches[0]["tokens"].shape
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(items),
        model=[model],
        num_microbatches=len(batches),
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
        **options,
    )
