"""Micro-batches through a teacher of another tensor-parallel degree than the student's.

Where several copies of the teacher lie in a tensor-parallel group of the student, each copy runs every so many-th of
its micro-batches and they tell each other the hidden states. Where a copy serves several data-parallel replicas, these
tell each other their tokens and it runs the micro-batches of all, of which each keeps its own.

Every rank of an exchange calls with as many micro-batches of the same shape and in the same order, and each of them
runs as many through its copy; so copies that gather their weights from each other stay in step.

S sequence (a context-parallel rank's part of it), B batch, H hidden_size, C copies or replicas.
"""

import math
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_nemo.engine.groups import TeacherGroups
from minitron_nemo.engine.schedule import Batch

READ = ("tokens", "documents")  # what a teacher reads of a micro-batch
Run = Callable[[list[Batch]], list[Tensor]]  # final hidden states [S, B, H] of each; none but on the last stage


def shared_out(batches: list[Batch], run: Run, groups: TeacherGroups, *, at_once: int) -> Iterator[Tensor]:
    """What `run` gives for every micro-batch, in order, `at_once` of them given to it at a time."""
    if groups.beside.copies > 1:
        return _over_copies(batches, run, groups, at_once=at_once)
    return _for_replicas(batches, run, groups, at_once=at_once)


def _over_copies(batches: list[Batch], run: Run, groups: TeacherGroups, *, at_once: int) -> Iterator[Tensor]:
    copies, layout = groups.beside.copies, groups.groups.layout
    rounds = [batches[first : first + copies] for first in range(0, len(batches), copies)]
    # A copy without a micro-batch in the last round runs one again, as does an interleaved pipeline, which takes
    # whole groups of them: whoever gathers weights from the others must run with them.
    own = [part[min(groups.number, len(part) - 1)] for part in rounds]
    whole = math.ceil(len(own) / layout.pp) * layout.pp if layout.vpp > 1 else len(own)
    own += own[-1:] * (whole - len(own))
    for first in range(0, len(own), at_once):
        states = run(own[first : first + at_once])
        for part, states_SBH in zip(rounds[first : first + at_once], states, strict=False):
            yield from _of_all(states_SBH, groups.exchange)[: len(part)]


def _for_replicas(batches: list[Batch], run: Run, groups: TeacherGroups, *, at_once: int) -> Iterator[Tensor]:
    for first in range(0, len(batches), at_once):
        shared = [_of_replicas(batch, groups.exchange) for batch in batches[first : first + at_once]]
        kept: list[Tensor] = []
        for replica in range(groups.beside.replicas):
            states = run([of_all[replica] for of_all in shared])
            if replica == groups.number:
                kept = states
            del states  # before the next are computed
        yield from kept


def _of_replicas(batch: Batch, exchange: dist.ProcessGroup | None) -> list[Batch]:
    """The micro-batch of each replica, in their order, with what a teacher reads of it."""
    assert exchange is not None
    gathered = {name: _of_all(batch[name], exchange) for name in READ if name in batch}
    return [{name: x[replica] for name, x in gathered.items()} for replica in range(exchange.size())]


def _of_all(x: Tensor, exchange: dist.ProcessGroup | None) -> Tensor:
    """[C, *shape of x], in the order of the ranks."""
    assert exchange is not None
    found = torch.empty(exchange.size() * len(x), *x.shape[1:], dtype=x.dtype, device=x.device)
    dist.all_gather_into_tensor(found, x.contiguous(), group=exchange)
    return found.unflatten(0, (exchange.size(), len(x)))
