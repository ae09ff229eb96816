"""Reading and writing Megatron's torch_dist checkpoints tensor by tensor: no process group, no Megatron, no GPU.

A checkpoint is a folder: `.metadata` says for every global tensor which boxes (chunks) of it lie where,
`__R_I.distcp` hold the chunks, each a `torch.save` payload; `metadata.json` and `common.pt` complete what
`megatron.core.dist_checkpointing.load` expects. The tensors of all layers are stacked, `[num_layers, ...]`.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from minitron_nemo.artefacts.contents import Contents, Place, contents_of
from minitron_nemo.artefacts.paths import is_plain_name
from minitron_nemo.artefacts.stretch import Stretch
from minitron_nemo.checkpoint.geometry import Box, Chunk, StoredTensor, coverage_fault, read_box, whole
from minitron_nemo.checkpoint.hashed_files import Fill, HashingFile, VerifiedFile, fill_from
from minitron_nemo.checkpoint.payload import SavedTensor, find_tensor, read_part
from minitron_nemo.checkpoint.restricted_metadata import (
    DTYPES,
    METADATA_FILE,
    StoredObjects,
    metadata_bytes,
    one_line,
    read_metadata,
)
from minitron_nemo.errors import UserError

NOTHING_FILE = "nothing.pt"
COMMON_FILE = "common.pt"
COMMON_OBJECT = "common_state/shard_0_1"  # what Megatron-Core has in the place of that file from 0.19 on
BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
COMMON_BACKEND = {"common_backend": "torch", "common_backend_version": 1}


class TorchDistReader:
    """The global tensors of a torch_dist folder, whatever layout wrote them; reads only the bytes it needs.

    Files that `sha256` lists, by name, are hashed while they are read, which `verify` completes. Raises UserError for a
    folder that is not a checkpoint, or whose metadata or payloads do not fit together.
    """

    def __init__(self, folder: Place, *, sha256: Mapping[str, str] | None = None) -> None:
        contents = contents_of(folder)
        self.folder = contents.path
        stored = read_metadata(contents)
        self._tensors, self.objects = stored.tensors, stored.objects
        names = {chunk.file for tensor in self._tensors.values() for chunk in tensor.chunks}
        self._files = {name: self._file(contents, name) for name in sorted(names | set(sha256 or ()))}
        self._verified = {
            name: VerifiedFile(self._files[name], sha, label=self.folder / name) for name, sha in (sha256 or {}).items()
        }
        self._check_places()
        self._whole: set[str] = set()
        self._places: dict[Chunk, SavedTensor] = {}

    def keys(self) -> list[str]:
        return list(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._tensors[key].shape

    def dtype(self, key: str) -> torch.dtype:
        return self._tensors[key].dtype

    def read(self, key: str, box: Box | None = None) -> Tensor:
        """A box of the global tensor, on the CPU in its stored dtype; the default is all of it."""
        stored = self._tensors[key]
        box = whole(stored.shape) if box is None else box
        box.check_inside(stored.shape, key)
        self._check_whole(key)
        return read_box(box, stored.dtype, stored.chunks, partial(self._read_part, key))

    def check_whole(self, keys: Iterable[str]) -> None:
        """Refuse, by name, the first of these tensors whose chunks do not cover it exactly once."""
        for key in keys:
            self._check_whole(key)

    def verify(self) -> None:
        """Refuse, by name, the first file whose bytes are not those that its SHA-256 stands for."""
        for file in self._verified.values():
            file.verify()

    def _check_whole(self, key: str) -> None:
        if key in self._whole:
            return
        if (fault := coverage_fault(self._tensors[key])) is not None:
            raise UserError(f"{self.folder}: tensor {key} is incomplete: {fault}")
        self._whole.add(key)

    def _check_places(self) -> None:
        """Refuse a checkpoint that promises more bytes than it has, before memory is taken for any of them."""
        for key, stored in self._tensors.items():
            for chunk in stored.chunks:
                if chunk.start + chunk.length > self._files[chunk.file].length:
                    raise self._cut_short(key, chunk)

    def _cut_short(self, key: str, chunk: Chunk) -> UserError:
        path = self.folder / chunk.file
        return UserError(f"{path}: ends before the chunk of {key} at byte {chunk.start}; the file was cut short")

    def _file(self, contents: Contents, name: str) -> Stretch:
        """A name from `.metadata` must stay inside the folder: a plain file name, no link."""
        if not is_plain_name(name):
            raise UserError(f"{self.folder}: .metadata names the file {name!r}; only names inside the folder are read")
        found = None if (self.folder / name).is_symlink() else contents.find(name)
        if found is None:
            raise UserError(
                f"{self.folder / name}: named by .metadata, but it is not a regular file of this checkpoint"
            )
        return found

    def _read_part(self, key: str, chunk: Chunk, shared: Box, out: Tensor) -> None:
        """Fill `out` with the box `shared`, which lies in a stored chunk; the chunk must be what the metadata promises.

        The bytes of the box alone where the chunk is contiguous, else all of it.
        """
        path, promised = self.folder / chunk.file, (self._tensors[key].dtype, chunk.size)
        stretch = self._files[chunk.file]
        with stretch.path.open("rb", buffering=0) as file:
            fill = self._filler(file, chunk)
            end = min(stretch.length, os.fstat(file.fileno()).st_size - stretch.start)
            if chunk.start + chunk.length > end:
                raise self._cut_short(key, chunk)
            try:
                if chunk not in self._places:  # a cut comes back for the next rows
                    self._places[chunk] = find_tensor(file, stretch.start + chunk.start, chunk.length)
                found = self._places[chunk]
                if (found.dtype, found.shape) == promised:
                    offset = tuple(at - begin for at, begin in zip(shared.offset, chunk.offset, strict=True))
                    return read_part(fill, found, Box(offset, shared.size), out)
            except (OSError, EOFError, ValueError) as error:
                raise UserError(f"{path}: the chunk of {key} cannot be read: {one_line(error)}") from None
        content = f"{found.dtype} {found.shape}"
        raise UserError(f"{path}: the chunk of {key} is {content}; .metadata promises {promised[0]} {promised[1]}")

    def _filler(self, file: BinaryIO, chunk: Chunk) -> Fill:
        """What fills memory with the bytes of a chunk, from a position in it on; hashed where a hash is known."""
        stretch, verified = self._files[chunk.file], self._verified.get(chunk.file)

        def fill(target: memoryview, position: int) -> None:
            if verified is not None:
                return verified.fill(target, chunk.start + position)
            return fill_from(file, target, stretch.start + chunk.start + position)

        return fill


def with_own_storage(tensor: Tensor) -> Tensor:
    """The same elements, contiguous, with no storage around them: that of a view is saved whole. Copies where it must.

    The result shares memory with a contiguous tensor, view or not.
    """
    tensor = tensor.contiguous() if tensor.numel() else torch.empty_like(tensor)
    if tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    elements = torch.from_numpy(tensor.view(-1).view(torch.uint8).numpy())
    return elements.view(tensor.dtype).view(tensor.shape)


@contextmanager
def _without_crc32() -> Iterator[None]:
    """`torch.save` without the checksums of its zip: a manifest has the SHA-256 of the whole file."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def weights_file(rank: int) -> str:
    """The name of the file of tensors that a rank writes."""
    return f"__{rank}_0.distcp"


