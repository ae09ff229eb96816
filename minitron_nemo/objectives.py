"""What the training loop minimizes: the language-model loss, or the divergence from a frozen teacher."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from minitron_nemo.distillation.head import HeadLoss
from minitron_nemo.distillation.teacher import Teacher
from minitron_nemo.engine.model import HeadlessGPT
from minitron_nemo.engine.schedule import Batch


def _tokens(hidden_SBH: Tensor) -> Tensor:
    return hidden_SBH.reshape(-1, hidden_SBH.shape[-1])


def _in_order(x_BS: Tensor) -> Tensor:
    """[b, s] -> [s * b], the order of `_tokens`."""
    return x_BS.T.reshape(-1)


class LanguageModelObjective:
    """Cross-entropy with the next token: pre-training, teacher correction and the no-distillation baseline."""

    has_teacher = False

    def __init__(self, head: HeadLoss) -> None:
        self.head = head

    def contexts(self, batches: list[Batch]) -> Iterator[None]:
        return iter([None] * len(batches))

    def loss(self, model: HeadlessGPT, hidden_SBH: Tensor, batch: Batch, context: Any) -> tuple[Tensor, Tensor]:
        student = (_tokens(hidden_SBH), model.head_weight())
        return self.head(student, labels_N=_in_order(batch["labels"]), mask_N=_in_order(batch["loss_mask"]))


class DistillationObjective:
    """Forward KL from the teacher's distribution to the student's, mixed with cross-entropy when asked."""

    has_teacher = True

    def __init__(self, head: HeadLoss, teacher: Teacher) -> None:
        self.head = head
        self.teacher = teacher

    def contexts(self, batches: list[Batch]) -> Iterator[Tensor | None]:
        return self.teacher.hidden_states(batches)

    def loss(self, model: HeadlessGPT, hidden_SBH: Tensor, batch: Batch, context: Tensor) -> tuple[Tensor, Tensor]:
        student = (_tokens(hidden_SBH), model.head_weight())
        teacher = (_tokens(context), self.teacher.head_weight())
        return self.head(student, teacher, labels_N=_in_order(batch["labels"]), mask_N=_in_order(batch["loss_mask"]))
