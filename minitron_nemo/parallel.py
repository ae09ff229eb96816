"""Ranks: parallel degrees, process groups, the device of this rank, and how a shape splits over them.

The only reader of rank numbers from the environment.
"""

import datetime
import json
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from minitron_nemo.arch import ModelArch
from minitron_nemo.errors import UserError

TIMEOUT = datetime.timedelta(minutes=30)


@dataclass(frozen=True)
class Rank:
    """Who this process is, read from torchrun's or Slurm's environment variables (or one process alone)."""

    rank: int
    local_rank: int
    world_size: int


def rank_from_environment(environment: dict[str, str]) -> Rank | None:
    """This process's rank when torchrun or srun started it, None when nobody did."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return Rank(int(environment["RANK"]), int(environment.get("LOCAL_RANK", 0)), int(environment["WORLD_SIZE"]))
    # `salloc` and `sbatch` set SLURM_NTASKS for the batch script too; only a task of srun has SLURM_STEP_ID.
    if "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment and int(environment["SLURM_NTASKS"]) > 1:
        return Rank(
            int(environment["SLURM_PROCID"]), int(environment["SLURM_LOCALID"]), int(environment["SLURM_NTASKS"])
        )
    return None


@dataclass(frozen=True)
class Groups:
    """Process groups and degrees of one layout. A group of one rank is None: maths then runs alone."""

    tp: dist.ProcessGroup | None
    pp: dist.ProcessGroup | None
    dp: dist.ProcessGroup | None
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    rank: int
    world_size: int
    sequence_parallel: bool
    device: torch.device

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def is_main(self) -> bool:
        """The rank that speaks: logs, manifests, reports."""
        return self.rank == 0

    @property
    def last_stage_rank(self) -> int:
        """Global rank of this rank's peer on the last pipeline stage: where the losses are."""
        return dist.get_process_group_ranks(self.pp)[-1] if self.pp is not None else self.rank

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def share_json(self, value: Any) -> list[Any]:
        """Every rank's JSON-able value, on every rank; bytes cross, never pickles."""
        if self.world_size == 1:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([text.numel()], device=self.device))
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8, device=self.device)
        padded[: text.numel()] = text
        parts = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(parts, padded)
        return [json.loads(bytes(part[: int(size)].cpu().tolist())) for part, size in zip(parts, sizes, strict=True)]

    def sum_over_data_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """Per-rank sums held on the last stage, summed over data-parallel ranks and known on every stage."""
        if self.dp is not None:
            dist.all_reduce(values, group=self.dp)
        if self.pp is not None:
            dist.broadcast(values, src=self.last_stage_rank, group=self.pp)
        return values


def uses_gpu(accelerator: str) -> bool:
    """Whether `trainer.accelerator` means GPUs here."""
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("trainer.accelerator=gpu: no CUDA device is visible; use trainer.accelerator=cpu")
    return accelerator != "cpu" and torch.cuda.is_available()


def start(rank: Rank, *, gpu: bool) -> torch.device:
    """Join the world process group (NCCL on GPU, gloo on CPU) and return this rank's device."""
    if gpu:
        # One queue keeps Megatron's collectives ahead of the computation they overlap with (Hopper and older).
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        torch.cuda.set_device(rank.local_rank)
    if not dist.is_initialized():
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29500")
        dist.init_process_group("nccl" if gpu else "gloo", rank=rank.rank, world_size=rank.world_size, timeout=TIMEOUT)
    return torch.device("cuda", rank.local_rank) if gpu else torch.device("cpu")


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def check_divides(name: str, arch: ModelArch, *, tp: int) -> None:
    """Refuse a tensor-parallel degree that does not divide the shape."""
    for axis in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        if (size := getattr(arch, axis)) % tp:
            fits = [n for n in range(1, size + 1) if _fits(arch, n)]
            raise UserError(
                f"parallel.tensor_model_parallel_size={tp}: must divide the {name}'s {axis}={size}; "
                f"allowed are {', '.join(map(str, fits[:12]))}"
            )


def _fits(arch: ModelArch, tp: int) -> bool:
    return not any(size % tp for size in (arch.num_attention_heads, arch.num_query_groups, arch.ffn_hidden_size))


def stage_layers(num_layers: int, pp: int, asked: list[int] | None = None) -> list[int]:
    """Layers on each pipeline stage: what was asked, or as even as they divide, later stages the fewest.

    The last stage also holds the head. Raises UserError when layers would be lost or a stage left empty.
    """
    if asked is None:
        if num_layers < pp:
            raise UserError(f"pipeline_model_parallel_size={pp}: a model of {num_layers} layers has at most that many")
        return [num_layers // pp + (stage < num_layers % pp) for stage in range(pp)]
    if len(asked) != pp or sum(asked) != num_layers or min(asked) < 1:
        raise UserError(
            f"pipeline stage layers {list(asked)}: needs {pp} numbers of at least 1 that add up to {num_layers} layers"
        )
    return list(asked)
