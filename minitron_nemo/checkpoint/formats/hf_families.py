"""The supported Hugging Face families: what each computes, and what transformers takes where a field is absent."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minitron_nemo.errors import UserError
from minitron_nemo.shape.arch import ModelArch


@dataclass(frozen=True)
class HfFamily:
    """One `model_type`: the parts that all of its models have, in Megatron's names and in Hugging Face's.

    `num_key_value_heads` and `head_dim` are what an absent field means; None: as many as query heads, and
    hidden_size / num_attention_heads. `partial_rotary`: whether a part of each head may stay unturned. `window`: the
    sliding window of a config that says nothing of it; `window_needs`: the field that has to be true for a window to
    count. `written` are fields that every config of the family says.
    """

    architecture: str
    hidden_act: str = "silu"
    epsilon_field: str = "rms_norm_eps"
    epsilon: float = 1e-6
    rotary_factor: float = 1.0
    partial_rotary: bool = False
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    window: int | None = None
    window_needs: str | None = None
    activation: str = "swiglu"
    normalization: str = "RMSNorm"
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    written: Mapping[str, Any] | None = None

    @property
    def parts(self) -> dict[str, Any]:
        """Fields of `ModelArch` that are the same in every model of the family."""
        names = ("activation", "normalization", "add_qkv_bias", "qk_layernorm")
        return {name: getattr(self, name) for name in names}


NO_BIASES = {"attention_bias": False, "mlp_bias": False}
HF_FAMILIES = {
    "llama": HfFamily("LlamaForCausalLM", written=NO_BIASES),
    "mistral": HfFamily("MistralForCausalLM", num_key_value_heads=8, window=4096),
    "nemotron": HfFamily(
        "NemotronForCausalLM",
        hidden_act="relu2",
        epsilon_field="norm_eps",
        epsilon=1e-5,
        rotary_factor=0.5,
        partial_rotary=True,
        activation="squared_relu",
        normalization="LayerNorm1p",
        written=NO_BIASES,
    ),
    "qwen2": HfFamily(
        "Qwen2ForCausalLM",
        num_key_value_heads=32,
        window=4096,
        window_needs="use_sliding_window",
        add_qkv_bias=True,
        written={"use_sliding_window": False},
    ),
    "qwen3": HfFamily(
        "Qwen3ForCausalLM",
        num_key_value_heads=32,
        head_dim=128,
        window=4096,
        window_needs="use_sliding_window",
        qk_layernorm=True,
        written={"attention_bias": False, "use_sliding_window": False},
    ),
}


def family_of(arch: ModelArch) -> HfFamily:
    """The family of a shape; UserError when no model of it has such parts, so that no config could say what it is."""
    family = HF_FAMILIES[arch.family]
    for name, value in family.parts.items():
        if (found := getattr(arch, name)) != value:
            raise UserError(
                f"model.{name}={found}: no {family.architecture} has that (family={arch.family}: {value}); give the "
                "family that does, or leave it out"
            )
    return family
