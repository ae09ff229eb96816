"""An artefact as one file: an uncompressed tar, written from front to back as its contents come.

The header of an entry says how long it is, so it is written when its content is complete, into the place left for it.
Names begin with `./`, as in the archives that NeMo makes.
"""

import os
import tarfile
from pathlib import Path

BLOCK = tarfile.BLOCKSIZE


class PackedTar:
    """A new tar at `path`, one entry after the other."""

    def __init__(self, path: Path) -> None:
        self.path, self._file = path, path.open("xb", buffering=0)
        self._place, self._name = 0, ""
        self.sizes: dict[str, int] = {}  # of the complete entries, by name

    def reserve(self, name: str) -> int:
        """Begin an entry: the byte of `path` from which on its content is to be written, by whoever has it."""
        self._name = name
        return self._place + BLOCK

    def complete(self, size: int) -> None:
        """The entry that was begun has `size` bytes of content, and they are written."""
        entry = tarfile.TarInfo(f"./{self._name}")
        entry.size, entry.mode = size, 0o644
        header = entry.tobuf(tarfile.GNU_FORMAT)
        assert len(header) == BLOCK, f"{self._name}: too long a name"
        _write(self._file.fileno(), header, self._place)
        self.sizes[self._name] = size
        self._place += BLOCK + -(-size // BLOCK) * BLOCK

    def add(self, name: str, content: bytes) -> None:
        """A small entry at once."""
        _write(self._file.fileno(), content, self.reserve(name))
        self.complete(len(content))

    def abandon(self) -> None:
        """Close the file as it is; what was written is worth nothing."""
        self._file.close()

    def close(self) -> None:
        """Mark the end; all of it is on the disk then."""
        # What lies between an entry and the next header, and after the last one, are zeros: the file grows over a gap.
        os.ftruncate(self._file.fileno(), -(-(self._place + 2 * BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE)
        os.fsync(self._file.fileno())
        self._file.close()


def _write(descriptor: int, data: bytes, position: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], position + done)
