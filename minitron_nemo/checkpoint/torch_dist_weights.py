"""A model's weights in torch_dist form: logical tensors by name over the stacked tensors that are stored.

`.nemo` folders and training checkpoints both hold such a folder.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from minitron_nemo.artefacts.contents import Place
from minitron_nemo.checkpoint.geometry import Box, whole
from minitron_nemo.checkpoint.hashed_files import HashingFile
from minitron_nemo.checkpoint.source import ShapedSource
from minitron_nemo.checkpoint.torch_dist import TorchDistReader, TorchDistWriter, write_metadata
from minitron_nemo.errors import UserError
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.shape.tensors import LAYER, LogicalTensor, TensorRow, logical_tensors, tensor_table


class TorchDistWeights(ShapedSource):
    """The logical tensors of a model of shape `arch` in a torch_dist folder, the vocabulary's padding trimmed.

    Files that `sha256` lists are hashed while they are read, for `verify` to judge. Raises UserError, on opening, for a
    tensor that is missing, extra, misshapen or of two dtypes; `source` is named in the message as what describes the
    shape.
    """

    def __init__(self, folder: Place, arch: ModelArch, *, source: str, sha256: Mapping[str, str] | None = None) -> None:
        super().__init__(arch)
        self.reader = TorchDistReader(folder, sha256=sha256)
        self._dtype = self._check(source)

    def dtype(self, name: str | None = None) -> torch.dtype:
        """The one dtype of all tensors."""
        return self._dtype

    def read(self, name: str, box: Box | None = None) -> Tensor:
        logical = self.tensors[name]
        box = whole(self.shape(name)) if box is None else box
        stored = self.reader.read(logical.row.key, stored_box(logical, box))
        return stored.reshape(box.size)

    def verify(self) -> None:
        self.reader.verify()

    def _check(self, source: str) -> torch.dtype:
        reader, rows = self.reader, tensor_table(self.arch)
        stored = set(reader.keys())
        for row in rows:
            expected = stored_shape(row, self.arch)
            if row.key not in stored:
                raise UserError(f"{reader.folder}: tensor {row.key} is missing; {source} describes a model that has it")
            found = reader.shape(row.key)
            # Tensor parallelism pads the vocabulary: more rows than words are fine, fewer are not.
            padded = row.is_vocabulary and len(found) == 2 and found[0] >= expected[0]
            if (found[1:] != expected[1:]) if padded else (found != expected):
                raise UserError(f"{reader.folder}: tensor {row.key} is {found}; {source} says {expected}")
        if extra := sorted(stored - {row.key for row in rows}):
            raise UserError(f"{reader.folder}: tensor {extra[0]} belongs to no part of the model in {source}")
        dtype = reader.dtype(rows[0].key)
        for row in rows:
            if reader.dtype(row.key) != dtype:
                raise UserError(f"{reader.folder}: tensor {row.key} is {reader.dtype(row.key)}, others are {dtype}")
        return dtype


def stored_shape(row: TensorRow, arch: ModelArch) -> tuple[int, ...]:
    """Global shape under the checkpoint key: `[num_layers, *shape]` where there is one per layer."""
    return (arch.num_layers, *row.shape(arch)) if row.per_layer else row.shape(arch)


def stored_box(logical: LogicalTensor, box: Box) -> Box:
    """A box of a logical tensor as a box of the global tensor it is stored in."""
    if logical.layer is None:
        return box
    return Box((logical.layer, *box.offset), (1, *box.size))


def extra_states(arch: ModelArch) -> list[str]:
    """Names of what Megatron's layers ask a checkpoint for beside their weights, at its default strictness.

    Transformer Engine keeps the scales of eight-bit products there; of weights in bf16, fp16 or fp32 there are none.
    """
    keys = [row.key for row in tensor_table(arch) if row.per_layer and row.key.endswith(".weight")]
    modules = [key.removesuffix(".weight") for key in keys] + [f"{LAYER}.self_attention.core_attention"]
    shards = [f"shard_{layer}_{arch.num_layers}" for layer in range(arch.num_layers)]
    return [f"{module}._extra_state/{shard}" for module in modules for shard in shards]


def write_stream(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    arch: ModelArch,
    dtype: torch.dtype,
    file: HashingFile | None = None,
) -> dict[str, str]:
    """Write every logical tensor of a model, one chunk each and stored as `dtype`, as a whole torch_dist folder.

    Returns the SHA-256 of the files of weights by name. `file` is where they go when not into the folder. Raises
    AssertionError for a tensor of another shape than the model's, and when some are missing at the end.
    """
    writer = TorchDistWriter(folder, file=file)
    missing = logical_tensors(arch)
    for name, tensor in tensors:
        logical = missing.pop(name)
        shape = logical.shape(arch)
        assert tuple(tensor.shape) == shape, f"{name}: got {tuple(tensor.shape)}, expected {shape}"
        box = stored_box(logical, whole(shape))
        chunk = tensor.to(dtype).reshape(box.size)
        writer.write(logical.row.key, chunk, global_shape=stored_shape(logical.row, arch), offset=box.offset)
    assert not missing, f"{next(iter(missing))} and {len(missing) - 1} more tensors did not come"
    write_metadata(folder, writer.close(), nothings=extra_states(arch))
    return {writer.name: writer.sha256}
