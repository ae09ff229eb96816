"""Mean squared difference of logits (2407.14679, table 15 tried it: worse than forward KL)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from minitron_nemo.losses.divergences.divergence import Pair, per_rank


@dataclass(frozen=True)
class LogitMSE:
    """mean_v (d - mean d)^2 with d = s - t, over the vocabulary; gradient 2 (d - mean d) / vocabulary.

    Centred: a number added to all logits of a token changes no distribution, so it costs nothing. No temperature.
    """

    name: ClassVar[str] = "logit_mse"
    tempered: ClassVar[bool] = False
    knows_whole: ClassVar[bool] = False

    def statistics(self, pair: Pair) -> Tensor:
        """How many rows, the mean of d over them, and the sum of squares around it."""
        d_NV = (pair.s_NV - pair.t_NV)[:, : pair.valid]
        mean_N = d_NV.sum(dim=1) / max(1, pair.valid)
        count_N = torch.full_like(mean_N, pair.valid)
        return per_rank(count_N, mean_N, (d_NV - mean_N[:, None]).square_().sum(dim=1))

    def merge(self, stats_TNC: Tensor, pair: Pair) -> tuple[Tensor, Tensor]:
        count, mean, squares = stats_TNC.double().unbind(dim=2)
        mean_N = (count * mean).sum(dim=0) / pair.vocab_size
        squares_N = (squares + count * (mean - mean_N).square()).sum(dim=0)
        return squares_N / pair.vocab_size, mean_N

    def gradient(self, pair: Pair, merged: Tensor) -> Tensor:
        return (pair.s_NV - pair.t_NV).sub_(merged.float()[:, None]).mul_(2 / pair.vocab_size)
