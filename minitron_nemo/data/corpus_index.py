"""Megatron's `.idx`: magic, version, dtype code, sequences, documents; then for every sequence its length (int32) and
its byte offset in the `.bin` (int64), and the sequence at which each document begins (int64).
"""

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minitron_nemo.errors import UserError

MAKE_IT = "make it with `python recipes/prepare_data.py`"
HEADER = struct.Struct("<9sQBQQ")
MAGIC = b"MMIDIDX\x00\x00"
DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
BLOCK = 1 << 20  # entries looked at together: tens of megabytes, whatever the size of the file


def with_suffix(prefix: Path, suffix: str) -> Path:
    """Appended, not replaced: a corpus may be called `web.v2`."""
    return prefix.parent / f"{prefix.name}{suffix}"


@dataclass(frozen=True)
class CorpusIndex:
    """The three arrays of an index file, mapped and not read."""

    dtype: np.dtype  # of the tokens
    lengths: np.ndarray
    pointers: np.ndarray
    documents: np.ndarray
    num_tokens: int


def dtype_for(vocab_size: int) -> np.dtype:
    """What Megatron stores the tokens of such a vocabulary as."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def write_index(path: Path, lengths: np.ndarray, *, dtype: np.dtype) -> str:
    """The .idx of documents of these lengths, each of one sequence, lying one after the other; returns its SHA-256."""
    ends = np.cumsum(lengths, dtype=np.int64)
    (code,) = (code for code, name in DTYPES.items() if name == dtype.name)
    header = HEADER.pack(MAGIC, 1, code, len(lengths), len(lengths) + 1)
    arrays = (
        lengths.astype("<i4"),
        ((ends - lengths) * dtype.itemsize).astype("<i8"),
        np.arange(len(lengths) + 1, dtype="<i8"),
    )
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in (header, *(array.tobytes() for array in arrays)):
            file.write(part)
            digest.update(part)
    return digest.hexdigest()


def open_index(prefix: Path) -> CorpusIndex:
    """Raises UserError unless the sizes of .idx and .bin are those that the header and the lengths say."""
    idx, tokens = with_suffix(prefix, ".idx"), with_suffix(prefix, ".bin")
    with idx.open("rb") as file:
        raw = file.read(HEADER.size)
    magic, version, code, sequences, documents = HEADER.unpack(raw) if len(raw) == HEADER.size else (b"", 0, 0, 0, 0)
    if magic != MAGIC or version != 1 or code not in DTYPES:
        raise UserError(f"{idx}: not a Megatron index file (bad header); {MAKE_IT}")
    # Python's integers: a damaged count of 2^60 must be seen before anything of that size is made.
    if idx.stat().st_size != (expected := HEADER.size + 12 * sequences + 8 * documents):
        raise UserError(f"{idx}: {idx.stat().st_size} bytes, {expected} expected by its header; {MAKE_IT}")
    dtype = np.dtype(DTYPES[code])
    lengths, pointers, begins = _map(idx, (("<i4", sequences), ("<i8", sequences), ("<i8", documents)))
    num_tokens = sum(int(block.sum(dtype=np.int64)) for _, block in _blocks(lengths))
    if num_tokens <= 0 or tokens.stat().st_size != num_tokens * dtype.itemsize:
        raise UserError(
            f"{tokens}: {tokens.stat().st_size} bytes, {num_tokens * dtype.itemsize} expected by its .idx; {MAKE_IT}"
        )
    return CorpusIndex(dtype, lengths, pointers, begins, num_tokens)


def check_index(index: CorpusIndex, prefix: Path) -> None:
    """Refuse an index whose sequences are not one after the other, from the first byte of the .bin to its last."""
    idx = with_suffix(prefix, ".idx")
    end = 0
    for start, lengths in _blocks(index.lengths):
        if (wrong := np.flatnonzero(lengths <= 0)).size:
            at = int(wrong[0])
            raise UserError(f"{idx}: damaged: sequence {start + at} has {lengths[at]} tokens; {MAKE_IT}")
        ends = end + np.cumsum(lengths, dtype=np.int64)
        expected = (ends - lengths) * index.dtype.itemsize
        pointers = np.asarray(index.pointers[start : start + len(lengths)])
        if (wrong := np.flatnonzero(pointers != expected)).size:
            at = int(wrong[0])
            raise UserError(
                f"{idx}: damaged: sequence {start + at} begins at byte {pointers[at]} of the .bin, {expected[at]} "
                f"expected by the lengths before it; {MAKE_IT}"
            )
        end = int(ends[-1])
    last = 0
    for start, begins in _blocks(index.documents):
        before = np.concatenate([[last], begins[:-1]])
        if (wrong := np.flatnonzero((begins < before) | (begins > len(index.lengths)))).size:
            at = int(wrong[0])
            raise UserError(
                f"{idx}: damaged: document {start + at} begins at sequence {begins[at]}, after {before[at]} and of "
                f"{len(index.lengths)}; {MAKE_IT}"
            )
        last = int(begins[-1])


def _map(path: Path, parts: tuple[tuple[str, int], ...]) -> list[np.ndarray]:
    arrays, offset = [], HEADER.size
    for dtype, count in parts:
        # An empty range cannot be mapped.
        arrays.append(np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,)) if count else np.empty(0))
        offset += count * np.dtype(dtype).itemsize
    return arrays


def _blocks(values: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(values), BLOCK):
        yield start, np.asarray(values[start : start + BLOCK])
