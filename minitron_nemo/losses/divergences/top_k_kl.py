"""Forward KL over the teacher's most likely tokens, with the mass of all others kept as one more outcome.

K candidates of each rank. Without the last outcome the student would be told nothing about what it gives to the others
(the bias of renormalized top-k losses, 2503.16870). Paper 1 (2407.14679) found that at most 100 tokens hurt, and that
more do not beat all.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from minitron_nemo.losses.divergences.divergence import Pair, per_rank
from minitron_nemo.losses.softmaxes import NEVER

_SUMS = 4  # columns before the candidates
_NONE = NEVER / 1e6  # what is below it, whatever the temperature, is padding


@dataclass(frozen=True)
class _Merged:
    """`chosen_NK`: which of this rank's candidates are among the tokens; `row_NK`: where they lie. Of the teacher the
    probability of all others; of the student their normalizer [N] in float64."""

    chosen_NK: Tensor
    row_NK: Tensor
    rest_t: Tensor
    lse_rest_s: Tensor


@dataclass(frozen=True)
class TopKKL:
    """KL between (p(v) of the tokens, 1 - their sum); gradient p_s - p_t at the tokens, p_s - P_t p_s / P_s elsewhere.

    The tokens are the `top_k` likeliest of the teacher; of these, with `top_p` below 1, the fewest whose probability
    reaches it. Of equal ones the lower id. A rank sends its own `top_k` logits of the teacher and the student's beside
    them, so both sets are exact; a nucleus of more than `top_k` tokens is cut to them, and its mass stays in the rest.
    """

    top_k: int = 1024
    top_p: float = 1.0

    name: ClassVar[str] = "top_k_kl"
    tempered: ClassVar[bool] = True
    knows_whole: ClassVar[bool] = False

    def statistics(self, pair: Pair) -> Tensor:
        """Of all but the candidates max s, sum exp((s - max s) / tau) and the same of t; t and s of the candidates."""
        row_NK = self._candidates(pair)
        columns = []
        for x_NV in (pair.s_NV, pair.t_NV):
            rest_NV = x_NV.scatter(1, row_NK, NEVER)
            max_N = rest_NV.max(dim=1).values
            columns += [max_N, rest_NV.sub_(max_N[:, None]).div_(pair.temperature).exp_().sum(dim=1)]
        return torch.cat([per_rank(*columns), pair.t_NV.gather(1, row_NK), pair.s_NV.gather(1, row_NK)], dim=1)

    def _candidates(self, pair: Pair) -> Tensor:
        """Rows [N, K] of the likeliest tokens on this rank, in order; of equal ones the lower row first."""
        bits_NV = (pair.t_NV + 0.0).view(torch.int32).long()  # + 0.0: no negative zero
        ordered_NV = torch.where(bits_NV < 0, -(bits_NV & 0x7FFFFFFF), bits_NV)
        rows_V = torch.arange(pair.t_NV.shape[1], device=pair.t_NV.device)
        keys_NV = ordered_NV.mul_(2**31).sub_(rows_V)  # no two are equal
        return keys_NV.topk(min(self.top_k, keys_NV.shape[1]), dim=1).indices

    def merge(self, stats_TNC: Tensor, pair: Pair) -> tuple[Tensor, _Merged]:
        whole = pair.whole
        assert whole is not None
        assert whole.teacher is not None
        tau, (ranks, _, columns) = pair.temperature, stats_TNC.shape
        count = (columns - _SUMS) // 2
        t_NC, s_NC = (
            stats_TNC[..., start : start + count].double().transpose(0, 1).flatten(1) / tau
            for start in (_SUMS, _SUMS + count)
        )
        log_t_NC, log_s_NC = t_NC - whole.teacher.lse_t[:, None], s_NC - whole.lse_s[:, None]
        chosen_NC = self._chosen(t_NC, log_t_NC.exp())
        max_s, sum_s, max_t, sum_t = stats_TNC[..., :_SUMS].double().unbind(dim=2)
        max_s, max_t = max_s / tau, max_t / tau
        log_rest_s = _log_rest(max_s, sum_s, s_NC, chosen_NC) - whole.lse_s
        log_rest_t = _log_rest(max_t, sum_t, t_NC, chosen_NC) - whole.teacher.lse_t
        rest_t = log_rest_t.exp()
        among = torch.where(chosen_NC, log_t_NC.exp() * (log_t_NC - log_s_NC), torch.zeros_like(log_t_NC)).sum(dim=1)
        rest = torch.where(rest_t > 0, rest_t * (log_rest_t - log_rest_s), torch.zeros_like(rest_t))
        own = chosen_NC.unflatten(1, (ranks, count))[:, pair.rank]
        return among + rest, _Merged(own, self._candidates(pair), rest_t, log_rest_s + whole.lse_s)

    def _chosen(self, t_NC: Tensor, p_NC: Tensor) -> Tensor:
        """Which of all ranks' candidates are the tokens; they come in rank order, so equal ones by their id."""
        order_NC = t_NC.sort(dim=1, descending=True, stable=True).indices
        before_NC = p_NC.gather(1, order_NC).cumsum(dim=1) - p_NC.gather(1, order_NC)
        place_C = torch.arange(t_NC.shape[1], device=t_NC.device)
        nucleus = self.top_p if self.top_p < 1 else torch.inf
        taken_NC = (place_C < self.top_k) & (before_NC < nucleus)
        return torch.zeros_like(taken_NC).scatter(1, order_NC, taken_NC) & (t_NC > _NONE)

    def gradient(self, pair: Pair, merged: _Merged) -> Tensor:
        apart_NV = torch.zeros_like(pair.s_NV, dtype=torch.bool).scatter(1, merged.row_NK, merged.chosen_NK)
        grad_NV = pair.exp_s().mul_(pair.share_s())
        rest_NV = pair.less(pair.s_NV, merged.lse_rest_s).clamp_(max=0.0).exp_()
        told_NV = torch.where(apart_NV, pair.exp_t().mul_(pair.share_t()), rest_NV.mul_(merged.rest_t.float()[:, None]))
        return grad_NV.sub_(told_NV)


def _log_rest(max_TN: Tensor, sum_TN: Tensor, x_NC: Tensor, chosen_NC: Tensor) -> Tensor:
    """log sum exp [N] over what is not chosen: the rest of each rank, and candidates that were not taken."""
    left_NC = torch.where(chosen_NC, torch.full_like(x_NC, NEVER), x_NC)
    top_N = torch.maximum(max_TN.max(dim=0).values, left_NC.max(dim=1).values)
    is_some_N = top_N > _NONE
    of_ranks = sum_TN * (max_TN - top_N).exp()
    total_N = of_ranks.sum(dim=0) + (left_NC - top_N[:, None]).exp().sum(dim=1)
    return torch.where(is_some_N, total_N.log() + top_N, torch.full_like(top_N, NEVER))
