"""Cutting one tensor: from the kept units of each axis to elements of each dimension.

What a dimension follows, and how units lie along it, is said by the table in `minitron_nemo/parameters.py`; here is
one function for each packing. Units and elements count from 0 and stay in ascending order.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from minitron_nemo.arch import ModelArch
from minitron_nemo.parameters import Dim, Parameter
from minitron_nemo.pruning.plan import PruningPlan


def _plain(keep: Tensor, arch: ModelArch) -> Tensor:
    return keep


def _gated(keep: Tensor, arch: ModelArch) -> Tensor:
    return torch.cat((keep, keep + arch.ffn_hidden_size))


def _heads(keep: Tensor, arch: ModelArch) -> Tensor:
    return _channels(keep, arch)


def _gqa(keep: Tensor, arch: ModelArch) -> Tensor:
    """Each query group is a run of blocks: its query heads, one key, one value. Key and value blocks all stay."""
    blocks = arch.heads_per_group + 2
    group, place = keep // arch.heads_per_group, keep % arch.heads_per_group
    queries = group * blocks + place
    keys = torch.arange(arch.num_query_groups) * blocks + arch.heads_per_group
    return _channels(torch.cat((queries, keys, keys + 1)).sort().values, arch)


def _channels(blocks: Tensor, arch: ModelArch) -> Tensor:
    """Elements of blocks of `kv_channels` elements each."""
    return (blocks[:, None] * arch.kv_channels + torch.arange(arch.kv_channels)).flatten()


PACKINGS: dict[str, Callable[[Tensor, ModelArch], Tensor]] = {
    "plain": _plain,
    "gated": _gated,
    "heads": _heads,
    "gqa": _gqa,
}


def elements_to_keep(dim: Dim, keep: Tensor, *, arch: ModelArch) -> Tensor:
    """Indices along a dimension of the source `arch`, int64, of the kept units `keep` of its axis."""
    if dim.packing not in PACKINGS:
        raise ValueError(f"packing {dim.packing!r} of {dim.axis}: no cut is written for it, only {', '.join(PACKINGS)}")
    return PACKINGS[dim.packing](keep, arch)


def cut(tensor: Tensor, parameter: Parameter, *, layer: int | None, plan: PruningPlan) -> Tensor:
    """The kept part of one logical tensor of the source.

    `layer` is its place in the pruned model, None where there is one tensor per model. Raises ValueError naming
    the parameter when its shape is not the source's or an axis is unknown to the plan.
    """
    if tuple(tensor.shape) != parameter.shape(plan.source):
        raise ValueError(
            f"{parameter.key}: shape {list(tensor.shape)}, the plan's source has {list(parameter.shape(plan.source))}"
        )
    for dimension, dim in enumerate(parameter.dims):
        try:
            units = plan.keep(dim.axis, layer=layer)
        except KeyError:
            raise ValueError(f"{parameter.key}: dimension {dimension} follows {dim.axis!r}, not in any plan") from None
        # An untouched axis is not copied: the vocabulary, and whatever the plan keeps whole.
        if units is None or len(units) == getattr(plan.source, dim.axis):
            continue
        index = elements_to_keep(dim, torch.tensor(units), arch=plan.source)
        tensor = tensor.index_select(dimension, index.to(tensor.device))
    return tensor
