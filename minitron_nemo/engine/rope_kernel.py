"""Rotary embedding in Triton, for GPUs without Transformer Engine: reads and writes each head once, in its own type.

S tokens of a sequence on this rank, B batch, H heads, D channels of a head, R of them rotated (Su et al. 2104.09864):

    out[:R/2] = x[:R/2] cos f[:R/2] - x[R/2:R] sin f[:R/2]
    out[R/2:R] = x[R/2:R] cos f[R/2:] + x[:R/2] sin f[R/2:]

and out[R:] = x[R:]. The gradient turns back. Angles are float32, and so is what is computed.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from megatron.core.models.common.embeddings import rope_utils
from torch import Tensor

HEADS = 4  # of a token, in a program at a time
WARPS = 4


@triton.jit
def rotate_kernel(  # type: ignore[no-untyped-def]
    x_SBHD, out_SBHD, cos_SR, sin_SR, stride_s, stride_b, stride_h, samples, heads, channels, half,
    BACK: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """All heads of one token. `half` channels of a head are turned with as many after them."""
    token = tl.program_id(0).to(tl.int64)
    place, sample = token // samples, token % samples
    one = tl.arange(0, HALF)
    here = one < half
    low, high = place * 2 * half + one, place * 2 * half + half + one
    cos_1 = tl.load(cos_SR + low, mask=here, other=0.0)[None, :]
    sin_1 = tl.load(sin_SR + low, mask=here, other=0.0)[None, :]
    cos_2 = tl.load(cos_SR + high, mask=here, other=0.0)[None, :]
    sin_2 = tl.load(sin_SR + high, mask=here, other=0.0)[None, :]
    rest = tl.arange(0, CHANNELS)
    for start in range(0, heads, HEADS):
        head = start + tl.arange(0, HEADS)[:, None]
        x = x_SBHD + place * stride_s + sample * stride_b + head * stride_h
        out = out_SBHD + (token * heads + head) * channels
        both = (head < heads) & here[None, :]
        x_1 = tl.load(x + one[None, :], mask=both, other=0.0).to(tl.float32)
        x_2 = tl.load(x + half + one[None, :], mask=both, other=0.0).to(tl.float32)
        if BACK:
            out_1 = x_1 * cos_1 + x_2 * sin_2
            out_2 = x_2 * cos_2 - x_1 * sin_1
        else:
            out_1 = x_1 * cos_1 - x_2 * sin_1
            out_2 = x_2 * cos_2 + x_1 * sin_2
        tl.store(out + one[None, :], out_1, mask=both)
        tl.store(out + half + one[None, :], out_2, mask=both)
        still = (head < heads) & (rest >= 2 * half)[None, :] & (rest < channels)[None, :]
        tl.store(out + rest[None, :], tl.load(x + rest[None, :], mask=still, other=0.0), mask=still)


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_SBHD, cos_SR, sin_SR):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(cos_SR, sin_SR)
        return _rotate(x_SBHD, cos_SR, sin_SR, back=False)

    @staticmethod
    def backward(ctx, grad_SBHD):  # type: ignore[no-untyped-def]
        return _rotate(grad_SBHD, *ctx.saved_tensors, back=True), None, None


def _rotate(x_SBHD: Tensor, cos_SR: Tensor, sin_SR: Tensor, *, back: bool) -> Tensor:
    if x_SBHD.stride(-1) != 1:
        x_SBHD = x_SBHD.contiguous()
    length, samples, heads, channels = x_SBHD.shape
    half = cos_SR.shape[-1] // 2
    out_SBHD = torch.empty(x_SBHD.shape, dtype=x_SBHD.dtype, device=x_SBHD.device)
    rotate_kernel[(length * samples,)](
        x_SBHD, out_SBHD, cos_SR, sin_SR, *x_SBHD.stride()[:3], samples, heads, channels, half, BACK=back, HEADS=HEADS,
        HALF=triton.next_power_of_2(half), CHANNELS=triton.next_power_of_2(channels), num_warps=WARPS,
    )  # fmt: skip
    return out_SBHD


def rotate(x_SBHD: Tensor, freqs: Tensor, interleaved: bool = False) -> Tensor:
    """Heads [s, b, heads, channels] turned by the angles [s, 1, 1, rotated]; in place of Transformer Engine's."""
    assert not interleaved
    angles_SR = freqs.flatten(1).float()
    return _Rotated.apply(x_SBHD, angles_SR.cos(), angles_SR.sin())


def serve_megatron() -> None:
    """Have `apply_rope_fusion` use this kernel, where Megatron found no Transformer Engine to import one from."""
    known: Any = rope_utils
    if known.fused_apply_rotary_pos_emb is None:
        known.fused_apply_rotary_pos_emb = rotate
