"""Part of a tensor out of a `torch.save` payload that lies somewhere in a file, without reading the rest of it.

A payload is a zip: `NAME/data.pkl` describes the tensor, `NAME/data/0` holds its elements, uncompressed and in one run.
The description is walked opcode by opcode for the one form that `torch.save` gives a plain tensor; nothing is
unpickled, and every other form is refused.
"""

import math
import pickletools
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from minitron_nemo.artefacts.stretch import OverBudgetError, StretchFile
from minitron_nemo.checkpoint.buffers import memory_of
from minitron_nemo.checkpoint.geometry import Box
from minitron_nemo.checkpoint.hashed_files import Fill

_HEADER_LIMIT = 2**20  # bytes of zip directory and description; those of a plain tensor have about a thousand
_DESCRIPTION_LIMIT = 4096
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_LEAST_RUN = 4096  # bytes; shorter runs are read with what lies between them
STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class SavedTensor:
    """A tensor whose first element lies at byte `start` of its payload; `stride` counts elements."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def in_order(cls, dtype: torch.dtype, shape: tuple[int, ...]) -> "SavedTensor":
        """A contiguous one at the beginning of its payload."""
        return cls(0, dtype, shape, tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape))))

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements lie in one run; the stride of a dimension of size 1 is never used."""
        steps = (math.prod(self.shape[dim + 1 :]) for dim in range(len(self.shape)))
        return all(n == 1 or given == step for n, given, step in zip(self.shape, self.stride, steps, strict=True))

    @property
    def reach(self) -> int:
        """Elements from the first to the last."""
        return 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))


def find_tensor(file: BinaryIO, start: int, length: int) -> SavedTensor:
    """The tensor in the payload of `length` bytes at `start`.

    Raises ValueError for what no `torch.save` makes of a plain tensor: other objects, other zips, compressed entries,
    which could unfold without end, and elements that lie outside of the payload or on top of each other.
    """
    stretch = StretchFile(file, start, length, budget=_HEADER_LIMIT)
    # A file that is no such zip raises nearly anything.
    try:
        entries = {entry.filename: entry for entry in zipfile.ZipFile(stretch).infolist()}
    except OverBudgetError:
        raise ValueError("its directory is larger than that of any tensor") from None
    except Exception as error:
        raise ValueError(f"it is no zip of torch.save: {error}") from None
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
        raise ValueError("it is compressed, which torch.save never does")
    try:
        return _tensor_in(stretch, entries)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"it is not what torch.save makes of a plain tensor: {reason}") from None


def _tensor_in(stretch: StretchFile, entries: dict[str, zipfile.ZipInfo]) -> SavedTensor:
    name = next(name for name in entries if name.endswith("/data.pkl"))
    folder, description = name.removesuffix("data.pkl"), entries[name]
    if description.file_size > _DESCRIPTION_LIMIT:
        raise ValueError(f"its description has {description.file_size} bytes; that of a tensor has a few hundred")
    order = entries.get(f"{folder}byteorder")
    if order is not None and _bytes(stretch, order) != b"little":
        raise ValueError("its numbers do not begin with their lowest byte")
    ((dtype, key, stored), first, shape, stride), _ = _described(_bytes(stretch, description))
    data = entries[f"{folder}data/{key}"]
    begin = data_start(stretch, data)
    found = SavedTensor(begin + first * dtype.itemsize, dtype, shape, stride)
    count = math.prod(shape)
    if stored * dtype.itemsize > data.file_size or begin + stored * dtype.itemsize > stretch.length:
        raise ValueError("it has fewer elements than it says")
    if count and (first + found.reach > stored or count > found.reach):
        raise ValueError("its elements lie outside of what is stored, or on top of each other")
    return found


def data_start(stretch: StretchFile, entry: zipfile.ZipInfo) -> int:
    """Where the bytes of an entry begin: behind its local header."""
    stretch.seek(entry.header_offset)
    magic, _, _, method, *_, name_length, extra_length = _LOCAL_HEADER.unpack(stretch.read(_LOCAL_HEADER.size))
    if magic != b"PK\x03\x04" or method != zipfile.ZIP_STORED:
        raise ValueError("not the header of a stored entry")
    return int(entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length)


