"""The shape of a model: one record that every step reads, with its parameter count and its compute."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minitron_nemo.errors import UserError, naming, shown
from minitron_nemo.shape.limits import check_fields

FAMILIES = ("llama", "mistral", "nemotron", "qwen2", "qwen3")
ACTIVATIONS = ("swiglu", "squared_relu")
NORMALIZATIONS = ("RMSNorm", "LayerNorm1p")
# Families that transformers 5 opens only when the hidden size is a multiple of the heads, whatever `head_dim` says.
WHOLE_HEADS = ("llama",)

# Fields that no file of schema version 1 has.
LATER = ("add_qkv_bias", "qk_layernorm")


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3 scaling of the rotary frequencies (Hugging Face `rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        check_fields(self)
        if self.low_freq_factor >= self.high_freq_factor:
            raise UserError(
                f"low_freq_factor={self.low_freq_factor}: must be below high_freq_factor={self.high_freq_factor}"
            )


@dataclass(frozen=True)
class ModelArch:
    """Shape of a decoder-only transformer, in Megatron-Core's field names.

    `num_attention_heads` query heads of `kv_channels` channels share `num_query_groups` key/value heads;
    `kv_channels` is always explicit because width pruning keeps it while `hidden_size` shrinks.
    `seq_length` is the longest position the model was made for. `add_qkv_bias`: queries, keys and values have biases;
    `qk_layernorm`: the channels of each query and key head go through a norm, which all heads of a layer share, before
    they are turned.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    seq_length: int
    family: str = "llama"
    activation: str = "swiglu"
    normalization: str = "RMSNorm"
    norm_epsilon: float = 1e-5
    rotary_base: float = 10000.0
    rotary_percent: float = 1.0
    rope_scaling: RopeScaling | None = None
    share_embeddings_and_output_weights: bool = False
    add_qkv_bias: bool = False
    qk_layernorm: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.rotary_percent > 1:
            raise UserError(f"rotary_percent={self.rotary_percent}: the rotated part of a head is at most 1")
        if self.num_attention_heads % self.num_query_groups:
            raise UserError(
                f"num_attention_heads={self.num_attention_heads}: must be a multiple of "
                f"num_query_groups={self.num_query_groups}"
            )
        for name, allowed in (("family", FAMILIES), ("activation", ACTIVATIONS), ("normalization", NORMALIZATIONS)):
            if getattr(self, name) not in allowed:
                raise UserError(f"{name}={shown(getattr(self, name))}: allowed are {', '.join(allowed)}")
        for name in ("share_embeddings_and_output_weights", *LATER):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name}={getattr(self, name)!r}: must be true or false")
        if self.qk_layernorm and self.normalization != "RMSNorm":
            raise UserError(f"qk_layernorm=true: needs normalization=RMSNorm, not {self.normalization}")

    @property
    def is_gated(self) -> bool:
        return self.activation == "swiglu"

    @property
    def has_norm_bias(self) -> bool:
        return self.normalization == "LayerNorm1p"

    @property
    def heads_per_group(self) -> int:
        return self.num_attention_heads // self.num_query_groups

    @property
    def query_size(self) -> int:
        """Channels of all query heads; differs from `hidden_size` in width-pruned models."""
        return self.num_attention_heads * self.kv_channels

    @property
    def qkv_size(self) -> int:
        """Rows of the fused query-key-value projection."""
        return (self.num_attention_heads + 2 * self.num_query_groups) * self.kv_channels

    @property
    def fc1_size(self) -> int:
        """Rows of the first MLP matrix: gate and up when gated."""
        return self.ffn_hidden_size * (2 if self.is_gated else 1)

    def num_params(self) -> int:
        """Every weight, both embedding tables included (a tied table once)."""
        norm = self.hidden_size * (2 if self.has_norm_bias else 1)
        layer = self.hidden_size * (self.qkv_size + self.query_size + self.fc1_size + self.ffn_hidden_size) + 2 * norm
        layer += self.qkv_size * self.add_qkv_bias + 2 * self.kv_channels * self.qk_layernorm
        return self.num_layers * layer + norm + self.num_embedding_params()

    def num_embedding_params(self) -> int:
        """Weights of the embedding table and of the output head (one table when they are tied)."""
        tables = 1 if self.share_embeddings_and_output_weights else 2
        return tables * self.vocab_size * self.hidden_size

    def kv_cache_bytes_per_token(self, itemsize: int = 2) -> int:
        """Bytes of the keys and values of one token in all layers; `itemsize` of a number is 2 in bf16."""
        return 2 * self.num_layers * self.num_query_groups * self.kv_channels * itemsize

    def flops_per_token(self, seq_length: int) -> float:
        """Forward FLOPs per token with a head and causal (half) attention; training costs three times as much."""
        matmuls = (
            self.num_layers
            * self.hidden_size
            * (self.qkv_size + self.query_size + self.fc1_size + self.ffn_hidden_size)
            + self.vocab_size * self.hidden_size
        )
        return 2.0 * matmuls + 2.0 * seq_length * self.query_size * self.num_layers

    def resized(self, sizes: Mapping[str, int]) -> "ModelArch":
        """The same model with these fields of other sizes; what pruning allows is said by `shape.axes.shrink`."""
        return dataclasses.replace(self, **sizes)  # type: ignore[arg-type]

    def describe(self) -> str:
        return (
            f"{self.num_layers} layers, hidden {self.hidden_size}, ffn {self.ffn_hidden_size}, "
            f"{self.num_attention_heads} heads in {self.num_query_groups} groups of {self.kv_channels}, "
            f"vocabulary {self.vocab_size}, {billions(self.num_params())} parameters"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without `LATER` fields at their default: files and fingerprints from before them stay valid."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if value or name not in LATER}

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, source: str = "model config") -> "ModelArch":
        """Rebuild from plain data; an unknown or missing field is refused by name."""
        known = {field.name for field in dataclasses.fields(cls)}
        required = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
        if not isinstance(values, dict):
            raise UserError(f"{source}: expected a mapping of model shape fields, got {type(values).__name__}")
        if unknown := sorted(map(str, set(values) - known)):
            raise UserError(
                f"{source}: unknown field {shown(unknown[0])}; a model shape has {', '.join(sorted(known))}"
            )
        if missing := sorted(required - set(values)):
            raise UserError(f"{source}: field {missing[0]!r} is missing")
        values = dict(values)
        with naming(source):
            if values.get("rope_scaling") is not None:
                try:
                    values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
                except TypeError as error:
                    raise UserError(f"rope_scaling: {error}") from None
            return cls(**values)


def billions(count: float) -> str:
    """Parameters to three digits, in the unit that shows them: `4.51 B`, `1.18 M`."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= limit:
            return f"{float(f'{count / limit:.3g}'):g} {unit}"
    return f"{count:g}"
