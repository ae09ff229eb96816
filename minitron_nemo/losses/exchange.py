"""One collective for each chunk: chunks hand out what the other ranks must know, and get it from all of them."""

from collections.abc import Generator, Iterable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Result = TypeVar("Result")
# Yields this rank's columns [N, C], is sent those of all ranks [T, N, C] in rank order, and returns a result.
Chunk = Generator[Tensor, Tensor, Result]


def run(chunks: Iterable[Chunk[Result]], group: dist.ProcessGroup | None) -> Iterator[Result]:
    """The results of the chunks, in order. A chunk begins when the one before it has been answered once.

    A chunk that asks twice asks together with the next one, so there are as many collectives as chunks, and one more
    where they ask twice. Two of them are then there at a time.
    """
    waiting: list[tuple[Chunk[Result], Tensor]] = []
    coming = iter(chunks)
    while True:
        # Alone a chunk is answered at once, so the next one need not be there before it is done.
        begun = None if group is None and waiting else next(coming, None)
        if begun is not None:
            waiting.append((begun, next(begun)))
        if not waiting:
            return
        answers = gather([columns_NC for _, columns_NC in waiting], group)
        asking = []
        for (chunk, _), answer_TNC in zip(waiting, answers, strict=True):
            try:
                asking.append((chunk, chunk.send(answer_TNC)))
            except StopIteration as end:
                yield end.value
        waiting = asking


def gather(columns: list[Tensor], group: dist.ProcessGroup | None) -> list[Tensor]:
    """[T, N, C] of every rank's [N, C], for several at once; the one collective of the losses."""
    if group is None:
        return [columns_NC[None] for columns_NC in columns]
    flat = torch.cat([columns_NC.reshape(-1) for columns_NC in columns])
    gathered = [torch.empty_like(flat) for _ in range(group.size())]
    dist.all_gather(gathered, flat, group=group)
    parts = torch.stack(gathered).split([columns_NC.numel() for columns_NC in columns], dim=1)
    return [part.unflatten(1, columns_NC.shape) for part, columns_NC in zip(parts, columns, strict=True)]
