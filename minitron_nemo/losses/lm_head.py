"""Both output heads and the loss between them, chunk by chunk: logits of a whole micro-batch never exist.

N tokens of a chunk, H hidden channels, V vocabulary rows on this rank, T tensor-parallel ranks.

    loss of a token = kl_weight * tau^2 * divergence + cross_entropy_weight * cross-entropy

with a divergence of `losses/divergences`, by default KL(teacher, student); one between logits has no tau. Of several
teachers each has a share of a token's divergence, and their terms add up; cross-entropy counts once. Each rank
reduces its part of the vocabulary to a few numbers per token (`losses/softmaxes.py`); one all-gather of those for each
chunk lets every rank finish the same exact loss in rank order. The gradient needs no further communication, so it is
computed in the forward pass and only the gradients of the hidden states and of the head weight are kept.

Source: Minitron 2407.14679 (forward KL on logits); temperature squared as in Hinton et al. 1503.02531.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from minitron_nemo.losses.divergences.divergence import Divergence, Pair
from minitron_nemo.losses.divergences.forward_kl import ForwardKL
from minitron_nemo.losses.exchange import Chunk, run
from minitron_nemo.losses.kernels.choice import kernel_for
from minitron_nemo.losses.kernels.torch_kernel import TorchKernel
from minitron_nemo.losses.output import (
    CROSS_ENTROPY,
    FORWARD_KL,
    LOSS,
    TEACHER_ENTROPY,
    TOKENS,
    TOP1_AGREEMENT,
    LossOutput,
    of_bin,
)
from minitron_nemo.losses.softmaxes import STUDENT_COLUMNS, Factors, Labels, Softmaxes, merge
from minitron_nemo.losses.tallies import Tallies
from minitron_nemo.losses.weight_gradient import accumulate_, hand_over

_DIVERGENCE = "divergence"  # whichever it is: `HeadLoss.divergence.name`
_PARTS = (TOKENS, CROSS_ENTROPY, FORWARD_KL, TOP1_AGREEMENT, TEACHER_ENTROPY, _DIVERGENCE)  # sums of a chunk
_OF_STUDENT = 2  # so many of them concern the student alone: counted once, whatever the number of teachers
_TALLIED = _PARTS[:3]
_OF_EACH = (TOKENS, FORWARD_KL)  # what is summed up for each of several teachers, by its shares


@dataclass(frozen=True)
class TeacherHead:
    """A teacher's hidden states [N, H], the weight of its head [V, H] and its share [N] of each token's divergence."""

    hidden_NH: Tensor
    weight_VH: Tensor
    share_N: Tensor | None = None  # None: 1


def names_of_each(teachers: Iterable[str]) -> tuple[str, ...]:
    """The names of the sums that each of several teachers has: tokens by its share of them, and the KL from it."""
    return tuple(of_bin(quantity, f"teacher_{name}") for name in teachers for quantity in _OF_EACH)


@dataclass(frozen=True)
class HeadLoss:
    """What the loss of a token is made of, and where the vocabulary lies.

    `kl_weight` is that of `divergence`. `group` holds the ranks that share the vocabulary; None means alone. With
    `tallies` a call is given the bins of its tokens and sums up by them too.
    """

    vocab_size: int
    kl_weight: float = 1.0
    cross_entropy_weight: float = 0.0
    temperature: float = 1.0
    chunk_tokens: int = 1024
    group: dist.ProcessGroup | None = None
    divergence: ForwardKL | Divergence = ForwardKL()
    tallies: Tallies | None = None

    def sum_names(self, *, with_teacher: bool) -> tuple[str, ...]:
        """The names of the sums of a call with or without a teacher; what is known of it is known for every loss."""
        tallied = [] if self.tallies is None else self.tallies.sum_names(_TALLIED if with_teacher else _TALLIED[:-1])
        if not with_teacher:
            return TOKENS, LOSS, CROSS_ENTROPY, *tallied
        own = () if self.divergence.name == FORWARD_KL else (self.divergence.name,)
        return TOKENS, LOSS, CROSS_ENTROPY, *own, FORWARD_KL, TOP1_AGREEMENT, TEACHER_ENTROPY, *tallied

    @property
    def scale(self) -> float:
        """What multiplies the divergence in the loss."""
        return self.kl_weight * (self.temperature**2 if self.divergence.tempered else 1.0)

    def combine(self, divergence: Tensor, cross_entropy: Tensor) -> Tensor:
        """The loss made of its two parts, sums or means."""
        return self.scale * divergence + self.cross_entropy_weight * cross_entropy

    @property
    def in_words(self) -> str:
        """What is minimized where there is a teacher."""
        settings = ", ".join(f"{name}={value:g}" for name, value in vars(self.divergence).items())
        divergence = f"{self.divergence.name} ({settings})" if settings else self.divergence.name
        return (
            f"{self.kl_weight:g} x {divergence} at temperature {self.temperature:g} + "
            f"{self.cross_entropy_weight:g} x {CROSS_ENTROPY}"
        )

    def runs_in_words(self, device: torch.device, *, with_teacher: bool) -> str:
        """What computes it on this device, for the log."""
        kernel = kernel_for(device) if self._is_linear or not with_teacher else TorchKernel
        return f"{self.divergence.name if with_teacher else CROSS_ENTROPY} by {kernel.in_words}"

    @property
    def _is_linear(self) -> bool:
        """Whether the gradient is linear in both softmaxes, which is what kernels are for."""
        return isinstance(self.divergence, ForwardKL)

    def __call__(
        self,
        student: tuple[Tensor, Tensor],
        teacher: tuple[Tensor, Tensor] | None = None,
        *,
        labels_N: Tensor,
        mask_N: Tensor,
        bins_KN: Tensor | None = None,
    ) -> LossOutput:
        """The loss over unmasked tokens and the sums it is made of.

        `student` and `teacher` are (hidden states [N, H], head weight [V, H]); without a teacher the divergence counts
        as zero, and what is known of a teacher has no sum. `bins_KN` as `Tallies.sort` gives them. Gradients reach the
        student's hidden states as this rank's part: the caller's region sums it over the group.
        """
        teachers = {} if teacher is None else {"": TeacherHead(*teacher)}
        output = self.of_several(student, teachers, labels_N=labels_N, mask_N=mask_N, bins_KN=bins_KN)
        names = self.sum_names(with_teacher=teacher is not None)
        return LossOutput(output.total, {name: output.sums[name] for name in names})

    def of_several(
        self,
        student: tuple[Tensor, Tensor],
        teachers: Mapping[str, TeacherHead],
        *,
        labels_N: Tensor,
        mask_N: Tensor,
        bins_KN: Tensor | None = None,
    ) -> LossOutput:
        """The same beside named teachers: sums of what is known of them are by their shares, and each has its own."""
        wants = torch.is_grad_enabled()  # always False inside of an autograd function
        heads = tuple(teachers.values())
        total, parts_P = _ChunkedHeadLoss.apply(*student, heads, labels_N, mask_N, bins_KN, self, wants)
        tallied = [] if self.tallies is None else self.tallies.sum_names(_TALLIED)
        names = (*_PARTS, *tallied, *names_of_each(teachers))
        sums = dict(zip(names, parts_P.unbind(), strict=True))
        sums[self.divergence.name] = sums.pop(_DIVERGENCE)
        sums[LOSS] = self.combine(sums[self.divergence.name], sums[CROSS_ENTROPY])
        return LossOutput(total, sums)


class _ChunkedHeadLoss(torch.autograd.Function):
    """(loss, parts [P]): the loss in float32; the sums of `HeadLoss.of_several`, float64 and detached."""

    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, teachers, labels_N, mask_N, bins_KN, spec, grad_enabled):  # type: ignore[no-untyped-def]
        # `needs_input_grad` knows what requires a gradient, not whether the caller wants any.
        wants_gradient = grad_enabled and any(ctx.needs_input_grad[:2])
        grad_hidden_NH = torch.empty_like(hidden_NH) if wants_gradient else None
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if wants_gradient else None
        inputs = _Inputs(hidden_NH, weight_VH, teachers, labels_N, mask_N, bins_KN, wants_gradient)
        parts_P = 0
        for turn, sums_P, grad_NV in run(_chunks(spec, inputs), spec.group):
            parts_P = sums_P + parts_P
            if grad_NV is not None:
                # The first teacher's gradient is written, those of others are added to it.
                part_NH = grad_hidden_NH[turn.rows]
                part_NH.addmm_(grad_NV.to(weight_VH.dtype), weight_VH, beta=int(turn.number > 0))
                accumulate_(grad_weight_VH, grad_NV, hidden_NH[turn.rows])
        ctx.weight, ctx.gradients = weight_VH, (grad_hidden_NH, grad_weight_VH) if wants_gradient else None
        loss = spec.combine(parts_P[_PARTS.index(_DIVERGENCE)], parts_P[_PARTS.index(CROSS_ENTROPY)])
        ctx.mark_non_differentiable(parts_P)
        return loss.float(), parts_P

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _):  # type: ignore[no-untyped-def]
        """Hands the gradients out once, scaled in place: a copy would be as large as the head weight."""
        if ctx.gradients is None:
            raise RuntimeError("the head loss was differentiated before: its gradients are given away once")
        (grad_hidden_NH, grad_weight_VH), ctx.gradients = ctx.gradients, None
        grad_weight = hand_over(ctx.weight, grad_weight_VH.mul_(grad_loss)) if ctx.needs_input_grad[1] else None
        return grad_hidden_NH.mul_(grad_loss), grad_weight, *[None] * 6


@dataclass(frozen=True)
class _Inputs:
    hidden_NH: Tensor
    weight_VH: Tensor
    teachers: tuple[TeacherHead, ...]
    labels_N: Tensor
    mask_N: Tensor
    bins_KN: Tensor | None
    wants_gradient: bool


@dataclass(frozen=True)
class _Turn:
    """Some tokens beside one teacher, or beside none."""

    rows: slice
    number: int  # of the teacher; 0 also where there is none
    teacher: TeacherHead | None

    @property
    def share(self) -> Tensor | None:
        """The teacher's share of the divergence of these tokens [N]; None: 1."""
        whole_N = None if self.teacher is None else self.teacher.share_N
        return None if whole_N is None else whole_N[self.rows]

    def cross_entropy_weight(self, spec: HeadLoss) -> float:
        """Of the tokens in this turn: once, whatever the number of teachers."""
        return spec.cross_entropy_weight if self.number == 0 else 0.0


