"""The frozen teacher beside the student: its own pipeline split, its own forward-only schedule.

Only final hidden states cross from teacher to student, so a depth-pruned student, uneven stages or another split
need no special case.
"""

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from minitron_nemo.checkpoint.nemo import NemoFolder
from minitron_nemo.engine.model import Engine, build_model
from minitron_nemo.engine.schedule import Batch, forward_hidden
from minitron_nemo.engine.weights import load_weights


class Teacher:
    """A checkpoint held for forward passes only; never trained, never part of a training checkpoint."""

    def __init__(self, source: NemoFolder, engine: Engine, *, stage_layers: list[int] | None = None) -> None:
        self.source = source
        self.groups = engine.groups
        self.model = build_model(
            source.arch, dataclasses.replace(engine, stage_layers=stage_layers, recompute_activations=False)
        )
        load_weights(self.model, source, engine.groups)
        self.model.requires_grad_(False).eval()

    def hidden_states(self, batches: list[Batch]) -> Iterator[Tensor | None]:
        """Final hidden states [s, b, h] of every micro-batch on the last stage; None on the others.

        Alone on its stage the teacher runs just before each micro-batch is needed. In a pipeline it runs through all
        micro-batches at once, before this returns: its transfers must not meet the student's between two stages.
        """
        if self.groups.pp is None:
            return (forward_hidden(self.model, [batch])[0] for batch in batches)
        hidden = forward_hidden(self.model, batches)
        return iter(hidden if self.groups.is_last_stage else [None] * len(batches))

    @torch.no_grad()
    def head_weight(self) -> Tensor:
        return self.model.head_weight()
