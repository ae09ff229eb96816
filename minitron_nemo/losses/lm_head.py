"""Both output heads and the loss between them, chunk by chunk: logits of a whole micro-batch never exist.

N tokens of a chunk, H hidden channels, V vocabulary rows on this rank, T tensor-parallel ranks.

For every token, with s and t the student's and teacher's logits divided by the temperature:

    KL(teacher, student) = sum_v p_t(v) (t_v - s_v) - logsumexp(t) + logsumexp(s)      gradient: p_s - p_t

Each rank reduces its part of the vocabulary to a few numbers per token (maximum and sum of exponentials of both,
and the weighted difference); one all-gather of those numbers per chunk lets every rank finish the same exact loss
in rank order. The gradient needs no further communication, so it is computed in the forward pass and only the
gradients of the hidden states and of the head weight are kept.

Source: Minitron 2407.14679 (forward KL on logits); temperature squared as in Hinton et al. 1503.02531.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from minitron_nemo.losses.output import CROSS_ENTROPY, FORWARD_KL, LOSS, TOKENS, TOP1_AGREEMENT, LossOutput

_PARTS = (TOKENS, FORWARD_KL, CROSS_ENTROPY, TOP1_AGREEMENT)  # what a chunk is summed up in
_NEVER = -1e30  # logit of a padding row: its probability is zero and its difference to another such row too


@dataclass(frozen=True)
class HeadLoss:
    """What the loss of a token is made of, and where the vocabulary lies.

    `group` holds the ranks that share the vocabulary, `rank` is this one's place in it; None means alone.
    """

    vocab_size: int
    kl_weight: float = 1.0
    cross_entropy_weight: float = 0.0
    temperature: float = 1.0
    chunk_tokens: int = 1024
    group: dist.ProcessGroup | None = None

    def sum_names(self, *, with_teacher: bool) -> tuple[str, ...]:
        """The names of the sums of a call with or without a teacher."""
        return (TOKENS, LOSS, CROSS_ENTROPY, *((FORWARD_KL, TOP1_AGREEMENT) if with_teacher else ()))

    def combine(self, forward_kl: Tensor, cross_entropy: Tensor) -> Tensor:
        """The loss made of its two parts, sums or means."""
        return self.kl_weight * self.temperature**2 * forward_kl + self.cross_entropy_weight * cross_entropy

    def __call__(
        self,
        student: tuple[Tensor, Tensor],
        teacher: tuple[Tensor, Tensor] | None = None,
        *,
        labels_N: Tensor,
        mask_N: Tensor,
    ) -> LossOutput:
        """The loss over unmasked tokens and the sums it is made of.

        `student` and `teacher` are (hidden states [N, H], head weight [V, H]); without a teacher the KL counts as zero
        and has no sum, nor has the agreement (same most likely token). Gradients reach the student's hidden states as
        this rank's part: the caller's region sums it over the group.
        """
        total, parts_P = _ChunkedHeadLoss.apply(*student, *(teacher or (None, None)), labels_N, mask_N, self)
        sums = dict(zip(_PARTS, parts_P.unbind(), strict=True))
        sums[LOSS] = self.combine(sums[FORWARD_KL], sums[CROSS_ENTROPY])
        return LossOutput(total, {name: sums[name] for name in self.sum_names(with_teacher=teacher is not None)})


class _ChunkedHeadLoss(torch.autograd.Function):
    """(loss, parts [P]): the loss in float32; the sums named by `_PARTS`, float64 and detached."""

    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, teacher_NH, teacher_weight_VH, labels_N, mask_N, spec):  # type: ignore[no-untyped-def]
        wants_gradient = any(ctx.needs_input_grad[:2])
        grad_hidden_NH = torch.empty_like(hidden_NH) if wants_gradient else None
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if wants_gradient else None
        parts_P = torch.zeros(len(_PARTS), dtype=torch.float64, device=hidden_NH.device)
        for start in range(0, hidden_NH.shape[0], spec.chunk_tokens):
            rows = slice(start, start + spec.chunk_tokens)
            logits = _Chunk(
                spec,
                _logits(hidden_NH[rows], weight_VH, spec),
                None if teacher_NH is None else _logits(teacher_NH[rows], teacher_weight_VH, spec),
                labels_N[rows],
            )
            mask = mask_N[rows].float()
            parts_P += logits.token_sums(mask)
            if wants_gradient:
                grad_NV = logits.gradient(mask).to(weight_VH.dtype)
                grad_hidden_NH[rows] = grad_NV @ weight_VH
                grad_weight_VH += grad_NV.T @ hidden_NH[rows]
        if wants_gradient:
            ctx.save_for_backward(grad_hidden_NH, grad_weight_VH.to(weight_VH.dtype))
        loss = spec.combine(parts_P[_PARTS.index(FORWARD_KL)], parts_P[_PARTS.index(CROSS_ENTROPY)])
        ctx.mark_non_differentiable(parts_P)
        return loss.float(), parts_P

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _):  # type: ignore[no-untyped-def]
        grad_hidden_NH, grad_weight_VH = ctx.saved_tensors
        return grad_hidden_NH * grad_loss, grad_weight_VH * grad_loss, None, None, None, None, None


def _logits(hidden_NH: Tensor, weight_VH: Tensor, spec: HeadLoss) -> Tensor:
    """Float32 logits of this rank's rows [N, V]; rows past the vocabulary are padding and can never be chosen."""
    logits_NV = (hidden_NH @ weight_VH.T).float()
    first_row = 0 if spec.group is None else spec.group.rank() * weight_VH.shape[0]
    logits_NV[:, max(0, spec.vocab_size - first_row) :] = _NEVER
    return logits_NV


