"""The table of tensors: for every logical (unsharded) tensor, what lies along each of its dimensions.

One row is the single source for a tensor's shape, for how tensor parallelism splits it, for how pruning cuts it and
for how Hugging Face packs it. Keys are those of a Megatron torch_dist checkpoint, where the norms carry Transformer
Engine's names and the tensors of all layers are stacked under one key, `[num_layers, *shape]`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.shape.packing import Gated, GroupedQuery, Heads, Packing, Plain


@dataclass(frozen=True)
class TensorRow:
    """One row of the table. `split` is the dimension that tensor parallelism divides, None when replicated."""

    key: str
    dims: tuple[Packing, ...]
    per_layer: bool
    split: int | None = None

    def shape(self, arch: ModelArch) -> tuple[int, ...]:
        """Shape for one layer (or of the whole tensor where there is one per model)."""
        return tuple(dim.size(arch) for dim in self.dims)

    @property
    def is_vocabulary(self) -> bool:
        """Whether its rows are words: tensor parallelism pads them."""
        return "vocab_size" in self.dims[0].axes


@dataclass(frozen=True)
class LogicalTensor:
    """A tensor of a model: a row of the table, in one layer (counted from 0) or, with None, one for the model."""

    row: TensorRow
    layer: int | None = None

    @property
    def name(self) -> str:
        """`decoder.layers.3.mlp.linear_fc1.weight`: the key with the number of its layer."""
        return self.row.key if self.layer is None else self.row.key.replace(LAYER, f"{LAYER}.{self.layer}", 1)

    def shape(self, arch: ModelArch) -> tuple[int, ...]:
        return self.row.shape(arch)


HIDDEN = Plain("hidden_size")
VOCAB = Plain("vocab_size")
FFN = Plain("ffn_hidden_size")
FFN_GATED = Gated("ffn_hidden_size")
HEADS = Heads()
QKV = GroupedQuery()
CHANNELS = Plain("kv_channels")

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
FINAL_NORM = "decoder.final_layernorm"
LAYER = "decoder.layers"
QKV_BIAS = f"{LAYER}.self_attention.linear_qkv.bias"
HEAD_NORMS = tuple(f"{LAYER}.self_attention.{head}_layernorm.weight" for head in ("q", "k"))


def tensor_table(arch: ModelArch) -> tuple[TensorRow, ...]:
    """Every row for a model of this shape, in the order of the forward pass."""
    norm_parts = ("weight", "bias") if arch.has_norm_bias else ("weight",)
    norms = lambda key, per_layer: [TensorRow(f"{key}_{part}", (HIDDEN,), per_layer) for part in norm_parts]  # noqa: E731
    fc1 = FFN_GATED if arch.is_gated else FFN
    rows = [
        TensorRow(EMBEDDING, (VOCAB, HIDDEN), per_layer=False, split=0),
        *norms(f"{LAYER}.self_attention.linear_qkv.layer_norm", True),
        TensorRow(f"{LAYER}.self_attention.linear_qkv.weight", (QKV, HIDDEN), per_layer=True, split=0),
        *([TensorRow(QKV_BIAS, (QKV,), per_layer=True, split=0)] if arch.add_qkv_bias else []),
        *(TensorRow(key, (CHANNELS,), per_layer=True) for key in HEAD_NORMS if arch.qk_layernorm),
        TensorRow(f"{LAYER}.self_attention.linear_proj.weight", (HIDDEN, HEADS), per_layer=True, split=1),
        *norms(f"{LAYER}.mlp.linear_fc1.layer_norm", True),
        TensorRow(f"{LAYER}.mlp.linear_fc1.weight", (fc1, HIDDEN), per_layer=True, split=0),
        TensorRow(f"{LAYER}.mlp.linear_fc2.weight", (HIDDEN, FFN), per_layer=True, split=1),
        *(TensorRow(f"{FINAL_NORM}.{part}", (HIDDEN,), per_layer=False) for part in norm_parts),
    ]
    if not arch.share_embeddings_and_output_weights:
        rows.append(TensorRow(OUTPUT, (VOCAB, HIDDEN), per_layer=False, split=0))
    return tuple(rows)


def logical_tensors(arch: ModelArch) -> dict[str, LogicalTensor]:
    """Every logical tensor of a model by name, in the order of the forward pass."""
    return {tensor.name: tensor for tensor in _in_order(tensor_table(arch), arch.num_layers)}


def _in_order(table: tuple[TensorRow, ...], num_layers: int) -> Iterator[LogicalTensor]:
    first = next(i for i, row in enumerate(table) if row.per_layer)
    last = max(i for i, row in enumerate(table) if row.per_layer)
    yield from map(LogicalTensor, table[:first])
    for layer in range(num_layers):
        yield from (LogicalTensor(row, layer) for row in table[first : last + 1])
    yield from map(LogicalTensor, table[last + 1 :])
