"""The fields by which Megatron, its Bridge and NeMo describe a model, to the shape of a model.

All of them fill Megatron-Core's `TransformerConfig` and the arguments of its `GPTModel`. Every field that changes what
a model computes is read, or refused by name when it asks for what is not supported; the rest says how it was trained.
"""

import math
from collections.abc import Mapping
from typing import Any

from minitron_nemo.errors import UserError, shown
from minitron_nemo.shape.arch import FAMILIES, ModelArch, RopeScaling

FAMILY = "minitron_family"  # ours, beside the fields of others, which pass it over: llama and mistral compute alike
LLAMA31 = (1.0, 4.0, 8192)  # what Megatron-Core scales by, whatever the model: low and high factor, original context

# What is allowed besides a field that is absent or null.
REFUSED: dict[str, tuple[Any, ...]] = {
    "add_bias_linear": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "rotary_interleaved": (False,),
    "multi_latent_attention": (False,),
    "attention_output_gate": (False,),
    "qk_l2_norm": (False,),
    "softmax_type": ("vanilla",),
    "softmax_scale": (),
    "glu_linear_offset": (0.0,),
    "activation_func_clamp_value": (),
    "window_attn_skip_freq": (),
    "no_rope_freq": (),
    "num_moe_experts": (),
    "mtp_num_layers": (0,),
    "linear_attention_freq": (),
    "experimental_attention_variant": (),
    "heterogeneous_block_specs": (False,),
    "heterogeneous_layers_config_path": (),
    "heterogeneous_layers_config_encoded_json": (),
    "is_hybrid_model": (False,),
    "use_mup": (False,),
    "seq_len_interpolation_factor": (1.0,),
    "rotary_scaling_factor": (1.0,),
    "mrope_section": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "quant_recipe": (),
    "fp4": (),
}


class ModelFields:
    """The fields of a model's description under Megatron-Core's names; `called` says how the source spells some."""

    def __init__(self, values: Mapping[str, Any], *, source: str, called: Mapping[str, str] | None = None) -> None:
        self.values, self.source, self.called = values, source, called or {}

    def refusal(self, name: str, allowed: str) -> UserError:
        return UserError(f"{self.source}: {self.called.get(name, name)}={shown(self.values.get(name))}: {allowed}")

    def size(self, name: str, *, default: int | None = None) -> int:
        value = self.values.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.refusal(name, "must be a whole number of at least 1")
        return value

    def number(self, name: str, *, default: float | None = None) -> float:
        value = self.values.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self.refusal(name, "must be a number above 0")
        return float(value)

    def flag(self, name: str, *, default: bool = False) -> bool:
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.refusal(name, "must be true or false")
        return value


