"""Process groups of a layout, as every part of the program sees them. A group of one rank is None: alone."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_nemo.distributed.layout import Layout


@dataclass(frozen=True)
class Groups:
    """This rank's groups and its places in them; without arguments one process alone on the CPU."""

    layout: Layout = field(default_factory=Layout)
    tp: dist.ProcessGroup | None = None
    pp: dist.ProcessGroup | None = None
    cp: dist.ProcessGroup | None = None
    dp: dist.ProcessGroup | None = None
    batch: dist.ProcessGroup | None = None  # context and data parallel: who has tokens of a batch
    rank: int = 0
    tp_rank: int = 0
    pp_rank: int = 0
    cp_rank: int = 0
    dp_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def sequence(self) -> dist.ProcessGroup | None:
        """The tensor-parallel ranks, where norms and layers see slices of what a context-parallel rank has."""
        return self.tp if self.layout.sequence_parallel else None

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.layout.pp - 1

    @property
    def is_main(self) -> bool:
        """The rank that speaks: logs, manifests, reports."""
        return self.rank == 0

    @property
    def last_stage_rank(self) -> int:
        """Global rank of this rank's peer on the last pipeline stage: where the losses are."""
        return dist.get_process_group_ranks(self.pp)[-1] if self.pp is not None else self.rank

    def barrier(self) -> None:
        if self.layout.world_size > 1:
            dist.barrier()

    def any_rank(self, *flags: bool) -> list[bool]:
        """Each flag as true on every rank if it was on one: what all must do alike. Collective, one small reduction."""
        return [bool(value) for value in self.largest(*map(float, flags))]

    def largest(self, *values: float) -> list[float]:
        """The largest of each value over all ranks, on every rank. Collective, one small reduction."""
        if self.layout.world_size == 1:
            return list(values)
        most = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return most.tolist()

    def share_json(self, value: Any) -> list[Any]:
        """Every rank's JSON-able value, on every rank; bytes cross, never pickles."""
        world_size = self.layout.world_size
        if world_size == 1:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(world_size)]
        dist.all_gather(sizes, torch.tensor([text.numel()], device=self.device))
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8, device=self.device)
        padded[: text.numel()] = text
        parts = [torch.empty_like(padded) for _ in range(world_size)]
        dist.all_gather(parts, padded)
        return [json.loads(bytes(part[: int(size)].cpu().tolist())) for part, size in zip(parts, sizes, strict=True)]

    def sum_over_batch(self, sums: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> dict[str, float]:
        """Named sums of micro-batches, summed over the global batch and the pipeline stages; known on every rank.

        A stage has those of `names` that it knows, and the others count as nothing there: those of the output heads are
        on the last. Stages are added up in their order, so every rank gets the same bits.
        """
        total = torch.zeros(len(names), dtype=torch.float64, device=self.device)
        if sums:
            nothing = torch.zeros((), dtype=torch.float64, device=self.device)
            total += torch.stack([torch.stack([part.get(name, nothing) for name in names]) for part in sums]).sum(dim=0)
        if self.batch is not None:
            dist.all_reduce(total, group=self.batch)
        if self.pp is not None:
            by_stage = [torch.empty_like(total) for _ in range(self.layout.pp)]
            dist.all_gather(by_stage, total, group=self.pp)
            total = torch.stack(by_stage).sum(dim=0)
        return dict(zip(names, total.tolist(), strict=True))
