"""Micro-batches through the pipeline: forward and backward (1F1B), or forward only."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from minitron_nemo.engine.model import HeadlessGPT
from minitron_nemo.losses.output import TOKENS, LossOutput

Batch = dict[str, Tensor]  # tokens, labels, loss_mask: [b, s] each
GetBatch = Callable[[int, int], Batch]  # (first sample, count) -> a micro-batch
# (the model, its hidden states [s, b, h], the micro-batch, its context) -> the loss; called on the last stage only
GetLoss = Callable[[HeadlessGPT, Tensor, Batch, Any], LossOutput]


def unwrap(model: Any) -> HeadlessGPT:
    """The GPT inside data-parallel wrappers."""
    while not isinstance(model, HeadlessGPT):
        model = model.module
    return model


def run_schedule(
    model: Any, batches: list[Batch], *, contexts: Iterable[Any], loss: GetLoss, train: bool
) -> list[dict[str, Tensor]]:
    """The sums of every micro-batch's loss on the last stage, an empty list elsewhere.

    `contexts` has one item for each micro-batch, taken when it is needed. When `train`, gradients of the summed loss
    accumulate in the model.
    """

    def forward_step(items: Iterator, part: Any) -> tuple[Tensor, Callable]:
        batch, context = next(items)

        def finish(hidden_SBH: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            output = loss(unwrap(part), hidden_SBH, batch, context)
            return output.total, output.sums[TOKENS].to(torch.int), output.sums

        return _forward(part, batch), finish

    return _schedule(model, zip(batches, contexts, strict=True), forward_step, batches, not train)


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
) -> list[Any]:
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
