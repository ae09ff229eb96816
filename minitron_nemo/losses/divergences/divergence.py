"""What a divergence is: three functions of both models' logits, whose vocabulary may be spread over ranks.

N tokens of a chunk, V vocabulary rows on this rank, T tensor-parallel ranks, C columns of a divergence.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from minitron_nemo.losses.softmaxes import Softmaxes


@dataclass(frozen=True)
class Pair:
    """This rank's part of a chunk. Rows past `valid` pad the vocabulary: their logits are NEVER in both.

    `s_NV`, `t_NV`: float32 logits of student and teacher; `max_s_N`, `max_t_N`: this rank's largest. No temperature
    divides them yet, so that differences are taken first: they are what rounding must not touch. `whole`: both
    softmaxes over the whole vocabulary; None until the ranks have met.
    """

    s_NV: Tensor
    t_NV: Tensor
    max_s_N: Tensor
    max_t_N: Tensor
    valid: int
    vocab_size: int
    rank: int
    temperature: float
    whole: Softmaxes | None = None

    def exp_s(self) -> Tensor:
        """exp((s - largest s of this rank) / tau) [N, V]; `share_s` makes it the student's probabilities."""
        return (self.s_NV - self.max_s_N[:, None]).div_(self.temperature).exp_()

    def exp_t(self) -> Tensor:
        return (self.t_NV - self.max_t_N[:, None]).div_(self.temperature).exp_()

    def share_s(self) -> Tensor:
        """[N, 1]: a probability of the student is this times its exponential."""
        assert self.whole is not None
        return (self.max_s_N.double() / self.temperature - self.whole.lse_s).exp().float()[:, None]

    def share_t(self) -> Tensor:
        assert self.whole is not None
        assert self.whole.teacher is not None
        return (self.max_t_N.double() / self.temperature - self.whole.teacher.lse_t).exp().float()[:, None]

    def log_ratio(self) -> Tensor:
        """log p_t - log p_s [N, V]."""
        assert self.whole is not None
        assert self.whole.teacher is not None
        return self.less(self.t_NV - self.s_NV, self.whole.teacher.lse_t - self.whole.lse_s)

    def less(self, x_NV: Tensor, y_N: Tensor) -> Tensor:
        """x / tau - y [N, V] for a float64 column, which is taken away in two parts: of logits in thousands one
        float32 would leave too little.
        """
        y_N = y_N * self.temperature
        coarse_N = y_N.float()
        near_NV = (x_NV - coarse_N[:, None]).sub_((y_N - coarse_N.double()).float()[:, None])
        return near_NV.div_(self.temperature)

    def mean_s(self, stats_TN: Tensor, max_TN: Tensor) -> Tensor:
        """Over the student's probabilities [N] in float64, of sums of its exponentials with each rank's own maximum."""
        assert self.whole is not None
        return (stats_TN.double() * (max_TN.double() / self.temperature - self.whole.lse_s).exp()).sum(dim=0)

    def mean_t(self, stats_TN: Tensor, max_TN: Tensor) -> Tensor:
        assert self.whole is not None
        assert self.whole.teacher is not None
        return (stats_TN.double() * (max_TN.double() / self.temperature - self.whole.teacher.lse_t).exp()).sum(dim=0)


class Divergence(Protocol):
    """A distance of a student's token from its teacher's. A frozen dataclass whose fields are its settings.

    `name`: what the log calls its mean. `tempered`: it is one between the softmaxes at the temperature, and is
    multiplied by the temperature squared (Hinton et al. 1503.02531), which keeps the size of its gradient.
    `knows_whole`: its statistics need `Pair.whole`, so they travel with those of the next chunk.
    """

    @property
    def name(self) -> str: ...

    @property
    def tempered(self) -> bool: ...

    @property
    def knows_whole(self) -> bool: ...

    def statistics(self, pair: Pair) -> Tensor:
        """[N, C], as many columns on each rank: what the ranks must know of this one's part. Changes no logits."""

    def merge(self, stats_TNC: Tensor, pair: Pair) -> tuple[Tensor, Any]:
        """(the divergence of each token [N] in float64, what `gradient` needs); the same bits on every rank."""

    def gradient(self, pair: Pair, merged: Any) -> Tensor:
        """Of the divergence, with respect to `s_NV` / tau [N, V]; finite, and of no consequence, at padding rows."""


def per_rank(*columns: Tensor) -> Tensor:
    """[N, C] float32 of columns [N]."""
    return torch.stack([column.float() for column in columns], dim=1)
