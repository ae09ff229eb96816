"""How activations become importance (paper 1): pure functions of one process, no ranks, no model.

A score is `agg_batch(agg_sequence(activation))`, each aggregation one of
    mean        1/n sum |s|
    l2          sqrt(sum s^2)
    variance    1/n sum (s - 1/n sum s)^2
All three follow from four sums that add up over slices of what is aggregated. Those sums are one float64 tensor,
the *moments* `[4, ...]`: count, sum |s|, sum s, sum s^2. Slices of a sequence are therefore added as moments and
aggregated once; aggregating slices first and adding afterwards is wrong, because l2 and variance are not linear and
because the batch aggregation squares what the sequence aggregation gives.

Shapes: S sequence, B batch (samples), U units, C channels, N heads, H hidden_size; M = 4 moments.
"""

import functools
import math

import torch
from torch import Tensor

AGGREGATIONS = ("mean", "l2", "variance")
MOMENTS = 4
BLOCK_ROWS = 128  # rows that are added in float32 before they go into the float64 totals
BLOCK_ELEMENTS = 2**18  # of a block: what is made on the way stays in the cache


def moments(s: Tensor, *, of: str | None = None) -> Tensor:
    """Moments of `s` over its first dimension, float64: [n, ...] -> [4, ...].

    `of` names the one aggregation that they are for: the sums that it does not read are nan and cost nothing.

    float64 is added in float64. Anything less is added in float32 blocks of at most `BLOCK_ROWS` rows, whose sums go
    into float64 totals: each sum is within `BLOCK_ROWS` float32 roundings of itself whatever n is, and so are l2 and
    mean. Squares are taken about the mean of their block, so the variance is too, however large the mean.
    """
    dtype, read = _at_least_float32(s), _READ[of]
    if dtype is torch.float64 and of is None:
        return _in_float64(s)
    sums = s.new_zeros((MOMENTS, *s.shape[1:]), dtype=torch.float64)
    sums[0] = len(s)
    for block in s.split(_rows_of_block(s)) if len(s) else ():
        _add_block(sums, block, _scratch(block, dtype), read=read)
    if dtype is not torch.float64 and not all(torch.isfinite(sums[part]).all() for part in read):
        return moments(s.to(torch.float64), of=of)  # past the range of float32: rare enough to be copied
    for unread in {1, 2, 3}.difference(read):
        sums[unread] = torch.nan
    return sums


# of moments, the sums that an aggregation reads besides the count
_READ = {None: (1, 2, 3), "mean": (1,), "l2": (3,), "variance": (2, 3)}


def _in_float64(s: Tensor) -> Tensor:
    """All moments of float64. What is aggregated is small: few operations matter more than what they allocate."""
    blocks = (torch.stack((torch.ones_like(x), x.abs(), x, x * x)).sum(dim=1) for x in s.split(_rows_of_block(s)))
    return functools.reduce(torch.add, blocks)


def _add_block(sums: Tensor, x: Tensor, work: Tensor, *, read: tuple[int, ...]) -> None:
    """Add a block's sums in the dtype of `work`, which is of its shape and may be written over."""
    _, sum_abs, total, sum_sq = sums

    def wide() -> Tensor:
        return x if x.dtype is work.dtype else work.copy_(x)

    if 1 in read:
        sum_abs += torch.abs(wide(), out=work).sum(dim=0)
    if 2 in read:
        center = wide().mean(dim=0)
        torch.sub(wide(), center, out=work)
        center, rest = center.to(torch.float64), work.sum(dim=0).to(torch.float64)
        total += rest + len(x) * center
        sum_sq += work.square_().sum(dim=0) + center * (2 * rest + len(x) * center)
    elif 3 in read:
        sum_sq += torch.square(wide(), out=work).sum(dim=0)


def _rows_of_block(x: Tensor) -> int:
    """Rows of the first dimension that are worked on at a time."""
    return max(16, min(BLOCK_ROWS, BLOCK_ELEMENTS // max(1, math.prod(x.shape[1:]))))


def _scratch(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory to work in, of a block's shape: the same again and again, as fresh pages cost more than the sums."""
    if like.numel() > BLOCK_ELEMENTS:
        return torch.empty_like(like, dtype=dtype)
    return _buffer(dtype, like.device)[: like.numel()].view(like.shape)


@functools.cache
def _buffer(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(BLOCK_ELEMENTS, dtype=dtype, device=device)


def aggregate(sums: Tensor, how: str) -> Tensor:
    """One number from moments: [4, ...] -> [...], by `how`, one of AGGREGATIONS. A count of zero gives nan."""
    count, sum_abs, total, sum_sq = sums
    if how == "mean":
        return sum_abs / count
    if how == "l2":
        return sum_sq.sqrt()
    if how == "variance":
        return (sum_sq / count - (total / count).square()).clamp_min(0.0)
    raise ValueError(f"aggregation {how!r}: allowed are {', '.join(AGGREGATIONS)}")


def head_norms(x_SBC: Tensor, kv_channels: int) -> Tensor:
    """Length of each head's attention output, [S, B, N], from [S, B, N * kv_channels] (paper 1)."""
    x_SBND = x_SBC.unflatten(-1, (-1, kv_channels))
    return torch.linalg.vector_norm(x_SBND, dim=-1, dtype=_at_least_float32(x_SBC))


def cosine_sum(before_SBH: Tensor, after_SBH: Tensor) -> Tensor:
    """Sum over tokens of the cosine between a layer's input and output, and the tokens: [2], float64."""
    total = torch.zeros((), dtype=torch.float64, device=before_SBH.device)
    rows = _rows_of_block(before_SBH)
    for before, after in zip(before_SBH.split(rows), after_SBH.split(rows), strict=True):
        total += _cosine(before, after).sum(dtype=torch.float64)
    return torch.stack((total, total.new_tensor(before_SBH.shape[:-1].numel())))


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    """Cosine along the last dimension; that of nothing with anything is zero."""
    dtype = _at_least_float32(x)
    products = _scratch(x, dtype).copy_(x).mul_(y).sum(dim=-1)
    lengths = [torch.linalg.vector_norm(part, dim=-1, dtype=dtype).clamp_min(1e-8) for part in (x, y)]
    return products / lengths[0] / lengths[1]


def block_importance(cosine_sums: Tensor) -> Tensor:
    """BI = 1 - mean cosine over tokens (ShortGPT; paper 1): [..., 2] -> [...]."""
    total, tokens = cosine_sums.unbind(-1)
    return 1.0 - total / tokens


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
