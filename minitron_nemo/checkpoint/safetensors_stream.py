"""Reading and writing a safetensors file one tensor at a time: memory holds one tensor, and not one shard."""

import json
import math
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from minitron_nemo.checkpoint.hashed_files import HashingFile
from minitron_nemo.checkpoint.safetensors_header import Entry, read_entries

DTYPE_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a file by name; ValueError for a file that is not sound.

    The safetensors library maps a file into memory, where each page of a tensor is a fault: here the bytes are read
    from where they lie.
    """
    with path.open("rb", buffering=0) as file:
        return read_entries(file)


class SafetensorsWriter:
    """Writes the announced tensors (name -> shape) in their order; leaving the `with` checks that all came.

    Format: 8 bytes with the length of the header, a JSON header, the raw little-endian tensors.
    `sha256` is the hash of the file.
    """

    def __init__(self, path: Path, tensors: dict[str, tuple[int, ...]], *, dtype: torch.dtype) -> None:
        self._expected = list(tensors.items())[::-1]
        self._dtype = dtype
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        start = 0
        for name, shape in tensors.items():
            end = start + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
            start = end
        text = json.dumps(header, separators=(",", ":")).encode()
        # Tensors start at a multiple of 8 bytes, so that a reader can map them.
        text += b" " * (-len(text) % 8)
        self._file = HashingFile(path)
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> None:
        expected = self._expected.pop()
        if (name, tuple(tensor.shape)) != expected or tensor.dtype != self._dtype:
            raise ValueError(f"{name} {tuple(tensor.shape)} {tensor.dtype}: expected {expected} {self._dtype}")
        self._file.write(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)

    @property
    def sha256(self) -> str:
        return self._file.sha256

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._file.close()
        if kind is None and self._expected:
            raise ValueError(f"{self._expected[-1][0]} was announced and not written")
