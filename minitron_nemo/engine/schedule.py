"""Micro-batches through the pipeline: forward and backward (1F1B), or forward only.

Everybody hands whole sequences over. What comes out is of this rank's part of them, where context parallelism shares
them out: hidden states, and the micro-batch that a loss is given.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from minitron_nemo.engine.attention import apart, own_positions
from minitron_nemo.engine.model import HeadlessGPT, ModelChunks, unwrap
from minitron_nemo.losses.output import TOKENS, LossOutput

Batch = dict[str, Tensor]  # tokens, labels, loss_mask, sources: [b, s] each; documents where they are apart
GetBatch = Callable[[int, int], Batch]  # (first sample, count) -> a micro-batch
# (the chunk with the head, hidden states [s, b, h], the micro-batch, its context) -> the loss; on the last stage only
GetLoss = Callable[[HeadlessGPT, Tensor, Batch, Any], LossOutput]
GetContexts = Callable[[list[Batch]], Iterable[Any]]  # micro-batches -> one context for each, in order
# (the micro-batch, its context) -> what is entered around its forward pass through a chunk; on every stage
Around = Callable[[Batch, Any], AbstractContextManager[Any]]


def calls(firsts: Sequence[int], *, stages: int) -> Iterator[Sequence[int]]:
    """The micro-batches of a forward pass over much data, as many as one call of the schedule takes: one alone, in a
    pipeline four for each stage, so that stages wait for each other a fifth of the time and not most of it.
    """
    size = 1 if stages == 1 else 4 * stages
    yield from (firsts[start : start + size] for start in range(0, len(firsts), size))


def nothing_around(batch: Batch, context: Any) -> AbstractContextManager[Any]:
    """The `Around` of a forward pass that nobody needs to know of."""
    return nullcontext()


def run_schedule(
    model: ModelChunks,
    batches: list[Batch],
    *,
    contexts: GetContexts,
    loss: GetLoss,
    train: bool,
    window: int = 0,
    around: Around = nothing_around,
) -> list[dict[str, Tensor]]:
    """The sums of every micro-batch's loss on the last stage, an empty list elsewhere.

    `contexts` is called for `window` micro-batches (0: all) before those run, so that no more contexts exist at a
    time. When `train`, gradients of the summed loss accumulate in the model; whatever the window, they are reduced and
    divided by the tokens once, with the last of the micro-batches.
    """
    size = window or len(batches)
    windows = [batches[start : start + size] for start in range(0, len(batches), size)]

    def run(part: list[Batch], waiting: Iterable[Any]) -> list[dict[str, Tensor]]:
        return _run_window(model, part, waiting, loss=loss, train=train, around=around)

    if not train or len(windows) == 1:
        return [sums for part in windows for sums in run(part, contexts(part))]
    results = []
    with _finalized_once(model) as held:
        for part in windows[:-1]:
            waiting = contexts(part)
            with held():
                results += run(part, waiting)
        return results + run(windows[-1], contexts(windows[-1]))


@contextmanager
def _finalized_once(model: ModelChunks) -> Iterator[Callable]:
    """Several training schedules as one. Inside of the context that this gives, gradients only add up.

    Megatron ends each schedule by `config.finalize_model_grads_func`, which reduces gradients over the ranks and
    divides them by the tokens of the schedule; where reduction overlaps, the backward pass of the last micro-batch
    starts it.
    """
    config = model.config
    finalize, no_sync = config.finalize_model_grads_func, config.no_sync_func
    waiting: list[Tensor] = []  # tokens of the schedules that were held, zero but on the last stage

    @contextmanager
    def held() -> Iterator[None]:
        config.finalize_model_grads_func = lambda models, tokens, **options: waiting.append(tokens)
        config.no_sync_func = nullcontext  # the schedule leaves Megatron's before its last micro-batch
        try:
            with model.no_sync():
                yield
        finally:
            config.finalize_model_grads_func, config.no_sync_func = finish, no_sync

    def finish(models: list[Any], tokens: Tensor, **options: Any) -> None:
        finalize(models, tokens + sum(waiting), **options)

    try:
        yield held
    finally:
        config.finalize_model_grads_func, config.no_sync_func = finalize, no_sync


def _run_window(
    model: ModelChunks, batches: list[Batch], contexts: Iterable[Any], *, loss: GetLoss, train: bool, around: Around
) -> list[dict[str, Tensor]]:
    """One schedule over micro-batches whose contexts are there."""

    def forward_step(items: Iterator, part: Any) -> tuple[Tensor, Callable]:
        batch, context = next(items)

        def finish(hidden_SBH: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            output = loss(unwrap(part), hidden_SBH, batch, context)
            return output.total, output.sums[TOKENS].to(torch.int), output.sums

        with around(batch, context):
            return _forward(part, batch), finish

    items = zip(_own_parts(model, batches), contexts, strict=True)
    return _schedule(model, items, forward_step, batches, not train)


def forward_hidden(model: ModelChunks, batches: list[Batch]) -> list[Tensor]:
    """Final hidden states [s, b, h] of every micro-batch on the last stage, an empty list elsewhere."""

    def forward_step(items: Iterator, part: Any) -> tuple[Tensor, Callable]:
        return _forward(part, next(items)), lambda output, non_loss_data: output

    with torch.no_grad():
        return _schedule(model, _own_parts(model, batches), forward_step, batches, True, collect_non_loss_data=True)


def forward_variants(
    model: ModelChunks,
    batch: Batch,
    variants: Iterable[AbstractContextManager[Any]],
    *,
    count: int,
    consume: Callable[[Tensor, int], Any],
) -> list[Any]:
    """One micro-batch through the pipeline once for each of `count` variants of the model, as so many micro-batches.

    A variant is a context that every stage enters around its own forward pass, in order. On the last stage, what
    `consume(final hidden states [s, b, h], number of the variant)` gives for each; an empty list elsewhere.
    """

    def forward_step(items: Iterator, part: Any) -> tuple[Tensor, Callable]:
        number, variant = next(items)
        with variant:
            return _forward(part, own), lambda output, non_loss_data: consume(output, number)

    (own,) = _own_parts(model, [batch])
    with torch.no_grad():
        return _schedule(model, enumerate(variants), forward_step, [batch] * count, True, collect_non_loss_data=True)


def _own_parts(model: ModelChunks, batches: Iterable[Batch]) -> Iterator[Batch]:
    """What this context-parallel rank has of every micro-batch, and the mask where `documents` are apart."""
    for batch in batches:
        documents, tokens = batch.get("documents"), batch["tokens"]
        positions = own_positions(tokens.shape[1], model.context).to(tokens.device)
        own = {name: x[:, positions] for name, x in batch.items() if name != "documents"}
        mask = {} if documents is None else {"mask": apart(documents, model.context)}
        yield {**own, **mask, "positions": positions}


def _forward(chunk: Any, batch: Batch) -> Tensor:
    tokens = batch["tokens"]
    return chunk(tokens, batch["positions"].expand_as(tokens), batch.get("mask"))


def _schedule(
    model: ModelChunks,
    items: Iterable,
    forward_step: Callable,
    batches: list[Batch],
    forward_only: bool,
    **options: Any,
) -> list[Any]:
    micro_batch_size, seq_length = batches[0]["tokens"].shape
    if (own := model.own_groups) is not None:
        options |= {"pg_collection": own, "p2p_communicator": P2PCommunicator(own.pp, model.config)}
    # Each chunk goes through all items; one alone takes them as they are made.
    each = [iter(items)] if len(model) == 1 else [iter(copy) for copy in [list(items)] * len(model)]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=each if len(model) > 1 else each[0],
        model=list(model),
        num_microbatches=len(batches),
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
        **options,
    )
