"""Chunks for the kernels of both softmaxes. As a script, under TRITON_INTERPRET=1, writes what Triton's make of them.

Triton decides when it is imported whether kernels are interpreted, so those that compile need another process.
"""

import sys

import torch
from torch import Tensor

from minitron_nemo.losses.softmaxes import Factors, Labels, merge

TOKENS, ROWS, FIRST_ROW = 4, 40, 40
CASES = [  # temperature, weight of the cross-entropy, with a teacher, rows that are no padding, type
    (1.0, 0.3, True, ROWS, torch.float32),
    (1.0, 0.3, True, 35, torch.bfloat16),
    (2.5, 0.3, True, 35, torch.float32),
    (0.25, 0.0, True, 16, torch.bfloat16),
    (1.0, 1.0, False, 35, torch.float32),
    (1.0, 0.0, True, 0, torch.float32),
]


def logits(seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(TOKENS, ROWS, generator=generator) * 4
    drawn[0, 3] = drawn[0, 30] = 15.0  # equal ones: the first counts
    drawn[1] *= 100
    drawn[2] = torch.arange(ROWS) / 8 + seed  # the largest comes last
    return drawn.to(dtype)


def answer(kernel: type, case: tuple) -> tuple[Tensor, Tensor]:
    """The statistics and the gradient that a kernel gives."""
    tau, ce, with_teacher, valid, dtype = case
    s, t = logits(1, dtype), logits(2, dtype) if with_teacher else None
    labels = Labels.on_rank(torch.tensor([43, 5, 55, 300] if valid else [5] * TOKENS), first_row=FIRST_ROW, rows=ROWS)
    one = kernel(s, t, valid=valid, temperature=tau, cross_entropy=ce > 0)
    stats_NC = one.statistics(labels, first_row=FIRST_ROW)
    # Beside another rank, so that one with nothing but padding has a whole vocabulary too.
    other = kernel(logits(3, dtype), logits(4, dtype) if with_teacher else None, valid=ROWS, temperature=tau,
                   cross_entropy=False).statistics(labels, first_row=0)  # fmt: skip
    whole = merge(torch.stack([other, stats_NC]), rank=1, temperature=tau)
    mask = torch.tensor([1.0, 1.0, 0.5, 0.0])
    factors = Factors.of(whole, mask, kl_weight=0.7, cross_entropy_weight=ce, temperature=tau)
    return stats_NC, one.gradient(factors, labels)


def main(path: str) -> None:
    from minitron_nemo.losses.kernels import triton_kernel

    triton_kernel.BLOCK = 16  # three to a row, the last one not full
    torch.save([answer(triton_kernel.TritonKernel, case) for case in CASES], path)


if __name__ == "__main__":
    main(sys.argv[1])
