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

import torch
from torch import Tensor
from torch.nn import functional

AGGREGATIONS = ("mean", "l2", "variance")
MOMENTS = 4
ROWS_AT_A_TIME = 1024  # bounds the float64 copy of the activations


def moments(s: Tensor) -> Tensor:
    """Moments of `s` over its first dimension, float64: [n, ...] -> [4, ...]."""
    sums = s.new_zeros((MOMENTS, *s.shape[1:]), dtype=torch.float64)
    for piece in s.split(ROWS_AT_A_TIME):
        x = piece.to(torch.float64)
        sums += torch.stack((torch.full_like(sums[0], len(x)), x.abs().sum(0), x.sum(0), x.square().sum(0)))
    return sums


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
    dtype = _at_least_float32(before_SBH)
    cosine_SB = functional.cosine_similarity(before_SBH.to(dtype), after_SBH.to(dtype), dim=-1)
    total = cosine_SB.sum(dtype=torch.float64)
    return torch.stack((total, total.new_tensor(cosine_SB.numel())))


def block_importance(cosine_sums: Tensor) -> Tensor:
    """BI = 1 - mean cosine over tokens (ShortGPT; paper 1): [..., 2] -> [...]."""
    total, tokens = cosine_sums.unbind(-1)
    return 1.0 - total / tokens


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