def arch_of(fields: ModelFields, *, vocab_size: int, rope_scaling: RopeScaling | None, family: str = "") -> ModelArch:
    """The shape; UserError naming the first field that asks for what is not supported.

    `activation_func` is the last name of the function; `family` is used where the fields do not say one.
    """
    for name, allowed in REFUSED.items():
        if (value := fields.values.get(name)) is not None and value not in allowed:
            may = f"only {allowed[0]!r} is supported" if allowed else "not supported, it must be left out or null"
            raise fields.refusal(name, may)
    if (position := fields.values.get("position_embedding_type")) != "rope":
        raise fields.refusal("position_embedding_type", f"only 'rope' is supported, not {position!r}")
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    if fields.values.get("kv_channels") is None and hidden % heads:
        raise fields.refusal("kv_channels", f"absent, and hidden_size={hidden} is no multiple of {heads} heads")
    seq_length = fields.size("seq_length")
    _check_window(fields, seq_length)
    activation, normalization = _activation(fields), _normalization(fields)
    values: dict[str, Any] = {
        "num_layers": fields.size("num_layers"),
        "hidden_size": hidden,
        "ffn_hidden_size": fields.size("ffn_hidden_size", default=4 * hidden),
        "num_attention_heads": heads,
        "num_query_groups": fields.size("num_query_groups", default=heads),
        "kv_channels": fields.size("kv_channels", default=hidden // heads),
        "vocab_size": vocab_size,
        "seq_length": seq_length,
        "family": _family(fields, default=family),
        "activation": activation,
        "normalization": normalization,
        "norm_epsilon": fields.number("layernorm_epsilon", default=1e-5),
        "rotary_base": fields.number("rotary_base", default=10000.0),
        "rotary_percent": fields.number("rotary_percent", default=1.0),
        "rope_scaling": rope_scaling,
        "share_embeddings_and_output_weights": fields.flag("share_embeddings_and_output_weights", default=True),
        "add_qkv_bias": fields.flag("add_qkv_bias"),
        "qk_layernorm": fields.flag("qk_layernorm"),
    }
    if values["rotary_percent"] > 1:
        raise fields.refusal("rotary_percent", "must be at most 1")
    return ModelArch(**values)


def core_fields(arch: ModelArch) -> dict[str, Any]:
    """The fields that `arch_of` reads the shape from; each target has its own way to say activation and rotary scaling.

    All are written, also where a class has the same default: defaults differ between classes and releases.
    """
    is_1p = arch.normalization == "LayerNorm1p"
    return {
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.ffn_hidden_size,
        "num_attention_heads": arch.num_attention_heads,
        "num_query_groups": arch.num_query_groups,
        "kv_channels": arch.kv_channels,
        "seq_length": arch.seq_length,
        "vocab_size": arch.vocab_size,
        "normalization": "LayerNorm" if is_1p else arch.normalization,
        "layernorm_zero_centered_gamma": is_1p,
        "layernorm_epsilon": arch.norm_epsilon,
        "gated_linear_unit": arch.is_gated,
        "position_embedding_type": "rope",
        "rotary_base": arch.rotary_base,
        "rotary_percent": arch.rotary_percent,
        "rotary_interleaved": False,
        "seq_len_interpolation_factor": None,
        "window_size": None,
        "add_bias_linear": False,
        "add_qkv_bias": arch.add_qkv_bias,
        "qk_layernorm": arch.qk_layernorm,
        "share_embeddings_and_output_weights": arch.share_embeddings_and_output_weights,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "num_moe_experts": None,
    }


def _activation(fields: ModelFields) -> str:
    name, gated = fields.values.get("activation_func"), fields.flag("gated_linear_unit")
    if (name, gated) in (("silu", True), ("swiglu", True)):
        return "swiglu"
    if (name, gated) == ("squared_relu", False):
        return "squared_relu"
    kind = "gated" if gated else "not gated"
    raise fields.refusal("activation_func", f"{kind}: supported are silu with a gate and squared_relu without")


def _normalization(fields: ModelFields) -> str:
    name, zero_centered = fields.values.get("normalization"), fields.flag("layernorm_zero_centered_gamma")
    if (name, zero_centered) == ("RMSNorm", False):
        return "RMSNorm"
    if (name, zero_centered) == ("LayerNorm", True):
        return "LayerNorm1p"
    kind = "kept less one" if zero_centered else "kept whole"
    raise fields.refusal("normalization", f"{kind}: supported are RMSNorm kept whole and LayerNorm kept less one")


def _family(fields: ModelFields, *, default: str) -> str:
    said = fields.values.get(FAMILY)
    if said is not None:
        if said not in FAMILIES:
            raise fields.refusal(FAMILY, f"allowed are {', '.join(FAMILIES)}")
        return str(said)
    has_parts = {"qwen2": fields.flag("add_qkv_bias"), "qwen3": fields.flag("qk_layernorm")}
    has_parts["nemotron"] = not fields.flag("gated_linear_unit")
    return default or next((family for family, has in has_parts.items() if has), "llama")


def _check_window(fields: ModelFields, seq_length: int) -> None:
    """Refuse attention that does not reach back to the first token."""
    window = fields.values.get("window_size")
    if window is None:
        return
    reach = window[0] if isinstance(window, list | tuple) and len(window) == 2 else None
    if not isinstance(reach, int) or isinstance(reach, bool) or 0 <= reach < seq_length:
        raise fields.refusal("window_size", f"a window shorter than seq_length={seq_length} is not supported")


def llama31_factor(arch: ModelArch, *, target: str) -> float | None:
    """The factor of the rotary scaling where `target` can say no more than that; UserError where it needs more."""
    scaling = arch.rope_scaling
    if scaling is None:
        return None
    rest = (scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings)
    if rest != LLAMA31:
        raise UserError(
            f"rope_scaling: low_freq_factor, high_freq_factor, original_max_position_embeddings={rest}: {target} "
            f"computes with {LLAMA31} only and could not open this model; choose another format"
        )
    return scaling.factor


def scaled_by(factor: float) -> RopeScaling:
    """The rotary scaling that Megatron-Core computes with by this factor."""
    low, high, original = LLAMA31
    return RopeScaling(factor, low, high, original)


def rope_scaling_of(fields: ModelFields) -> RopeScaling | None:
    """The rotary scaling in a config of NeMo 2 or of the Bridge, whose models of Llama 3.1 name all its numbers."""
    if fields.values.get("scale_factor") is not None:
        return RopeScaling(
            fields.number("scale_factor"),
            fields.number("low_freq_factor", default=1.0),
            fields.number("high_freq_factor", default=4.0),
            fields.size("old_context_len", default=8192),
        )
    if fields.flag("rope_scaling"):
        return scaled_by(fields.number("rope_scaling_factor", default=8.0))
    return None


def padded(words: int, multiple: Any, args: Mapping[str, Any]) -> int:
    """Rows of an embedding for so many words, as Megatron-LM and NeMo pad it; `args` say over how many ranks."""
    tp = args.get("tensor_model_parallel_size")
    multiples = [value for value in (multiple, tp) if isinstance(value, int) and value > 0]
    return math.ceil(words / math.prod(multiples)) * math.prod(multiples)


def vocabulary(rows: int, said: Any, *, source: str) -> tuple[int, tuple[str, ...]]:
    """Words of an embedding of so many rows, and what to note: `said` of them where it is known."""
    if said is None:
        return rows, (f"vocabulary of {rows} rows; nothing says how many of them are padding",)
    if isinstance(said, bool) or not isinstance(said, int) or not 1 <= said <= rows:
        raise UserError(f"{source}: vocab_size={said!r}: the embedding has {rows} rows; it needs one for each word")
    return said, () if said == rows else (f"{rows - said} rows of padding in the vocabulary",)