class TorchDistWriter:
    """Appends chunks to `__{rank}_0.distcp`; `close` gives the records that `write_metadata` needs of every rank.

    `sha256` is the hash of the file so far. Files are created, never reopened. With `file` the chunks go there, into a
    tar say, and not into the folder.
    """

    def __init__(self, folder: str | Path, *, rank: int = 0, file: HashingFile | None = None) -> None:
        self.name = weights_file(rank)
        self._file = HashingFile(Path(folder) / self.name) if file is None else file
        self._records: list[dict[str, Any]] = []

    def write(self, key: str, tensor: Tensor, *, global_shape: Sequence[int], offset: Sequence[int]) -> None:
        """Append the chunk of `key` that starts at `offset`; `tensor` has as many dims as `global_shape`."""
        if not tensor.dim() == len(global_shape) == len(offset):
            raise ValueError(f"{key}: chunk {tuple(tensor.shape)} at {tuple(offset)} of {tuple(global_shape)}")
        start = self._file.position
        payload = with_own_storage(tensor.detach().cpu())
        with _without_crc32():
            torch.save(payload, self._file)  # type: ignore[arg-type]
        self._records.append(
            {
                "key": key,
                "dtype": str(payload.dtype).removeprefix("torch."),
                "global_shape": list(global_shape),
                "offset": list(offset),
                "size": list(payload.shape),
                "file": self.name,
                "start": start,
                "length": self._file.position - start,
            }
        )

    @property
    def sha256(self) -> str:
        return self._file.sha256

    def close(self) -> list[dict[str, Any]]:
        """Flush to the disk; the chunk records, JSON-able."""
        self._file.close(sync=True)
        return self._records


def write_metadata(
    folder: str | Path,
    records: list[dict[str, Any]],
    *,
    nothings: Sequence[str] = (),
    common: Mapping[str, Any] | None = None,
    common_is_object: bool = False,
) -> None:
    """Complete a torch_dist folder: `.metadata`, `metadata.json` and the common state for the chunks of all ranks.

    `nothings` are names of objects that a reader asks for and that hold nothing. The common state is a file of its own,
    which every Megatron-Core reads, or with `common_is_object` an object among the tensors, as 0.19 saves it.
    Raises AssertionError when the chunks do not cover every global tensor exactly.
    """
    folder = Path(folder)
    tensors: dict[str, StoredTensor] = {}
    for record in records:
        key, shape, dtype = record["key"], tuple(record["global_shape"]), DTYPES[record["dtype"]]
        before = tensors.get(key, StoredTensor(shape, dtype, ()))
        assert (before.shape, before.dtype) == (shape, dtype), f"{key}: ranks disagree on its shape or dtype"
        chunk = Chunk(tuple(record["offset"]), tuple(record["size"]), record["file"], record["start"], record["length"])
        tensors[key] = StoredTensor(shape, dtype, (*before.chunks, chunk))
    for key, stored in tensors.items():
        fault = coverage_fault(stored)
        assert fault is None, f"{key}: {fault}"
    objects = []
    if common_is_object:
        objects.append(_write_object(folder, "common_state.pt", dict(common or {}), [COMMON_OBJECT]))
    else:
        torch.save(dict(common or {}), folder / COMMON_FILE)
    if nothings:
        objects.append(_write_object(folder, NOTHING_FILE, None, nothings))
    backend = BACKEND if common_is_object else BACKEND | COMMON_BACKEND
    (folder / "metadata.json").write_text(json.dumps(backend))
    (folder / METADATA_FILE).write_bytes(metadata_bytes(tensors, objects))


def _write_object(folder: Path, file: str, value: Any, names: Sequence[str]) -> StoredObjects:
    """A file with one object, which all of these names stand for."""
    torch.save([value], folder / file)  # Megatron keeps the objects of one name as a list
    return StoredObjects(tuple(names), file, (folder / file).stat().st_size)
