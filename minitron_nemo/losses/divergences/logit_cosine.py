"""One minus the cosine between both vectors of logits (2407.14679, table 15 tried it: worse than forward KL)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from minitron_nemo.losses.divergences.divergence import Pair, per_rank


@dataclass(frozen=True)
class LogitCosine:
    """1 - <s, t> / (|s| |t|) of logits less their mean; gradient (cosine s / |s| - t / |t|) / |s|.

    Centred: a number added to all logits of a token changes no distribution, so it costs nothing. Logits that are all
    equal have no direction: the cosine is 0 there, without a gradient. No temperature.
    """

    name: ClassVar[str] = "logit_cosine"
    tempered: ClassVar[bool] = False
    knows_whole: ClassVar[bool] = False

    def statistics(self, pair: Pair) -> Tensor:
        """How many rows, both means over them, and the sums of both squares and of the product around these."""
        s_NV, t_NV = pair.s_NV[:, : pair.valid], pair.t_NV[:, : pair.valid]
        mean_s, mean_t = (x_NV.sum(dim=1) / max(1, pair.valid) for x_NV in (s_NV, t_NV))
        s_NV, t_NV = s_NV - mean_s[:, None], t_NV - mean_t[:, None]
        sums = [(a_NV * b_NV).sum(dim=1) for a_NV, b_NV in ((s_NV, s_NV), (t_NV, t_NV), (s_NV, t_NV))]
        return per_rank(torch.full_like(mean_s, pair.valid), mean_s, mean_t, *sums)

    def merge(self, stats_TNC: Tensor, pair: Pair) -> tuple[Tensor, tuple[Tensor, ...]]:
        count, mean_s, mean_t, squares_s, squares_t, products = stats_TNC.double().unbind(dim=2)
        whole_s, whole_t = ((count * mean).sum(dim=0) / pair.vocab_size for mean in (mean_s, mean_t))
        off_s, off_t = mean_s - whole_s, mean_t - whole_t
        norm_s = (squares_s + count * off_s.square()).sum(dim=0).sqrt()
        norm_t = (squares_t + count * off_t.square()).sum(dim=0).sqrt()
        product = (products + count * off_s * off_t).sum(dim=0)
        length = norm_s * norm_t
        inverse = torch.where(length > 0, 1 / length, torch.zeros_like(length))
        cosine = product * inverse
        along = torch.where(length > 0, cosine / norm_s.square(), torch.zeros_like(length))
        return 1 - cosine, (whole_s, whole_t, along, inverse)

    def gradient(self, pair: Pair, merged: tuple[Tensor, ...]) -> Tensor:
        mean_s, mean_t, along, inverse = (column.float()[:, None] for column in merged)
        return (pair.s_NV - mean_s).mul_(along).sub_((pair.t_NV - mean_t).mul_(inverse))
