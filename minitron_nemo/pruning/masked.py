"""The whole source of a cut with the removed units masked out: what the sliced model must compute.

Masks are written from the meaning of each axis, on activations and never on weights, and share no code with the cuts:
removed neurons are zero behind the activation, removed heads behind the attention, removed channels in the residual
stream, where norms are taken over the kept channels alone. Removed layers are skipped and removed words left out by who
calls the blocks.

Shapes: B samples, S tokens, H hidden_size, N query heads, D kv_channels, F neurons.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minitron_nemo.checkpoint.source import TensorSource
from minitron_nemo.errors import UserError
from minitron_nemo.pruning.plain_forward import PlainModel
from minitron_nemo.pruning.plan import PruningPlan
from minitron_nemo.shape.axes import AXES

# Whole query groups go with their heads: behind the attention there is nothing of a group but its heads.
MASKED_AXES = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "vocab_size",
)  # fmt: skip


class MaskedModel(PlainModel):
    """The source of `plan` with what the plan removes masked out; layers count as in the source.

    Raises UserError for an axis that has no mask here.
    """

    def __init__(
        self,
        source: TensorSource,
        plan: PruningPlan,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(source, dtype=dtype, device=device)
        plan.check_source(source.arch)
        pruned = [name for name, axis in AXES.items() if axis.size(plan.source) != axis.size(plan.target)]
        if unknown := [name for name in pruned if name not in MASKED_AXES]:
            raise UserError(
                f"prune.proof: {unknown[0]} has no mask, so its cut cannot be proven; set prune.proof=false"
            )
        self.plan = plan
        self.channels_H = self._chosen(plan.units("hidden_size"), source.arch.hidden_size)

    def kept_words(self) -> Tensor:
        """Kept words of the vocabulary, ascending, on the CPU."""
        if self.plan.target.vocab_size == self.plan.source.vocab_size:
            return torch.arange(self.arch.vocab_size)
        return torch.tensor(self.plan.units("vocab_size"))

    def kept_channels(self, x_BSH: Tensor) -> Tensor:
        """The kept channels of something in the residual stream, as the sliced model has them."""
        return x_BSH[..., self.channels_H]

    def embed(self, tokens_BS: Tensor) -> Tensor:
        return self._added(super().embed(tokens_BS))

    def _norm(self, name: str, x_BSH: Tensor) -> Tensor:
        """The norm's formula with every mean over the kept channels; the removed ones stay zero behind it."""
        x_BSH, kept_H = x_BSH.to(self.wide), self.channels_H.to(self.wide)
        count = kept_H.sum()
        weight_H = self._read(f"{name}weight").to(self.wide)
        if not self.arch.has_norm_bias:
            scale_BS1 = torch.rsqrt((x_BSH.square() * kept_H).sum(-1, keepdim=True) / count + self.arch.norm_epsilon)
            return (x_BSH * scale_BS1 * weight_H * kept_H).to(self.dtype)
        mean_BS1 = (x_BSH * kept_H).sum(-1, keepdim=True) / count
        centred_BSH = (x_BSH - mean_BS1) * kept_H
        scale_BS1 = torch.rsqrt(centred_BSH.square().sum(-1, keepdim=True) / count + self.arch.norm_epsilon)
        bias_H = self._read(f"{name}bias").to(self.wide)
        return ((centred_BSH * scale_BS1 * (1 + weight_H) + bias_H) * kept_H).to(self.dtype)

    def _heads(self, layer: int, heads_BSND: Tensor) -> Tensor:
        heads_N = self._chosen(self._units("num_attention_heads", layer), self.arch.num_attention_heads)
        return heads_BSND.masked_fill(~heads_N[:, None], 0)

    def _neurons(self, layer: int, neurons_BSF: Tensor) -> Tensor:
        neurons_F = self._chosen(self._units("ffn_hidden_size", layer), self.arch.ffn_hidden_size)
        return neurons_BSF.masked_fill(~neurons_F, 0)

    def _added(self, update_BSH: Tensor) -> Tensor:
        return update_BSH.masked_fill(~self.channels_H, 0)

    def _units(self, axis: str, layer: int) -> Sequence[int]:
        """Kept units of an axis in a layer of the source."""
        return self.plan.units(axis, self.plan.layers.index(layer))

    def _chosen(self, units: Sequence[int], size: int) -> Tensor:
        chosen = torch.zeros(size, dtype=torch.bool, device=self.device)
        chosen[list(units)] = True
        return chosen
