"""Who this process is, and how it joins the others. The only reader of rank numbers from the environment."""

import datetime
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minitron_nemo.errors import UserError

if TYPE_CHECKING:
    import torch

# Who this process is must be known before anything is said: torch, which takes seconds to import, comes with a use.

TIMEOUT = datetime.timedelta(minutes=30)


@dataclass(frozen=True)
class Rank:
    """Who this process is, read from torchrun's or Slurm's environment variables (or one process alone)."""

    rank: int
    local_rank: int
    world_size: int


def rank_from_environment(environment: dict[str, str] | None = None) -> Rank | None:
    """This process's rank when torchrun or srun started it, None when nobody did."""
    environment = dict(os.environ) if environment is None else environment
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return Rank(int(environment["RANK"]), int(environment.get("LOCAL_RANK", 0)), int(environment["WORLD_SIZE"]))
    # `salloc` and `sbatch` set SLURM_NTASKS for the batch script too; only a task of srun has SLURM_STEP_ID.
    if "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment and int(environment["SLURM_NTASKS"]) > 1:
        return Rank(
            int(environment["SLURM_PROCID"]), int(environment["SLURM_LOCALID"]), int(environment["SLURM_NTASKS"])
        )
    return None


def is_main_process() -> bool:
    """Whether this process speaks: rank 0, or one that nobody started as a rank."""
    rank = rank_from_environment()
    return rank is None or rank.rank == 0


def uses_gpu(accelerator: str) -> bool:
    """Whether `trainer.accelerator` means GPUs here."""
    if accelerator == "cpu":
        return False
    import torch

    if accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("trainer.accelerator=gpu: no CUDA device is visible; use trainer.accelerator=cpu")
    return torch.cuda.is_available()


def visible_gpus() -> int:
    """GPUs that this process may use."""
    import torch

    return torch.cuda.device_count()


def start(rank: Rank, *, gpu: bool) -> "torch.device":
    """Join the world process group (NCCL on GPU, gloo on CPU) and return this rank's device."""
    import torch
    import torch.distributed as dist

    if gpu:
        # One queue keeps Megatron's collectives ahead of the computation they overlap with (Hopper and older).
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        if rank.local_rank >= (visible := visible_gpus()):
            raise UserError(
                f"rank {rank.rank}: {visible} GPU(s) are visible to it and it is number {rank.local_rank} on its node; "
                "start no more ranks on a node than it has GPUs, and let each see all of them"
            )
        torch.cuda.set_device(rank.local_rank)
    if not dist.is_initialized():
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29500")
        # A world of one needs no meeting place, and so no port that another program may have.
        store = dist.HashStore() if rank.world_size == 1 else None
        dist.init_process_group(
            "nccl" if gpu else "gloo", rank=rank.rank, world_size=rank.world_size, timeout=TIMEOUT, store=store
        )
    return torch.device("cuda", rank.local_rank) if gpu else torch.device("cpu")


def stop() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
