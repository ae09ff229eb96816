"""The norm of machines without Transformer Engine."""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


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
