"""Core attention on `scaled_dot_product_attention`, for machines without Transformer Engine.

Megatron's local attention materializes the score matrix; this one is faster on CPU and lets a GPU without
Transformer Engine train at 8k context.
"""

from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class SdpaCoreAttention(MegatronModule):
    """Causal attention with grouped queries; fills the `core_attention` slot of a Megatron layer spec.

    Without a mask attention is causal; a mask says all, in Megatron's sense of True for what is not seen.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(config=config)
        self.softmax_scale = kwargs.get("softmax_scale")

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """[s, b, heads, d], twice [s, b, groups, d], None or [b, 1, s, s] with causality in it -> [s, b, heads * d]."""
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


def mask_apart(documents_BS: Tensor) -> Tensor:
    """[b, 1, s, s], True where a token of the row may not see that of the column: a later one, or another document's.

    Megatron's `reset_attention_mask`. Positions need no reset: rotary embeddings depend on differences alone.
    """
    S = documents_BS.shape[1]
    is_later_SS = torch.ones(S, S, dtype=torch.bool, device=documents_BS.device).triu(1)
    is_other_BSS = documents_BS[:, :, None] != documents_BS[:, None, :]
    return (is_later_SS | is_other_BSS)[:, None]
