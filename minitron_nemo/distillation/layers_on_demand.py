"""Layers whose weights lie elsewhere while they do not run: in host memory, shared out over ranks, or both.

Each layer's parameters are one flat tensor, padded so that its ranks have equal shares. A rank keeps its share; just
before a layer runs the flat tensor is put together in one of a few buffers, of which the parameters are views while it
runs. Values are copied and never computed with, so nothing depends on where they lie.

Forward passes only: after a layer ran its parameters are empty.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minitron_nemo.distributed.flat import FlatLayer


@dataclass(frozen=True)
class OnDemand:
    """Where layers lie and how many of them are on the device."""

    ahead: int  # layers on their way while one runs
    device: torch.device
    in_host_memory: bool = False
    group: dist.ProcessGroup | None = None  # ranks that each keep a share, running the same layers in the same order


class _Resting:
    """A layer and this rank's share of its weights."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype, how: OnDemand) -> None:
        self.layer, self.how = layer, how
        self.nothing = torch.empty(0, dtype=dtype, device=how.device)
        shapes, self.parameters = _take_out(layer, self.nothing)
        ranks = 1 if how.group is None else how.group.size()
        self.flat = FlatLayer.of(list(map(math.prod, shapes)), item=dtype.itemsize, ranks=ranks)
        self.shapes = shapes
        self.share = self.nothing
        self.buffer: Tensor | None = None
        self.arrives: Callable[[], Any] | None = None

    def load(self, load: Callable[[list[nn.Parameter]], None]) -> None:
        """Have `load` fill the parameters, in host memory, and keep this rank's share."""
        whole = torch.zeros(self.flat.size, dtype=self.nothing.dtype)
        self.fill(whole)
        load(self.parameters)
        self.empty()
        own = whole.chunk(self.flat.ranks)[0 if self.how.group is None else self.how.group.rank()]
        if self.how.in_host_memory and self.how.device.type == "cuda":
            self.share = torch.empty(own.shape, dtype=own.dtype, pin_memory=True).copy_(own)
        else:
            self.share = own.to(self.how.device, copy=True)

    def fill(self, whole: Tensor) -> None:
        """Make the parameters views of the flat tensor."""
        for parameter, shape, start in zip(self.parameters, self.shapes, self.flat.starts, strict=True):
            parameter.data = whole[start : start + math.prod(shape)].view(shape)

    def empty(self) -> None:
        for parameter in self.parameters:
            parameter.data = self.nothing


def _take_out(layer: nn.Module, nothing: Tensor) -> tuple[list[torch.Size], list[nn.Parameter]]:
    """The shapes of a layer's parameters, which may have no memory, and the empty ones that are put in their place."""
    shapes, parameters = [], []
    for module in layer.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            shapes.append(parameter.shape)
            parameters.append(nn.Parameter(nothing, requires_grad=False))
            module.register_parameter(name, parameters[-1])
    return shapes, parameters


class LayersOnDemand:
    """The layers of the chunks of a model, brought in and dropped by hooks around their forward passes.

    `chunks` are modules and their layers, in the order in which these run; `load` fills parameters that it is given.
    One layer at a time has memory of its own while they are loaded.
    """

    def __init__(
        self,
        chunks: Sequence[tuple[nn.Module, Sequence[nn.Module]]],
        *,
        dtype: torch.dtype,
        load: Callable[[list[nn.Parameter]], None],
        how: OnDemand,
    ) -> None:
        self.how = how
        self.chunks = [[_Resting(layer, dtype, how) for layer in layers] for _, layers in chunks]
        for resting in self.layers:
            resting.load(load)
        count = min(how.ahead + 1, max(map(len, self.chunks)))
        largest = max(resting.flat.size for resting in self.layers)
        self.buffers = [torch.empty(largest, dtype=dtype, device=how.device) for _ in range(count)]
        self._free = list(self.buffers)
        self._stream = torch.cuda.Stream(how.device) if how.device.type == "cuda" else None
        for (module, _), own in zip(chunks, self.chunks, strict=True):
            module.register_forward_pre_hook(partial(self._begin_first, own))
            for number, resting in enumerate(own):
                resting.layer.register_forward_pre_hook(partial(self._before, own, number))
                resting.layer.register_forward_hook(partial(self._after, resting))

    @property
    def layers(self) -> list[_Resting]:
        return [resting for chunk in self.chunks for resting in chunk]

    @property
    def held(self) -> list[Tensor]:
        """All the memory that the layers have on this rank: shares, and buffers for those that run."""
        return [*self.shares, *self.buffers]

    @property
    def shares(self) -> list[Tensor]:
        """What this rank keeps of each layer."""
        return [resting.share for resting in self.layers]

    def _begin_first(self, chunk: list[_Resting], module: nn.Module, args: Any) -> None:
        """While the chunk's embedding runs."""
        self._begin(chunk[: self.how.ahead])

    def _before(self, chunk: list[_Resting], number: int, layer: nn.Module, args: Any) -> None:
        self._begin(chunk[number : number + 1])
        resting = chunk[number]
        assert resting.arrives is not None
        assert resting.buffer is not None
        resting.arrives()
        resting.fill(resting.buffer)
        self._begin(chunk[number + 1 : number + 1 + self.how.ahead])

    def _after(self, resting: _Resting, layer: nn.Module, args: Any, output: Any) -> None:
        assert resting.buffer is not None
        resting.empty()
        self._free.append(resting.buffer)
        resting.buffer = resting.arrives = None

    def _begin(self, some: Sequence[_Resting]) -> None:
        """Start what brings these layers in, but for those that are on their way."""
        for resting in some:
            if resting.buffer is None:
                resting.buffer = self._free.pop()
                with self._aside():
                    resting.arrives = self._bring(resting.share, resting.buffer[: resting.flat.size])

    def _aside(self) -> AbstractContextManager[Any]:
        """On a GPU a stream beside the one that computes, which may still read what a buffer held before."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self.how.device))
        return torch.cuda.stream(self._stream)

    def _bring(self, share: Tensor, whole: Tensor) -> Callable[[], Any]:
        """Start to put a flat tensor together; what is returned waits for it."""
        if self.how.group is not None:
            here = share.to(self.how.device, non_blocking=True)
            work = dist.all_gather_into_tensor(whole, here, group=self.how.group, async_op=True)
            return partial(_wait_and_drop, work, here)
        whole.copy_(share, non_blocking=True)
        if self._stream is None:
            return lambda: None
        arrived = self._stream.record_event()
        return lambda: torch.cuda.current_stream(self.how.device).wait_event(arrived)


def _wait_and_drop(work: dist.Work, here: Tensor) -> None:
    """Holding `here`, the share on the device, until what reads it is in order before all that comes later."""
    work.wait()
