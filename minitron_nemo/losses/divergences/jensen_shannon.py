"""Generalized Jensen-Shannon divergence: both models against their mixture (Agarwal et al. 2306.13649, equation 1)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from minitron_nemo.losses.divergences.divergence import Pair, per_rank


@dataclass(frozen=True)
class JensenShannon:
    """beta KL(p_t, m) + (1 - beta) KL(p_s, m) with m = beta p_t + (1 - beta) p_s and 0 < beta < 1.

    Gradient (1 - beta) p_s (log(p_s / m) - KL(p_s, m)). It vanishes at both ends of beta: divided by beta it tends to
    forward KL, divided by 1 - beta to reverse KL. The mixture is no sum over a part of the vocabulary until both
    normalizers are known.
    """

    beta: float = 0.5

    name: ClassVar[str] = "jensen_shannon"
    tempered: ClassVar[bool] = True
    knows_whole: ClassVar[bool] = True

    def statistics(self, pair: Pair) -> Tensor:
        """Maximum and mean over exponentials, of t with log(p_t / m) and of s with log(p_s / m)."""
        ratio_NV = pair.log_ratio()
        teacher = pair.exp_t().mul_(_log_mixture(-ratio_NV, 1 - self.beta)).sum(dim=1).neg()
        student = pair.exp_s().mul_(_log_mixture(ratio_NV, self.beta)).sum(dim=1).neg()
        return per_rank(pair.max_t_N, teacher, pair.max_s_N, student)

    def merge(self, stats_TNC: Tensor, pair: Pair) -> tuple[Tensor, Tensor]:
        teacher_N = pair.mean_t(stats_TNC[..., 1], stats_TNC[..., 0])
        student_N = pair.mean_s(stats_TNC[..., 3], stats_TNC[..., 2])
        return self.beta * teacher_N + (1 - self.beta) * student_N, student_N

    def gradient(self, pair: Pair, merged: Tensor) -> Tensor:
        bracket_NV = _log_mixture(pair.log_ratio(), self.beta).add_(merged.float()[:, None])
        return bracket_NV.mul_(pair.exp_s()).mul_(pair.share_s()).mul_(self.beta - 1)


def _log_mixture(ratio_NV: Tensor, weight: float) -> Tensor:
    """log(w exp(r) + 1 - w): exact where r is small, and finite where exp(r) is not."""
    near_NV = torch.log1p(weight * torch.expm1(ratio_NV))
    far_NV = ratio_NV + math.log(weight) + torch.log1p((1 - weight) / weight * (-ratio_NV).exp())
    return torch.where(ratio_NV <= 20.0, near_NV, far_NV)
