"""What every loss needs of a token's two softmaxes, merged over the ranks that share the vocabulary.

N tokens of a chunk, V vocabulary rows on this rank, T tensor-parallel ranks.

A rank sums up its part in the columns below, with its own largest logit as the origin of the exponentials; `tau` is the
temperature, s and t are logits of student and teacher that it does not divide yet:

    max_s     max s                         max_t       max t
    sum_s     sum exp((s - max_s) / tau)    sum_t       sum exp((t - max_t) / tau)
    sum_1     sum exp(s - max_s)            difference  sum exp((t - max_t) / tau) (t - s) / tau
    label     s at the label, or NEVER      energy      sum exp((t - max_t) / tau) (t - max_t) / tau
    best_s    which row has max_s           best_t      which row has max_t
"""

from dataclasses import dataclass

import torch
from torch import Tensor

NEVER = -1e30  # logit of a padding row: its probability is zero and its difference to another such row too
STUDENT_COLUMNS = 5
COLUMNS = 10


@dataclass(frozen=True)
class Teacher:
    """What a chunk knows of its teacher, [N] each in float64; `max_t` is this rank's, the rest whole."""

    max_t: Tensor
    lse_t: Tensor  # of the logits divided by the temperature, as lse_s
    forward_kl: Tensor
    entropy: Tensor
    agree: Tensor


@dataclass(frozen=True)
class Softmaxes:
    """Whole-vocabulary values of a chunk's tokens, [N] each in float64; `max_s` is this rank's largest logit."""

    max_s: Tensor
    lse: Tensor  # at temperature 1
    lse_s: Tensor
    cross_entropy: Tensor
    teacher: Teacher | None


def merge(stats_TNC: Tensor, *, rank: int, temperature: float) -> Softmaxes:
    """Every rank's columns as whole-vocabulary values, combined in rank order: every rank gets the same bits.

    In float64: a divergence is the small difference of large logarithms, and the loss multiplies it by tau squared.
    """
    tau = temperature
    max_s, sum_s, sum_1, label, best_s = stats_TNC[..., :STUDENT_COLUMNS].double().unbind(dim=2)
    top_s, holder_s = max_s.max(dim=0)
    lse = (sum_1 * (max_s - top_s).exp()).sum(dim=0).log() + top_s
    lse_s = (sum_s * ((max_s - top_s) / tau).exp()).sum(dim=0).log() + top_s / tau
    teacher = None
    if stats_TNC.shape[2] > STUDENT_COLUMNS:
        max_t, sum_t, difference, energy, best_t = stats_TNC[..., STUDENT_COLUMNS:].double().unbind(dim=2)
        top_t, holder_t = max_t.max(dim=0)
        scale = ((max_t - top_t) / tau).exp()
        total_t = (sum_t * scale).sum(dim=0)
        lse_t = total_t.log() + top_t / tau
        mean_t = (scale * (energy + sum_t * (max_t - top_t) / tau)).sum(dim=0) / total_t
        agree = best_s.gather(0, holder_s[None]) == best_t.gather(0, holder_t[None])
        teacher = Teacher(
            max_t=max_t[rank],
            lse_t=lse_t,
            forward_kl=(difference * scale).sum(dim=0) / total_t - lse_t + lse_s,
            entropy=total_t.log() - mean_t,
            agree=agree[0].double(),
        )
    return Softmaxes(max_s[rank], lse, lse_s, lse - label.max(dim=0).values, teacher)


@dataclass(frozen=True)
class Labels:
    """Where the labels of a chunk are among this rank's rows."""

    row_N: Tensor  # some row where another rank has the label
    here_N: Tensor

    @classmethod
    def on_rank(cls, labels_N: Tensor, *, first_row: int, rows: int) -> "Labels":
        local_N = labels_N - first_row
        return cls(local_N.clamp(0, rows - 1), (local_N >= 0) & (local_N < rows))

    def of(self, x_NV: Tensor) -> Tensor:
        """The value at the label [N], NEVER where another rank has it."""
        at_label_N = x_NV.gather(1, self.row_N[:, None])[:, 0].float()
        return torch.where(self.here_N, at_label_N, torch.full_like(at_label_N, NEVER))

    def subtract_(self, grad_NV: Tensor, weight_N: Tensor) -> None:
        """Subtract a weight [N] at the label, in place.

        One place in every row, also where another rank has the label: which rows those are is not known to the host,
        and asking would make it wait for the device.
        """
        at_label_N1 = grad_NV.gather(1, self.row_N[:, None])
        weight_N = torch.where(self.here_N, weight_N, torch.zeros_like(weight_N))
        grad_NV.scatter_(1, self.row_N[:, None], at_label_N1 - weight_N[:, None])


@dataclass(frozen=True)
class Factors:
    """The gradient of forward KL and cross-entropy is linear in the exponentials. With one-hot labels e,

        factor_s exp((s - max_s) / tau) - factor_t exp((t - max_t) / tau) + factor_1 exp(s - max_s) - weight_1 e

    weights, mask and normalization being part of the factors: [N] each in float64; None leaves the term out.
    """

    max_s: Tensor
    max_t: Tensor | None
    factor_s: Tensor | None
    factor_t: Tensor | None
    factor_1: Tensor | None
    weight_1: Tensor | None

    @classmethod
    def of(
        cls,
        whole: Softmaxes,
        mask_N: Tensor,
        *,
        kl_weight: float,
        cross_entropy_weight: float,
        temperature: float,
        share_N: Tensor | None = None,
    ) -> "Factors":
        """`share_N` multiplies the weight of each token's divergence; None: 1."""
        tau, teacher = temperature, whole.teacher if kl_weight else None
        max_t = factor_s = factor_t = factor_1 = weight_1 = None
        if teacher is not None:
            weight_N = kl_weight * tau * mask_N
            if share_N is not None:
                weight_N = weight_N * share_N
            max_t = teacher.max_t
            factor_s = weight_N * (whole.max_s / tau - whole.lse_s).exp()
            factor_t = weight_N * (max_t / tau - teacher.lse_t).exp()
        if cross_entropy_weight or teacher is None:
            weight_1 = cross_entropy_weight * mask_N
            factor_1 = weight_1 * (whole.max_s - whole.lse).exp()
        return cls(whole.max_s, max_t, factor_s, factor_t, factor_1, weight_1)