_Result = tuple[_Turn, Tensor, Tensor | None]  # the turn, its sums [P], the logits' gradient [N, V]


def _chunks(spec: HeadLoss, inputs: _Inputs) -> Iterator[Chunk[_Result]]:
    work = _by_kernel if spec._is_linear or not inputs.teachers else _by_divergence
    for start in range(0, inputs.hidden_NH.shape[0], spec.chunk_tokens):
        for number, teacher in enumerate(inputs.teachers or (None,)):
            yield work(spec, inputs, _Turn(slice(start, start + spec.chunk_tokens), number, teacher))


@dataclass(frozen=True)
class _Place:
    """This rank's rows of the vocabulary; those past `valid` are padding."""

    rank: int
    first_row: int
    valid: int
    labels: Labels

    @classmethod
    def of(cls, spec: HeadLoss, inputs: _Inputs, rows: slice) -> "_Place":
        size, rank = inputs.weight_VH.shape[0], 0 if spec.group is None else spec.group.rank()
        labels = Labels.on_rank(inputs.labels_N[rows], first_row=rank * size, rows=size)
        return cls(rank, rank * size, min(max(0, spec.vocab_size - rank * size), size), labels)


def _logits(inputs: _Inputs, turn: _Turn) -> tuple[Tensor, Tensor | None]:
    """Those of student and teacher [N, V], as the products leave them."""
    s_NV = inputs.hidden_NH[turn.rows] @ inputs.weight_VH.T
    if turn.teacher is None:
        return s_NV, None
    return s_NV, turn.teacher.hidden_NH[turn.rows] @ turn.teacher.weight_VH.T


