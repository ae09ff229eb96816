"""Core attention on `scaled_dot_product_attention`, for machines without Transformer Engine.

Megatron's local attention materializes the score matrix; this one is faster on CPU and lets a GPU without
Transformer Engine train at 8k context.
"""

from typing import Any

from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class SdpaCoreAttention(MegatronModule):
    """Causal attention with grouped queries; fills the `core_attention` slot of a Megatron layer spec."""

    def __init__(self, config: TransformerConfig, layer_number: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(config=config)
        self.softmax_scale = kwargs.get("softmax_scale")

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[s, b, heads, d], twice [s, b, groups, d] -> [s, b, heads * d]; the mask is causal whatever is passed."""
        q_BHSD, k_BGSD, v_BGSD = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out_BHSD = scaled_dot_product_attention(
            q_BHSD, k_BGSD, v_BGSD, is_causal=True, scale=self.softmax_scale, enable_gqa=key.shape[2] != query.shape[2]
        )
        return out_BHSD.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)
