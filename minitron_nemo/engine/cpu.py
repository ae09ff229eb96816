"""Megatron-Core without a GPU: every request for CUDA is answered with the CPU.

Megatron-Core writes `device="cuda"` and calls `torch.cuda.*` in many places. `pretend_cuda_is_cpu` turns those
requests to the CPU, for the life of the process, so that the very code that runs on GPUs over NCCL runs on CPU
over gloo. Entered only when there is no GPU.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CUDA_TYPE_NAMES = {  # gradient clipping and the optimizer compare Tensor.type() with these names
    torch.float32: "torch.cuda.FloatTensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
}


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, int) and not isinstance(device, bool) or isinstance(device, str) and device[:4] == "cuda"


class _CudaIsCpu(TorchFunctionMode):
    """Rewrites the device argument of torch functions and answers the two tensor methods that name CUDA."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs = {**kwargs, "device": "cpu"}
        elif func is torch.Tensor.cuda:
            return args[0]
        elif func is torch.Tensor.type and len(args) == 1:
            return _CUDA_TYPE_NAMES.get(args[0].dtype, func(*args))
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        return func(*args, **(kwargs or {}))


class _NoStream:
    """A CUDA stream or event whose every method does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable:
        return lambda *args, **kwargs: None


@functools.cache
def pretend_cuda_is_cpu() -> None:
    """Redirect CUDA to the CPU in this process; the second call does nothing."""
    cuda: Any = torch.cuda
    cuda.current_device = lambda: "cpu"
    cuda.device_count = lambda: 0
    cuda.synchronize = cuda.empty_cache = lambda *args, **kwargs: None
    cuda.Stream = cuda.Event = _NoStream
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: _NoStream()
    cuda.stream = lambda *args, **kwargs: contextlib.nullcontext()
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed

    from megatron.core.tensor_parallel import random as megatron_random

    rng: Any = megatron_random
    rng._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    rng._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    _CudaIsCpu().__enter__()