def _by_kernel(spec: HeadLoss, inputs: _Inputs, turn: _Turn) -> Chunk[_Result]:
    """A chunk whose gradient is linear in both softmaxes: forward KL and cross-entropy."""
    place, mask_N = _Place.of(spec, inputs, turn.rows), inputs.mask_N[turn.rows].float()
    kernel = kernel_for(inputs.hidden_NH.device)(
        *_logits(inputs, turn),
        valid=place.valid,
        temperature=spec.temperature,
        cross_entropy=inputs.wants_gradient and bool(turn.cross_entropy_weight(spec) or not spec.kl_weight),
    )
    stats_TNC = yield kernel.statistics(place.labels, first_row=place.first_row)
    whole = merge(stats_TNC, rank=place.rank, temperature=spec.temperature)
    grad_NV = None
    if inputs.wants_gradient:
        grad_NV = kernel.gradient(_factors(spec, turn, whole, mask_N, kl_weight=spec.kl_weight), place.labels)
    divergence_N = torch.zeros_like(whole.lse) if whole.teacher is None else whole.teacher.forward_kl
    return turn, _sums(spec, inputs, turn, whole, divergence_N), grad_NV


def _by_divergence(spec: HeadLoss, inputs: _Inputs, turn: _Turn) -> Chunk[_Result]:
    """A chunk with any divergence, in torch: its own statistics travel beside those of the softmaxes."""
    place, mask_N = _Place.of(spec, inputs, turn.rows), inputs.mask_N[turn.rows].float()
    tau, divergence = spec.temperature, spec.divergence
    assert not isinstance(divergence, ForwardKL)
    kernel = TorchKernel(*_logits(inputs, turn), valid=place.valid, temperature=tau, cross_entropy=False, keep=True)
    base_NC = kernel.statistics(place.labels, first_row=place.first_row)
    assert kernel.t_NV is not None
    own_tau = tau if divergence.tempered else 1.0
    pair = Pair(
        kernel.s_NV, kernel.t_NV, base_NC[:, 0], base_NC[:, STUDENT_COLUMNS], valid=place.valid,
        vocab_size=spec.vocab_size, rank=place.rank, temperature=own_tau,
    )  # fmt: skip
    own_NC = base_NC[:, :0] if divergence.knows_whole else divergence.statistics(pair)
    both_TNC = yield torch.cat([base_NC, own_NC], dim=1)
    whole = merge(both_TNC[..., : base_NC.shape[1]], rank=place.rank, temperature=tau)
    pair = replace(pair, whole=whole)
    own_TNC = (yield divergence.statistics(pair)) if divergence.knows_whole else both_TNC[..., base_NC.shape[1] :]
    divergence_N, merged = divergence.merge(own_TNC, pair)
    sums_P = _sums(spec, inputs, turn, whole, divergence_N)
    if not inputs.wants_gradient:
        return turn, sums_P, None
    grad_NV = divergence.gradient(pair, merged)
    grad_NV[:, place.valid :] = 0.0
    weight_N = mask_N if turn.share is None else mask_N * turn.share
    grad_NV.mul_((spec.scale / own_tau * weight_N)[:, None])
    if turn.cross_entropy_weight(spec):
        factors = _factors(spec, turn, whole, mask_N, kl_weight=0.0)
        assert factors.factor_1 is not None
        assert factors.weight_1 is not None
        exp_NV = kernel.s_NV.sub_(whole.max_s.float()[:, None]).exp_()
        grad_NV.addcmul_(exp_NV, factors.factor_1.float()[:, None])
        place.labels.subtract_(grad_NV, factors.weight_1.float())
    return turn, sums_P, grad_NV


