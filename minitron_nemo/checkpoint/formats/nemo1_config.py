"""`model_config.yaml` of a NeMo 1 language model, to the shape of a model and back.

Source: NeMo 1.23, `examples/nlp/language_modeling/conf/megatron_llama_config.yaml` for the names, and its GPT model for
what they mean. Every field that changes what a model computes is read, or refused by name.
"""

from collections.abc import Mapping
from typing import Any

import torch

from minitron_nemo.checkpoint.formats.megatron_config import (
    FAMILY,
    ModelFields,
    arch_of,
    llama31_factor,
    padded,
    scaled_by,
    vocabulary,
)
from minitron_nemo.errors import UserError
from minitron_nemo.shape.arch import ModelArch

# How NeMo 1 spells the fields of Megatron-Core.
NAMES = {
    "seq_length": "encoder_seq_length",
    "add_bias_linear": "bias",
    "rotary_percent": "rotary_percentage",
    "activation_func": "activation",
}
ACTIVATIONS = {"fast-swiglu": ("silu", True), "swiglu": ("silu", True), "squared-relu": ("squared_relu", False)}
NORMALIZATIONS = {"rmsnorm": ("RMSNorm", False), "layernorm1p": ("LayerNorm", True), "layernorm": ("LayerNorm", False)}
# What NeMo 1 alone has, with what is allowed besides a field that is absent or null.
REFUSED: dict[str, tuple[Any, ...]] = {
    "transformer_block_type": ("pre_ln",),
    "attention_type": ("multihead",),
    "normalize_attention_scores": (True,),
    "headscale": (False,),
    "openai_gelu": (False,),
    "onnx_safe": (False,),
    "megatron_legacy": (False,),
    "mcore_customization_config": ({},),
    "name": ("", "megatron_gpt", "megatron_gpt_full_te_layer_autocast", "te_gpt"),
}
LLAMA31_FACTOR = 8.0  # NeMo 1 knows no other
TARGET = "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel"


def arch_of_config(
    config: Mapping[str, Any], *, rows: int, words: int | None, source: str
) -> tuple[ModelArch, tuple[str, ...]]:
    """The shape of a model whose embedding has so many rows, and what to note of it.

    `words` is the size of its tokenizer where that is known: NeMo 1 itself keeps no other record of the vocabulary.
    """
    values = dict(config)
    values |= {ours: config[theirs] for ours, theirs in NAMES.items() if theirs in config}
    fields = ModelFields(values, source=source, called=NAMES)
    for name, allowed in REFUSED.items():
        if (value := config.get(name)) is not None and value not in allowed:
            raise fields.refusal(name, f"only {allowed[-1]!r} is supported")
    if str(config.get("activation")) == "swiglu" and config.get("mcore_gpt") is not True:
        raise fields.refusal("activation", "its gate is a matrix of its own; save the model with fast-swiglu")
    if (activation := ACTIVATIONS.get(str(config.get("activation")))) is None:
        raise fields.refusal("activation", f"supported are {', '.join(ACTIVATIONS)}")
    if (normalization := NORMALIZATIONS.get(str(config.get("normalization")))) is None:
        raise fields.refusal("normalization", "supported are rmsnorm and layernorm1p")
    values["activation_func"], values["gated_linear_unit"] = activation
    values["normalization"], values["layernorm_zero_centered_gamma"] = normalization
    scaling = scaled_by(LLAMA31_FACTOR) if fields.flag("scale_positional_embedding") else None
    kept = [config[name] for name in ("override_vocab_size", "vocab_size") if config.get(name) is not None]
    said = kept[0] if kept else _words_of_padded(config, rows, words)
    count, notes = vocabulary(rows, said, source=source)
    return arch_of(fields, vocab_size=count, rope_scaling=scaling), notes


def _words_of_padded(config: Mapping[str, Any], rows: int, words: int | None) -> int | None:
    """The size of the tokenizer, where that many words and the padding of NeMo 1 make these rows."""
    if words is None:
        return None
    multiple = config.get("make_vocab_size_divisible_by", 128)
    return words if rows in (words, padded(words, multiple, config), padded(words, multiple, {})) else None


def config_of(arch: ModelArch, *, dtype: torch.dtype, tp: int, pp: int) -> dict[str, Any]:
    """`model_config.yaml` of a model; UserError for a rotary scaling that NeMo 1 does not know."""
    factor = llama31_factor(arch, target="NeMo 1")
    if factor not in (None, LLAMA31_FACTOR):
        raise UserError(f"rope_scaling: factor={factor}: NeMo 1 computes with {LLAMA31_FACTOR} only")
    precision = {torch.bfloat16: "bf16", torch.float16: 16, torch.float32: 32}[dtype]
    return {
        "target": TARGET,
        "mcore_gpt": True,
        "transformer_engine": True,
        "megatron_amp_O2": False,
        "micro_batch_size": 1,
        "global_batch_size": 1,
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": None,
        "precision": precision,
        "encoder_seq_length": arch.seq_length,
        "max_position_embeddings": arch.seq_length,
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.ffn_hidden_size,
        "num_attention_heads": arch.num_attention_heads,
        "num_query_groups": arch.num_query_groups,
        "kv_channels": arch.kv_channels,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "ffn_dropout": 0.0,
        "apply_query_key_layer_scaling": False,
        "normalization": "layernorm1p" if arch.normalization == "LayerNorm1p" else "rmsnorm",
        "layernorm_epsilon": arch.norm_epsilon,
        "make_vocab_size_divisible_by": 128,
        "vocab_size": arch.vocab_size,
        "pre_process": True,
        "post_process": True,
        "bias": False,
        "add_qkv_bias": arch.add_qkv_bias,
        "qk_layernorm": arch.qk_layernorm,
        "activation": "fast-swiglu" if arch.is_gated else "squared-relu",
        "headscale": False,
        "transformer_block_type": "pre_ln",
        "normalize_attention_scores": True,
        "position_embedding_type": "rope",
        "rotary_percentage": arch.rotary_percent,
        "rotary_base": int(arch.rotary_base) if arch.rotary_base == int(arch.rotary_base) else arch.rotary_base,
        "seq_len_interpolation_factor": None,
        "scale_positional_embedding": factor is not None,
        "attention_type": "multihead",
        "share_embeddings_and_output_weights": arch.share_embeddings_and_output_weights,
        FAMILY: arch.family,
    }
