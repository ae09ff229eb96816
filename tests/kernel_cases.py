"""Cases for the kernels of both softmaxes and of rotary embeddings. As a script, under TRITON_INTERPRET=1, writes what
Triton's make of them.

Triton decides when it is imported whether kernels are interpreted, so those that compile need another process.
"""

import sys
from collections.abc import Callable

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


ROTATIONS = [  # heads, channels, those that are turned, type
    (6, 8, 8, torch.float32),
    (3, 12, 6, torch.float32),
    (6, 8, 8, torch.bfloat16),
]


def rotation(rotate: Callable[[Tensor, Tensor], Tensor], case: tuple) -> tuple[Tensor, Tensor]:
    """Heads [5, 2, heads, channels] turned by angles that differ in both halves, and the gradient of them.

    The heads lie inside of a wider tensor, as queries do that were projected together with keys and values.
    """
    heads, channels, turned, dtype = case
    generator = torch.Generator().manual_seed(5)
    wide = torch.randn(5, 2, heads, channels + 4, generator=generator).to(dtype).requires_grad_()
    angles = torch.rand(5, 1, 1, turned, generator=generator) * 50
    turned_SBHD = rotate(wide[..., :channels], angles)
    turned_SBHD.backward(torch.randn(turned_SBHD.shape, generator=generator).to(dtype).to(turned_SBHD.dtype))
    assert wide.grad is not None
    return turned_SBHD.detach(), wide.grad


def main(path: str) -> None:
    from minitron_nemo.engine.rope_kernel import rotate
    from minitron_nemo.losses.kernels import triton_kernel

    triton_kernel.BLOCK = 16  # three to a row, the last one not full
    softmaxes = [answer(triton_kernel.TritonKernel, case) for case in CASES]
    torch.save([softmaxes, [rotation(rotate, case) for case in ROTATIONS]], path)


if __name__ == "__main__":
    main(sys.argv[1])
