"""Bytes of a file on the disk from one place to another, as if they were a file of their own."""

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO


@dataclass(frozen=True)
class Stretch:
    """`length` bytes of the file `path` from `start` on: all of a file, or one that lies inside of a tar."""

    path: Path
    start: int
    length: int

    @classmethod
    def whole(cls, path: str | Path) -> "Stretch":
        """All of a file."""
        return cls(Path(path), 0, os.stat(path).st_size)

    def read(self) -> bytes:
        """All of it; EOFError when the file ends before."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            data = file.read(self.length)
        if len(data) < self.length:
            raise EOFError(f"{self.path} was cut short")
        return data


class OverBudgetError(ValueError):
    """More was read than what it is read for can need."""


class StretchFile(io.RawIOBase):
    """`length` bytes of an open file from `start` on, for libraries that want a file; it gives out `budget` bytes."""

    def __init__(self, file: BinaryIO, start: int, length: int, *, budget: int) -> None:
        self.file, self.start, self.length, self.position, self.left = file, start, length, 0, budget

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.length}[whence]
        if origin + offset < 0:
            raise ValueError("seeks before the start")
        self.position = origin + offset
        return self.position

    def read(self, size: int | None = -1) -> bytes:
        """At most `size` bytes; memory is taken for those that are there, whatever a header says."""
        there = max(0, self.length - self.position)
        data = super().read(there if size is None or size < 0 else min(size, there))
        return b"" if data is None else data

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self.length - self.position))
        self.left -= wanted
        if self.left < 0:
            raise OverBudgetError
        count = os.preadv(self.file.fileno(), [memoryview(buffer)[:wanted]], self.start + self.position)
        self.position += count
        return count
