"""Activations that wait for the backward pass in the host's memory.

A view, such as half of a gated MLP, comes back dense: on a CPU some operations round that differently in the last bit.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

SMALLEST = 2**16  # elements; below it a transfer costs more than the memory is worth


def offload_activations(layers: Iterable[nn.Module]) -> None:
    """What these layers keep for their backward pass goes to the host, and comes back for it."""
    for layer in layers:
        layer.forward = functools.partial(_offloading, layer, layer.forward)


def _offloading(layer: nn.Module, forward: Callable, *args: Any, **kwargs: Any) -> Any:
    # Products keep their weights too, or views of them, and those stay. Wrappers move weights after the model is built.
    weights = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}

    def to_host(x: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        if x.numel() < SMALLEST or x.untyped_storage().data_ptr() in weights:
            return x
        host = torch.empty_like(x, device="cpu", pin_memory=x.is_cuda)
        host.copy_(x, non_blocking=True)  # its memory is used again by what follows on the same stream, so after it
        return x.device, host

    def to_device(kept: Tensor | tuple[torch.device, Tensor]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        device, host = kept
        return host.to(device, non_blocking=True)

    with torch.autograd.graph.saved_tensors_hooks(to_host, to_device):
        return forward(*args, **kwargs)
