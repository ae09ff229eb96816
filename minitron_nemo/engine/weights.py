"""Between this rank's parameters and the logical tensors of a checkpoint, for any tensor/pipeline layout.

One rule per parameter comes from the table in `minitron_nemo.parameters`; nothing else knows how a tensor is split.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minitron_nemo.arch import ModelArch
from minitron_nemo.checkpoint.nemo import NemoFolder
from minitron_nemo.checkpoint.torch_dist import TorchDistReader, TorchDistWriter, write_metadata
from minitron_nemo.engine.model import HeadlessGPT
from minitron_nemo.parallel import Groups
from minitron_nemo.parameters import EMBEDDING, LAYER, OUTPUT, Parameter, parameters

# Without Transformer Engine the norms are modules of their own; in a checkpoint they carry its names.
_LOCAL_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


@dataclass(frozen=True)
class Piece:
    """A block of one local parameter and where it lies in the logical tensor (per layer, vocabulary padded)."""

    parameter: Parameter
    layer: int | None
    local: Tensor
    offset: tuple[int, ...]


def logical_shape(parameter: Parameter, arch: ModelArch, tp: int) -> tuple[int, ...]:
    """Shape of the logical tensor as this layout stores it: with the vocabulary's padding rows."""
    shape = parameter.shape(arch)
    return (arch.padded_vocab_size(tp), *shape[1:]) if parameter.key in (EMBEDDING, OUTPUT) else shape


def local_pieces(model: HeadlessGPT, arch: ModelArch, groups: Groups) -> Iterator[Piece]:
    """Every block of logical tensors that this rank holds, as views of its parameters."""
    table = {row.key: row for row in parameters(arch)}
    offset = model.decoder.layers[0].layer_number - 1 if len(model.decoder.layers) else 0
    for name, local in model.named_parameters():
        key, layer = name, None
        if match := re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name):
            layer = int(match[1]) + offset
            rest = match[2]
            for ours, stored in _LOCAL_NORMS.items():
                rest = rest.replace(ours, stored)
            key = f"{LAYER}.{rest}"
        if key == OUTPUT and key not in table:
            key = EMBEDDING  # a tied head on the last pipeline stage is a copy of the table
        yield from _blocks(table[key], layer, local.data, groups)


def _blocks(parameter: Parameter, layer: int | None, local: Tensor, groups: Groups) -> Iterator[Piece]:
    """The whole local tensor, or its gate and up halves, which lie apart in the logical tensor."""
    start = [0] * local.dim()
    if parameter.split is None:
        yield Piece(parameter, layer, local, tuple(start))
        return
    dim = parameter.split
    halves = 2 if parameter.dims[dim].packing == "gated" else 1
    size = local.shape[dim] // halves
    for half in range(halves):
        start[dim] = half * size * groups.tp_size + groups.tp_rank * size
        yield Piece(parameter, layer, local.narrow(dim, half * size, size), tuple(start))


def load_weights(model: HeadlessGPT, source: NemoFolder, groups: Groups) -> None:
    """Fill this rank's parameters from a checkpoint of any layout; vocabulary padding rows become zero."""
    read_weights(model, source.reader, source.arch, groups)


@torch.no_grad()
def read_weights(model: HeadlessGPT, reader: TorchDistReader, arch: ModelArch, groups: Groups) -> None:
    """As `load_weights`, from a bare torch_dist folder."""
    for piece in local_pieces(model, arch, groups):
        rows = piece.local.shape[0]
        if piece.parameter.key in (EMBEDDING, OUTPUT):
            rows = max(0, min(rows, arch.vocab_size - piece.offset[0]))
            piece.local[rows:].zero_()
        if rows == 0:
            continue
        offset, size = piece.offset, (rows, *piece.local.shape[1:])
        if piece.layer is not None:
            offset, size = (piece.layer, *offset), (1, *size)
        tensor = reader.read(piece.parameter.key, offset=offset, size=size)
        piece.local[:rows].copy_(tensor.reshape(size[-piece.local.dim() :]))


def write_weights(folder: Path, model: HeadlessGPT, arch: ModelArch, groups: Groups) -> dict[str, str]:
    """Every rank writes what it alone holds into a torch_dist folder; returns the SHA-256 of each file, on rank 0.

    Collective. One data-parallel replica writes; replicated parameters come from tensor-parallel rank 0; the copy
    of a tied embedding on the last stage is left out.
    """
    writer = TorchDistWriter(folder, rank=groups.rank)
    for piece in local_pieces(model, arch, groups):
        is_copy = piece.parameter.split is None and groups.tp_rank > 0
        is_tied_copy = piece.parameter.key == EMBEDDING and not groups.is_first_stage
        if groups.dp_rank > 0 or is_copy or is_tied_copy:
            continue
        shape, offset, chunk = logical_shape(piece.parameter, arch, groups.tp_size), piece.offset, piece.local
        if piece.layer is not None:
            shape, offset, chunk = (arch.num_layers, *shape), (piece.layer, *offset), chunk[None]
        writer.write(piece.parameter.key, chunk, global_shape=shape, offset=offset)
    records = groups.share_json({"records": writer.close(), "name": writer.name, "sha256": writer.sha256})
    if not groups.is_main:
        return {}
    write_metadata(folder, [record for part in records for record in part["records"]])
    return {part["name"]: part["sha256"] for part in records}
