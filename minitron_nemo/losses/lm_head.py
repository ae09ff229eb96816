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
        wants = torch.is_grad_enabled()  # always False inside of an autograd function
        total, parts_P = _ChunkedHeadLoss.apply(*student, *(teacher or (None, None)), labels_N, mask_N, self, wants)
        sums = dict(zip(_PARTS, parts_P.unbind(), strict=True))
        sums[LOSS] = self.combine(sums[FORWARD_KL], sums[CROSS_ENTROPY])
        return LossOutput(total, {name: sums[name] for name in self.sum_names(with_teacher=teacher is not None)})


class _ChunkedHeadLoss(torch.autograd.Function):
    """(loss, parts [P]): the loss in float32; the sums named by `_PARTS`, float64 and detached."""

    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, teacher_NH, teacher_weight_VH, labels_N, mask_N, spec, grad_enabled):  # type: ignore[no-untyped-def]
        # `needs_input_grad` knows what requires a gradient, not whether the caller wants any.
        wants_gradient = grad_enabled and any(ctx.needs_input_grad[:2])
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
                torch.mm(grad_NV, weight_VH, out=grad_hidden_NH[rows])
                if weight_VH.dtype == torch.float32:
                    grad_weight_VH.addmm_(grad_NV.T, hidden_NH[rows])
                else:
                    grad_weight_VH += grad_NV.T @ hidden_NH[rows]
        ctx.gradients = (grad_hidden_NH, grad_weight_VH.to(weight_VH.dtype)) if wants_gradient else None
        loss = spec.combine(parts_P[_PARTS.index(FORWARD_KL)], parts_P[_PARTS.index(CROSS_ENTROPY)])
        ctx.mark_non_differentiable(parts_P)
        return loss.float(), parts_P

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _):  # type: ignore[no-untyped-def]
        """Hands the gradients out once, scaled in place: a copy would be as large as the head weight."""
        if ctx.gradients is None:
            raise RuntimeError("the head loss was differentiated before: its gradients are given away once")
        (grad_hidden_NH, grad_weight_VH), ctx.gradients = ctx.gradients, None
        return grad_hidden_NH.mul_(grad_loss), grad_weight_VH.mul_(grad_loss), *[None] * 6


def _logits(hidden_NH: Tensor, weight_VH: Tensor, spec: HeadLoss) -> Tensor:
    """Float32 logits of this rank's rows [N, V]; rows past the vocabulary are padding and can never be chosen."""
    logits_NV = (hidden_NH @ weight_VH.T).float()
    first_row = 0 if spec.group is None else spec.group.rank() * weight_VH.shape[0]
    logits_NV[:, max(0, spec.vocab_size - first_row) :] = _NEVER
    return logits_NV


