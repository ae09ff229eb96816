"""The only pickles of this package: the `.metadata` file of a torch_dist checkpoint and what `torch.save` describes
its content by, read without running code.

Reading goes through a closed table of opcodes (`pickle_machine`) and closed tables of names: every class a checkpoint
of torch.distributed or Megatron-Core names is answered by an inert record of ours, every other name is refused. Nothing
is imported because a file says so.
"""

import itertools
import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from minitron_nemo.artefacts.contents import Contents, has, read_small
from minitron_nemo.checkpoint.geometry import Chunk, StoredTensor
from minitron_nemo.checkpoint.pickle_machine import Record, run
from minitron_nemo.errors import UserError

METADATA_FILE = ".metadata"
METADATA_LIMIT = 64 * 2**20  # bytes; that of 24,000 chunks has 3.5 MB
DIMS_LIMIT = 16

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
    torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2,
)}  # fmt: skip


class EnumMember(Record):
    """A member of an enumeration as Python 3.11.0 to 3.11.3 pickle it (Debian 12 has 3.11.2): getattr(class, name).

    Nothing is looked up here: it stays a record of both.
    """

    def __init__(self, kind: Any, name: Any) -> None:
        if not (isinstance(kind, type) and issubclass(kind, Record) and isinstance(name, str)):
            raise ValueError("it asks for an attribute of what is no enumeration")
        super().__init__(kind, name)


# The second in the protocol of torch.save.
ENUM_MEMBERS = dict.fromkeys((("builtins", "getattr"), ("__builtin__", "getattr")), EnumMember)


class _Metadata(Record):
    pass


class _TensorStorage(Record):
    pass


class _MetadataIndex(Record):
    """A key of a dict, hashed by identity: its state arrives after it is put on the stack."""


def _table() -> dict[tuple[str, str], Any]:
    module, planner = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner"
    filesystem = "torch.distributed.checkpoint.filesystem"
    table: dict[tuple[str, str], Any] = {
        (module, "Metadata"): _Metadata,
        (module, "TensorStorageMetadata"): _TensorStorage,
        (module, "MetadataIndex"): _MetadataIndex,
        ("torch", "Size"): Record,
        ("torch.serialization", "_get_layout"): Record,
        ("pathlib", "PosixPath"): Record,
        ("pathlib", "PurePosixPath"): Record,
        (filesystem, "_StorageInfo"): Record,
        (filesystem, "_StoragePrefix"): Record,
        **ENUM_MEMBERS,
    }
    for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "StorageMeta",
                 "_MEM_FORMAT_ENCODING"):  # fmt: skip
        table[module, name] = Record
    # Megatron-Core keeps the save plans of all ranks beside the metadata; they are read and not used.
    for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"):
        table[planner, name] = Record
    table.update({("torch", name): dtype for name, dtype in DTYPES.items()})
    return table


ALLOWED_GLOBALS = _table()


@dataclass(frozen=True)
class StoredObject:
    """Where the pickle of an object lies: `[start, start + length)` of `file`."""

    file: str
    start: int
    length: int


@dataclass(frozen=True)
class StoredState:
    """What a torch_dist checkpoint holds, by key."""

    tensors: dict[str, StoredTensor]
    objects: dict[str, StoredObject]


def read_metadata(checkpoint: Contents) -> StoredState:
    """What a torch_dist checkpoint holds, from its `.metadata` file.

    Raises UserError for a file that is missing, too large, hostile or inconsistent.
    """
    path = checkpoint.path / METADATA_FILE
    if not has(checkpoint, METADATA_FILE):
        raise UserError(f"{checkpoint.path} is not a torch_dist checkpoint: no {METADATA_FILE}")
    content = read_small(checkpoint, METADATA_FILE, limit=METADATA_LIMIT)
    try:
        root = run(content, lambda module, name: ALLOWED_GLOBALS.get((module, name)))
    # A damaged pickle raises nearly anything; whatever it is, the file is refused and the cause named.
    except Exception as error:
        raise UserError(f"{path}: not the metadata of a checkpoint: {one_line(error)}") from None
    try:
        return _stored_state(root)
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{path}: not the metadata of a checkpoint: {one_line(error)}") from None


