"""One writer for each output: a lock that the kernel gives up when its holder dies."""

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minitron_nemo.errors import UserError

logger = logging.getLogger(__name__)

# What a file system without locks answers (Lustre without `flock`, NFS without its lock service).
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}


class Lock:
    """The lock of `target`, held by this process until `release`: an flock on the file `.<name>.lock` beside it.

    `purpose` tells locks of one target apart: who makes it, and who moves it into place.
    """

    def __init__(self, target: str | Path, *, purpose: str = "") -> None:
        """Raises UserError when another run holds it. The folder of `target` must be there."""
        target = Path(target)
        self._path = target.with_name(f".{target.name}{purpose and f'.{purpose}'}.lock")
        self._file: int | None = None
        while self._file is None:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(file, 200).decode("utf-8", "replace").strip() or "another process"
                os.close(file)
                raise UserError(f"{target}: another run is writing it ({holder}); wait for it, or stop it") from None
            except OSError as error:
                os.close(file)
                if error.errno not in _NO_LOCKS:
                    raise
                logger.warning(f"{target}: this file system has no locks; do not write it from two runs at once")
                return
            if _is_at(self._path, file):
                self._file = file
            else:  # its last holder removed it in between
                os.close(file)
        try:
            os.truncate(self._file, 0)
            os.write(self._file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        except OSError:  # the disk is full: whoever made room would find the lock held by nobody
            self.release()
            raise

    def release(self) -> None:
        """Remove the file and give the lock up; the second call does nothing."""
        if self._file is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = None


@contextmanager
def locked(target: str | Path, *, purpose: str = "") -> Iterator[None]:
    """Hold the lock of `target` while the block runs."""
    lock = Lock(target, purpose=purpose)
    try:
        yield
    finally:
        lock.release()


def _is_at(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False
