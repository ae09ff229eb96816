"""What training minimizes and evaluation measures: the language-model loss, or the distance to a frozen teacher."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from minitron_nemo.distillation.teacher import Teacher
from minitron_nemo.distributed.groups import Groups
from minitron_nemo.engine.model import HeadlessGPT, ModelChunks
from minitron_nemo.engine.schedule import Batch, run_schedule
from minitron_nemo.losses.lm_head import HeadLoss
from minitron_nemo.losses.output import CROSS_ENTROPY, TOKENS, LossOutput
from minitron_nemo.shape.arch import ModelArch


class Objective(Protocol):
    """Prepares a context for every micro-batch, then turns hidden states into a loss."""

    @property
    def sum_names(self) -> tuple[str, ...]:
        """The names of the sums in every `LossOutput` of it."""

    @property
    def window(self) -> int:
        """Micro-batches whose contexts are made, and wait, at a time; 0: all of a call."""

    @property
    def in_words(self) -> str:
        """What is minimized; a resumed run must minimize the same."""

    def runs_in_words(self, device: torch.device) -> str:
        """What computes the loss on this device, for the log."""

    def flops_per_token(self, arch: ModelArch, seq_length: int) -> float:
        """FLOPs of a training step on a token of a model of this shape, the teacher's included."""

    def contexts(self, batches: list[Batch]) -> Iterator[Any]:
        """One context for each micro-batch, in order; the teacher's hidden states in distillation.

        Not a generator function: what it sends between pipeline stages must be sent before the schedule starts.
        """

    def loss(self, model: HeadlessGPT, hidden_SBH: Tensor, batch: Batch, context: Any) -> LossOutput:
        """The loss of a micro-batch; last stage only."""


class LanguageModelObjective:
    """Cross-entropy with the next token: pre-training, teacher correction and the no-distillation baseline."""

    window = 0  # its contexts are nothing

    def __init__(self, head: HeadLoss) -> None:
        self.head = head
        self.sum_names = head.sum_names(with_teacher=False)

    @property
    def in_words(self) -> str:
        return CROSS_ENTROPY

    def runs_in_words(self, device: torch.device) -> str:
        return self.head.runs_in_words(device, with_teacher=False)

    def flops_per_token(self, arch: ModelArch, seq_length: int) -> float:
        return 3 * arch.flops_per_token(seq_length)

    def contexts(self, batches: list[Batch]) -> Iterator[None]:
        return iter([None] * len(batches))

    def loss(self, model: HeadlessGPT, hidden_SBH: Tensor, batch: Batch, context: Any) -> LossOutput:
        student = (_tokens(hidden_SBH), model.head_weight())
        return self.head(student, labels_N=_in_order(batch["labels"]), mask_N=_in_order(batch["loss_mask"]))


class DistillationObjective:
    """The student's divergence from the teacher, forward KL where none is named, mixed with cross-entropy when asked.

    `window` bounds how many micro-batches' teacher states wait on the last stage of a pipeline (0: all); without a
    pipeline the teacher runs just before each micro-batch.
    """

    def __init__(self, head: HeadLoss, teacher: Teacher, *, window: int = 0) -> None:
        self.head = head
        self.teacher = teacher
        self.window = window if teacher.groups.pp is not None else 0
        self.sum_names = head.sum_names(with_teacher=True)

    @property
    def in_words(self) -> str:
        return self.head.in_words

    def runs_in_words(self, device: torch.device) -> str:
        return self.head.runs_in_words(device, with_teacher=True)

    def flops_per_token(self, arch: ModelArch, seq_length: int) -> float:
        return 3 * arch.flops_per_token(seq_length) + self.teacher.arch.flops_per_token(seq_length)

    def contexts(self, batches: list[Batch]) -> Iterator[Tensor | None]:
        return self.teacher.hidden_states(batches)

    def loss(self, model: HeadlessGPT, hidden_SBH: Tensor, batch: Batch, context: Tensor) -> LossOutput:
        student = (_tokens(hidden_SBH), model.head_weight())
        teacher = (_tokens(context), self.teacher.head_weight())
        return self.head(student, teacher, labels_N=_in_order(batch["labels"]), mask_N=_in_order(batch["loss_mask"]))


def _tokens(hidden_SBH: Tensor) -> Tensor:
    return hidden_SBH.reshape(-1, hidden_SBH.shape[-1])


def _in_order(x_BS: Tensor) -> Tensor:
    """[b, s] -> [s * b], the order of `_tokens`."""
    return x_BS.T.reshape(-1)


def batch_sums(
    model: ModelChunks, batches: list[Batch], objective: Objective, *, groups: Groups, train: bool
) -> dict[str, float]:
    """The objective's sums over a whole global batch, known on every rank; gradients accumulate when `train`.

    `batches` are this data-parallel rank's micro-batches of it.
    """
    sums = run_schedule(
        model, batches, contexts=objective.contexts, loss=objective.loss, train=train, window=objective.window
    )
    return groups.sum_over_batch(sums, objective.sum_names)


def means(sums: Mapping[str, float]) -> dict[str, float]:
    """Sums over tokens, divided by the tokens, under the same names."""
    return {name: value / sums[TOKENS] for name, value in sums.items() if name != TOKENS}