def _factors(spec: HeadLoss, turn: _Turn, whole: Softmaxes, mask_N: Tensor, *, kl_weight: float) -> Factors:
    return Factors.of(
        whole,
        mask_N,
        kl_weight=kl_weight,
        cross_entropy_weight=turn.cross_entropy_weight(spec),
        temperature=spec.temperature,
        share_N=turn.share,
    )


def _sums(spec: HeadLoss, inputs: _Inputs, turn: _Turn, whole: Softmaxes, divergence_N: Tensor) -> Tensor:
    """The sums of a turn, in float64: by `_PARTS`, by the tallies, and by the teachers where they have shares: [P]."""
    nothing_N, teacher = torch.zeros_like(whole.lse), whole.teacher
    values = {
        TOKENS: torch.ones_like(whole.lse),
        CROSS_ENTROPY: whole.cross_entropy,
        FORWARD_KL: nothing_N if teacher is None else teacher.forward_kl,
        TOP1_AGREEMENT: nothing_N if teacher is None else teacher.agree,
        TEACHER_ENTROPY: nothing_N if teacher is None else teacher.entropy,
        _DIVERGENCE: divergence_N,
    }
    values_PN = torch.stack([values[name] for name in _PARTS]) * inputs.mask_N[turn.rows].double()
    if turn.share is not None:
        values_PN[_OF_STUDENT:] *= turn.share.double()
    tokens_N = values_PN[0] if turn.share is None else values_PN[0] * turn.share.double()
    of_teachers = values_PN.new_zeros(len(inputs.teachers), len(_OF_EACH))
    if turn.teacher is not None:
        of_teachers[turn.number] = torch.stack([tokens_N, values_PN[_PARTS.index(FORWARD_KL)]]).sum(dim=1)
    if turn.number > 0:
        values_PN[:_OF_STUDENT] = 0.0
    tallied = []
    if spec.tallies is not None:
        assert inputs.bins_KN is not None, "a loss that tallies is given the bins of its tokens"
        tallied = [spec.tallies.tally(values_PN[: len(_TALLIED)], inputs.bins_KN[:, turn.rows]).flatten()]
    return torch.cat([values_PN.sum(dim=1), *tallied, of_teachers.flatten()])
