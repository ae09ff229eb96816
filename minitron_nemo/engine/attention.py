"""Core attention on `scaled_dot_product_attention`, for machines without Transformer Engine.

Megatron's local attention materializes the score matrix; this one is faster on CPU and lets a GPU without
Transformer Engine train at 8k context.

Documents that are kept apart go through it one by one, as cumulative lengths say; no mask of S x S exists. On a GPU a
kernel takes them all at once, where torch has it.

Under context parallelism a rank has two chunks of each sequence, c of 2C (`distributed.layout.context_chunks`), and
asks the keys and values of all ranks: chunk c those up to its own end, of the same document where a mask says so.

Shapes: S whole sequence, T tokens of it on this rank, Q of a chunk, P of a whole micro-batch, B batch, H heads, G query
groups, D channels, E documents.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, distributed
from torch.distributed import ProcessGroup
from torch.nn.functional import scaled_dot_product_attention

from minitron_nemo.distributed.layout import context_chunks


class SdpaCoreAttention(MegatronModule):
    """Causal attention with grouped queries; fills the `core_attention` slot of a Megatron layer spec.

    Without a mask attention is causal. A mask says all, in Megatron's sense of True for what is not seen; of one
    dimension it holds cumulative lengths (`cumulative_lengths`), and attention is causal inside of each.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(config=config)
        self.softmax_scale = kwargs.get("softmax_scale")
        self.context: ProcessGroup = kwargs["pg_collection"].cp

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """[T, B, H, D], twice [T, B, G, D], None or [E + 1] or [B, 1, T, S] with causality in it -> [T, B, H * D]."""
        if (ranks := self.context.size()) == 1:
            if attention_mask is not None and attention_mask.dim() == 1:
                return self._attend_apart(query, key, value, attention_mask)
            return self._attend(query, key, value, attention_mask)
        key, value = (_WholeSequence.apply(x, self.context) for x in (key, value))
        if attention_mask is None:
            attention_mask = later(own_positions(len(key), self.context).to(key.device), len(key))
        parts = zip(
            context_chunks(self.context.rank(), ranks), query.chunk(2), attention_mask.chunk(2, dim=-2), strict=True
        )
        outs = []
        for chunk, query_QBHD, mask in parts:
            seen = (chunk + 1) * len(query_QBHD)
            outs.append(self._attend(query_QBHD, key[:seen], value[:seen], mask[..., :seen]))
        return torch.cat(outs)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None) -> Tensor:
        q_BHSD, k_BGSD, v_BGSD = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out_BHSD = scaled_dot_product_attention(
            q_BHSD,
            k_BGSD,
            v_BGSD,
            attn_mask=None if attention_mask is None else attention_mask.logical_not(),
            is_causal=attention_mask is None,
            scale=self.softmax_scale,
            enable_gqa=key.shape[2] != query.shape[2],
        )
        return out_BHSD.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)

    def _attend_apart(self, query: Tensor, key: Tensor, value: Tensor, ends_E: Tensor) -> Tensor:
        """Causal attention of documents that follow each other through the samples: lengths add up to `ends_E`."""
        length, samples = query.shape[:2]
        parts = [x.transpose(0, 1).flatten(0, 1) for x in (query, key, value)]  # [P, heads, D]
        if (kernel := _kernel_for_lengths(query.device)) is not None and query.dtype in (torch.bfloat16, torch.float16):
            out_PHD = kernel(
                *parts, ends_E, ends_E, length, length, window_size=(-1, 0), scale=self.softmax_scale, enable_gqa=True
            )
        else:
            lengths = ends_E.diff().tolist()
            each = zip(*(x.unsqueeze(1).split(lengths) for x in parts), strict=True)
            out_PHD = torch.cat([self._attend(q, k, v, None) for q, k, v in each])
        return out_PHD.view(samples, length, -1).transpose(0, 1)


@functools.cache
def _kernel_for_lengths(device: torch.device) -> Callable[..., Any] | None:
    """torch's flash attention over cumulative lengths, where it is and knows grouped queries; GPUs only."""
    if device.type != "cuda":
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys() else None


class _WholeSequence(torch.autograd.Function):
    """[T, B, G, D] of every context-parallel rank as [S, B, G, D] in the order of the sequence.

    Every rank uses the whole, so the gradient of a part is the sum over all ranks.
    """

    @staticmethod
    def forward(ctx, x_TBGD, group):  # type: ignore[no-untyped-def]
        ranks = group.size()
        ctx.group, ctx.gathered = group, [chunk for rank in range(ranks) for chunk in context_chunks(rank, ranks)]
        gathered = x_TBGD.new_empty((ranks * len(x_TBGD), *x_TBGD.shape[1:]))
        distributed.all_gather_into_tensor(gathered, x_TBGD.contiguous(), group=group)
        chunks = gathered.chunk(2 * ranks)
        return torch.cat([chunks[ctx.gathered.index(chunk)] for chunk in range(2 * ranks)])

    @staticmethod
    def backward(ctx, grad_SBGD):  # type: ignore[no-untyped-def]
        chunks = grad_SBGD.chunk(2 * ctx.group.size())
        by_rank = torch.cat([chunks[chunk] for chunk in ctx.gathered])
        grad_TBGD = by_rank.new_empty((len(by_rank) // ctx.group.size(), *by_rank.shape[1:]))
        distributed.reduce_scatter_tensor(grad_TBGD, by_rank, group=ctx.group)
        return grad_TBGD, None


def own_positions(length: int, context: ProcessGroup) -> Tensor:
    """[T], the places in a sequence of so many tokens that this rank of a context-parallel group has."""
    if (ranks := context.size()) == 1:
        return torch.arange(length)
    chunks = torch.arange(length).chunk(2 * ranks)
    return torch.cat([chunks[chunk] for chunk in context_chunks(context.rank(), ranks)])


def later(positions_T: Tensor, length: int) -> Tensor:
    """[T, S], True where the column's token comes after the row's."""
    return positions_T[:, None] < torch.arange(length, device=positions_T.device)


def apart(documents_BS: Tensor, context: ProcessGroup) -> Tensor:
    """What keeps documents apart (Megatron's `reset_attention_mask`): cumulative lengths, or a mask where ranks share
    each sequence. Positions need no reset: rotary embeddings depend on differences alone.
    """
    if context.size() == 1:
        return cumulative_lengths(documents_BS)
    return mask_apart(documents_BS, own_positions(documents_BS.shape[1], context).to(documents_BS.device))


def cumulative_lengths(documents_BS: Tensor) -> Tensor:
    """[E + 1], int32: where documents begin, one sample after the other, and the end of the last; from 0."""
    begins_BS = torch.ones_like(documents_BS, dtype=torch.bool)
    begins_BS[:, 1:] = documents_BS[:, 1:] != documents_BS[:, :-1]
    begins = begins_BS.flatten().nonzero().flatten()
    return torch.cat([begins, begins.new_tensor([documents_BS.numel()])]).int()


def mask_apart(documents_BS: Tensor, positions_T: Tensor) -> Tensor:
    """[B, 1, T, S], True where a token of the row may not see that of the column: later, or of another document."""
    is_other_BTS = documents_BS[:, positions_T, None] != documents_BS[:, None, :]
    return (later(positions_T, documents_BS.shape[1]) | is_other_BTS)[:, None]
