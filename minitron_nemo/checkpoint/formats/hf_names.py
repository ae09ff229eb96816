"""Hugging Face's names: which of its tensors a logical tensor is packed from, and their shapes."""

from collections.abc import Iterator

from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.shape.tensors import EMBEDDING, FINAL_NORM, LAYER, OUTPUT, LogicalTensor, logical_tensors

TOP_NAMES = {EMBEDDING: "model.embed_tokens.weight", OUTPUT: "lm_head.weight"}
NORM_NAMES = {
    f"{FINAL_NORM}.": "model.norm.",
    f"{LAYER}.self_attention.linear_qkv.layer_norm_": "model.layers.{layer}.input_layernorm.",
    f"{LAYER}.mlp.linear_fc1.layer_norm_": "model.layers.{layer}.post_attention_layernorm.",
}
# By the number of tensors that the packing of the first dimension is made of: an MLP without a gate has no gate_proj.
MATRIX_NAMES = {
    ("self_attention.linear_qkv.weight", 3): ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attention.linear_proj.weight", 1): ("self_attn.o_proj",),
    ("mlp.linear_fc1.weight", 2): ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.linear_fc1.weight", 1): ("mlp.up_proj",),
    ("mlp.linear_fc2.weight", 1): ("mlp.down_proj",),
}


def hf_names(logical: LogicalTensor, arch: ModelArch) -> tuple[str, ...]:
    """The Hugging Face tensors that one logical tensor is packed from, in packing order."""
    key = logical.row.key
    if key in TOP_NAMES:
        return (TOP_NAMES[key],)
    for prefix, name in NORM_NAMES.items():
        if key.startswith(prefix):
            return (name.format(layer=logical.layer) + key.removeprefix(prefix),)
    names = MATRIX_NAMES[key.removeprefix(f"{LAYER}."), len(logical.row.dims[0].hf_sizes(arch))]
    return tuple(f"model.layers.{logical.layer}.{name}.weight" for name in names)


def hf_shapes(logical: LogicalTensor, arch: ModelArch) -> list[tuple[int, ...]]:
    """The shapes of those tensors."""
    rest = logical.shape(arch)[1:]
    return [(rows, *rest) for rows in logical.row.dims[0].hf_sizes(arch)]


def hf_tensors(arch: ModelArch) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor in a Hugging Face folder of this shape, in the order of the forward pass."""
    for logical in logical_tensors(arch).values():
        yield from zip(hf_names(logical, arch), hf_shapes(logical, arch), strict=True)
