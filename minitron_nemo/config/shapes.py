"""The settings that say a shape: that of the teacher, and that to prune to."""

import dataclasses
from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from minitron_nemo.config.setting import MAX_SIZE, count, setting
from minitron_nemo.errors import UserError
from minitron_nemo.shape.arch import ACTIVATIONS, FAMILIES, NORMALIZATIONS, ModelArch, RopeScaling
from minitron_nemo.shape.axes import AXES, shrink
from minitron_nemo.shape.budget import SHRINKABLE, Budget, Fit, fit, granularity
from minitron_nemo.shape.figures import FIGURES, Workload

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
    add_qkv_bias: bool = setting(False, "biases on queries, keys and values (Qwen2)", later=True)
    qk_layernorm: bool = setting(False, "a norm over the channels of each query and key (Qwen3)", later=True)

    def arch(self) -> ModelArch:
        values = dataclasses.asdict(self)
        if values["rope_scaling"] is not None:
            try:
                values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
            except UserError as error:
                raise UserError(f"rope_scaling.{error}") from None
        return ModelArch(**values)


class DropBy(Enum):
    """Measures of `score_blocks` that can choose what to drop."""

    cosine = "cosine"
    lm_loss = "lm_loss"
    nmse = "nmse"
    task = "task"


@dataclass
class BudgetConfig:
    """What the pruned model may cost; all that is set must hold. Sizes set in `prune.target` stay as they are set."""

    parameters: float | None = setting(None, "weights at most, both embedding tables included", above=0, at_most=10**12)
    non_embedding_parameters: float | None = setting(
        None, "weights at most, without embedding and output head", above=0, at_most=10**12
    )
    memory_bytes: float | None = setting(
        None,
        "bf16 weights and the KV cache of `cached_tokens` at most; nothing else is counted",
        above=0,
        at_most=10**12,
    )
    cached_tokens: int = count(0, "in the KV cache, of all sequences together, for `memory_bytes`", at_least=0)
    kv_cache_bytes_per_token: float | None = setting(
        None, "bf16 keys and values of a token at most", above=0, at_most=10**12
    )
    flops_per_token: float | None = setting(
        None, "of a forward pass at most, in sequences of `data.seq_length`", above=0, at_most=10**12
    )
    axes: list[str] = setting(
        ["hidden_size", "ffn_hidden_size"], "which shrink, by one common factor", choices=SHRINKABLE
    )
    hidden_multiple: int | None = count(
        None, "channels come in lots of; null: 256, or the largest power of two in an eighth of the source's"
    )
    ffn_multiple: int | None = count(None, "neurons come in lots of; null: 512, or the same of theirs")


@dataclass
class TargetConfig:
    """Shape to prune to; what is unset stays as it is, or follows from the budget."""

    num_layers: int | None = count(None, "layers to keep; null: all", at_most=MAX_LAYERS)
    hidden_size: int | None = count(None, "channels to keep; null: all")
    ffn_hidden_size: int | None = count(None, "neurons to keep in each layer; null: all")
    num_attention_heads: int | None = count(None, "query heads to keep, a multiple of the query groups; null: all")
    num_query_groups: int | None = count(
        None, "query groups (key/value heads) to keep, with their query heads; null: all", later=True
    )
    vocab_size: int | None = count(
        None, "words to keep, the most frequent in the distillation data; null: all", later=True
    )
    drop_layers: list[int] | None = count(
        None,
        "layers to drop, counted from 1 as in the paper; null: those of lowest block importance, or as `drop_by` says, "
        "down to `num_layers`",
        at_most=MAX_LAYERS,
    )
    drop_by: DropBy | None = setting(
        None,
        "drop the contiguous block that this measure of `prune.blocks` finds best, down to `num_layers`; null: by "
        "block importance, each layer for itself",
        later=True,
    )
    drop_contiguous: bool = setting(
        True, "with `drop_by`, one block; false: the layers that are best dropped one by one", later=True
    )
    budget: BudgetConfig | None = setting(None, "what the pruned model may cost; null: no budget", later=True)

    def shrink(self, source: ModelArch) -> ModelArch:
        """The target shape of a target without a budget, or on one rank."""
        return self.fit(source).arch

    def fit(self, source: ModelArch, *, tp: int = 1, seq_length: int = 1) -> Fit:
        """The target shape, and how a budget was met; `drop_layers` also sets `num_layers`.

        A budget's sizes are such that `tp` tensor-parallel ranks can share them; its FLOPs are those of `seq_length`.
        """
        unsaid = self.num_layers is None and self.budget is None
        if self.drop_by is not None and (self.drop_layers is not None or unsaid):
            raise UserError(
                f"prune.target.drop_by={self.drop_by.value}: needs num_layers, the layers to keep, or a budget, and no "
                "drop_layers"
            )
        sizes = {axis: size for axis in AXES if (size := getattr(self, axis)) is not None}
        if self.drop_layers is not None:
            left = self._layers_left(source)
            if self.num_layers not in (None, left):
                raise UserError(
                    f"prune.target.num_layers={self.num_layers}: drop_layers leaves {left}; give one of the two"
                )
            sizes["num_layers"] = left
        if self.num_query_groups is not None and self.num_attention_heads is None:
            sizes["num_attention_heads"] = source.heads_per_group * self.num_query_groups  # those that go with them
        try:
            if self.budget is None:
                return Fit(shrink(source, **sizes))
            return self._within_budget(source, self.budget, fixed=sizes, tp=tp, seq_length=seq_length)
        except UserError as error:
            raise UserError(f"prune.target.{error}") from None

    def _within_budget(
        self, source: ModelArch, budget: BudgetConfig, *, fixed: dict[str, int], tp: int, seq_length: int
    ) -> Fit:
        limits = {name: most for name in FIGURES if (most := getattr(budget, name)) is not None}
        if not limits:
            raise UserError(f"budget: limits nothing; set one of {', '.join(FIGURES)}")
        given = {"hidden_size": budget.hidden_multiple, "ffn_hidden_size": budget.ffn_multiple}
        return fit(
            source,
            Budget(limits, Workload(seq_length, budget.cached_tokens)),
            axes=budget.axes,
            fixed=fixed,
            multiples=granularity(source, given, tp=tp),
        )

    def _layers_left(self, source: ModelArch) -> int:
        dropped = self.drop_layers or []
        if len(set(dropped)) != len(dropped) or not all(1 <= layer <= source.num_layers for layer in dropped):
            raise UserError(
                f"prune.target.drop_layers={dropped}: layers are counted from 1 to {source.num_layers}, each at most "
                "once"
            )
        return source.num_layers - len(dropped)