def one_line(error: Exception) -> str:
    """The message of an exception without line breaks, its type when it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def _stored_state(root: Any) -> StoredState:
    if not isinstance(root, _Metadata):
        raise ValueError("it does not hold a Metadata record")
    places, objects = {}, {}
    for index, info in root.fields["storage_data"].items():
        if index.fields.get("offset") is not None:
            places[_text(index.fields["fqn"]), _sizes(index.fields["offset"])] = info.fields
        else:
            place = _text(info.fields["relative_path"]), _count(info.fields["offset"]), _count(info.fields["length"])
            objects[_text(index.fields["fqn"])] = StoredObject(*place)
    tensors = {}
    for key, stored in root.fields["state_dict_metadata"].items():
        if isinstance(stored, _TensorStorage):
            tensors[_text(key)] = _stored_tensor(key, stored.fields, places)
    _check_places(tensors)
    return StoredState(tensors, objects)


def _stored_tensor(key: str, fields: dict[str, Any], places: dict[Any, dict[str, Any]]) -> StoredTensor:
    shape, dtype = _sizes(fields["size"]), fields["properties"].state[0]
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"tensor {key!r} has no dtype")
    chunks = []
    for chunk in fields["chunks"]:
        offset, size = _sizes(chunk.fields["offsets"]), _sizes(chunk.fields["sizes"])
        if len(offset) != len(shape) or len(size) != len(shape):
            raise ValueError(f"a chunk of tensor {key!r} has another number of dimensions")
        place = places.get((key, offset))
        if place is None:
            raise ValueError(f"the chunk of tensor {key!r} at {offset} is stored nowhere")
        if place.get("transform_descriptors"):
            raise ValueError(f"tensor {key!r} is stored compressed, which is not supported")
        start, length = _count(place["offset"]), _count(place["length"])
        if math.prod(size) * dtype.itemsize > length:
            raise ValueError(
                f"the chunk of tensor {key!r} at {offset} has {length} bytes, too few for its shape {size}"
            )
        chunks.append(Chunk(offset, size, _text(place["relative_path"]), start, length))
    return StoredTensor(shape, dtype, tuple(chunks))


def _check_places(tensors: dict[str, StoredTensor]) -> None:
    """Refuse chunks that share bytes: a file would unfold into more than it has."""
    places = sorted((c.file, c.start, c.length, key) for key, stored in tensors.items() for c in stored.chunks)
    for (file, start, length, key), (after, begin, _, other) in itertools.pairwise(places):
        if file == after and start + length > begin:
            raise ValueError(f"chunks of {key!r} and {other!r} share bytes of {file!r}")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected a name, got {type(value).__name__}")
    return value


def _count(value: Any) -> int:
    # What is no number is not shown: what nests may take for ever to print.
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"expected a whole number, got {type(value).__name__}")
    if not 0 <= value < 2**63:
        raise ValueError(f"expected a whole number of bytes or elements, got {value}")
    return value


def _sizes(size: Record) -> tuple[int, ...]:
    """The numbers of a pickled torch.Size."""
    (values,) = size.arguments
    if len(values) > DIMS_LIMIT:
        raise ValueError(f"a shape of {len(values)} dimensions")
    return tuple(_count(value) for value in values)


@dataclass(frozen=True)
class StoredObjects:
    """Objects that are one and the same pickle: the bytes of a file that hold it, and their names."""

    names: tuple[str, ...]
    file: str
    length: int


def metadata_bytes(tensors: dict[str, StoredTensor], objects: Sequence[StoredObjects] = ()) -> bytes:
    """`.metadata` for these tensors and objects, in the classes torch.distributed.checkpoint itself reads."""
    storage_data = {}
    state_dict_metadata: dict[str, dcp.STORAGE_TYPES] = {}
    for key, stored in tensors.items():
        boxes = []
        for chunk in stored.chunks:
            boxes.append(dcp.ChunkStorageMetadata(torch.Size(chunk.offset), torch.Size(chunk.size)))
            storage_data[dcp.MetadataIndex(key, chunk.offset)] = _StorageInfo(chunk.file, chunk.start, chunk.length)
        properties = dcp.TensorProperties(dtype=stored.dtype)
        state_dict_metadata[key] = dcp.TensorStorageMetadata(properties, torch.Size(stored.shape), boxes)
    for alike in objects:
        for name in alike.names:
            storage_data[dcp.MetadataIndex(name)] = _StorageInfo(alike.file, 0, alike.length)
            state_dict_metadata[name] = dcp.BytesStorageMetadata()
    metadata = dcp.Metadata(state_dict_metadata, storage_data=storage_data, version="1.0.0")
    return pickle.dumps(metadata, protocol=4)
