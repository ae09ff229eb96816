"""Where weights come from: logical (unsharded) tensors by name, read on demand, whole or by the box.

A `.nemo` folder, a training checkpoint, a Hugging Face folder, random weights and a model being pruned are all
sources. Writers take a stream of `(name, tensor)`, which `stream` makes of a source. Names, order and shapes are those
of `shape.tensors.logical_tensors`.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from minitron_nemo.checkpoint.buffers import memory_used_again
from minitron_nemo.checkpoint.geometry import Box
from minitron_nemo.errors import UserError
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.shape.tensors import logical_tensors


class TensorSource(Protocol):
    """The weights of one model of shape `arch`."""

    @property
    def arch(self) -> ModelArch: ...

    def names(self) -> list[str]:
        """Every logical tensor, in the order of the forward pass."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str, box: Box | None = None) -> Tensor:
        """The tensor, or a box of it, on the CPU in its stored dtype."""

    def verify(self) -> None:
        """Refuse with UserError what was read, and is not what its maker wrote; before it is published."""


class ShapedSource:
    """What every source of a model of a known shape has in common: names and shapes follow from `arch`.

    A source that computes its tensors from another one says so by `made_of`.
    """

    def __init__(self, arch: ModelArch, *, made_of: TensorSource | None = None) -> None:
        self.arch, self.made_of = arch, made_of
        self.tensors = logical_tensors(arch)

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape(self.arch)

    def verify(self) -> None:
        if self.made_of is not None:
            self.made_of.verify()


def stream(source: TensorSource) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a source, one at a time: what a writer takes.

    The next one is read by another thread while the writer has this one: two tensors in memory, and two cores at work,
    as reading, cutting, hashing and writing all run outside Python's lock. The stream ends well only when the source is
    what its maker wrote: who publishes runs it to its end first, and ends it by `ended` when that fails.
    """
    try:
        yield from _read_ahead(source)
    except UserError:
        source.verify()  # that a file is damaged says more than what it was refused for
        raise
    source.verify()


@contextmanager
def ended(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[Iterator[tuple[str, Tensor]]]:
    """A stream that is over when the block is, in whatever way that ends.

    A writer that fails leaves its stream where it is; the exception holds both, and with them a thread and the memory
    of two tensors, for as long as somebody holds the exception.
    """
    try:
        yield iter(tensors)
    finally:
        close = getattr(tensors, "close", None)  # of a generator; a list has none
        if close is not None:
            close()


def _read_ahead(source: TensorSource) -> Iterator[tuple[str, Tensor]]:
    names = source.names()
    with memory_used_again(), ThreadPoolExecutor(max_workers=1, thread_name_prefix="stream") as reader:
        waiting = reader.submit(source.read, names[0]) if names else None
        for name, following in zip(names, [*names[1:], None], strict=True):
            assert waiting is not None
            tensor = waiting.result()
            waiting = None if following is None else reader.submit(source.read, following)
            yield name, tensor
            del tensor  # or it would live on while the one after the next is read
