"""Memory for tensors that are streamed: filled once, written once, gone."""

import contextlib
import math
import mmap

import torch
from torch import Tensor

WORTH_LARGE_PAGES = 32 * 2**20  # bytes: glibc gives smaller ones out again, without new pages


def new_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor to be filled. A large one lies in pages of 2 MiB where the system has them.

    Every page of fresh memory is a fault into the kernel; in pages of 4 KiB these take longer than reading does.
    """
    count = math.prod(shape)
    if count * dtype.itemsize < WORTH_LARGE_PAGES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, count * dtype.itemsize)
    with contextlib.suppress(OSError):  # of a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(shape)