def _bytes(stretch: StretchFile, entry: zipfile.ZipInfo) -> bytes:
    """A small entry. Its CRC is not looked at: manifests have a SHA-256, and torch can leave the CRC out."""
    stretch.seek(data_start(stretch, entry))
    return stretch.read(entry.file_size)


def _described(pickled: bytes) -> Any:
    """(((dtype, key, elements), first element, shape, stride), flags) of a pickled plain tensor.

    A walk over the few opcodes that such a description has, which builds tuples of numbers and calls nothing; raises
    for any other.
    """
    mark = object()
    stack: list[Any] = []
    for opcode, argument, _ in pickletools.genops(pickled):
        name = opcode.name
        if name in ("PROTO", "BINPUT", "STOP"):
            continue
        if name in ("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "GLOBAL"):
            stack.append(argument)
        elif name in ("MARK", "EMPTY_TUPLE", "NEWFALSE"):
            stack.append({"MARK": mark, "EMPTY_TUPLE": (), "NEWFALSE": False}[name])
        elif name == "TUPLE" or name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            size = stack[::-1].index(mark) if name == "TUPLE" else int(name[-1])
            items = tuple(stack[len(stack) - size :])
            del stack[len(stack) - size - (name == "TUPLE") :]
            stack.append(items)
        elif name == "BINPERSID":
            _, storage, key, _, elements = stack.pop()
            stack.append((STORAGES[storage.removeprefix("torch ")], key, elements))
        elif name == "REDUCE":
            arguments = stack.pop()
            stack.append(_called(stack.pop(), arguments))
        else:
            raise ValueError(f"a plain tensor has no {name}")
    (result,) = stack
    return result


def _called(function: str, arguments: tuple[Any, ...]) -> Any:
    if function == "collections OrderedDict" and not arguments:
        return None  # the hooks of the tensor: none
    if function != "torch._utils _rebuild_tensor_v2":
        raise ValueError(f"{function} makes no plain tensor")
    storage, first, shape, stride, *flags = arguments
    if not all(isinstance(n, int) and n >= 0 for n in (storage[2], first, *shape, *stride)):
        raise ValueError("sizes that are no numbers")
    return (storage, first, tuple(shape), tuple(stride)), flags


def read_part(fill: Fill, plain: SavedTensor, part: Box, out: Tensor) -> None:
    """Fill `out`, contiguous and of the part's size, with a box of the tensor in a payload that `fill` reads.

    Reads the bytes of the box alone where they lie in runs worth a call to the system, else the rows they lie in; all
    of a tensor whose elements lie in another order.
    """
    if not plain.is_contiguous:
        elements = torch.empty(plain.reach, dtype=plain.dtype)
        fill(memory_of(elements), plain.start)
        out.copy_(elements.as_strided(plain.shape, plain.stride)[part.slices()])
        return
    run_dim = _first_whole_dim(part, plain.shape)
    run = math.prod(part.size[run_dim:]) * plain.dtype.itemsize
    if run < _LEAST_RUN and math.prod(part.size[:run_dim]) > 1:
        rows = Box(
            (*part.offset[:run_dim], *[0] * (out.dim() - run_dim)), (*part.size[:run_dim], *plain.shape[run_dim:])
        )
        whole = torch.empty(rows.size, dtype=out.dtype)
        read_part(fill, plain, rows, whole)
        out.copy_(whole[part.slices(rows.offset)])
        return
    target = memory_of(out)
    for index, offset in enumerate(_run_offsets(part, plain.shape, run_dim)):
        fill(target[index * run : (index + 1) * run], plain.start + offset * plain.dtype.itemsize)


def _first_whole_dim(part: Box, shape: tuple[int, ...]) -> int:
    """The dimension from which on the elements of the part lie in one run."""
    dim = len(shape)
    while dim and part.size[dim - 1] == shape[dim - 1]:
        dim -= 1
    return max(dim - 1, 0)


def _run_offsets(part: Box, shape: tuple[int, ...], run_dim: int) -> Iterator[int]:
    """The first element of every run, counted over the whole tensor."""
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    first = sum(offset * stride for offset, stride in zip(part.offset, strides, strict=True))
    for number in range(math.prod(part.size[:run_dim])):
        offset = first
        for dim in reversed(range(run_dim)):
            number, place = divmod(number, part.size[dim])
            offset += place * strides[dim]
        yield offset
