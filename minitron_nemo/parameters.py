"""The table of parameters: for every logical (unsharded) tensor, which axis each dimension follows.

One row per parameter is the single source for its shape, for how tensor parallelism splits it and for how
pruning cuts it. Keys are those of a Megatron torch_dist checkpoint, where the norms carry Transformer Engine's
names and the tensors of all layers are stacked under one key, `[num_layers, *shape]`.

Packings (how the units of an axis lie along a dimension):
    plain   unit i is row i
    gated   gate rows, then up rows: unit i is rows i and i + ffn_hidden_size
    heads   `kv_channels` columns for each query head
    gqa     for each query group: its query heads, one key head, one value head, `kv_channels` rows each
"""

from dataclasses import dataclass

from minitron_nemo.arch import ModelArch


@dataclass(frozen=True)
class Dim:
    """One dimension of a parameter: the `axis` of the shape it follows and the packing of its units."""

    axis: str
    packing: str = "plain"

    def size(self, arch: ModelArch) -> int:
        if self.packing == "gated":
            return 2 * arch.ffn_hidden_size
        if self.packing == "heads":
            return arch.query_size
        if self.packing == "gqa":
            return arch.qkv_size
        return int(getattr(arch, self.axis))


@dataclass(frozen=True)
class Parameter:
    """One logical tensor. `split` is the dimension that tensor parallelism divides, None when replicated."""

    key: str
    dims: tuple[Dim, ...]
    per_layer: bool
    split: int | None = None

    def shape(self, arch: ModelArch) -> tuple[int, ...]:
        """Shape for one layer (or of the whole tensor where there is one per model)."""
        return tuple(dim.size(arch) for dim in self.dims)


HIDDEN = Dim("hidden_size")
VOCAB = Dim("vocab_size")
FFN = Dim("ffn_hidden_size")
FFN_GATED = Dim("ffn_hidden_size", "gated")
HEADS = Dim("num_attention_heads", "heads")
QKV = Dim("num_attention_heads", "gqa")

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
FINAL_NORM = "decoder.final_layernorm"
LAYER = "decoder.layers"


def parameters(arch: ModelArch) -> tuple[Parameter, ...]:
    """Every parameter of a model of this shape, in the order of the forward pass."""
    norm_parts = ("weight", "bias") if arch.has_norm_bias else ("weight",)
    norms = lambda key, per_layer: [Parameter(f"{key}_{part}", (HIDDEN,), per_layer) for part in norm_parts]  # noqa: E731
    fc1 = FFN_GATED if arch.is_gated else FFN
    rows = [
        Parameter(EMBEDDING, (VOCAB, HIDDEN), per_layer=False, split=0),
        *norms(f"{LAYER}.self_attention.linear_qkv.layer_norm", True),
        Parameter(f"{LAYER}.self_attention.linear_qkv.weight", (QKV, HIDDEN), per_layer=True, split=0),
        Parameter(f"{LAYER}.self_attention.linear_proj.weight", (HIDDEN, HEADS), per_layer=True, split=1),
        *norms(f"{LAYER}.mlp.linear_fc1.layer_norm", True),
        Parameter(f"{LAYER}.mlp.linear_fc1.weight", (fc1, HIDDEN), per_layer=True, split=0),
        Parameter(f"{LAYER}.mlp.linear_fc2.weight", (HIDDEN, FFN), per_layer=True, split=1),
        *(Parameter(f"{FINAL_NORM}.{part}", (HIDDEN,), per_layer=False) for part in norm_parts),
    ]
    if not arch.share_embeddings_and_output_weights:
        rows.append(Parameter(OUTPUT, (VOCAB, HIDDEN), per_layer=False, split=0))
    return tuple(rows)


def logical_tensors(arch: ModelArch) -> list[tuple[Parameter, int | None]]:
    """(parameter, layer) for every logical tensor; layers count from 0, None where there is one per model."""
    pairs: list[tuple[Parameter, int | None]] = []
    table = parameters(arch)
    first = next(i for i, row in enumerate(table) if row.per_layer)
    last = max(i for i, row in enumerate(table) if row.per_layer)
    pairs += [(row, None) for row in table[:first]]
    pairs += [(row, layer) for layer in range(arch.num_layers) for row in table[first : last + 1]]
    pairs += [(row, None) for row in table[last + 1 :]]
    return pairs
