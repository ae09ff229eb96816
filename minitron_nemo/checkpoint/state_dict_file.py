"""The tensors of a `torch.save` file of many, read one at a time from where they lie and without running code.

Such a file is an uncompressed zip: a pickle describes the tensors, and the elements of each storage are an entry.
"""

import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitron_nemo.artefacts.stretch import Stretch, StretchFile
from minitron_nemo.checkpoint import common_state
from minitron_nemo.checkpoint.buffers import memory_of, new_tensor
from minitron_nemo.checkpoint.geometry import Box, whole
from minitron_nemo.checkpoint.hashed_files import fill_from
from minitron_nemo.checkpoint.payload import STORAGES, SavedTensor, data_start, read_part
from minitron_nemo.checkpoint.pickle_machine import run
from minitron_nemo.checkpoint.restricted_metadata import one_line
from minitron_nemo.errors import UserError

DESCRIPTION_LIMIT = 64 * 2**20  # bytes; the description of a thousand tensors has some hundred KiB
DIRECTORY_LIMIT = 4 * 2**20  # bytes: some 40,000 tensors; a directory takes ten times as much memory


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    key: str
    elements: int


@dataclass(frozen=True)
class StoredView:
    """A contiguous tensor: elements of a storage from `first` on."""

    storage: _Storage
    first: int
    shape: tuple[int, ...]


class StateDictFile:
    """A state dict in a file. `names` are those of its tensors; inside of nested dicts, joined by dots.

    Raises UserError, naming `label`, for what is no such file, hostile or cut short.
    """

    def __init__(self, stretch: Stretch, *, label: Path) -> None:
        self.stretch, self.label = stretch, label
        # A damaged zip or pickle raises nearly anything; whatever it is, the file is refused and the cause named.
        try:
            with stretch.path.open("rb", buffering=0) as file:
                place = stretch.start, stretch.length
                with zipfile.ZipFile(StretchFile(file, *place, budget=DIRECTORY_LIMIT)) as archive:
                    entries = {entry.filename: entry for entry in archive.infolist()}
                self._read_description(StretchFile(file, *place, budget=2 * DESCRIPTION_LIMIT), entries)
        except Exception as error:
            raise UserError(f"{label}: not a readable file of torch.save: {one_line(error)}") from None

    def names(self) -> list[str]:
        return list(self._views)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._views[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._views[name].storage.dtype

    def read(self, name: str, box: Box | None = None) -> Tensor:
        """A tensor, or a box of it, on the CPU in its stored dtype."""
        view = self._views[name]
        box = whole(view.shape) if box is None else box
        dtype = view.storage.dtype
        out = new_tensor(box.size, dtype)
        start = self.stretch.start + self._starts[view.storage.key] + view.first * dtype.itemsize
        with self.stretch.path.open("rb", buffering=0) as file:

            def fill(target: memoryview, position: int) -> None:
                fill_from(file, target, start + position)

            try:
                if box == whole(view.shape):
                    fill(memory_of(out), 0)
                else:
                    read_part(fill, SavedTensor.in_order(dtype, view.shape), box, out)
            except EOFError:
                raise UserError(f"{self.label}: ends before {name} does; the file was cut short") from None
        return out

    def _read_description(self, file: StretchFile, entries: dict[str, zipfile.ZipInfo]) -> None:
        described = [name for name in entries if name.endswith("/data.pkl")]
        if len(described) != 1:
            raise ValueError("it describes no tensors")
        folder, description = described[0].removesuffix("data.pkl"), entries[described[0]]
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
            raise ValueError("it is compressed, which torch.save never does")
        if description.file_size > DESCRIPTION_LIMIT:
            raise ValueError(f"its description has over {DESCRIPTION_LIMIT} bytes")
        file.seek(data_start(file, description))
        state = run(file.read(description.file_size), _named, stored=_stored)
        self._views = dict(_flat(state))
        self._starts: dict[str, int] = {}
        for name, view in self._views.items():
            key, size = view.storage.key, view.storage.elements * view.storage.dtype.itemsize
            entry = entries[f"{folder}data/{key}"]
            if key not in self._starts:
                self._starts[key] = data_start(file, entry)
            if size > entry.file_size or self._starts[key] + size > file.length:
                raise ValueError(f"the elements of {name} are cut short")
            if view.first + math.prod(view.shape) > view.storage.elements:
                raise ValueError(f"{name} leaves its storage")


def _named(module: str, name: str) -> Any:
    if module == "torch._utils" and name == "_rebuild_tensor_v2":
        return _view
    if module == "torch._utils" and name == "_rebuild_parameter":
        return lambda view, *_: view
    if module == "torch" and name in STORAGES:
        return STORAGES[name]
    return common_state.named(module, name)


def _stored(reference: Any) -> _Storage:
    kind, dtype, key, _, elements = reference
    is_sound = isinstance(key, str) and type(elements) is int and elements >= 0
    if kind != "storage" or not isinstance(dtype, torch.dtype) or not is_sound:
        raise ValueError("a storage is not described as torch.save does it")
    return _Storage(dtype, key, elements)


def _view(storage: _Storage, first: Any, shape: Any, stride: Any, *_: Any) -> StoredView:
    if not isinstance(storage, _Storage) or not all(type(n) is int and n >= 0 for n in (first, *shape, *stride)):
        raise ValueError("a tensor is not described as torch.save does it")
    contiguous = all(
        size == 1 or step == math.prod(shape[dim + 1 :])
        for dim, (size, step) in enumerate(zip(shape, stride, strict=True))
    )
    if not contiguous:
        raise ValueError("a tensor is no contiguous one")
    return StoredView(storage, first, tuple(shape))


def _flat(state: Any, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, StoredView]]:
    if not isinstance(state, dict):
        raise ValueError(f"it holds {type(state).__name__}, not a dict")
    for name, value in state.items():
        if isinstance(value, StoredView):
            yield f"{prefix}{name}", value
        elif isinstance(value, dict) and isinstance(name, str) and depth < 4:
            yield from _flat(value, f"{prefix}{name}.", depth + 1)
