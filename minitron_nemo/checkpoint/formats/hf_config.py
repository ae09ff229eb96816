"""`config.json` of the supported Hugging Face families, to the shape of a model and back.

Every field that changes what a model computes is read or refused by name; the rest is kept as it came.
"""

from dataclasses import asdict
from typing import Any

import torch

from minitron_nemo.checkpoint.formats.hf_families import HF_FAMILIES, HfFamily, family_of
from minitron_nemo.errors import UserError, naming, shown
from minitron_nemo.shape.arch import WHOLE_HEADS, ModelArch, RopeScaling

ROPE_FIELDS = ("rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor")
OF_THE_SOURCE = ("_name_or_path", "transformers_version")  # who wrote it and where: untrue of a model cut from it
SIZES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "vocab_size": "vocab_size",
    "seq_length": "max_position_embeddings",
}
REFUSED = {
    "auto_map": "its code would have to be run; only models that transformers itself knows are read",
    "quantization_config": "quantized weights cannot be pruned; give the model before quantization",
    "attention_bias": "a bias of the attention's output is not supported; those that Qwen2 always has need no field",
    "mlp_bias": "biases in the MLP are not supported",
    "num_experts": "mixtures of experts are not supported",
    "num_local_experts": "mixtures of experts are not supported",
    "n_routed_experts": "mixtures of experts are not supported",
}


def arch_from_config(config: dict[str, Any], *, source: str = "config.json") -> ModelArch:
    """The shape that a parsed `config.json` describes; UserError naming the first field that is not supported."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in HF_FAMILIES:
        raise UserError(f"{source}: model_type={model_type!r}: supported are {', '.join(HF_FAMILIES)}")
    family = HF_FAMILIES[model_type]
    architectures = config.get("architectures")
    if architectures not in (None, [family.architecture]):
        raise UserError(f"{source}: architectures={architectures!r}: {model_type} needs ['{family.architecture}']")
    for name, reason in REFUSED.items():
        if config.get(name):
            raise UserError(f"{source}: {name}={shown(config[name])}: {reason}")
    _check_attention(config, family, source)
    if (act := config.get("hidden_act", family.hidden_act)) != family.hidden_act:
        raise UserError(f"{source}: hidden_act={act!r}: {model_type} is supported with {family.hidden_act!r}")
    tied = config.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise UserError(f"{source}: tie_word_embeddings={tied!r}: must be true or false")
    base, rotary_percent, scaling = _rope(config, family, source)
    sizes, epsilon = (
        _sizes(config, family, source),
        _number(config, family.epsilon_field, source, default=family.epsilon),
    )
    with naming(source):
        return ModelArch(
            **family.parts,
            **sizes,  # type: ignore[arg-type]  # sizes have no other fields' names
            family=model_type,
            norm_epsilon=epsilon,
            rotary_base=base,
            rotary_percent=rotary_percent,
            rope_scaling=scaling,
            share_embeddings_and_output_weights=tied,
        )


def _check_attention(config: dict[str, Any], family: HfFamily, source: str) -> None:
    """Refuse attention that does not reach back to the first token."""
    layer_types = config.get("layer_types")
    if layer_types and any(kind != "full_attention" for kind in layer_types):
        raise UserError(f"{source}: layer_types={shown(layer_types)}: only full_attention is supported")
    if family.window_needs is not None and not config.get(family.window_needs):
        return
    window, reach = config.get("sliding_window", family.window), config.get("max_position_embeddings")
    if window is not None and not (isinstance(window, int) and isinstance(reach, int) and window >= reach):
        absent = "" if family.window is None else f" ({family.window} when absent from such a config)"
        raise UserError(
            f"{source}: sliding_window={window!r}{absent} is shorter than "
            f"max_position_embeddings={reach!r}: set sliding_window to null, or lower max_position_embeddings to it"
        )


def _sizes(config: dict[str, Any], family: HfFamily, source: str) -> dict[str, int]:
    """The sizes under our names, with what transformers fills in when a field is absent."""
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    absent = {"num_key_value_heads": family.num_key_value_heads, "head_dim": family.head_dim}
    values = {**absent, **config}
    if values["num_key_value_heads"] is None:
        values["num_key_value_heads"] = heads
    if values.get("head_dim") is None and isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        if hidden % heads:
            raise UserError(
                f"{source}: head_dim is absent and hidden_size={hidden} is no multiple of "
                f"num_attention_heads={heads}: write head_dim into the config"
            )
        values["head_dim"] = hidden // heads
    for name in SIZES.values():
        value = values.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{source}: {name}={value!r}: must be a whole number of at least 1")
    return {ours: values[theirs] for ours, theirs in SIZES.items()}


def _rope(config: dict[str, Any], family: HfFamily, source: str) -> tuple[float, float, RopeScaling | None]:
    """(base, rotated part of each head, scaling) from `rope_parameters` (transformers 5) or the older fields."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{source}: rope_parameters={shown(rope)}: must be a mapping")
    # transformers 5 lets the older top-level fields fill what the mapping leaves out.
    older = {name: value for name, value in config.items() if name in ("rope_theta", "partial_rotary_factor")}
    rope = older | rope
    base = _number(rope, "rope_theta", source, default=10000.0)
    factor = _number(rope, "partial_rotary_factor", source, default=family.rotary_factor)
    if not family.partial_rotary and factor != 1.0:
        raise UserError(f"{source}: partial_rotary_factor={factor!r}: {config['model_type']} has 1.0 only")
    if not 0 < factor <= 1:
        raise UserError(f"{source}: partial_rotary_factor={factor!r}: must be above 0 and at most 1")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return base, factor, None
    if kind != "llama3":
        raise UserError(f"{source}: rope_type={kind!r}: supported are 'default' and 'llama3'")
    original = rope.get("original_max_position_embeddings")
    if isinstance(original, bool) or not isinstance(original, int) or original < 1:
        raise UserError(f"{source}: original_max_position_embeddings={original!r}: must be a whole number")
    factors = {name: _number(rope, name, source) for name in ("factor", "low_freq_factor", "high_freq_factor")}
    return base, factor, RopeScaling(**factors, original_max_position_embeddings=original)


