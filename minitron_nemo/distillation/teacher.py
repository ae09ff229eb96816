"""The frozen teacher beside the student: its own pipeline split, its own forward-only schedule.

Only final hidden states cross from teacher to student, so a depth-pruned student, uneven stages or another split
need no special case.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from minitron_nemo.checkpoint.source import TensorSource
from minitron_nemo.engine.model import BuildOptions, build_model
from minitron_nemo.engine.schedule import Batch, forward_hidden
from minitron_nemo.engine.weights import load_weights


class Teacher:
    """A model held for forward passes only; never trained, never part of a training checkpoint."""

    def __init__(self, weights: TensorSource, options: BuildOptions) -> None:
        self.arch = weights.arch
        self.groups = options.groups
        self.model = build_model(weights.arch, options.computing_once())
        load_weights(self.model, weights, options.groups)
        self.model.requires_grad_(False).eval()

    def hidden_states(self, batches: list[Batch]) -> Iterator[Tensor | None]:
        """Final hidden states [s, b, h] of every micro-batch on the last stage; None on the others.

        Alone on its stage the teacher runs just before each micro-batch is needed. In a pipeline it runs through all of
        `batches` at once, before this returns: its transfers must not meet the student's between two stages.
        """
        if self.groups.pp is None:
            return (forward_hidden(self.model, [batch])[0] for batch in batches)
        hidden = forward_hidden(self.model, batches)
        return iter(hidden if self.groups.is_last_stage else [None] * len(batches))

    @torch.no_grad()
    def head_weight(self) -> Tensor:
        """This rank's rows of the output head, [padded vocabulary / tp, h]; last stage only."""
        return self.model.head_weight()
