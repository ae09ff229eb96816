"""KL(teacher, student), the papers' loss (2407.14679, tables 15 and 16). Every chunk's softmaxes have it already."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from minitron_nemo.losses.divergences.divergence import Pair
from minitron_nemo.losses.output import FORWARD_KL


@dataclass(frozen=True)
class ForwardKL:
    """sum_v p_t (log p_t - log p_s); gradient p_s - p_t. The kernels compute both without the functions below."""

    name: ClassVar[str] = FORWARD_KL
    tempered: ClassVar[bool] = True
    knows_whole: ClassVar[bool] = False

    def statistics(self, pair: Pair) -> Tensor:
        return pair.s_NV.new_empty(len(pair.s_NV), 0)

    def merge(self, stats_TNC: Tensor, pair: Pair) -> tuple[Tensor, None]:
        assert pair.whole is not None
        assert pair.whole.teacher is not None
        return pair.whole.teacher.forward_kl, None

    def gradient(self, pair: Pair, merged: None) -> Tensor:
        return pair.exp_s().mul_(pair.share_s()).sub_(pair.exp_t().mul_(pair.share_t()))
