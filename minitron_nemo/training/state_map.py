"""The linear map from the student's hidden states to the teacher's width, trained beside the student.

Paper 1 (2407.14679) has one for all states that are compared. It is no part of the student: every rank has a copy, as
pairs may lie on every pipeline stage, its gradient is summed over all ranks, and each takes the same step. G channels
of the teacher, H of the student.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minitron_nemo.config.schema import OptimConfig
from minitron_nemo.distributed.groups import Groups


class StateMap:
    """`weight_GH`, float32 whatever the models are, and its Adam."""

    def __init__(self, student_width: int, teacher_width: int, *, seed: int, groups: Groups) -> None:
        generator = torch.Generator().manual_seed(seed)
        drawn_GH = torch.randn(teacher_width, student_width, generator=generator) / student_width**0.5
        self.weight_GH = nn.Parameter(drawn_GH.to(groups.device))
        self.groups = groups

    def start(self, optim: OptimConfig) -> None:
        """Adam with the student's settings; like the student's matrices the map is decayed."""
        self.clip = optim.gradient_clip_val
        self.adam = torch.optim.AdamW(
            [self.weight_GH], lr=0.0, betas=(optim.betas[0], optim.betas[1]), eps=optim.eps,
            weight_decay=optim.weight_decay,
        )  # fmt: skip

    def zero_gradient(self) -> None:
        self.weight_GH.grad = None

    def step(self, *, tokens: float, learning_rate: float) -> None:
        """One step with the mean of the gradient over the tokens of the global batch. Collective, on all ranks.

        The gradient is clipped by its own norm: beside that of the student it would change how far the student moves.
        """
        layout, weight_GH = self.groups.layout, self.weight_GH
        if weight_GH.grad is None:  # no pair on this stage
            weight_GH.grad = torch.zeros_like(weight_GH)
        if layout.world_size > 1:
            dist.all_reduce(weight_GH.grad)
        # Without sequence parallelism tensor-parallel ranks compare the same states and have the same gradient.
        copies = 1 if layout.sequence_parallel else layout.tp
        weight_GH.grad /= tokens * copies
        if self.clip > 0:
            nn.utils.clip_grad_norm_([weight_GH], self.clip)
        self.adam.param_groups[0]["lr"] = learning_rate
        self.adam.step()

    def tensors(self) -> dict[str, Tensor]:
        """All that training changes, for a checkpoint."""
        return {"weight": self.weight_GH.detach(), **self.adam.state[self.weight_GH]}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `tensors`."""
        with torch.no_grad():
            self.weight_GH.copy_(tensors["weight"])
        # torch's Adam keeps its step count on the CPU, the moments beside the parameter
        self.adam.state[self.weight_GH] = {
            name: x if x.dim() == 0 else x.to(self.weight_GH.device) for name, x in tensors.items() if name != "weight"
        }
