"""Memory for tensors that are streamed: filled once, written once, used again."""

import contextlib
import math
import mmap
import weakref
from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

WORTH_KEEPING = 16 * 2**20  # bytes: glibc gives smaller ones out again, without new pages
_spare: deque[mmap.mmap] = deque(maxlen=4)  # memory of tensors that are gone; what waits longest is freed
_streams = 0


@contextlib.contextmanager
def memory_used_again() -> Iterator[None]:
    """While the block runs, large tensors get the memory of those that are gone."""
    global _streams
    _streams += 1
    try:
        yield
    finally:
        _streams -= 1
        if not _streams:
            _spare.clear()


def new_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor to be filled. A large one gets memory that is used again, or pages of 2 MiB where the system has them.

    Every page of fresh memory is a fault into the kernel; these take longer than reading does.
    """
    count = math.prod(shape)
    size = count * dtype.itemsize
    if size < WORTH_KEEPING or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    memory = _spare_of(size) or _fresh(size)
    lent = memoryview(memory)
    weakref.finalize(lent, _give_back, memory)
    return torch.frombuffer(lent, dtype=dtype, count=count).view(shape)


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, to be filled."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _spare_of(size: int) -> mmap.mmap | None:
    """Spare memory of this size, of which at most half is left over."""
    for memory in _spare.copy():
        if size <= len(memory) <= 2 * size:
            with contextlib.suppress(ValueError):  # another thread took it
                _spare.remove(memory)
                return memory
    return None


def _give_back(memory: mmap.mmap) -> None:
    if _streams:
        _spare.append(memory)


def _fresh(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # of a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
