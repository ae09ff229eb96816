"""Statistics and gradient of both softmaxes in Triton: each reads the logits once, in the type that the products left.

N tokens of a chunk, V vocabulary rows on this rank. The columns and the factors are those of `losses/softmaxes.py`.
A program of `statistics_kernel` walks a token's row in blocks and rescales its sums where a block has a larger maximum
(online softmax, Milakov and Gimelshein 1805.02867). Exponentials and sums are float32. The gradient is written over the
student's logits.
"""

from typing import ClassVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from minitron_nemo.losses.softmaxes import COLUMNS, STUDENT_COLUMNS, Factors, Labels

BLOCK = 4096
WARPS = 8
FACTORS = 6  # max_s, max_t, factor_s, factor_t, factor_1, weight_1


@triton.jit
def statistics_kernel(  # type: ignore[no-untyped-def]
    s_NV, t_NV, labels_N, stats_NC, stride_s, stride_t, valid, first_row, inverse_tau,
    TEACHER: tl.constexpr, TEMPERED: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The columns of one token. `valid` rows are no padding; a label is a row of this rank, or below 0."""
    token = tl.program_id(0).to(tl.int64)
    s_V, t_V, out = s_NV + token * stride_s, t_NV + token * stride_t, stats_NC + token * COLUMNS
    max_s, max_t = -1e30, -1e30
    best_s, best_t = 0, 0
    sum_s, sum_1, sum_t, difference, energy = 0.0, 0.0, 0.0, 0.0, 0.0
    for start in range(0, valid, BLOCK):
        row = start + tl.arange(0, BLOCK)
        here = row < valid
        s = tl.where(here, tl.load(s_V + row, mask=here, other=0.0).to(tl.float32), -1e30)  # which bf16 has not
        top, place = tl.max(s, axis=0, return_indices=True, return_indices_tie_break_left=True)
        best_s = tl.where(top > max_s, start + place, best_s)
        higher = tl.maximum(top, max_s)
        sum_1 = sum_1 * tl.exp(max_s - higher) + tl.sum(tl.exp(s - higher), axis=0)
        if TEMPERED:
            factor = tl.exp((max_s - higher) * inverse_tau)
            sum_s = sum_s * factor + tl.sum(tl.exp((s - higher) * inverse_tau), axis=0)
        max_s = higher
        if TEACHER:
            t = tl.where(here, tl.load(t_V + row, mask=here, other=0.0).to(tl.float32), -1e30)
            top, place = tl.max(t, axis=0, return_indices=True, return_indices_tie_break_left=True)
            best_t = tl.where(top > max_t, start + place, best_t)
            higher = tl.maximum(top, max_t)
            moved = (max_t - higher) * inverse_tau
            lower = (t - higher) * inverse_tau
            exp_t = tl.exp(lower)
            energy = tl.exp(moved) * (energy + moved * sum_t) + tl.sum(exp_t * lower, axis=0)
            difference = tl.exp(moved) * difference + tl.sum(exp_t * (t - s), axis=0) * inverse_tau
            sum_t = tl.exp(moved) * sum_t + tl.sum(exp_t, axis=0)
            max_t = higher
    label = tl.load(labels_N + token)
    at_label = tl.load(s_V + tl.maximum(label, 0), mask=label >= 0, other=0.0).to(tl.float32)
    tl.store(out, max_s)
    tl.store(out + 1, sum_s if TEMPERED else sum_1)
    tl.store(out + 2, sum_1)
    tl.store(out + 3, tl.where(label >= 0, at_label, -1e30))
    tl.store(out + 4, (best_s + first_row).to(tl.float32))
    if TEACHER:
        tl.store(out + 5, max_t)
        tl.store(out + 6, sum_t)
        tl.store(out + 7, difference)
        tl.store(out + 8, energy)
        tl.store(out + 9, (best_t + first_row).to(tl.float32))


@triton.jit
def gradient_kernel(  # type: ignore[no-untyped-def]
    s_NV, t_NV, labels_N, factors_NF, stride_s, stride_t, rows, valid, inverse_tau,
    DIVERGENCE: tl.constexpr, CROSS_ENTROPY: tl.constexpr, FACTORS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of one token's gradient, over the student's logits; padding rows get zero."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = row < valid
    factor = factors_NF + token * FACTORS
    max_s = tl.load(factor)
    s_V = s_NV + token * stride_s + row
    s = tl.where(here, tl.load(s_V, mask=here, other=0.0).to(tl.float32), -1e30)
    grad = tl.zeros([BLOCK], dtype=tl.float32)
    if DIVERGENCE:
        t = tl.load(t_NV + token * stride_t + row, mask=here, other=0.0).to(tl.float32)
        t = tl.where(here, t, -1e30)
        grad += tl.load(factor + 2) * tl.exp((s - max_s) * inverse_tau)
        grad -= tl.load(factor + 3) * tl.exp((t - tl.load(factor + 1)) * inverse_tau)
    if CROSS_ENTROPY:
        grad += tl.load(factor + 4) * tl.exp(s - max_s)
        grad -= tl.where(row == tl.load(labels_N + token), tl.load(factor + 5), 0.0)
    tl.store(s_V, tl.where(here, grad, 0.0).to(s_NV.dtype.element_ty), mask=row < rows)


class TritonKernel:
    """A `Kernel`; logits are bf16 or float32. Exponentials are taken twice, which costs less than keeping them."""

    in_words: ClassVar[str] = "Triton"

    def __init__(
        self, s_NV: Tensor, t_NV: Tensor | None, *, valid: int, temperature: float, cross_entropy: bool
    ) -> None:
        self.s_NV, self.t_NV, self.valid = s_NV, t_NV, valid
        self.tau = 1.0 if t_NV is None else temperature
        self.other_NV = s_NV if t_NV is None else t_NV  # a pointer that nothing reads

    def statistics(self, labels: Labels, *, first_row: int) -> Tensor:
        """[N, 10] columns of this rank's rows; [N, 5] without a teacher."""
        columns = STUDENT_COLUMNS if self.t_NV is None else COLUMNS
        stats_NC = torch.empty(len(self.s_NV), columns, dtype=torch.float32, device=self.s_NV.device)
        statistics_kernel[(len(self.s_NV),)](
            self.s_NV, self.other_NV, self._labels(labels), stats_NC, self.s_NV.stride(0), self.other_NV.stride(0),
            self.valid, first_row, 1 / self.tau, TEACHER=self.t_NV is not None, TEMPERED=self.tau != 1.0,
            COLUMNS=columns, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
        return stats_NC

    def gradient(self, factors: Factors, labels: Labels) -> Tensor:
        """[N, V], in the storage of the student's logits."""
        tokens, rows = self.s_NV.shape
        named = (factors.max_s, factors.max_t, factors.factor_s, factors.factor_t, factors.factor_1, factors.weight_1)
        columns = [torch.zeros_like(factors.max_s) if column is None else column.double() for column in named]
        gradient_kernel[(tokens, triton.cdiv(rows, BLOCK))](
            self.s_NV, self.other_NV, self._labels(labels), torch.stack(columns, dim=1).float(), self.s_NV.stride(0),
            self.other_NV.stride(0), rows, self.valid, 1 / self.tau, DIVERGENCE=factors.factor_s is not None,
            CROSS_ENTROPY=factors.factor_1 is not None, FACTORS=FACTORS, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
        return self.s_NV

    def _labels(self, labels: Labels) -> Tensor:
        return torch.where(labels.here_N, labels.row_N, torch.full_like(labels.row_N, -1))