class _Chunk:
    """Exact statistics of one chunk of tokens over the whole vocabulary, from one all-gather."""

    def __init__(self, spec: HeadLoss, student_NV: Tensor, teacher_NV: Tensor | None, labels_N: Tensor) -> None:
        self.spec = spec
        self.s_NV, self.t_NV = student_NV, teacher_NV
        self.first_row = 0 if spec.group is None else spec.group.rank() * student_NV.shape[1]
        self.local_label_N = labels_N - self.first_row
        self.has_label_N = (self.local_label_N >= 0) & (self.local_label_N < student_NV.shape[1])
        self._merge(_gather(self._local_statistics(), spec.group))

    def _local_statistics(self) -> Tensor:
        """[N, 9] of this rank's part: see the names in `_merge`."""
        tau = self.spec.temperature
        max_s, best_s = self.s_NV.max(dim=1)
        exp_NV = (self.s_NV - max_s[:, None]).exp()
        sum_1 = exp_NV.sum(dim=1)
        sum_s = sum_1 if tau == 1.0 else exp_NV.pow(1 / tau).sum(dim=1)
        label = self.s_NV.gather(1, self.local_label_N.clamp(0, self.s_NV.shape[1] - 1)[:, None])[:, 0]
        label = torch.where(self.has_label_N, label, torch.full_like(label, _NEVER))
        columns = [max_s, sum_s, sum_1, label, best_s + self.first_row]
        if self.t_NV is not None:
            max_t, best_t = self.t_NV.max(dim=1)
            weight_NV = ((self.t_NV - max_t[:, None]) / tau).exp()
            difference = (weight_NV * (self.t_NV - self.s_NV)).sum(dim=1) / tau
            columns += [max_t, weight_NV.sum(dim=1), difference, best_t + self.first_row]
        return torch.stack([column.float() for column in columns], dim=1)

    def _merge(self, stats_TNC: Tensor) -> None:
        """Whole-vocabulary values per token [N], combined in rank order so that every rank gets the same bits."""
        tau = self.spec.temperature
        max_s, sum_s, sum_1, label, best_s = stats_TNC[:, :, :5].unbind(dim=2)
        top_s, holder_s = max_s.max(dim=0)
        self.lse_N = (sum_1 * (max_s - top_s).exp()).sum(dim=0).log() + top_s
        self.lse_s_N = (sum_s * ((max_s - top_s) / tau).exp()).sum(dim=0).log() + top_s / tau
        self.cross_entropy_N = self.lse_N - label.max(dim=0).values
        if self.t_NV is None:
            self.forward_kl_N = self.agree_N = torch.zeros_like(self.lse_N)
            return
        max_t, sum_t, difference, best_t = stats_TNC[:, :, 5:].unbind(dim=2)
        top_t, holder_t = max_t.max(dim=0)
        scale = ((max_t - top_t) / tau).exp()
        total_t = (sum_t * scale).sum(dim=0)
        self.lse_t_N = total_t.log() + top_t / tau
        self.forward_kl_N = (difference * scale).sum(dim=0) / total_t - self.lse_t_N + self.lse_s_N
        self.agree_N = (best_s.gather(0, holder_s[None]) == best_t.gather(0, holder_t[None]))[0].float()

    def token_sums(self, mask_N: Tensor) -> Tensor:
        """The sums of the chunk, in float64 and in the order of `_PARTS`: [P]."""
        values = {
            TOKENS: torch.ones_like(mask_N),
            FORWARD_KL: self.forward_kl_N,
            CROSS_ENTROPY: self.cross_entropy_N,
            TOP1_AGREEMENT: self.agree_N,
        }
        values_PN = torch.stack([values[name] for name in _PARTS])
        return (values_PN.double() * mask_N.double()).sum(dim=1)

    def gradient(self, mask_N: Tensor) -> Tensor:
        """Gradient of the loss with respect to this rank's student logits, [N, V]."""
        spec, tau = self.spec, self.spec.temperature
        grad_NV = torch.zeros_like(self.s_NV)
        if self.t_NV is not None and spec.kl_weight:
            grad_NV = (self.s_NV / tau - self.lse_s_N[:, None]).exp_()
            grad_NV -= (self.t_NV / tau - self.lse_t_N[:, None]).exp_()
            grad_NV *= spec.kl_weight * tau
        if spec.cross_entropy_weight:
            grad_NV += spec.cross_entropy_weight * (self.s_NV - self.lse_N[:, None]).exp_()
            rows = self.has_label_N.nonzero()[:, 0]
            grad_NV[rows, self.local_label_N[rows]] -= spec.cross_entropy_weight
        return grad_NV.mul_(mask_N[:, None])


def _gather(stats_NC: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[T, N, C] from every rank's [N, C]: the one collective of the loss."""
    if group is None:
        return stats_NC[None]
    gathered = [torch.empty_like(stats_NC) for _ in range(group.size())]
    dist.all_gather(gathered, stats_NC.contiguous(), group=group)
    return torch.stack(gathered)
