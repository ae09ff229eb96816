"""KL(student, teacher), the mode-seeking one (2407.14679, tables 15 and 16: worse than forward KL)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from minitron_nemo.losses.divergences.divergence import Pair, per_rank


@dataclass(frozen=True)
class ReverseKL:
    """sum_v p_s (log p_s - log p_t); gradient p_s (log p_s - log p_t - KL)."""

    name: ClassVar[str] = "reverse_kl"
    tempered: ClassVar[bool] = True
    knows_whole: ClassVar[bool] = False

    def statistics(self, pair: Pair) -> Tensor:
        """max s, and sum exp((s - max s) / tau) (s - t)."""
        return per_rank(pair.max_s_N, pair.exp_s().mul_(pair.s_NV - pair.t_NV).sum(dim=1))

    def merge(self, stats_TNC: Tensor, pair: Pair) -> tuple[Tensor, Tensor]:
        whole = pair.whole
        assert whole is not None
        assert whole.teacher is not None
        mean_N = pair.mean_s(stats_TNC[..., 1], stats_TNC[..., 0])
        kl_N = mean_N / pair.temperature - whole.lse_s + whole.teacher.lse_t
        return kl_N, kl_N

    def gradient(self, pair: Pair, merged: Tensor) -> Tensor:
        assert pair.whole is not None
        assert pair.whole.teacher is not None
        # In one subtraction: the ratio and the divergence may be large and nearly equal.
        bracket_NV = pair.less(pair.t_NV - pair.s_NV, pair.whole.teacher.lse_t - pair.whole.lse_s - merged)
        return bracket_NV.mul_(pair.exp_s()).mul_(pair.share_s()).neg_()
