"""Distillation from several teachers, each of which has a share in the tokens of some sources of data."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from minitron_nemo.distillation.teacher import Teacher, TeacherOutputs
from minitron_nemo.distillation.teachers_by_source import TeachersBySource
from minitron_nemo.engine.model import HeadlessGPT
from minitron_nemo.engine.schedule import Batch
from minitron_nemo.losses.lm_head import HeadLoss, TeacherHead, names_of_each
from minitron_nemo.losses.output import LossOutput
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.training.objectives import facts_of_tokens, in_order_of_tokens


class SeveralTeachersObjective:
    """As `DistillationObjective`, with the divergence from each teacher by its share in the token's source.

    What is known of a teacher, such as `forward_kl`, is the mean by these shares; each has its own KL beside it.
    `running` is the share of the micro-batches that each teacher runs through, for the count of FLOPs.
    """

    hidden_states = None  # they are compared with those of one teacher alone

    def __init__(
        self, head: HeadLoss, beside: TeachersBySource, *, running: Mapping[str, float], window: int = 0
    ) -> None:
        self.head = head
        self.beside = beside
        self.running = running
        self.window = window if beside.in_pipeline else 0
        self.sum_names = (*head.sum_names(with_teacher=True), *names_of_each(beside.teachers))

    @property
    def in_words(self) -> str:
        return f"{self.head.in_words} from {self.beside.in_words}"

    def runs_in_words(self, device: torch.device) -> str:
        return self.head.runs_in_words(device, with_teacher=True)

    def flops_per_token(self, arch: ModelArch, seq_length: int) -> float:
        return 3 * arch.flops_per_token(seq_length) + self.teacher_flops_per_token(seq_length)

    def teacher_flops_per_token(self, seq_length: int) -> float:
        return sum(
            self.running[name] * teacher.arch.flops_per_token(seq_length)
            for name, teacher in self.beside.teachers.items()
        )

    def teachers(self) -> Mapping[str, Teacher]:
        return self.beside.teachers

    def contexts(self, batches: list[Batch]) -> Iterator[dict[str, TeacherOutputs]]:
        return self.beside.outputs(batches)

    def loss(
        self, model: HeadlessGPT, hidden_SBH: Tensor, batch: Batch, context: Mapping[str, TeacherOutputs]
    ) -> LossOutput:
        facts = facts_of_tokens(batch, self.head)
        heads = {}
        for name, said in context.items():
            assert said.final is not None
            teacher_NH, weight_VH = in_order_of_tokens(said.final), self.beside.teachers[name].head_weight()
            heads[name] = TeacherHead(teacher_NH, weight_VH, self.beside.share_of(name, batch))
        output = self.head.of_several((in_order_of_tokens(hidden_SBH), model.head_weight()), heads, **facts)
        nothing = torch.zeros_like(output.sums[self.sum_names[0]])
        return LossOutput(output.total, {name: output.sums.get(name, nothing) for name in self.sum_names})
