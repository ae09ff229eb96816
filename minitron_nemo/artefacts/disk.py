"""What a disk refuses, in one line: it is full, read-only or not ours."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minitron_nemo.errors import UserError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
# Of a disk only where a file is named: sockets are refused too.
_REFUSED = {errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ESTALE}
# What torch's zip writer says when the file below it did not take what it was given.
_TORCH_WRITER = re.compile(r"unexpected pos|PytorchStreamWriter failed|iostream error")

_SAFETENSORS = re.compile(r"(?:Os \{ code: |\(os error )(\d+)")


def in_bytes(size: float) -> str:
    """A size with three digits and the unit that shows it: `482 bytes`, `1.31 kB`, `16.1 GB`."""
    if size < 1000:
        return f"{size:.0f} bytes"
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if size < 999.5:
            return f"{size:.3g} {unit}"
    return f"{size / 1000:.4g} TB"


def free_bytes(path: str | Path) -> int:
    """What is free on the disk where `path` is or would be."""
    folder = Path(path).resolve()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


@contextmanager
def writing(path: str | Path, *, needed: int = 0) -> Iterator[None]:
    """Around whatever writes `path`: turns what the disk refuses into a UserError, with the bytes `needed` and free."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or (fault := disk_fault(error)) is None:
            raise
        reason, file = fault
        if file is not None and not Path(os.path.abspath(file)).is_relative_to(Path(os.path.abspath(path)).parent):
            raise UserError(f"{file}: {reason}; needed to write {path}") from None
        needs = f"needs about {in_bytes(needed)}, " if needed else ""
        raise UserError(
            f"{path}: cannot be written: {reason}; {needs}{in_bytes(free_bytes(path))} are free on that disk: make "
            "room or allow writing there, and run the same command again"
        ) from None


def disk_fault(error: BaseException) -> tuple[str, str | None] | None:
    """(the reason, the file if it is known) when a disk refused something, whatever library says so; else None."""
    chain = list(_chain(error))
    for seen in chain:
        code, file = None, None
        if isinstance(seen, OSError):
            code, file = seen.errno, seen.filename
        elif type(seen).__name__ == "SafetensorError" and (named := _SAFETENSORS.search(str(seen))):
            code = int(named[1])
        if code in _FULL or code in _REFUSED and file is not None:
            return os.strerror(code), None if file is None else os.fsdecode(file)
    if any(isinstance(seen, RuntimeError) and _TORCH_WRITER.search(str(seen)) for seen in chain):
        return "it did not take all of a file", None
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those that it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