class _Chunk:
    """Exact statistics of one chunk of tokens over the whole vocabulary, from one all-gather.

    Both matrices of logits are used up: what is kept of them are the exponentials that the gradient needs, each taken
    once, with this rank's largest logit as their origin.
    """

    def __init__(self, spec: HeadLoss, student_NV: Tensor, teacher_NV: Tensor | None, labels_N: Tensor) -> None:
        self.spec, self.has_teacher = spec, teacher_NV is not None
        self.first_row = 0 if spec.group is None else spec.group.rank() * student_NV.shape[1]
        local_label_N = labels_N - self.first_row
        self.has_label_N = (local_label_N >= 0) & (local_label_N < student_NV.shape[1])
        self.label_N = local_label_N.clamp(0, student_NV.shape[1] - 1)
        self._merge(_gather(self._local_statistics(student_NV, teacher_NV), spec.group))

    def _local_statistics(self, s_NV: Tensor, t_NV: Tensor | None) -> Tensor:
        """[N, 9] of this rank's part: see the names in `_merge`. Overwrites both matrices."""
        tau = self.spec.temperature
        max_s, best_s = s_NV.max(dim=1)
        label = s_NV.gather(1, self.label_N[:, None])[:, 0]
        label = torch.where(self.has_label_N, label, torch.full_like(label, _NEVER))
        teacher = [] if t_NV is None else self._teacher_statistics(s_NV, t_NV)
        exp_NV = s_NV.sub_(max_s[:, None])
        if tau == 1.0:
            self.exp_s_NV = self.exp_1_NV = exp_NV.exp_()
            sum_1 = sum_s = exp_NV.sum(dim=1)
        else:
            # Not a power of the exponentials at 1: what underflows there is still probable at a high temperature.
            self.exp_s_NV = (exp_NV / tau).exp_()
            self.exp_1_NV = exp_NV.exp_()
            sum_1, sum_s = self.exp_1_NV.sum(dim=1), self.exp_s_NV.sum(dim=1)
        self.max_s_N = max_s.double()
        columns = [max_s, sum_s, sum_1, label, best_s + self.first_row, *teacher]
        return torch.stack([column.float() for column in columns], dim=1)

    def _teacher_statistics(self, s_NV: Tensor, t_NV: Tensor) -> list[Tensor]:
        """The columns of the teacher, [N] each; overwrites its logits."""
        tau = self.spec.temperature
        max_t, best_t = t_NV.max(dim=1)
        self.max_t_N, self.exp_t_NV = max_t.double(), t_NV - max_t[:, None]
        if tau != 1.0:
            self.exp_t_NV /= tau
        self.exp_t_NV.exp_()
        difference = t_NV.sub_(s_NV).mul_(self.exp_t_NV).sum(dim=1) / tau
        return [max_t, self.exp_t_NV.sum(dim=1), difference, best_t + self.first_row]

    def _merge(self, stats_TNC: Tensor) -> None:
        """Whole-vocabulary values per token [N], combined in rank order so that every rank gets the same bits.

        In float64: a divergence is the small difference of large logarithms, and the loss multiplies it by tau squared.
        """
        tau = self.spec.temperature
        max_s, sum_s, sum_1, label, best_s = stats_TNC.double()[:, :, :5].unbind(dim=2)
        top_s, holder_s = max_s.max(dim=0)
        self.lse_N = (sum_1 * (max_s - top_s).exp()).sum(dim=0).log() + top_s
        self.lse_s_N = (sum_s * ((max_s - top_s) / tau).exp()).sum(dim=0).log() + top_s / tau
        self.cross_entropy_N = self.lse_N - label.max(dim=0).values
        if not self.has_teacher:
            self.forward_kl_N = self.agree_N = torch.zeros_like(self.lse_N)
            return
        max_t, sum_t, difference, best_t = stats_TNC.double()[:, :, 5:].unbind(dim=2)
        top_t, holder_t = max_t.max(dim=0)
        scale = ((max_t - top_t) / tau).exp()
        total_t = (sum_t * scale).sum(dim=0)
        self.lse_t_N = total_t.log() + top_t / tau
        self.forward_kl_N = (difference * scale).sum(dim=0) / total_t - self.lse_t_N + self.lse_s_N
        self.agree_N = (best_s.gather(0, holder_s[None]) == best_t.gather(0, holder_t[None]))[0].double()

    def token_sums(self, mask_N: Tensor) -> Tensor:
        """The sums of the chunk, in float64 and in the order of `_PARTS`: [P]."""
        values = {
            TOKENS: torch.ones_like(self.lse_N),
            FORWARD_KL: self.forward_kl_N,
            CROSS_ENTROPY: self.cross_entropy_N,
            TOP1_AGREEMENT: self.agree_N,
        }
        return (torch.stack([values[name] for name in _PARTS]) * mask_N.double()).sum(dim=1)

    def gradient(self, mask_N: Tensor) -> Tensor:
        """Gradient of the loss with respect to this rank's student logits, [N, V]; made of the exponentials, once.

        A probability is a stored exponential times a factor of its token; weights and mask are part of the factor.
        """
        tau, weight_1_N = self.spec.temperature, self.spec.cross_entropy_weight * mask_N
        factor_1_N = weight_1_N * (self.max_s_N - self.lse_N).exp()
        if self.has_teacher and self.spec.kl_weight:
            weight_N = self.spec.kl_weight * tau * mask_N
            factor_s_N = weight_N * (self.max_s_N / tau - self.lse_s_N).exp()
            factor_t_N = weight_N * (self.max_t_N / tau - self.lse_t_N).exp()
            shares_exponentials = self.exp_1_NV is self.exp_s_NV
            grad_NV = self.exp_s_NV.mul_(_column(factor_s_N + factor_1_N if shares_exponentials else factor_s_N))
            grad_NV.addcmul_(self.exp_t_NV, _column(factor_t_N), value=-1)
            if self.spec.cross_entropy_weight and not shares_exponentials:
                grad_NV.addcmul_(self.exp_1_NV, _column(factor_1_N))
        else:
            grad_NV = self.exp_1_NV.mul_(_column(factor_1_N))
        if self.spec.cross_entropy_weight:
            # One place in every row, also where another rank has the label: which rows those are is not known to the
            # host, and asking would make it wait for the device.
            at_label_N1 = grad_NV.gather(1, self.label_N[:, None])
            weight_1_N = torch.where(self.has_label_N, weight_1_N, torch.zeros_like(weight_1_N))
            grad_NV.scatter_(1, self.label_N[:, None], at_label_N1 - weight_1_N[:, None])
        return grad_NV


def _column(factor_N: Tensor) -> Tensor:
    return factor_N.float()[:, None]


def _gather(stats_NC: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[T, N, C] from every rank's [N, C]: the one collective of the loss."""
    if group is None:
        return stats_NC[None]
    gathered = [torch.empty_like(stats_NC) for _ in range(group.size())]
    dist.all_gather(gathered, stats_NC.contiguous(), group=group)
    return torch.stack(gathered)
