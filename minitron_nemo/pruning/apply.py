"""Applying a plan: each tensor of the pruned model from one tensor of the source, one at a time."""

from collections.abc import Callable

from torch import Tensor

from minitron_nemo.parameters import Parameter
from minitron_nemo.pruning.cuts import cut
from minitron_nemo.pruning.plan import PruningPlan

ReadTensor = Callable[[Parameter, int | None], Tensor]


def pruned_tensor(read: ReadTensor, parameter: Parameter, *, layer: int | None, plan: PruningPlan) -> Tensor:
    """The logical tensor of the pruned model; `layer` counts its layers from 0, None where there is one per model.

    `read(parameter, layer)` gives the source's logical tensor. Values are copied, never computed.
    """
    source_layer = None if layer is None else plan.layers[layer]
    tensor = cut(read(parameter, source_layer), parameter, layer=layer, plan=plan)
    if tuple(tensor.shape) != parameter.shape(plan.target):
        raise AssertionError(f"{parameter.key}: cut to {list(tensor.shape)}, not {list(parameter.shape(plan.target))}")
    return tensor


def pruned_tensors(read: ReadTensor, plan: PruningPlan) -> ReadTensor:
    """`read` of the pruned model, from `read` of the source: what a checkpoint writer streams."""

    def read_pruned(parameter: Parameter, layer: int | None = None) -> Tensor:
        return pruned_tensor(read, parameter, layer=layer, plan=plan)

    return read_pruned
