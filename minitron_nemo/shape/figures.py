"""What a model costs, on paper: the figures that a budget limits and that a dry run shows before and after a cut."""

from collections.abc import Callable
from dataclasses import dataclass

from minitron_nemo.shape.arch import ModelArch, billions

BF16 = 2  # bytes


@dataclass(frozen=True)
class Workload:
    """What a cost depends on besides the shape: the length of a sequence (FLOPs), tokens in the KV cache (memory)."""

    seq_length: int
    cached_tokens: int = 0


@dataclass(frozen=True)
class Figure:
    """One cost of a model: its name for people, its value for a shape and a workload, and how that is written."""

    title: str
    of: Callable[[ModelArch, Workload], float]
    show: Callable[[float], str]


def in_binary(size: float) -> str:
    """`8.41 GiB`, `128 KiB`: powers of two, as memory is sold."""
    for limit, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= limit:
            return f"{float(f'{size / limit:.3g}'):g} {unit}"
    return f"{size:g} bytes"


def memory_bytes(arch: ModelArch, work: Workload) -> float:
    """Weights in bf16 and the KV cache of `cached_tokens`, in bytes; no activations, no buffers of a runtime."""
    return BF16 * arch.num_params() + arch.kv_cache_bytes_per_token(BF16) * work.cached_tokens


FIGURES: dict[str, Figure] = {
    "parameters": Figure("parameters", lambda arch, _: arch.num_params(), billions),
    "non_embedding_parameters": Figure(
        "without embeddings", lambda arch, _: arch.num_params() - arch.num_embedding_params(), billions
    ),
    "memory_bytes": Figure("bf16 memory", memory_bytes, in_binary),
    "kv_cache_bytes_per_token": Figure(
        "KV cache a token", lambda arch, _: arch.kv_cache_bytes_per_token(BF16), in_binary
    ),
    "flops_per_token": Figure(
        "FLOP a token", lambda arch, work: arch.flops_per_token(work.seq_length), lambda flops: f"{flops / 1e9:.3g} G"
    ),
}
