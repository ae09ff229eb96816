"""Cutting tensors: from the kept units of each axis to elements of each dimension, one tensor at a time.

How the units of an axis lie along a dimension is said by its packing, in the table of tensors; values are copied,
never computed. Units and elements count from 0 and stay in ascending order.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from minitron_nemo.checkpoint.buffers import new_tensor
from minitron_nemo.checkpoint.geometry import Box, whole
from minitron_nemo.checkpoint.source import ShapedSource, TensorSource
from minitron_nemo.pruning.plan import PruningPlan
from minitron_nemo.shape.axes import AXES
from minitron_nemo.shape.packing import Kept, Packing
from minitron_nemo.shape.tensors import LogicalTensor

BLOCK_BYTES = 4 * 2**20  # of the source, read at a time
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # NumPy has no bfloat16


class PrunedSource(ShapedSource):
    """The weights of the pruned model, cut from those of its source as they are read; each in its stored dtype.

    Raises UserError when the plan was made for another shape than the source's.
    """

    def __init__(self, source: TensorSource, plan: PruningPlan) -> None:
        plan.check_source(source.arch)
        super().__init__(plan.target, made_of=source)
        self.source = source
        self.plan = plan

    def dtype(self, name: str) -> torch.dtype:
        return self.source.dtype(self._origin(name))

    def read(self, name: str, box: Box | None = None) -> Tensor:
        """Read in blocks of rows, so that of the source no more than a block is in memory."""
        logical, origin = self.tensors[name], self._origin(name)
        elements = kept_of_each(logical, plan=self.plan)
        box = whole(self.shape(name)) if box is None else box
        if all(kept is None for kept in elements):
            return self.source.read(origin, box)
        shape = logical.shape(self.plan.source)
        inside = [_part(kept, at) for kept, at in zip(elements, box.slices(), strict=True)]
        result = new_tensor(box.size, self.dtype(name))
        row_bytes = max(1, result.element_size() * math.prod(shape[1:]))
        for first, rows in _blocks(inside[0], BLOCK_BYTES // row_bytes):
            offset, end = int(rows[0]), int(rows[-1]) + 1
            part = self.source.read(origin, Box((offset, *[0] * (len(shape) - 1)), (end - offset, *shape[1:])))
            result[first : first + len(rows)] = select(part, [rows - offset, *inside[1:]])
        return result

    def _origin(self, name: str) -> str:
        """The tensor of the source that a tensor of the pruned model is cut from."""
        tensor = self.tensors[name]
        layer = None if tensor.layer is None else self.plan.layers[tensor.layer]
        return dataclasses.replace(tensor, layer=layer).name


def kept_elements(logical: LogicalTensor, dimension: int, *, plan: PruningPlan) -> Tensor | None:
    """Which elements of a dimension of the source's tensor stay, ascending; None when all do.

    `logical` is the tensor of the pruned model. Raises ValueError naming it when the plan does not say what stays.
    """
    dim = logical.row.dims[dimension]
    try:
        return dim.keep(_kept(dim, logical.layer, plan=plan), plan.source)
    except KeyError as error:
        raise ValueError(f"{logical.name}: dimension {dimension}: {error.args[0]}") from None


def kept_of_each(logical: LogicalTensor, *, plan: PruningPlan) -> list[Tensor | None]:
    """`kept_elements` of every dimension; ValueError when that is not of the target's shape."""
    elements = [kept_elements(logical, dimension, plan=plan) for dimension in range(len(logical.row.dims))]
    pairs = zip(elements, logical.shape(plan.source), strict=True)
    sizes = [size if kept is None else len(kept) for kept, size in pairs]
    if tuple(sizes) != (shape := logical.shape(plan.target)):
        raise ValueError(f"{logical.name}: cut to {sizes}, the plan's target has {list(shape)}")
    return elements


def select(tensor: Tensor, elements: Sequence[Tensor | slice | None]) -> Tensor:
    """The elements of each dimension, ascending; None and what is all of a dimension: not copied.

    NumPy takes columns four times as fast as `index_select`, which goes through them one by one.
    """
    for dimension, kept in enumerate(elements):
        if isinstance(kept, slice):
            tensor = tensor[(slice(None),) * dimension + (kept,)]
        elif kept is not None and len(kept) and int(kept[-1] - kept[0]) + 1 == len(kept):
            tensor = tensor.narrow(dimension, int(kept[0]), len(kept))
        elif kept is not None:
            bits = tensor.view(_BITS[tensor.element_size()]).numpy()
            tensor = torch.from_numpy(np.take(bits, kept.numpy(), axis=dimension)).view(tensor.dtype)
    return tensor


def _part(kept: Tensor | None, at: slice) -> Tensor | slice:
    """The elements of the source behind a part of a cut dimension."""
    return at if kept is None else kept[at]


def _blocks(rows: Tensor | slice, most: int) -> Iterator[tuple[int, Tensor]]:
    """Ascending rows in blocks that each span at most `most` rows of the source, each with its place among them."""
    rows = torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
    first = 0
    while first < len(rows):
        past = int(torch.searchsorted(rows, int(rows[first]) + max(1, most)))
        yield first, rows[first:past]
        first = past


def _kept(dim: Packing, layer: int | None, *, plan: PruningPlan) -> Kept:
    """Kept units of the axes along a dimension, without those that stay whole; of layers, whole tensors go."""
    axes = [AXES[name] for name in dim.axes if name in AXES and not AXES[name].is_layers]
    pruned = [axis.name for axis in axes if axis.size(plan.source) != axis.size(plan.target)]
    return {name: torch.tensor(plan.units(name, layer)) for name in pruned}
