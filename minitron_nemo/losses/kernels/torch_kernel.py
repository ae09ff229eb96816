"""Statistics and gradient of both softmaxes in torch; on a CPU a few rows at a time, so that they stay in its caches.

N tokens of a chunk, V vocabulary rows on this rank. The columns and the factors are those of `losses/softmaxes.py`.
"""

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from minitron_nemo.losses.softmaxes import COLUMNS, NEVER, STUDENT_COLUMNS, Factors, Labels

BLOCK = 2**18  # numbers of a matrix that a CPU works on at a time


class TorchKernel:
    """A `Kernel`. In place of both matrices `statistics` leaves the exponentials that `gradient` needs, taken once.

    With `keep` it leaves float32 logits, `s_NV` and `t_NV`, and there is no gradient to be had.
    """

    in_words: ClassVar[str] = "torch"

    def __init__(
        self,
        s_NV: Tensor,
        t_NV: Tensor | None,
        *,
        valid: int,
        temperature: float,
        cross_entropy: bool,
        keep: bool = False,
    ) -> None:
        self.s_NV = without_padding(s_NV, valid)
        self.t_NV = None if t_NV is None else without_padding(t_NV, valid)
        self.tau, self.keep = 1.0 if t_NV is None else temperature, keep
        # Not a power of the exponentials at the temperature: what underflows in one is probable in the other.
        is_apart = self.tau != 1.0 and cross_entropy and not keep
        self.exp_1_NV = self.s_NV if self.tau == 1.0 else torch.empty_like(self.s_NV) if is_apart else None

    def _blocks(self) -> Iterator[slice]:
        tokens, rows = self.s_NV.shape
        step = tokens if self.s_NV.device.type != "cpu" else max(1, BLOCK // rows)
        for start in range(0, tokens, step):
            yield slice(start, start + step)

    def statistics(self, labels: Labels, *, first_row: int) -> Tensor:
        """[N, 10] columns of this rank's rows; [N, 5] without a teacher."""
        columns = STUDENT_COLUMNS if self.t_NV is None else COLUMNS
        stats_NC = torch.empty(len(self.s_NV), columns, dtype=torch.float32, device=self.s_NV.device)
        label_N = labels.of(self.s_NV)
        for block in self._blocks():
            s_NV = self.s_NV[block].clone() if self.keep else self.s_NV[block]
            max_s, best_s = s_NV.max(dim=1)
            found = [] if self.t_NV is None else self._teacher(s_NV, block, first_row)
            sum_s, sum_1 = self._student(s_NV.sub_(max_s[:, None]), block)
            found = [max_s, sum_s, sum_1, label_N[block], best_s + first_row, *found]
            stats_NC[block] = torch.stack([column.float() for column in found], dim=1)
        return stats_NC

    def _student(self, s_NV: Tensor, block: slice) -> tuple[Tensor, Tensor]:
        if self.tau == 1.0:
            sum_1 = s_NV.exp_().sum(dim=1)
            return sum_1, sum_1
        exp_1_NV = s_NV.exp() if self.exp_1_NV is None else torch.exp(s_NV, out=self.exp_1_NV[block])
        return s_NV.div_(self.tau).exp_().sum(dim=1), exp_1_NV.sum(dim=1)

    def _teacher(self, s_NV: Tensor, block: slice, first_row: int) -> list[Tensor]:
        assert self.t_NV is not None
        t_NV = self.t_NV[block]
        max_t, best_t = t_NV.max(dim=1)
        difference_NV = t_NV - s_NV
        lower_NV = t_NV.sub(max_t[:, None]) if self.keep else t_NV.sub_(max_t[:, None])
        if self.tau != 1.0:
            lower_NV.div_(self.tau)
        exp_NV = lower_NV.exp()
        difference = difference_NV.mul_(exp_NV).sum(dim=1) / self.tau
        energy = torch.mul(lower_NV, exp_NV, out=difference_NV).sum(dim=1)
        if not self.keep:
            t_NV.copy_(exp_NV)
        return [max_t, exp_NV.sum(dim=1), difference, energy, best_t + first_row]

    def gradient(self, factors: Factors, labels: Labels) -> Tensor:
        """[N, V], in the storage of the student's logits."""
        for block in self._blocks():
            self._block_gradient(factors, block)
        if factors.weight_1 is not None:
            labels.subtract_(self.s_NV, factors.weight_1.float())
        return self.s_NV

    def _block_gradient(self, factors: Factors, block: slice) -> None:
        grad_NV, factor_s, factor_1 = self.s_NV[block], factors.factor_s, factors.factor_1
        if factor_1 is not None:
            assert self.exp_1_NV is not None
            if factor_s is None:
                torch.mul(self.exp_1_NV[block], _column(factor_1[block]), out=grad_NV)
                return
            if self.tau == 1.0:  # the same exponentials
                factor_s, factor_1 = factor_s + factor_1, None
        assert factor_s is not None
        assert factors.factor_t is not None
        assert self.t_NV is not None
        grad_NV.mul_(_column(factor_s[block]))
        grad_NV.addcmul_(self.t_NV[block], _column(factors.factor_t[block]), value=-1)
        if factor_1 is not None:
            assert self.exp_1_NV is not None
            grad_NV.addcmul_(self.exp_1_NV[block], _column(factor_1[block]))


def without_padding(logits_NV: Tensor, valid: int) -> Tensor:
    """Float32 logits in which rows past `valid` can never be chosen; in place where they are float32."""
    logits_NV = logits_NV.float()
    logits_NV[:, valid:] = NEVER
    return logits_NV


def _column(factor_N: Tensor) -> Tensor:
    return factor_N.float()[:, None]
