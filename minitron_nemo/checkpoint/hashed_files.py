"""Files whose SHA-256 is taken while they are written or read, so that no byte comes from the disk to be hashed only.

Hashing has a thread of its own, beside the disk and outside Python's lock. What is streamed is not read again soon: it
leaves the page cache as it passes where the kernel can do that (Linux 6.14 on), as gigabytes of fresh pages cost
more than the transfer.
"""

import errno
import hashlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from minitron_nemo.artefacts.manifest import damaged
from minitron_nemo.artefacts.stretch import Stretch

_BLOCK = 4 << 20  # bytes that are hashed while the next are read
_SCRATCH = 16 << 20  # bytes that nobody asked for, read at a time
_WORTH_A_THREAD = 1 << 20
_UNCACHED = 0x80  # RWF_DONTCACHE, which `os` knows from Python 3.14 on

Fill = Callable[[memoryview, int], None]  # fills memory with the bytes of a file from a position on


def fill_from(file: BinaryIO, target: memoryview, position: int, *, uncached: bool = False) -> None:
    """Read exactly as many bytes as `target` has; EOFError where the file ends before."""
    _whole(os.preadv, file, target, position, uncached=uncached)


def _whole(transfer: Callable[..., int], file: BinaryIO, data: memoryview, position: int, *, uncached: bool) -> None:
    """`os.preadv` or `os.pwritev` of all of `data`: one call moves at most 2 GiB on Linux."""
    done = 0
    while done < len(data):
        rest = [data[done : done + _BLOCK]], position + done
        try:
            count = transfer(file.fileno(), *rest, _UNCACHED if uncached else 0)
        except OSError as error:
            if not uncached or error.errno != errno.EOPNOTSUPP:
                raise
            uncached = False
            continue
        if not count:
            raise EOFError
        done += count


class _Sha256:
    """SHA-256 of what comes, in its order, by a thread of its own."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sha256")
        self._last: Future[None] | None = None

    def add(self, data: memoryview) -> "Future[None]":
        """Begin with `data`, which must stay as it is until the result is there."""
        self._last = self._thread.submit(self._digest.update, data)
        return self._last

    def hexdigest(self) -> str:
        if self._last is not None:
            self._last.result()
        return self._digest.hexdigest()

    def close(self) -> None:
        """End the thread; nothing can be added any more."""
        self._thread.shutdown()


class HashingFile:
    """A new file that is hashed while it is written, so that no cache stands between the hash and the data.

    With a `start` it is part of a file that is there, from that byte on: an entry of a tar. `position` counts from it.
    """

    def __init__(self, path: Path, *, start: int = 0) -> None:
        self._file = path.open("r+b" if start else "xb", buffering=0)
        self._sha256, self.start, self.position = _Sha256(), start, 0

    def write(self, data: Any) -> int:
        data = memoryview(data)
        if not data.nbytes:
            return 0
        data = data.cast("B")
        hashing = self._sha256.add(data)
        try:
            place = self.start + self.position
            _whole(os.pwritev, self._file, data, place, uncached=len(data) >= _WORTH_A_THREAD)
        finally:
            hashing.result()
        self.position += len(data)
        return len(data)

    def flush(self) -> None:
        """For `torch.save`, which asks for it; nothing waits."""

    def close(self, *, sync: bool = False) -> None:
        """Close the file, with `sync` when all of it is on the disk; its hash can still be asked for."""
        try:
            if sync and not self._file.closed:
                os.fsync(self._file.fileno())
        finally:
            self._file.close()
            self._sha256.close()

    @property
    def sha256(self) -> str:
        """Of all that was written so far."""
        return self._sha256.hexdigest()


class VerifiedFile:
    """A file that is hashed while parts of it are read: each byte once, where they come from front to back.

    Bytes before a part that nobody asked for are read and hashed on the way; bytes that were hashed already are read
    again. `verify` reads the rest and says whether all of it is what `sha256` says. Positions count from where the file
    begins, which may lie inside of a tar; `label` is its name in messages.
    """

    def __init__(self, stretch: Stretch, sha256: str, *, label: Path | None = None) -> None:
        self.stretch, self.sha256, self.label = stretch, sha256, label or stretch.path
        self._digest, self._hashed, self._lock = _Sha256(), 0, threading.Lock()

    def fill(self, target: memoryview, position: int) -> None:
        """The bytes from `position` on; EOFError where the file ends before."""
        with self._lock, self.stretch.path.open("rb", buffering=0) as file:
            known = min(max(self._hashed - position, 0), len(target))
            fill_from(file, target[:known], self.stretch.start + position)
            if known < len(target):
                self._pass(file, position + known)
                self._advance(file, target[known:])

    def verify(self) -> None:
        """Raises UserError, naming the file, when its SHA-256 is another."""
        with self._lock, self.stretch.path.open("rb", buffering=0) as file:
            self._pass(file, self.stretch.length)
            if self._digest.hexdigest() != self.sha256:
                raise damaged(self.label)

    def _pass(self, file: BinaryIO, position: int) -> None:
        """Hash what lies before `position` and was not hashed yet."""
        scratch = memoryview(bytearray(max(0, min(position - self._hashed, _SCRATCH))))
        while self._hashed < position:
            self._advance(file, scratch[: position - self._hashed])

    def _advance(self, file: BinaryIO, target: memoryview) -> None:
        """Read and hash the next bytes of the file."""
        hashing = None
        for start in range(0, len(target), _BLOCK):
            block = target[start : start + _BLOCK]
            fill_from(file, block, self.stretch.start + self._hashed, uncached=True)
            hashing = self._digest.add(block)
            self._hashed += len(block)
        if hashing is not None:
            hashing.result()
