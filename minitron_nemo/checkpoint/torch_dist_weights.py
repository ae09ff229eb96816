"""A model's weights in torch_dist form: logical tensors by name over the stacked tensors that are stored.

`.nemo` folders, training checkpoints and the checkpoints of NeMo and Megatron all hold such a folder.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from minitron_nemo.artefacts.contents import Place
from minitron_nemo.artefacts.publishing import Draft
from minitron_nemo.checkpoint.geometry import Box, whole
from minitron_nemo.checkpoint.hashed_files import HashingFile
from minitron_nemo.checkpoint.source import ShapedSource, ended
from minitron_nemo.checkpoint.torch_dist import TorchDistReader, TorchDistWriter, weights_file, write_metadata
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.errors import UserError
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.shape.tensors import (
    EMBEDDING,
    FINAL_NORM,
    LAYER,
    OUTPUT,
    LogicalTensor,
    TensorRow,
    logical_tensors,
    tensor_table,
)

# What a training run of others keeps beside the weights: nothing of it is part of a model.
NO_WEIGHTS = re.compile(
    r"(optimizer|optimizer_states|chained_\d+|opt_param_scheduler|rng_state|rerun_state_machine|iteration_state)\b.*"
    r"|.*\._extra_state(/.*)?"
)


class StackedTensors(Protocol):
    """Tensors of a checkpoint by key, those of all layers stacked under one."""

    folder: Path

    def keys(self) -> list[str]: ...

    def shape(self, key: str) -> tuple[int, ...]: ...

    def dtype(self, key: str) -> torch.dtype: ...

    def read(self, key: str, box: Box | None = None) -> Tensor: ...

    def check_whole(self, keys: Iterable[str]) -> None: ...

    def verify(self) -> None: ...


class StackedWeights(ShapedSource):
    """The logical tensors of a model of shape `arch` in stacked tensors, the vocabulary's padding trimmed.

    `prefix` stands before each key. In a checkpoint `of_training` by others there may be what is no weight.
    Raises UserError, on opening, for a tensor that is missing, extra, misshapen or of two dtypes; `source` is named in
    the message as what describes the shape.
    """

    def __init__(
        self, reader: StackedTensors, arch: ModelArch, *, source: str, prefix: str = "", of_training: bool = False
    ) -> None:
        super().__init__(arch)
        self.reader, self.prefix, self.of_training = reader, prefix, of_training
        self._dtype = self._check(source)

    def dtype(self, name: str | None = None) -> torch.dtype:
        """The one dtype of all tensors."""
        return self._dtype

    def read(self, name: str, box: Box | None = None) -> Tensor:
        logical = self.tensors[name]
        box = whole(self.shape(name)) if box is None else box
        stored = self.reader.read(self.prefix + logical.row.key, stored_box(logical, box))
        return stored.reshape(box.size)

    def verify(self) -> None:
        self.reader.verify()

    def _check(self, source: str) -> torch.dtype:
        reader, rows = self.reader, tensor_table(self.arch)
        keys = {row: self.prefix + row.key for row in rows}
        stored = set(reader.keys())
        if self.of_training:
            stored -= {key for key in stored if NO_WEIGHTS.fullmatch(key)}
        for row, key in keys.items():
            expected = stored_shape(row, self.arch)
            if key not in stored:
                raise UserError(f"{reader.folder}: tensor {key} is missing; {source} describes a model that has it")
            found = reader.shape(key)
            # Tensor parallelism pads the vocabulary: more rows than words are fine, fewer are not.
            padded = row.is_vocabulary and len(found) == 2 and found[0] >= expected[0]
            if (found[1:] != expected[1:]) if padded else (found != expected):
                raise UserError(f"{reader.folder}: tensor {key} is {found}; {source} says {expected}")
        if extra := sorted(stored - set(keys.values())):
            raise UserError(f"{reader.folder}: tensor {extra[0]} belongs to no part of the model in {source}")
        dtype = reader.dtype(keys[rows[0]])
        for key in keys.values():
            if reader.dtype(key) != dtype:
                raise UserError(f"{reader.folder}: tensor {key} is {reader.dtype(key)}, others are {dtype}")
        reader.check_whole(keys.values())
        return dtype


def vocabulary_rows(reader: StackedTensors, *, prefix: str = "") -> int:
    """Rows of the embedding, its padding included; UserError where there is none."""
    key = prefix + EMBEDDING
    if key not in set(reader.keys()):
        raise UserError(f"{reader.folder}: no tensor {key}; only models of the kind GPT are read")
    if len(shape := reader.shape(key)) != 2:
        raise UserError(f"{reader.folder}: tensor {key} is {shape}; a table has rows and columns")
    return shape[0]


class TorchDistWeights(StackedWeights):
    """The same in a torch_dist folder of ours; files that `sha256` lists are hashed while they are read."""

    def __init__(self, folder: Place, arch: ModelArch, *, source: str, sha256: Mapping[str, str] | None = None) -> None:
        super().__init__(TorchDistReader(folder, sha256=sha256), arch, source=source)


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
    draft: Draft,
    inside: str,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    arch: ModelArch,
    dtype: torch.dtype,
    layout: Layout | None = None,
    prefix: str = "",
    common: Mapping[str, Any] | None = None,
    common_is_object: bool = False,
) -> None:
    """Write every logical tensor of a model, stored as `dtype`, as the torch_dist folder `inside` of a draft.

    Each of the ranks of `layout` (one without it) has a file with the boxes that it would hold, so that it reads its
    own; the vocabulary is not padded. Where the artefact is one file, the only rank's goes into it as it comes.
    `prefix` stands before each key; `common` is the common state.

    The draft gets the SHA-256 of the files of weights. Raises AssertionError for a tensor of another shape than the
    model's, and when some are missing at the end.
    """
    missing, layout, folder = logical_tensors(arch), layout or Layout(), draft.folder / inside
    folder.mkdir(exist_ok=True)
    holders = _Holders(arch, layout)
    writers: dict[int, TorchDistWriter] = {}
    with ExitStack() as stack:
        file = None
        if draft.tar is not None:
            assert layout.model_ranks == 1, "one file takes what one rank writes"
            file = HashingFile(draft.tar.path, start=draft.tar.reserve(f"{inside}/{weights_file(0)}"))
            stack.callback(file.close)
        for name, tensor in stack.enter_context(ended(tensors)):
            logical = missing.pop(name)
            shape = logical.shape(arch)
            assert tuple(tensor.shape) == shape, f"{name}: got {tuple(tensor.shape)}, expected {shape}"
            tensor = tensor.to(dtype)
            for rank, box in holders.of(logical):
                if rank not in writers:
                    writers[rank] = TorchDistWriter(folder, rank=rank, file=file)
                    stack.callback(writers[rank].close)
                place = stored_box(logical, box)
                chunk, global_shape = tensor[box.slices()].reshape(place.size), stored_shape(logical.row, arch)
                writers[rank].write(prefix + logical.row.key, chunk, global_shape=global_shape, offset=place.offset)
        assert not missing, f"{next(iter(missing))} and {len(missing) - 1} more tensors did not come"
        records = [record for writer in writers.values() for record in writer.close()]
    if draft.tar is not None and file is not None:
        draft.tar.complete(file.position)
    nothings = [prefix + name for name in extra_states(arch)]
    write_metadata(folder, records, nothings=nothings, common=common, common_is_object=common_is_object)
    draft.hashes.update({f"{inside}/{writer.name}": writer.sha256 for writer in writers.values()})


class _Holders:
    """Which ranks of a layout, without its copies over data parallelism, hold which boxes of a model."""

    def __init__(self, arch: ModelArch, layout: Layout) -> None:
        layout.check(arch, setting="tensor_model_parallel_size")
        self.arch, self.layout = arch, layout
        chunks = enumerate(layout.stages(arch.num_layers))
        self.stages = [chunk % layout.pp for chunk, count in chunks for _ in range(count)]

    def of(self, logical: LogicalTensor) -> Iterator[tuple[int, Box]]:
        """(rank, box of the tensor); a tensor that all tensor-parallel ranks hold whole is the first one's."""
        tp, shape, dim = self.layout.tp, logical.shape(self.arch), logical.row.split
        first = self._stage(logical) * tp
        if dim is None or tp == 1:
            yield first, whole(shape)
            return
        padded = self.layout.padded_vocab_size(self.arch) if logical.row.is_vocabulary else shape[dim]
        for rank in range(tp):
            for piece in logical.row.dims[dim].tensor_parallel_pieces(padded // tp, rank=rank, tp=tp):
                length = min(piece.length, shape[dim] - piece.start)
                if length > 0:
                    offset = [piece.start if at == dim else 0 for at in range(len(shape))]
                    size = [length if at == dim else full for at, full in enumerate(shape)]
                    yield first + rank, Box(tuple(offset), tuple(size))

    def _stage(self, logical: LogicalTensor) -> int:
        if logical.layer is not None:
            return self.stages[logical.layer]
        return self.layout.pp - 1 if logical.row.key.startswith((FINAL_NORM, OUTPUT)) else 0