def _number(values: dict[str, Any], name: str, source: str, *, default: float | None = None) -> float:
    value = values.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise UserError(f"{source}: {name}={value!r}: must be a number above 0")
    return float(value)


def config_from_arch(arch: ModelArch, *, dtype: torch.dtype, base: dict[str, Any] | None = None) -> dict[str, Any]:
    """`config.json` for a model of this shape; `base`, the config it once came with, keeps its other fields.

    Raises UserError for a shape that no model of its family has.
    """
    family = family_of(arch)
    base = dict(base) if base and base.get("model_type") == arch.family else {}
    is_nested = "rope_parameters" in base
    is_smaller = any(base.get(theirs, getattr(arch, ours)) != getattr(arch, ours) for ours, theirs in SIZES.items())
    gone = (*REFUSED, *ROPE_FIELDS, *(OF_THE_SOURCE if is_smaller else ()))
    base = {name: value for name, value in base.items() if name not in gone}
    layer_types = {"layer_types": ["full_attention"] * arch.num_layers} if base.get("layer_types") else {}
    # transformers takes a window of its own for a config that says nothing.
    needs_window = family.window is not None and family.window_needs is None
    window = {"sliding_window": base.get("sliding_window")} if needs_window else {}
    dtype_name = str(dtype).removeprefix("torch.")
    dtype_fields = [name for name in ("dtype", "torch_dtype") if name in base] or ["torch_dtype"]
    return {
        **base,
        "architectures": [family.architecture],
        "model_type": arch.family,
        **{theirs: getattr(arch, ours) for ours, theirs in SIZES.items()},
        "hidden_act": family.hidden_act,
        family.epsilon_field: arch.norm_epsilon,
        "tie_word_embeddings": arch.share_embeddings_and_output_weights,
        **(family.written or {}),
        **window,
        **layer_types,
        **_rope_fields(arch, is_nested=is_nested),
        **dict.fromkeys(dtype_fields, dtype_name),
    }


def _rope_fields(arch: ModelArch, *, is_nested: bool) -> dict[str, Any]:
    """The rotary settings in the form of the source: one mapping (transformers 5) or separate fields (4 reads it)."""
    theta: dict[str, Any] = {"rope_theta": arch.rotary_base}
    if HF_FAMILIES[arch.family].partial_rotary:
        theta["partial_rotary_factor"] = arch.rotary_percent
    scaling = {"rope_type": "llama3", **asdict(arch.rope_scaling)} if arch.rope_scaling else None
    if is_nested:
        return {"rope_parameters": {"rope_type": "default", **theta, **(scaling or {})}}
    return {**theta, "rope_scaling": scaling}


def export_doubt(target: ModelArch, *, largest: int) -> str | None:
    """What to choose instead of a hidden size (of at most `largest`) that transformers 5 refuses, or None."""
    hidden, heads = target.hidden_size, target.num_attention_heads
    if target.family not in WHOLE_HEADS or hidden % heads == 0:
        return None
    below = hidden // heads * heads
    choices = [f"hidden_size={size}" for size in (below, below + heads) if 0 < size <= largest]
    return (
        f"hidden_size={hidden} is no multiple of num_attention_heads={heads}: transformers 5 will not open an export "
        f"of this Llama; choose {' or '.join(choices) or 'fewer heads'}"
    )
