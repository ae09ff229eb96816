"""Cutting tensors: from the kept units of each axis to elements of each dimension, one tensor at a time.

How the units of an axis lie along a dimension is said by its packing, in the table of tensors; values are copied,
never computed. Units and elements count from 0 and stay in ascending order.
"""

import dataclasses

import torch
from torch import Tensor

from minitron_nemo.checkpoint.geometry import Box
from minitron_nemo.checkpoint.source import ShapedSource, TensorSource
from minitron_nemo.pruning.plan import PruningPlan
from minitron_nemo.shape.axes import AXES
from minitron_nemo.shape.packing import Kept, Packing
from minitron_nemo.shape.tensors import LogicalTensor


class PrunedSource(ShapedSource):
    """The weights of the pruned model, cut from those of its source as they are read; each in its stored dtype.

    Raises UserError when the plan was made for another shape than the source's.
    """

    def __init__(self, source: TensorSource, plan: PruningPlan) -> None:
        plan.check_source(source.arch)
        super().__init__(plan.target)
        self.source = source
        self.plan = plan

    def dtype(self, name: str) -> torch.dtype:
        return self.source.dtype(self._origin(name))

    def read(self, name: str, box: Box | None = None) -> Tensor:
        tensor = cut(self.source.read(self._origin(name)), self.tensors[name], plan=self.plan)
        return tensor if box is None else tensor[box.slices()]

    def _origin(self, name: str) -> str:
        """The tensor of the source that a tensor of the pruned model is cut from."""
        tensor = self.tensors[name]
        layer = None if tensor.layer is None else self.plan.layers[tensor.layer]
        return dataclasses.replace(tensor, layer=layer).name


def cut(tensor: Tensor, logical: LogicalTensor, *, plan: PruningPlan) -> Tensor:
    """The kept part of one tensor of the source; a dimension that stays whole is not copied.

    `logical` is the tensor of the pruned model, its layer counted there. Raises ValueError naming it when the shape
    is not the source's, when the plan does not say what stays, and when what stays is not of the target's shape.
    """
    shape = logical.shape(plan.source)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{logical.name}: shape {list(tensor.shape)}, the plan's source has {list(shape)}")
    for dimension, dim in enumerate(logical.row.dims):
        try:
            kept = _kept(dim, logical.layer, plan=plan)
        except KeyError as error:
            raise ValueError(f"{logical.name}: dimension {dimension}: {error.args[0]}") from None
        if (elements := dim.keep(kept, plan.source)) is not None:
            tensor = tensor.index_select(dimension, elements.to(tensor.device))
    if tuple(tensor.shape) != (shape := logical.shape(plan.target)):
        raise ValueError(f"{logical.name}: cut to {list(tensor.shape)}, the plan's target has {list(shape)}")
    return tensor


def _kept(dim: Packing, layer: int | None, *, plan: PruningPlan) -> Kept:
    """Kept units of the axes along a dimension, without those that stay whole; of layers, whole tensors go."""
    axes = [AXES[name] for name in dim.axes if name in AXES and not AXES[name].is_layers]
    pruned = [axis.name for axis in axes if axis.size(plan.source) != axis.size(plan.target)]
    return {name: torch.tensor(plan.units(name, layer)) for name in pruned}
