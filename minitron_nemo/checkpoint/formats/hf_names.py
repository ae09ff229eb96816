"""Hugging Face's names: which of its tensors a logical tensor is packed from, and their shapes."""

from collections.abc import Iterator

from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.shape.tensors import EMBEDDING, FINAL_NORM, LAYER, OUTPUT, LogicalTensor, logical_tensors

TOP_NAMES = {EMBEDDING: "model.embed_tokens.weight", OUTPUT: "lm_head.weight"}
# Norms that the matrix behind them is fused with carry its name.
NORM_NAMES = {
    f"{FINAL_NORM}.": "model.norm.",
    f"{LAYER}.self_attention.linear_qkv.layer_norm_": "model.layers.{layer}.input_layernorm.",
    f"{LAYER}.mlp.linear_fc1.layer_norm_": "model.layers.{layer}.post_attention_layernorm.",
}
# Other modules of a layer, by the number of tensors that the packing of the first dimension is made of: an MLP without
# a gate has no gate_proj.
MODULE_NAMES = {
    ("self_attention.linear_qkv", 3): ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attention.q_layernorm", 1): ("self_attn.q_norm",),
    ("self_attention.k_layernorm", 1): ("self_attn.k_norm",),
    ("self_attention.linear_proj", 1): ("self_attn.o_proj",),
    ("mlp.linear_fc1", 2): ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.linear_fc1", 1): ("mlp.up_proj",),
    ("mlp.linear_fc2", 1): ("mlp.down_proj",),
}


def hf_names(logical: LogicalTensor, arch: ModelArch) -> tuple[str, ...]:
    """The Hugging Face tensors that one logical tensor is packed from, in packing order."""
    key = logical.row.key
    if key in TOP_NAMES:
        return (TOP_NAMES[key],)
    for prefix, name in NORM_NAMES.items():
        if key.startswith(prefix):
            return (name.format(layer=logical.layer) + key.removeprefix(prefix),)
    module, _, part = key.removeprefix(f"{LAYER}.").rpartition(".")
    names = MODULE_NAMES[module, len(logical.row.dims[0].hf_sizes(arch))]
    return tuple(f"model.layers.{logical.layer}.{name}.{part}" for name in names)


def hf_shapes(logical: LogicalTensor, arch: ModelArch) -> list[tuple[int, ...]]:
    """The shapes of those tensors."""
    rest = logical.shape(arch)[1:]
    return [(rows, *rest) for rows in logical.row.dims[0].hf_sizes(arch)]


def hf_tensors(arch: ModelArch) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor in a Hugging Face folder of this shape, in the order of the forward pass."""
    for logical in logical_tensors(arch).values():
        yield from zip(hf_names(logical, arch), hf_shapes(logical, arch), strict=True)
