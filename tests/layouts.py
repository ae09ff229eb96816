"""What the layout tests share: code that runs on ranks, and its answers brought back to rank 0.

Run through `minitron_nemo.testing.run_layout`, whose ranks import this module by name.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.checkpoint.formats.nemo import NemoFolder, open_nemo
from minitron_nemo.checkpoint.source import stream
from minitron_nemo.distributed.groups import Groups
from minitron_nemo.engine.model import BuildOptions, ModelChunks, build_model
from minitron_nemo.engine.schedule import forward_hidden
from minitron_nemo.engine.weights import load_weights
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.testing import random_batch, random_nemo
from minitron_nemo.training.checkpoints import save_model

ORIGIN = Origin("test")


def load_model(path: str | Path, groups: Groups, *, stage_layers: list[int] | None = None) -> ModelChunks:
    """This rank's part of a checkpoint."""
    source = open_nemo(path)
    model = build_model(source.arch, BuildOptions(groups=groups, stage_layers=stage_layers))
    load_weights(model, source.weights, groups)
    return model


def random_models(folder: Path, archs: Mapping[str, ModelArch]) -> dict[str, Path]:
    """A model of random weights for each shape, no two alike."""
    return {
        name: random_nemo(folder / f"{name}.nemo", arch, seed=n).path for n, (name, arch) in enumerate(archs.items())
    }


@torch.no_grad()
def whole_logits(model: ModelChunks, tokens_BS: Tensor, *, vocab_size: int, groups: Groups, **batch: Tensor) -> Tensor:
    """[b, s, vocabulary] on every rank: the vocabulary gathered, its padding trimmed, sent from the last stage."""
    hidden = forward_hidden(model, [{"tokens": tokens_BS, **batch}])
    logits_BSV = torch.empty(*tokens_BS.shape, vocab_size)
    if groups.is_last_stage:
        local_SBV = hidden[0] @ model.head_weight().T
        parts = [local_SBV]
        if groups.tp is not None:
            parts = [torch.empty_like(local_SBV) for _ in range(groups.layout.tp)]
            dist.all_gather(parts, local_SBV.contiguous(), group=groups.tp)
        logits_BSV = torch.cat(parts, dim=-1)[..., :vocab_size].transpose(0, 1).contiguous()
    if groups.pp is not None:
        dist.broadcast(logits_BSV, src=groups.last_stage_rank, group=groups.pp)
    return logits_BSV


def logits_and_copies(groups: Groups, jobs: list[tuple[Path, Path, Tensor, list[int] | None]]) -> list[np.ndarray]:
    """For every (model, copy, tokens, stage layers): the logits; and the untrained model saved as `copy`.

    Arrays, because a tensor that crosses processes lives in memory of a rank that may be gone before it is opened.
    """
    answers = []
    for path, copy, tokens, stages in jobs:
        source = open_nemo(path)
        model = load_model(path, groups, stage_layers=stages)
        answers.append(whole_logits(model, tokens, vocab_size=source.arch.vocab_size, groups=groups).numpy())
        save_model(copy, model, source.arch, groups, tokenizer=source.tokenizer, tokens=0, origin=ORIGIN)
    return answers


def logits_of(groups: Groups, paths: list[Path], tokens_BS: Tensor) -> list[np.ndarray]:
    """The logits of every checkpoint."""
    answers = []
    for path in paths:
        vocab_size = open_nemo(path).arch.vocab_size
        answers.append(whole_logits(load_model(path, groups), tokens_BS, vocab_size=vocab_size, groups=groups).numpy())
    return answers


def assert_same_weights(ours: NemoFolder, theirs: NemoFolder) -> None:
    """Every logical tensor equal bit for bit."""
    assert ours.arch == theirs.arch
    assert ours.dtype == theirs.dtype
    for name, tensor in stream(theirs.weights):
        assert torch.equal(ours.weights.read(name), tensor), name


def weights_of(path: str | Path) -> dict[str, Tensor]:
    """Every logical tensor of a checkpoint by name."""
    return dict(stream(open_nemo(path).weights))


def samples(arch: ModelArch, *, first: int, count: int, seq_length: int) -> dict[str, Tensor]:
    """Samples `first`..: each decided by its own number alone, as the training data are."""
    drawn = [random_batch(arch, samples=1, seq_length=seq_length, seed=1000 + n) for n in range(first, first + count)]
    return {name: torch.cat([sample[name] for sample in drawn]) for name in drawn[0]}


def share_of_batch(
    arch: ModelArch, *, step: int, size: int, seq_length: int, groups: Groups
) -> list[dict[str, Tensor]]:
    """This data-parallel rank's micro-batches, of one sample each, of global batch `step` of `size` samples."""
    share = size // groups.layout.dp
    start = step * size + groups.dp_rank * share
    return [samples(arch, first=n, count=1, seq_length=seq_length) for n in range(start, start + share)]
