"""A whole model as a mapping of tensors, and its logits written from the packings' definitions."""

import torch
from torch import Tensor
from torch.nn import functional

from minitron_nemo.checkpoint.geometry import Box
from minitron_nemo.checkpoint.source import ShapedSource
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.shape.tensors import logical_tensors

Model = dict[str, Tensor]


class InMemory(ShapedSource):
    """A model held as a mapping."""

    def __init__(self, arch: ModelArch, model: Model) -> None:
        super().__init__(arch)
        self.model = model

    def dtype(self, name: str) -> torch.dtype:
        return self.model[name].dtype

    def read(self, name: str, box: Box | None = None) -> Tensor:
        return self.model[name] if box is None else self.model[name][box.slices()]


def random_model(arch: ModelArch, seed: int, *, dtype: torch.dtype = torch.float64) -> Model:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape(arch), generator=generator, dtype=dtype)
        for name, tensor in logical_tensors(arch).items()
    }


def forward(model: Model, arch: ModelArch, tokens: Tensor) -> Tensor:
    """Logits of the reference model, [s, vocab]: written from the packings' definitions, without rotary embedding."""

    def get(name: str, layer: int | None = None) -> Tensor:
        return model[name if layer is None else name.replace("layers.", f"layers.{layer}.")]

    def norm(x: Tensor, key: str, layer: int | None = None) -> Tensor:
        if arch.normalization == "RMSNorm":
            return functional.rms_norm(x, x.shape[-1:], get(f"{key}weight", layer))
        return functional.layer_norm(x, x.shape[-1:], 1 + get(f"{key}weight", layer), get(f"{key}bias", layer))

    x = get("embedding.word_embeddings.weight")[tokens]
    for layer in range(arch.num_layers):
        name = "decoder.layers.self_attention."
        fused = norm(x, f"{name}linear_qkv.layer_norm_", layer) @ get(f"{name}linear_qkv.weight", layer).T
        if arch.add_qkv_bias:
            fused = fused + get(f"{name}linear_qkv.bias", layer)
        heads = []
        for group in fused.chunk(arch.num_query_groups, dim=-1):
            *queries, key, value = group.split(arch.kv_channels, dim=-1)
            if arch.qk_layernorm:
                queries = [norm(q, f"{name}q_layernorm.", layer) for q in queries]
                key = norm(key, f"{name}k_layernorm.", layer)
            heads += [
                functional.scaled_dot_product_attention(q[None], key[None], value[None], is_causal=True)[0]
                for q in queries
            ]
        x = x + torch.cat(heads, dim=-1) @ get(f"{name}linear_proj.weight", layer).T
        name = "decoder.layers.mlp."
        first = norm(x, f"{name}linear_fc1.layer_norm_", layer) @ get(f"{name}linear_fc1.weight", layer).T
        if arch.is_gated:
            gate, up = first.chunk(2, dim=-1)
            neurons = functional.silu(gate) * up
        else:
            neurons = functional.relu(first).square()
        x = x + neurons @ get(f"{name}linear_fc2.weight", layer).T
    x = norm(x, "decoder.final_layernorm.")
    tied = arch.share_embeddings_and_output_weights
    return x @ get("embedding.word_embeddings.weight" if tied else "output_layer.weight").T
