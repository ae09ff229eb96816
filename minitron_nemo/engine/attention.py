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


class Norm(torch.nn.Module):
    """RMSNorm, or LayerNorm whose weight is stored minus one (LayerNorm1p); marks itself for sequence parallelism.

    Megatron's local torch norms refuse sequence parallelism and zero-centered weights.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__()
        self.eps = eps
        self.is_layer_norm = config.normalization == "LayerNorm"
        self.zero_centered = config.layernorm_zero_centered_gamma
        self.weight = torch.nn.Parameter(torch.ones(hidden_size) - float(self.zero_centered))
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size)) if self.is_layer_norm else None
        for parameter in self.parameters():
            # Each rank sees a slice of the sequence, so Megatron must sum these gradients over the group.
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + 1 if self.zero_centered else self.weight
        if self.is_layer_norm:
            return torch.nn.functional.layer_norm(x, weight.shape, weight, self.bias, self.eps)
        return torch.nn.functional.rms_norm(x, weight.shape, weight, self.eps)
