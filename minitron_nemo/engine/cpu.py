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
        if func is torch.Tensor.cuda:
            return args[0]
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs = {**kwargs, "device": "cpu"}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
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


def _prefer_torch() -> None:
    """Give Megatron torch's functions: at import it took those of Transformer Engine or Apex where these are.

    The names are those of Megatron-Core 0.16 to 0.19; a module gets only the ones that it has.
    """
    from megatron.core import optimizer, utils
    from megatron.core.optimizer import clip_grads, distrib_optimizer
    from megatron.core.optimizer import optimizer as optimizers
    from megatron.core.transformer import attention, transformer_block

    torch_names = {
        "Adam": torch.optim.AdamW,
        "SGD": torch.optim.SGD,
        "USING_PYTORCH_OPTIMIZER": True,
        "HAVE_APEX_OR_TE": False,
        "multi_tensor_applier": utils.local_multi_tensor_applier,
        "l2_norm_impl": utils.local_multi_tensor_l2_norm,
        "multi_tensor_scale_impl": utils.local_multi_tensor_scale,
        "multi_tensor_scale_tensor_impl": None,  # 0.17 on: None is how it says that there is none
        "get_cpu_offload_context": None,
        "SplitAlongDim": None,
    }
    for module in (optimizer, distrib_optimizer, clip_grads, optimizers, attention, transformer_block):
        for name in torch_names.keys() & vars(module).keys():
            setattr(module, name, torch_names[name])


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

    _prefer_torch()
    # Megatron compiles small functions as it calls them: seconds in every process, for microseconds of a step.
    torch._dynamo.config.disable = True
    from megatron.core.tensor_parallel import random as megatron_random

    rng: Any = megatron_random
    rng._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    rng._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    _CudaIsCpu().__enter__()
