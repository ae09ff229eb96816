"""The settings that say a shape: that of the teacher, and that to prune to."""

import dataclasses
from dataclasses import dataclass

from omegaconf import MISSING

from minitron_nemo.config.setting import MAX_SIZE, count, setting
from minitron_nemo.errors import UserError
from minitron_nemo.shape.arch import ACTIVATIONS, FAMILIES, NORMALIZATIONS, ModelArch, RopeScaling
from minitron_nemo.shape.axes import AXES, shrink

MAX_LAYERS = 10**4  # a bound in the spirit of `MAX_SIZE`


@dataclass
class RopeScalingConfig:
    factor: float = setting(MISSING, "what long wavelengths are divided by", at_least=1, at_most=MAX_SIZE)
    low_freq_factor: float = setting(
        MISSING, "wavelengths above original / this are divided by `factor`", above=0, at_most=MAX_SIZE
    )
    high_freq_factor: float = setting(MISSING, "wavelengths below original / this stay", above=0, at_most=MAX_SIZE)
    original_max_position_embeddings: int = count(MISSING, "context length before scaling", unit="tokens")


@dataclass
class ModelConfig:
    """The shape that `dry_run` and `random_init` use. A checkpoint on disk brings its own."""

    num_layers: int = count(MISSING, "transformer layers", at_most=MAX_LAYERS)
    hidden_size: int = count(MISSING, "channels of the residual stream")
    ffn_hidden_size: int = count(MISSING, "neurons of the MLP (a gated MLP has this many gates as well)")
    num_attention_heads: int = count(MISSING, "query heads")
    num_query_groups: int = count(MISSING, "key/value heads; divides the query heads")
    kv_channels: int = setting(
        MISSING,
        "channels of a head; not tied to hidden/heads; rotary embedding takes them in pairs",
        at_least=2,
        at_most=MAX_SIZE,
        multiple_of=2,
    )
    vocab_size: int = count(MISSING, "tokens, without padding")
    seq_length: int = count(MISSING, "longest position the model was made for", unit="tokens")
    family: str = setting("llama", "how it is exported to Hugging Face", choices=FAMILIES)
    activation: str = setting("swiglu", "of the MLP", choices=ACTIVATIONS)
    normalization: str = setting("RMSNorm", "of every norm", choices=NORMALIZATIONS)
    norm_epsilon: float = setting(1e-5, "epsilon of the norms", above=0, at_most=1)
    rotary_base: float = setting(10000.0, "base of the rotary embedding", above=0, at_most=10**12)
    rotary_percent: float = setting(1.0, "rotated part of each head", above=0, at_most=1)
    rope_scaling: RopeScalingConfig | None = setting(None, "Llama-3 scaling of the rotary frequencies; null: none")
    share_embeddings_and_output_weights: bool = setting(False, "one table for input and output")

    def arch(self) -> ModelArch:
        values = dataclasses.asdict(self)
        if values["rope_scaling"] is not None:
            values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
        return ModelArch(**values)


@dataclass
class TargetConfig:
    """Shape to prune to; what is unset stays as it is."""

    num_layers: int | None = count(None, "layers to keep; null: all", at_most=MAX_LAYERS)
    hidden_size: int | None = count(None, "channels to keep; null: all")
    ffn_hidden_size: int | None = count(None, "neurons to keep in each layer; null: all")
    num_attention_heads: int | None = count(None, "query heads to keep, a multiple of the query groups; null: all")
    drop_layers: list[int] | None = count(
        None,
        "layers to drop, counted from 1 as in the paper; null: those of lowest block importance, down to `num_layers`",
        at_most=MAX_LAYERS,
    )

    def shrink(self, source: ModelArch) -> ModelArch:
        """The target shape; `drop_layers` also sets `num_layers`."""
        sizes = {axis: getattr(self, axis) for axis in AXES}
        if self.drop_layers is not None:
            left = self._layers_left(source)
            if self.num_layers not in (None, left):
                raise UserError(
                    f"prune.target.num_layers={self.num_layers}: drop_layers leaves {left}; give one of the two"
                )
            sizes["num_layers"] = left
        try:
            return shrink(source, **sizes)
        except UserError as error:
            raise UserError(f"prune.target.{error}") from None

    def _layers_left(self, source: ModelArch) -> int:
        dropped = self.drop_layers or []
        if len(set(dropped)) != len(dropped) or not all(1 <= layer <= source.num_layers for layer in dropped):
            raise UserError(
                f"prune.target.drop_layers={dropped}: layers are counted from 1 to {source.num_layers}, each at most "
                "once"
            )
        return source.num_layers - len(dropped)
