"""Scores drawn at random, for tests of what is done with scores."""

import torch

from minitron_nemo.importance.scores import ImportanceScores
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.shape.axes import AXES


def random_scores(arch: ModelArch, *, seed: int = 0, **given: torch.Tensor) -> ImportanceScores:
    """Scores of every axis of the registry; those `given` are taken as they are."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for name, axis in AXES.items():
        shape = (arch.num_layers, axis.size(arch)) if axis.per_layer else (axis.size(arch),)
        drawn[name] = torch.rand(shape, generator=generator, dtype=torch.float64)
    return ImportanceScores(arch=arch, by_axis=drawn | given, num_samples=16, seq_length=32,
                            sequence_aggregation="mean", batch_aggregation="l2", data_fingerprint="abc")  # fmt: skip
