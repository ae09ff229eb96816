"""Tensors that older Megatron-Core saved as zarr: a folder for each key, with `.zarray` and a file for each chunk.

Source: the zarr storage specification, version 2, and Megatron-Core 0.5, which leaves its chunks uncompressed.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minitron_nemo.artefacts.contents import Contents
from minitron_nemo.artefacts.foreign_json import read_json_in
from minitron_nemo.artefacts.paths import is_plain_name
from minitron_nemo.artefacts.stretch import Stretch
from minitron_nemo.checkpoint.geometry import Box, read_box, whole
from minitron_nemo.checkpoint.hashed_files import fill_from
from minitron_nemo.checkpoint.payload import SavedTensor, read_part
from minitron_nemo.errors import UserError

DESCRIPTION = ".zarray"
# `bfloat16` is Megatron's own spelling, which `<V2`, two bytes of anything, has in the files of zarr itself.
DTYPES = {"<f8": torch.float64, "<f4": torch.float32, "<f2": torch.float16, "bfloat16": torch.bfloat16}


class ZarrTensors:
    """The arrays in a folder, read by the box; UserError, naming the array, for what is compressed or incomplete."""

    def __init__(self, contents: Contents) -> None:
        self.folder, self._contents = contents.path, contents
        names = contents.names()
        self._files = len(names)
        self._whole: set[str] = set()
        keys = sorted(name.removesuffix(f"/{DESCRIPTION}") for name in names if name.endswith(f"/{DESCRIPTION}"))
        self._arrays = {key: self._array(key) for key in keys if is_plain_name(key)}

    def keys(self) -> list[str]:
        return list(self._arrays)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._arrays[key][0].shape

    def dtype(self, key: str) -> torch.dtype:
        return self._arrays[key][0].dtype

    def check_whole(self, keys: Iterable[str]) -> None:
        """Refuse, by name, the first chunk that is missing or of another size."""
        for key in keys:
            array, chunk, _ = self._arrays[key]
            grid = [math.ceil(size / step) for size, step in zip(array.shape, chunk, strict=True)]
            for index in itertools.product(*map(range, grid)):
                self._find_chunk(key, index)
            self._whole.add(key)

    def verify(self) -> None:
        """Nothing: zarr keeps no hashes."""

    def read(self, key: str, box: Box | None = None) -> Tensor:
        """A box of the array, on the CPU in its stored dtype; the default is all of it."""
        array, chunk, _ = self._arrays[key]
        box = whole(array.shape) if box is None else box
        box.check_inside(array.shape, key)
        if key not in self._whole:
            self.check_whole([key])  # before memory is taken for what the array says that it has
        return read_box(box, array.dtype, _chunks_of(box, chunk), partial(self._read_chunk, key))

    def _read_chunk(self, key: str, chunk: Box, shared: Box, out: Tensor) -> None:
        array, index = self._arrays[key][0], tuple(o // s for o, s in zip(chunk.offset, chunk.size, strict=True))
        found = self._find_chunk(key, index)
        offset = tuple(at - begin for at, begin in zip(shared.offset, chunk.offset, strict=True))
        with found.path.open("rb", buffering=0) as file:

            def fill(target: memoryview, position: int) -> None:
                fill_from(file, target, found.start + position)

            try:
                read_part(fill, SavedTensor.in_order(array.dtype, chunk.size), Box(offset, shared.size), out)
            except EOFError:
                raise UserError(f"{found.path}: ends before the chunk of {key} does; it was cut short") from None

    def _find_chunk(self, key: str, index: tuple[int, ...]) -> Stretch:
        array, chunk, separator = self._arrays[key]
        name, size = f"{key}/{separator.join(map(str, index))}", math.prod(chunk) * array.dtype.itemsize
        found = self._contents.find(name)
        if found is None or found.length != size:
            held = "is missing" if found is None else f"has {found.length} bytes, not {size}"
            raise UserError(f"{self.folder / name}: the chunk {held}; the array was not saved whole")
        return found

    def _array(self, key: str) -> tuple[SavedTensor, tuple[int, ...], str]:
        """(dtype and shape, shape of a chunk, separator in names of chunks) of an array."""
        source = self.folder / key / DESCRIPTION
        values = read_json_in(self._contents, f"{key}/{DESCRIPTION}")
        if values.get("zarr_format") != 2:
            raise UserError(f"{source}: zarr_format={values.get('zarr_format')!r}: supported is 2")
        if values.get("compressor") is not None or values.get("filters"):
            raise UserError(
                f"{source}: compressor={str(values.get('compressor'))[:40]}: only arrays without compressor and "
                "filters are read, as Megatron saves them; copy it with zarr and compressor=None"
            )
        if values.get("order") != "C" or (dtype := DTYPES.get(str(values.get("dtype")))) is None:
            raise UserError(
                f"{source}: order={values.get('order')!r}, dtype={str(values.get('dtype'))[:20]!r}: supported are "
                f"order C and {', '.join(DTYPES)}"
            )
        shape, chunk = _sizes(values.get("shape")), _sizes(values.get("chunks"))
        separator = values.get("dimension_separator", ".")
        if shape is None or chunk is None or len(shape) != len(chunk) or separator not in (".", "/"):
            raise UserError(f"{source}: shape, chunks and dimension_separator must describe a grid of chunks")
        grid = [math.ceil(size / step) for size, step in zip(shape, chunk, strict=True)]
        if math.prod(grid) > self._files:
            raise UserError(f"{source}: describes {math.prod(grid)} chunks, there are not so many files; some are lost")
        return SavedTensor.in_order(dtype, shape), chunk, separator


def _sizes(value: Any) -> tuple[int, ...] | None:
    is_list = isinstance(value, list) and 0 < len(value) <= 8
    return tuple(value) if is_list and all(type(size) is int and 0 < size < 2**48 for size in value) else None


def _chunks_of(box: Box, size: tuple[int, ...]) -> Iterator[Box]:
    """The chunks of this size that a box touches."""
    spans = zip(box.offset, box.end, size, strict=True)
    starts = itertools.product(*(range(begin // step * step, end, step) for begin, end, step in spans))
    return (Box(start, size) for start in starts)
