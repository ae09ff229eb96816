"""Which kernel works out both softmaxes on a device."""

import importlib.util
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from minitron_nemo.losses.kernels.torch_kernel import TorchKernel
from minitron_nemo.losses.softmaxes import Factors, Labels


class Kernel(Protocol):
    """One chunk: `statistics`, and then, once, `gradient`. Both matrices of logits [N, V] are the kernel's to use up.

    Logits are as the matrix products left them, divided by no temperature; `valid` of their rows are no padding.
    `cross_entropy`: the gradient will have a part of it.
    """

    in_words: ClassVar[str]

    def __init__(
        self, s_NV: Tensor, t_NV: Tensor | None, *, valid: int, temperature: float, cross_entropy: bool
    ) -> None: ...

    def statistics(self, labels: Labels, *, first_row: int) -> Tensor:
        """The columns of `losses/softmaxes.py` of this rank's rows: [N, 10], without a teacher [N, 5]; float32."""

    def gradient(self, factors: Factors, labels: Labels) -> Tensor:
        """The gradient that the factors describe [N, V], in the storage of the student's logits."""


def kernel_for(device: torch.device) -> type[Kernel]:
    """Triton on a GPU, where torch brings it along; else torch."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from minitron_nemo.losses.kernels.triton_kernel import TritonKernel

        return TritonKernel
    return TorchKernel
