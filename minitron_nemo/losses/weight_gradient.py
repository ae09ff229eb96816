"""The gradient of the head's weight: summed up over chunks in float32, and into Megatron's buffer where it has one.

N tokens of a chunk, H hidden channels, V vocabulary rows on this rank.
"""

import torch
from torch import Tensor


def accumulate_(sum_VH: Tensor, grad_NV: Tensor, hidden_NH: Tensor) -> None:
    """Add grad^T hidden to a float32 sum, in place; the product's own sums are float32 whatever the operands are."""
    if hidden_NH.dtype == torch.float32:
        sum_VH.addmm_(grad_NV.T, hidden_NH)
    elif hidden_NH.device.type == "cuda":
        torch.addmm(sum_VH, grad_NV.to(hidden_NH.dtype).T, hidden_NH, out_dtype=torch.float32, out=sum_VH)
    else:  # torch has no product of bf16 matrices with a float32 result on a CPU
        sum_VH.addmm_(grad_NV.float().T, hidden_NH.float())


def hand_over(weight: Tensor, sum_VH: Tensor) -> Tensor:
    """What the backward pass returns for the weight, given its gradient in float32; uses that up.

    A parameter in Megatron's gradient buffer has a `main_grad`, which is float32 where the weight may be bf16. What
    comes back then only has the shape, as in Megatron's own fused accumulation: the data-parallel hook leaves out a
    gradient that is said to be added already, unless `zero_out_wgrad` says that the weight is also the embedding, whose
    gradient autograd adds to it.
    """
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None or not hasattr(weight, "grad_added_to_main_grad"):
        return sum_VH.to(weight.dtype)
    main_grad.add_(sum_VH)
    weight.grad_added_to_main_grad = True
    return torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight)
