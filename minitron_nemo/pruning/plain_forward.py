"""A forward pass in plain PyTorch over the tensors of a source: one process, one tensor in memory at a time.

It shares no code with the engine nor with the cuts: how rows are ordered is written out here once more, because what
rests on this file (the proof of a cut) must not rest on what it checks.

Activations are held in the dtype of the weights; products, norms, the rotary embedding and the softmax are computed in
float32 (float64 for float64) and rounded once.

Shapes: B samples, S tokens, H hidden_size, G query groups, Q query heads of a group, D kv_channels, F neurons,
V words at a time.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from minitron_nemo.checkpoint.geometry import Box
from minitron_nemo.checkpoint.source import TensorSource
from minitron_nemo.shape.rope import rotary_inverse_frequencies
from minitron_nemo.shape.tensors import EMBEDDING, FINAL_NORM, LAYER, OUTPUT

WORDS_AT_A_TIME = 8192  # rows of the head whose logits exist at a time


def runs_of_words(vocab_size: int) -> Iterator[tuple[int, int]]:
    """(first word, words) of the pieces in which a vocabulary is worked through."""
    for first in range(0, vocab_size, WORDS_AT_A_TIME):
        yield first, min(WORDS_AT_A_TIME, vocab_size - first)


class PlainModel:
    """The blocks of a model as functions of the residual stream x [B, S, H]; layers count from 0.

    A model is `x = embed(tokens)`, then for each layer `x = x + attention(layer, x)`, `x = x + mlp(layer, x)`, then
    `logits(final_norm(x), first, words)`. The underscored methods between them are what a masked model changes.
    """

    def __init__(
        self, source: TensorSource, *, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> None:
        """`dtype` is that of the activations, by default the embedding's."""
        self.source, self.arch = source, source.arch
        self.dtype = dtype or source.dtype(EMBEDDING)
        self.wide = torch.promote_types(self.dtype, torch.float32)
        self.device = device or torch.device("cpu")
        self.frequencies = rotary_inverse_frequencies(source.arch).to(self.device)

    def embed(self, tokens_BS: Tensor) -> Tensor:
        """[B, S] -> [B, S, H]; reads the rows of the words that occur."""
        words, places_BS = tokens_BS.unique(return_inverse=True)
        rows = [self._read(EMBEDDING, Box((word, 0), (1, self.arch.hidden_size))) for word in words.tolist()]
        return torch.cat(rows)[places_BS.to(self.device)].to(self.dtype)

    def attention(self, layer: int, x_BSH: Tensor) -> Tensor:
        """What the attention of a layer adds to the residual stream: causal, grouped queries, rotary positions."""
        arch, name = self.arch, f"{LAYER}.{layer}.self_attention"
        z_BSH = self._norm(f"{name}.linear_qkv.layer_norm_", x_BSH)
        fused = self._product(z_BSH, f"{name}.linear_qkv.weight", bias=arch.add_qkv_bias)
        # The rows of a group: its queries, its key, its value.
        fused_BSGbD = fused.unflatten(-1, (arch.num_query_groups, arch.heads_per_group + 2, arch.kv_channels))
        q_BSGQD, k_BSGD, v_BSGD = fused_BSGbD[..., :-2, :], fused_BSGbD[..., -2, :], fused_BSGbD[..., -1, :]
        if arch.qk_layernorm:
            q_BSGQD, k_BSGD = (
                self._over_channels(f"{name}.{which}_layernorm.", x) for which, x in (("q", q_BSGQD), ("k", k_BSGD))
            )
        q_BNSD = self._rotate(q_BSGQD.flatten(2, 3).transpose(1, 2).to(self.wide))
        k_BGSD = self._rotate(k_BSGD.transpose(1, 2).to(self.wide))
        heads_BNSD = functional.scaled_dot_product_attention(
            q_BNSD, k_BGSD, v_BSGD.transpose(1, 2).to(self.wide), is_causal=True, enable_gqa=True
        )
        heads_BSND = self._heads(layer, heads_BNSD.transpose(1, 2).to(self.dtype))
        return self._added(self._product(heads_BSND.flatten(2), f"{name}.linear_proj.weight"))

    def mlp(self, layer: int, x_BSH: Tensor) -> Tensor:
        """What the MLP of a layer adds to the residual stream."""
        name = f"{LAYER}.{layer}.mlp"
        first = self._product(self._norm(f"{name}.linear_fc1.layer_norm_", x_BSH), f"{name}.linear_fc1.weight")
        first = first.to(self.wide)
        if self.arch.is_gated:
            gate_BSF, up_BSF = first.chunk(2, dim=-1)
            neurons_BSF = functional.silu(gate_BSF) * up_BSF
        else:
            neurons_BSF = functional.relu(first).square()
        neurons_BSF = self._neurons(layer, neurons_BSF.to(self.dtype))
        return self._added(self._product(neurons_BSF, f"{name}.linear_fc2.weight"))

    def final_norm(self, x_BSH: Tensor) -> Tensor:
        """What the output head reads."""
        return self._norm(f"{FINAL_NORM}.", x_BSH)

    def logits(self, z_BSH: Tensor, first: int, words: int) -> Tensor:
        """Logits [B, S, words] of some words behind `final_norm`; they are not rounded."""
        head = EMBEDDING if self.arch.share_embeddings_and_output_weights else OUTPUT
        weight_VH = self._read(head, Box((first, 0), (words, self.arch.hidden_size)))
        return functional.linear(z_BSH.to(self.wide), weight_VH.to(self.wide))

    def _norm(self, name: str, x_BSH: Tensor) -> Tensor:
        """RMSNorm, or LayerNorm with its weight stored minus one, over all channels."""
        x_BSH, size = x_BSH.to(self.wide), (self.arch.hidden_size,)
        weight_H = self._read(f"{name}weight").to(self.wide)
        if not self.arch.has_norm_bias:
            return functional.rms_norm(x_BSH, size, weight_H, self.arch.norm_epsilon).to(self.dtype)
        bias_H = self._read(f"{name}bias").to(self.wide)
        return functional.layer_norm(x_BSH, size, 1 + weight_H, bias_H, self.arch.norm_epsilon).to(self.dtype)

    def _over_channels(self, name: str, x_D: Tensor) -> Tensor:
        """The norm of queries or keys, over the channels of each head."""
        weight_D = self._read(f"{name}weight").to(self.wide)
        return functional.rms_norm(x_D.to(self.wide), weight_D.shape, weight_D, self.arch.norm_epsilon).to(self.dtype)

    def _heads(self, layer: int, heads_BSND: Tensor) -> Tensor:
        """Outputs of the query heads on their way to the output projection."""
        return heads_BSND

    def _neurons(self, layer: int, neurons_BSF: Tensor) -> Tensor:
        """Activations of the neurons on their way to the second matrix of the MLP."""
        return neurons_BSF

    def _added(self, update_BSH: Tensor) -> Tensor:
        """What is about to be added to the residual stream."""
        return update_BSH

    def _rotate(self, x_BNSD: Tensor) -> Tensor:
        """Rotary embedding of the first channels of each head, in halves (2104.09864; GPT-NeoX's order)."""
        positions_S = torch.arange(x_BNSD.shape[2], dtype=torch.float32, device=self.device)
        angles_SR = torch.outer(positions_S, self.frequencies).to(self.wide)
        cos_SR, sin_SR = angles_SR.cos(), angles_SR.sin()
        half = len(self.frequencies)
        a, b, rest = x_BNSD.split((half, half, x_BNSD.shape[-1] - 2 * half), dim=-1)
        return torch.cat((a * cos_SR - b * sin_SR, b * cos_SR + a * sin_SR, rest), dim=-1)

    def _product(self, x: Tensor, name: str, *, bias: bool = False) -> Tensor:
        weight = self._read(name).to(self.wide)
        added = self._read(name.removesuffix("weight") + "bias").to(self.wide) if bias else None
        return functional.linear(x.to(self.wide), weight, added).to(self.dtype)

    def _read(self, name: str, box: Box | None = None) -> Tensor:
        return self.source.read(name, box).to(self.device)


@torch.no_grad()
def plain_logits(
    source: TensorSource, tokens_BS: Tensor, *, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> Tensor:
    """Logits [B, S, vocabulary] of a model, without Megatron; small models and few tokens, as all of them are held.

    `dtype` is that of the activations, by default the weights'; logits are float32 (float64 for float64).
    """
    model = PlainModel(source, dtype=dtype, device=device)
    x_BSH = model.embed(tokens_BS)
    for layer in range(source.arch.num_layers):
        x_BSH = x_BSH + model.attention(layer, x_BSH)
        x_BSH = x_BSH + model.mlp(layer, x_BSH)
    z_BSH = model.final_norm(x_BSH)
    return torch.cat([model.logits(z_BSH, *words) for words in runs_of_words(source.arch.vocab_size)], dim=-1)
