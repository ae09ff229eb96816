"""Attention of documents that are kept apart: cumulative lengths are what a mask of all pairs would say."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from minitron_nemo.engine import attention
from minitron_nemo.engine.attention import SdpaCoreAttention, cumulative_lengths, mask_apart

DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
HEADS, GROUPS, CHANNELS = 4, 2, 8


def core() -> SdpaCoreAttention:
    alone = SimpleNamespace(cp=SimpleNamespace(size=lambda: 1))
    return SdpaCoreAttention(SimpleNamespace(), 1, pg_collection=alone, softmax_scale=0.3)


def drawn(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    samples, length = DOCUMENTS.shape
    return [
        torch.randn(length, samples, heads, CHANNELS, generator=generator).to(dtype).requires_grad_()
        for heads in (HEADS, GROUPS, GROUPS)
    ]


def by_formula(query, key, value):
    """softmax(0.3 q k) v over the tokens of the same document up to the row's own, in float64: [s, b, heads * d]."""
    q, k, v = (x.double().permute(1, 2, 0, 3) for x in (query, key, value))
    k, v = (x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (k, v))
    place = torch.arange(DOCUMENTS.shape[1])
    seen = (DOCUMENTS[:, :, None] == DOCUMENTS[:, None, :]) & (place[:, None] >= place)
    scores = (0.3 * q @ k.mT).masked_fill(~seen[:, None], -torch.inf)
    return (functional.softmax(scores, dim=-1) @ v).permute(2, 0, 1, 3).flatten(2)


def with_gradients(run, inputs):
    out = run(*inputs)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype))
    return [out.detach(), *(x.grad for x in inputs)]


def test_lengths_of_documents_end_with_each_sample():
    assert cumulative_lengths(DOCUMENTS).tolist() == [0, 3, 5, 6, 7, 12, 18]
    assert cumulative_lengths(DOCUMENTS).dtype == torch.int32


@pytest.mark.parametrize("says", [cumulative_lengths, lambda d: mask_apart(d, torch.arange(d.shape[1]))],
                         ids=["lengths", "mask"])  # fmt: skip
def test_documents_attend_to_themselves_alone(says):
    got = with_gradients(lambda *qkv: core()(*qkv, says(DOCUMENTS)), drawn())
    want = with_gradients(by_formula, drawn())
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=1e-6)


def test_a_kernel_for_lengths_is_given_all_documents_at_once(monkeypatch):
    """The arguments of torch's, which runs on GPUs alone: this stand-in takes them at their word."""

    def varlen(q, k, v, ends_q, ends_k, max_q, max_k, *, window_size, scale, enable_gqa):
        assert (max_q, max_k, window_size, enable_gqa) == (6, 6, (-1, 0), True)
        assert torch.equal(ends_q, ends_k)
        assert len(q) == len(k) == len(v) == ends_q[-1]
        parts = []
        for start, end in zip(ends_q[:-1], ends_q[1:], strict=True):
            query, key, value = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
            out = functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=scale, enable_gqa=True
            )
            parts.append(out[0].transpose(0, 1))
        return torch.cat(parts)

    monkeypatch.setattr(attention, "_kernel_for_lengths", lambda device: varlen)
    got = with_gradients(lambda *qkv: core()(*qkv, cumulative_lengths(DOCUMENTS)), drawn(torch.bfloat16))
    want = with_gradients(by_formula, drawn(torch.bfloat16))
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=2e-2, atol=2e-2)


def test_a_cpu_has_no_kernel_for_lengths():
    assert attention._kernel_for_lengths(torch.device("cpu")) is None
