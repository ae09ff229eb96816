"""For tests, ours and yours: tiny models of every family, checkpoints of random weights, and code on gloo ranks."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.checkpoint.formats.nemo import NemoFolder, open_nemo, write_nemo
from minitron_nemo.checkpoint.random_init import RandomWeights
from minitron_nemo.checkpoint.source import stream
from minitron_nemo.distributed.launch import run_on_ranks
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.distributed.ranks import Rank
from minitron_nemo.shape.arch import ModelArch, RopeScaling

# A vocabulary of 131 needs padding under tensor parallelism; heads x channels differs from hidden on purpose.
LLAMA = ModelArch(
    num_layers=4, hidden_size=48, ffn_hidden_size=80, num_attention_heads=8, num_query_groups=4, kv_channels=8,
    vocab_size=131, seq_length=128, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32),
)  # fmt: skip
MISTRAL = dataclasses.replace(LLAMA, family="mistral", rope_scaling=None, share_embeddings_and_output_weights=True)
NEMOTRON = dataclasses.replace(
    LLAMA, family="nemotron", activation="squared_relu", normalization="LayerNorm1p", rotary_percent=0.5,
    rope_scaling=None,
)  # fmt: skip
QWEN2 = dataclasses.replace(LLAMA, family="qwen2", rope_scaling=None, add_qkv_bias=True)
QWEN3 = dataclasses.replace(LLAMA, family="qwen3", rope_scaling=None, qk_layernorm=True)
TINY = {"llama": LLAMA, "mistral": MISTRAL, "nemotron": NEMOTRON, "qwen2": QWEN2, "qwen3": QWEN3}

# What layout tests compare with one rank.
LAYOUTS = {
    "tp2": Layout(tp=2),
    "tp2_sp": Layout(tp=2, sequence_parallel=True),
    "pp2": Layout(pp=2),
    "dp2": Layout(dp=2),
    "tp2_pp2": Layout(tp=2, pp=2, sequence_parallel=True),
}
ALONE = Layout()


def random_nemo(path: Path, arch: ModelArch, *, seed: int = 0, scale: float = 3.0) -> NemoFolder:
    """A model artefact of random weights without a tokenizer; `scale` makes logits differ enough to test with."""

    def shaken(drawn: Tensor) -> Tensor:
        return drawn * scale if drawn.dim() > 1 else drawn + 0.1 * torch.randn(drawn.shape, generator=_generator(seed))

    tensors = ((name, shaken(drawn)) for name, drawn in stream(RandomWeights(arch, seed=seed)))
    write_nemo(path, arch, tensors, dtype=torch.float32, tokenizer=None, origin=Origin(f"random {seed}"))
    return open_nemo(path)


def random_batch(arch: ModelArch, *, samples: int, seq_length: int = 16, seed: int = 0) -> dict[str, Tensor]:
    """Tokens, labels and a loss mask with holes, [samples, seq_length]."""
    ids = torch.randint(0, arch.vocab_size, (samples, seq_length + 1), generator=_generator(seed))
    mask = (torch.rand(samples, seq_length, generator=_generator(seed + 1)) > 0.2).float()
    return {"tokens": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous(), "loss_mask": mask}


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run_layout(body: Callable[..., Any], layout: Layout, *arguments: Any) -> Any:
    """Rank 0's result of `body(groups, *arguments)` on CPU ranks in the layout; `body` must be importable."""
    return run_on_ranks(_in_layout, body, layout, arguments, num_ranks=layout.world_size)


def _in_layout(rank: Rank, body: Callable[..., Any], layout: Layout, arguments: tuple) -> Any:
    from minitron_nemo.engine.groups import form_groups

    return body(form_groups(rank, layout), *arguments)
