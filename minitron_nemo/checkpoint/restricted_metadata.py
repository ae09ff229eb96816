"""The only pickles of this package: the `.metadata` file of a torch_dist checkpoint, read without running code.

Reading goes through a closed table: every class a checkpoint of torch.distributed or Megatron-Core names is
answered by an inert record of ours, every other name is refused. Nothing is imported because a file says so.
"""

import io
import pickle
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from minitron_nemo.artefacts.contents import Contents, has, read_small
from minitron_nemo.checkpoint.geometry import Chunk, StoredTensor
from minitron_nemo.errors import UserError

METADATA_FILE = ".metadata"
METADATA_LIMIT = 512 * 2**20  # bytes; that of a 405B model with its optimizer is a few dozen MiB

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
    torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2,
)}  # fmt: skip


class _Record:
    """Stands in for a pickled object: keeps the arguments and the state that came with it."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.fields: dict[str, Any] = {}
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state
        self.fields = state if isinstance(state, dict) else {}


class _Metadata(_Record):
    pass


class _TensorStorage(_Record):
    pass


class _MetadataIndex(_Record):
    """A key of a dict, hashed by identity: its state arrives after it is put on the stack."""


def _table() -> dict[tuple[str, str], Any]:
    module, planner = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner"
    filesystem = "torch.distributed.checkpoint.filesystem"
    table: dict[tuple[str, str], Any] = {
        (module, "Metadata"): _Metadata,
        (module, "TensorStorageMetadata"): _TensorStorage,
        (module, "MetadataIndex"): _MetadataIndex,
        ("torch", "Size"): _Record,
        ("torch.serialization", "_get_layout"): _Record,
        ("pathlib", "PosixPath"): _Record,
        ("pathlib", "PurePosixPath"): _Record,
        (filesystem, "_StorageInfo"): _Record,
        (filesystem, "_StoragePrefix"): _Record,
    }
    for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "StorageMeta",
                 "_MEM_FORMAT_ENCODING"):  # fmt: skip
        table[module, name] = _Record
    # Megatron-Core keeps the save plans of all ranks beside the metadata; they are read and not used.
    for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"):
        table[planner, name] = _Record
    table.update({("torch", name): dtype for name, dtype in DTYPES.items()})
    return table


ALLOWED_GLOBALS = _table()


class _RestrictedUnpickler(pickle._Unpickler):
    """The unpickler written in Python: the one in C lets a file of ten bytes ask for a memo of many GiB."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return ALLOWED_GLOBALS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs") from None

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it holds a persistent id, which no checkpoint needs")


def read_metadata(checkpoint: Contents) -> dict[str, StoredTensor]:
    """The tensors of a torch_dist checkpoint by key, from its `.metadata` file; byte objects are left out.

    Raises UserError for a file that is missing, too large, hostile or inconsistent.
    """
    path = checkpoint.path / METADATA_FILE
    if not has(checkpoint, METADATA_FILE):
        raise UserError(f"{checkpoint.path} is not a torch_dist checkpoint: no {METADATA_FILE}")
    content = read_small(checkpoint, METADATA_FILE, limit=METADATA_LIMIT)
    try:
        root = _RestrictedUnpickler(io.BytesIO(content)).load()
    # A damaged pickle raises nearly anything; whatever it is, the file is refused and the cause named.
    except Exception as error:
        raise UserError(f"{path}: not the metadata of a checkpoint: {one_line(error)}") from None
    try:
        return _stored_tensors(root)
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{path}: not the metadata of a checkpoint: {one_line(error)}") from None


def one_line(error: Exception) -> str:
    """The message of an exception without line breaks, its type when it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def _stored_tensors(root: Any) -> dict[str, StoredTensor]:
    if not isinstance(root, _Metadata):
        raise ValueError("it does not hold a Metadata record")
    places = {}
    for index, info in root.fields["storage_data"].items():
        if index.fields.get("offset") is not None:
            places[index.fields["fqn"], _sizes(index.fields["offset"])] = info.fields
    tensors = {}
    for key, stored in root.fields["state_dict_metadata"].items():
        if isinstance(stored, _TensorStorage):
            tensors[_text(key)] = _stored_tensor(key, stored.fields, places)
    return tensors


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
        chunks.append(Chunk(offset, size, _text(place["relative_path"]), start, length))
    return StoredTensor(shape, dtype, tuple(chunks))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected a name, got {type(value).__name__}")
    return value


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"expected a whole number, got {value!r}")
    return value


def _sizes(size: _Record) -> tuple[int, ...]:
    """The numbers of a pickled torch.Size."""
    (values,) = size.arguments
    return tuple(_count(value) for value in values)


@dataclass(frozen=True)
class StoredObjects:
    """Objects that are one and the same pickle: the bytes of a file that hold it, and their names."""

    names: tuple[str, ...]
    file: str
    length: int


def metadata_bytes(tensors: dict[str, StoredTensor], objects: StoredObjects | None = None) -> bytes:
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
    if objects is not None:
        for name in objects.names:
            storage_data[dcp.MetadataIndex(name)] = _StorageInfo(objects.file, 0, objects.length)
            state_dict_metadata[name] = dcp.BytesStorageMetadata()
    metadata = dcp.Metadata(state_dict_metadata, storage_data=storage_data, version="1.0.0")
    return pickle.dumps(metadata, protocol=4)
