"""What training minimizes and evaluation measures: the language-model loss, or the distance to a frozen teacher."""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any, Protocol, TypedDict

import torch
from torch import Tensor

from minitron_nemo.distillation.teacher import Teacher, TeacherOutputs
from minitron_nemo.distributed.groups import Groups
from minitron_nemo.engine.model import HeadlessGPT, ModelChunks
from minitron_nemo.engine.schedule import Batch, nothing_around, run_schedule
from minitron_nemo.losses.lm_head import HeadLoss
from minitron_nemo.losses.output import CROSS_ENTROPY, TOKENS, LossOutput, bin_of, of_bin
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.training.hidden_states import HiddenStates


class Objective(Protocol):
    """Prepares a context for every micro-batch, then turns hidden states into a loss."""

    @property
    def sum_names(self) -> tuple[str, ...]:
        """The names of the sums in every `LossOutput` of it."""

    @property
    def hidden_states(self) -> HiddenStates | None:
        """What is minimized inside of the model, on all of its stages, and trained beside it; mostly nothing."""

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

    def teacher_flops_per_token(self, seq_length: int) -> float:
        """Those of the teacher, or of several as often as they run; 0 without one."""

    def teachers(self) -> Mapping[str, Teacher]:
        """The frozen models that it has, by name; the name of one alone is empty."""

    def contexts(self, batches: list[Batch]) -> Iterator[Any]:
        """One context for each micro-batch, in order; what the teacher says of it in distillation.

        Not a generator function: what it sends between pipeline stages must be sent before the schedule starts.
        """

    def loss(self, model: HeadlessGPT, hidden_SBH: Tensor, batch: Batch, context: Any) -> LossOutput:
        """The loss of a micro-batch; last stage only."""


class LanguageModelObjective:
    """Cross-entropy with the next token: pre-training, teacher correction and the no-distillation baseline."""

    window = 0  # its contexts are nothing
    hidden_states = None

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

    def teacher_flops_per_token(self, seq_length: int) -> float:
        return 0.0

    def teachers(self) -> Mapping[str, Teacher]:
        return {}

    def contexts(self, batches: list[Batch]) -> Iterator[None]:
        return iter([None] * len(batches))

    def loss(self, model: HeadlessGPT, hidden_SBH: Tensor, batch: Batch, context: Any) -> LossOutput:
        student = (in_order_of_tokens(hidden_SBH), model.head_weight())
        return self.head(student, **facts_of_tokens(batch, self.head))


class DistillationObjective:
    """The student's divergence from the teacher, forward KL where none is named, mixed with cross-entropy when asked.

    `window` bounds how many micro-batches' teacher states wait in a pipeline (0: all); without a pipeline the teacher
    runs just before each micro-batch. `hidden_states` are compared beside the logits.
    """

    def __init__(
        self, head: HeadLoss, teacher: Teacher, *, window: int = 0, hidden_states: HiddenStates | None = None
    ) -> None:
        self.head = head
        self.teacher = teacher
        self.window = window if teacher.groups.pp is not None else 0
        self.hidden_states = hidden_states
        self.sum_names = head.sum_names(with_teacher=True)
        if hidden_states is not None:
            self.sum_names += hidden_states.sum_names

    @property
    def in_words(self) -> str:
        hidden = self.hidden_states
        return self.head.in_words if hidden is None else f"{self.head.in_words} + {hidden.in_words}"

    def runs_in_words(self, device: torch.device) -> str:
        return self.head.runs_in_words(device, with_teacher=True)

    def flops_per_token(self, arch: ModelArch, seq_length: int) -> float:
        inside = 0.0 if self.hidden_states is None else self.hidden_states.flops_per_token(arch, self.teacher.arch)
        return 3 * arch.flops_per_token(seq_length) + self.teacher_flops_per_token(seq_length) + inside

    def teacher_flops_per_token(self, seq_length: int) -> float:
        return self.teacher.arch.flops_per_token(seq_length)

    def teachers(self) -> Mapping[str, Teacher]:
        return {"": self.teacher}

    def contexts(self, batches: list[Batch]) -> Iterator[TeacherOutputs]:
        return self.teacher.outputs(batches, () if self.hidden_states is None else self.hidden_states.routes)

    def loss(self, model: HeadlessGPT, hidden_SBH: Tensor, batch: Batch, context: TeacherOutputs) -> LossOutput:
        assert context.final is not None
        student = (in_order_of_tokens(hidden_SBH), model.head_weight())
        teacher = (in_order_of_tokens(context.final), self.teacher.head_weight())
        return self.head(student, teacher, **facts_of_tokens(batch, self.head))


def in_order_of_tokens(hidden_SBH: Tensor) -> Tensor:
    """[s, b, h] -> [s * b, h]"""
    return hidden_SBH.reshape(-1, hidden_SBH.shape[-1])


class TokenFacts(TypedDict):
    """What the head's loss is told of the tokens of a micro-batch, in the order [s * b]."""

    labels_N: Tensor
    mask_N: Tensor
    bins_KN: Tensor | None


def facts_of_tokens(batch: Batch, head: HeadLoss) -> TokenFacts:
    """Of a micro-batch as a loss is given it, which is this context-parallel rank's part."""
    bins_KN = None if head.tallies is None else head.tallies.sort(batch["positions"], batch["sources"])
    labels_N, mask_N = (batch[name].T.reshape(-1) for name in ("labels", "loss_mask"))
    return TokenFacts(labels_N=labels_N, mask_N=mask_N, bins_KN=bins_KN)


def micro_batch_sums(
    model: ModelChunks, batches: list[Batch], objective: Objective, *, train: bool
) -> list[dict[str, Tensor]]:
    """The objective's sums of each of this data-parallel rank's micro-batches, on the last stage; [] on the others.

    Gradients accumulate when `train`.
    """
    hidden = objective.hidden_states
    with nullcontext() if hidden is None else hidden.inside(model, train=train):
        return run_schedule(
            model,
            batches,
            contexts=objective.contexts,
            loss=objective.loss,
            train=train,
            window=objective.window,
            around=nothing_around if hidden is None else hidden.around,
        )


def batch_sums(
    model: ModelChunks, batches: list[Batch], objective: Objective, *, groups: Groups, train: bool
) -> dict[str, float]:
    """The objective's sums over a whole global batch, known on every rank; gradients accumulate when `train`.

    `batches` are this data-parallel rank's micro-batches of it.
    """
    by_micro_batch = micro_batch_sums(model, batches, objective, train=train)
    return over_batch(by_micro_batch, objective, groups=groups, train=train)


def over_batch(
    by_micro_batch: list[dict[str, Tensor]], objective: Objective, *, groups: Groups, train: bool
) -> dict[str, float]:
    """The objective's sums over a whole global batch from those of its micro-batches, known on every rank."""
    hidden = objective.hidden_states
    if hidden is None:
        return groups.sum_over_batch(by_micro_batch, objective.sum_names)
    own = [*by_micro_batch, hidden.own_sums()]
    return hidden.with_loss(groups.sum_over_batch(own, objective.sum_names), train=train)


def means(sums: Mapping[str, float]) -> dict[str, float]:
    """Sums over tokens, divided by the tokens that they are over, under the same names; none for a bin without any."""
    found = {}
    for name, value in sums.items():
        quantity, inside = bin_of(name)
        tokens = sums[of_bin(TOKENS, inside) if inside else TOKENS]
        if quantity != TOKENS and (tokens or not inside):
            found[name] = value / tokens
    return found
