"""A student's hidden states compared with a teacher's, token by token, behind the norm.

S sequence (this rank's part of it), B batch, H channels of the student, G channels of the teacher.

    x, t = norm(student), norm(teacher)            without weight and bias of the norm
    y    = map x                                   x itself where the models are equally wide
    cosine of a token = 1 - y.t / (|y| |t|)
    mse of a token    = mean over channels of (y - t)^2

Source: Minitron 2407.14679, retraining with intermediate states: states behind the norm, one linear map shared by all
of them up to the teacher's width; of the losses tried there cosine was best.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

COSINE, MSE = "cosine", "mse"


@dataclass(frozen=True)
class StateNorm:
    """A model's norm without its weight and bias: by the mean square, or `centred` by the variance."""

    centred: bool
    epsilon: float

    def __call__(self, x_SBH: Tensor) -> Tensor:
        """[s, b, h], normalized over h, at least in float32."""
        x_SBH = x_SBH.to(torch.promote_types(x_SBH.dtype, torch.float32))
        norm = functional.layer_norm if self.centred else functional.rms_norm
        return norm(x_SBH, (x_SBH.shape[-1],), eps=self.epsilon)


@dataclass(frozen=True)
class HiddenStateLoss:
    """How states are compared: `cosine` or `mse`, behind the norms of both models."""

    divergence: str
    student_norm: StateNorm
    teacher_norm: StateNorm

    def __call__(
        self, student_SBH: Tensor, teacher_SBG: Tensor, *, mask_SB: Tensor, map_GH: Tensor | None = None
    ) -> Tensor:
        """The sum over unmasked tokens, a scalar of at least float32, differentiable in student and map.

        Kept for the backward pass are the arguments alone: what follows from them is computed again there.
        """
        total: Tensor = checkpoint(
            self._sum, student_SBH, teacher_SBG, mask_SB, map_GH, use_reentrant=False, preserve_rng_state=False
        )
        return total

    def _sum(self, student_SBH: Tensor, teacher_SBG: Tensor, mask_SB: Tensor, map_GH: Tensor | None) -> Tensor:
        y_SBG, t_SBG = self.student_norm(student_SBH), self.teacher_norm(teacher_SBG)
        if map_GH is not None:  # in the dtype of the model, as its own products are
            dtype = student_SBH.dtype
            y_SBG = functional.linear(y_SBG.to(dtype), map_GH.to(dtype)).to(t_SBG.dtype)
        if self.divergence == COSINE:
            by_token_SB = 1 - functional.cosine_similarity(y_SBG, t_SBG, dim=-1)
        else:
            by_token_SB = (y_SBG - t_SBG).square().mean(dim=-1)
        return (by_token_SB * mask_SB).sum()
