"""The header of a safetensors file: parsed and checked by hand, before any size in it is believed.

Format (https://github.com/huggingface/safetensors): 8 bytes with the length of the header, a JSON object, the tensors
in one run. Each tensor has a dtype, a shape, and its first and last byte behind the header.
"""

import itertools
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from minitron_nemo.artefacts.strict_json import parse_json

LIMIT = 8 * 2**20  # bytes; the library reads 100 MB, and a thousand layers need two of them
TENSORS_LIMIT = 100_000
ENTRY_FIELDS = {"dtype", "shape", "data_offsets"}
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32,
    "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """What the header of a safetensors file says of a tensor: its dtype by name, its shape, its first byte."""

    dtype: str
    shape: tuple[int, ...]
    start: int


def read_entries(file: BinaryIO) -> dict[str, Entry]:
    """The tensors of a file by name, in the order of their bytes; ValueError for a file that is not sound.

    Sound is a header that fits into the file, and tensors that fill the rest of it: one behind the other, no byte
    twice and none left, each with as many bytes as its dtype and shape need.
    """
    size, prefix = os.fstat(file.fileno()).st_size, os.pread(file.fileno(), 8, 0)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(LIMIT, size - 8):
        raise ValueError(f"its header would have {length} bytes; the file has {size}, and at most {LIMIT} are read")
    text = os.pread(file.fileno(), length, 8)
    if text.count(b"{") > TENSORS_LIMIT:  # each of them is an object
        raise ValueError(f"it has too many tensors; at most {TENSORS_LIMIT} are read")
    header = parse_json(text)
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("its __metadata__ must map texts to texts")
    spans = sorted((*_span(name, entry), name) for name, entry in header.items())
    for (_, end, name), (begin, _, after) in itertools.pairwise(spans):
        if end != begin:
            raise ValueError(f"its tensors {ascii(name)[:80]} and {ascii(after)[:80]} overlap or leave a gap")
    if spans and spans[0][0] != 0:
        raise ValueError(f"its first tensor begins at byte {spans[0][0]}")
    if (end := spans[-1][1] if spans else 0) != size - 8 - length:
        raise ValueError(f"its tensors have {end} bytes; the file has {size - 8 - length} for them")
    return {
        name: Entry(header[name]["dtype"], tuple(header[name]["shape"]), 8 + length + begin) for begin, _, name in spans
    }


def _span(name: str, entry: Any) -> tuple[int, int]:
    """First and last byte of a tensor behind the header, as many as its dtype and shape need."""
    shown = ascii(name)[:80]
    if not isinstance(entry, Mapping) or set(entry) != ENTRY_FIELDS:
        raise ValueError(f"its tensor {shown} must have {', '.join(sorted(ENTRY_FIELDS))} and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"its tensor {shown} has the dtype {ascii(dtype)[:40]}; known are {', '.join(BITS)}")
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"its tensor {shown} has a shape or offsets that are no whole numbers")
    begin, end = offsets
    if end - begin != math.prod(shape) * BITS[dtype] // 8:
        raise ValueError(f"its tensor {shown} has {end - begin} bytes, which is not what its dtype and shape need")
    return begin, end


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and len(values) <= 16 and all(type(n) is int and 0 <= n < 2**63 for n in values)
