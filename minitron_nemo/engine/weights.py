"""Between this rank's parameters and the logical tensors of a checkpoint, for any tensor/pipeline layout.

Where a rank's part lies in a logical tensor is said by the packing of the dimension that is split; nothing else knows.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from minitron_nemo.checkpoint.geometry import Box
from minitron_nemo.checkpoint.source import TensorSource
from minitron_nemo.checkpoint.torch_dist import TorchDistWriter, write_metadata
from minitron_nemo.checkpoint.torch_dist_weights import extra_states, stored_box
from minitron_nemo.distributed.groups import Groups
from minitron_nemo.engine.model import HeadlessGPT, ModelChunks
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.shape.tensors import EMBEDDING, LAYER, OUTPUT, LogicalTensor, logical_tensors

# Without Transformer Engine the norms are modules of their own; in a checkpoint they carry its names.
_LOCAL_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


@dataclass(frozen=True)
class LocalPiece:
    """A block of one local parameter and where it begins in the logical tensor, the vocabulary's padding included."""

    logical: LogicalTensor
    local: Tensor
    offset: tuple[int, ...]


def local_pieces(
    model: ModelChunks, arch: ModelArch, groups: Groups, *, only: Iterable[nn.Parameter] | None = None
) -> Iterator[LocalPiece]:
    """Every block of logical tensors that this rank holds, as views of its parameters; of `only` some when given."""
    table = logical_tensors(arch)
    wanted = None if only is None else {id(parameter) for parameter in only}
    for name, parameter in local_parameters(model):
        if wanted is not None and id(parameter) not in wanted:
            continue
        if name == OUTPUT and OUTPUT not in table:
            name = EMBEDDING  # a tied head on the last pipeline stage is a copy of the table
        yield from _pieces(table[name], parameter.data, groups)


def local_parameters(model: ModelChunks) -> Iterator[tuple[str, nn.Parameter]]:
    """This rank's parameters, each with the name of the logical tensor that it is a part of."""
    for chunk in model.gpts():
        for name, parameter in chunk.named_parameters():
            yield _logical_name(name, _first_layer(chunk)), parameter


def _first_layer(chunk: HeadlessGPT) -> int:
    """The number from 0, over the whole model, of a chunk's first layer."""
    return chunk.decoder.layers[0].layer_number - 1 if len(chunk.decoder.layers) else 0


def _logical_name(name: str, first_layer: int) -> str:
    """The name of the logical tensor that a local parameter is a part of; layers are numbered over the whole model."""
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    if match is None:
        return name
    rest = match[2]
    for ours, stored in _LOCAL_NORMS.items():
        rest = rest.replace(ours, stored)
    return f"{LAYER}.{int(match[1]) + first_layer}.{rest}"


def _pieces(logical: LogicalTensor, local: Tensor, groups: Groups) -> Iterator[LocalPiece]:
    dim, offset = logical.row.split, [0] * local.dim()
    if dim is None:
        yield LocalPiece(logical, local, tuple(offset))
        return
    packing, size = logical.row.dims[dim], local.shape[dim]
    for piece in packing.tensor_parallel_pieces(size, rank=groups.tp_rank, tp=groups.layout.tp):
        offset[dim] = piece.start
        yield LocalPiece(logical, local.narrow(dim, piece.local, piece.length), tuple(offset))


@torch.no_grad()
def load_weights(
    model: ModelChunks, source: TensorSource, groups: Groups, *, only: Iterable[nn.Parameter] | None = None
) -> None:
    """Fill this rank's parameters, or `only` some of them, from a source of any layout.

    The vocabulary's padding rows become zero.
    """
    for piece in local_pieces(model, source.arch, groups, only=only):
        _read(piece, source)


@torch.no_grad()
def load_head(source: TensorSource, groups: Groups, *, dtype: torch.dtype) -> Tensor:
    """This rank's rows of the output head alone, as though `groups` were the model's: [padded vocabulary / tp, h]."""
    table = logical_tensors(source.arch)
    rows = groups.layout.padded_vocab_size(source.arch) // groups.layout.tp
    weight = torch.empty(rows, source.arch.hidden_size, dtype=dtype, device=groups.device)
    (piece,) = _pieces(table.get(OUTPUT, table[EMBEDDING]), weight, groups)
    _read(piece, source)
    return weight


def _read(piece: LocalPiece, source: TensorSource) -> None:
    rows = piece.local.shape[0]
    if piece.logical.row.is_vocabulary:
        rows = max(0, min(rows, source.arch.vocab_size - piece.offset[0]))
        piece.local[rows:].zero_()
    if rows:
        box = Box(piece.offset, (rows, *piece.local.shape[1:]))
        piece.local[:rows].copy_(source.read(piece.logical.name, box))


def write_weights(folder: Path, model: ModelChunks, arch: ModelArch, groups: Groups) -> dict[str, str]:
    """Every rank writes what it alone holds into a torch_dist folder; returns the SHA-256 of each file, on rank 0.

    Collective. One data- and context-parallel replica writes; replicated parameters come from tensor-parallel rank 0;
    the copy of a tied embedding on the last stage is left out.
    """
    writer = TorchDistWriter(folder, rank=groups.rank)
    for piece in local_pieces(model, arch, groups):
        logical = piece.logical
        is_copy = logical.row.split is None and groups.tp_rank > 0
        is_tied_copy = logical.row.key == EMBEDDING and not groups.is_first_stage
        if groups.dp_rank > 0 or groups.cp_rank > 0 or is_copy or is_tied_copy:
            continue
        box = stored_box(logical, Box(piece.offset, tuple(piece.local.shape)))
        shape = _padded_shape(logical, arch, groups)
        writer.write(logical.row.key, piece.local.reshape(box.size), global_shape=shape, offset=box.offset)
    records = groups.share_json({"records": writer.close(), "name": writer.name, "sha256": writer.sha256})
    if not groups.is_main:
        return {}
    write_metadata(folder, [record for part in records for record in part["records"]], nothings=extra_states(arch))
    return {part["name"]: part["sha256"] for part in records}


def _padded_shape(logical: LogicalTensor, arch: ModelArch, groups: Groups) -> tuple[int, ...]:
    """Shape of the stored tensor under this layout: layers stacked, the vocabulary padded."""
    shape = logical.shape(arch)
    if logical.row.is_vocabulary:
        shape = (groups.layout.padded_vocab_size(arch), *shape[1:])
    return shape if logical.layer is None else (arch.num_layers, *shape)
