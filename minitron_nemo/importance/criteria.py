"""How each axis is scored: a record of where it is heard, what is kept of what is heard, and what that makes.

A criterion more is a record more. Sources: Minitron (2407.14679) and, for layers, ShortGPT (2403.03853).

Shapes: L layers of the model (1 at a site that is heard once), M = 4 moments, U units of the axis.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minitron_nemo.errors import UserError
from minitron_nemo.importance import estimators
from minitron_nemo.importance.accumulators import CosineSums, Hearing, SignedUnitMoments, Statistic, UnitMoments
from minitron_nemo.importance.gradient_sites import (
    HEADS_GRADIENT,
    INPUT_NORM_GRADIENT,
    LAYER_GRADIENT,
    NEURONS_GRADIENT,
    PRE_MLP_NORM_GRADIENT,
    QUERY_GROUPS_GRADIENT,
)
from minitron_nemo.importance.sites import (
    BEFORE_ACTIVATION,
    FINAL_NORM_OUTPUT,
    HEAD_CHANNELS,
    HEADS,
    INPUT_NORM,
    LAYER,
    NEURONS,
    PRE_MLP_NORM,
    QUERY_GROUPS,
    Site,
)
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.shape.axes import AXES


@dataclass(frozen=True)
class Criterion:
    """The scores of one axis.

    `statistic(site, hearing)` makes what is kept of what is heard at a site. `finish(tables, batch_aggregation)` turns
    the merged tables of the sites, [L, ...] each and in their order, into scores: [L, U] where every layer ranks its
    own units, [U] where one choice serves the whole model, [L] for the layers themselves. `heard(arch)` says how many
    units are heard where they are not those of the axis; `fold(scores, arch)` then makes them those of the axis.
    """

    axis: str
    sites: tuple[Site, ...]
    statistic: Callable[[Site, Hearing], Statistic]
    finish: Callable[[Sequence[Tensor], str], Tensor]
    name: str = "custom"
    heard: Callable[[ModelArch], int] | None = None
    fold: Callable[[Tensor, ModelArch], Tensor] | None = None

    @property
    def gradients(self) -> bool:
        """Whether it needs backward passes."""
        return any(site.gradients for site in self.sites)

    def units(self, arch: ModelArch) -> int:
        """How many units are heard at its sites, over all tensor-parallel ranks."""
        return AXES[self.axis].size(arch) if self.heard is None else self.heard(arch)

    def scores(self, tables: Sequence[Tensor], batch_aggregation: str, arch: ModelArch) -> Tensor:
        """The scores of the axis from the merged tables of its sites."""
        scores = self.finish(tables, batch_aggregation)
        return scores if self.fold is None else self.fold(scores, arch)

    def shapes(self, arch: ModelArch) -> list[tuple[int, ...]]:
        """The shape of the merged table of each site."""
        hearings = ((site, Hearing(1 if site.once else arch.num_layers, self.units(arch))) for site in self.sites)
        return [tuple(self.statistic(site, hearing).values.shape) for site, hearing in hearings]


def scores_in_each_layer(tables: Sequence[Tensor], batch_aggregation: str) -> Tensor:
    """[L, U] from moments [L, M, U]: each site is scored on its own, then the sites are plainly added (paper 1)."""
    return torch.stack([estimators.aggregate(t_LMU.movedim(1, 0), batch_aggregation) for t_LMU in tables]).sum(dim=0)


def scores_over_layers(tables: Sequence[Tensor], batch_aggregation: str) -> Tensor:
    """[U] from moments [L, M, U]: sites and layers plainly added, as they share the units (paper 1)."""
    return sum(scores_in_each_layer([table], batch_aggregation).sum(dim=0) for table in tables)  # type: ignore


def scores_over_equal_layers(tables: Sequence[Tensor], batch_aggregation: str) -> Tensor:
    """[U]: the scores at each site of each layer are divided by their mean, so that all weigh alike, and added."""
    weighed = []
    for table in tables:
        scores_LU = scores_in_each_layer([table], batch_aggregation)
        mean_L1 = scores_LU.mean(dim=1, keepdim=True)
        weighed.append(torch.where(mean_L1 > 0, scores_LU / mean_L1, 0.0).sum(dim=0))
    return torch.stack(weighed).sum(dim=0)


def block_importance(tables: Sequence[Tensor], batch_aggregation: str) -> Tensor:
    """[L] from sums of cosines [L, 2]; a mean over tokens, whatever the batch aggregation."""
    (cosines_L2,) = tables
    return estimators.block_importance(cosines_L2)


def scores_of_layers(tables: Sequence[Tensor], batch_aggregation: str) -> Tensor:
    """[L] from moments [L, M, 1]: the one unit heard in each layer is the layer."""
    return scores_in_each_layer(tables, batch_aggregation).squeeze(-1)


def length_of_blocks(count: Callable[[ModelArch], int]) -> Callable[[Tensor, ModelArch], Tensor]:
    """Scores of channels become the L2 norm over the channels of each of `count(arch)` blocks: [L, C] -> [L, U]."""
    return lambda scores_LC, arch: scores_LC.unflatten(-1, (count(arch), -1)).norm(dim=-1)


def _query_size(arch: ModelArch) -> int:
    return arch.query_size


_NORMS = (INPUT_NORM, PRE_MLP_NORM)
_ALL_NORMS = (*_NORMS, FINAL_NORM_OUTPUT)
_HEADS_BY_CHANNELS = length_of_blocks(lambda arch: arch.num_attention_heads)
_GROUPS_BY_CHANNELS = length_of_blocks(lambda arch: arch.num_query_groups)
# A layer is one unit; a unit of the others is what the axis counts.
_GRADIENTS: tuple[tuple[str, tuple[Site, ...], Any, Any], ...] = (
    ("num_layers", (LAYER_GRADIENT,), scores_of_layers, lambda arch: 1),
    ("hidden_size", (INPUT_NORM_GRADIENT, PRE_MLP_NORM_GRADIENT), scores_over_layers, None),
    ("ffn_hidden_size", (NEURONS_GRADIENT,), scores_in_each_layer, None),
    ("num_attention_heads", (HEADS_GRADIENT,), scores_in_each_layer, None),
    ("num_query_groups", (QUERY_GROUPS_GRADIENT,), scores_in_each_layer, None),
)

# Every criterion there is. The first of an axis is the default, that of the published code where there is one.
KNOWN: tuple[Criterion, ...] = (
    Criterion("num_layers", (LAYER,), CosineSums, block_importance, "cosine"),
    Criterion("hidden_size", _NORMS, UnitMoments, scores_over_layers, "norm_outputs"),
    Criterion("hidden_size", _NORMS, UnitMoments, scores_over_equal_layers, "equal_layers"),
    Criterion("hidden_size", _ALL_NORMS, UnitMoments, scores_over_layers, "with_final_norm"),
    Criterion(
        "hidden_size", _ALL_NORMS, UnitMoments, scores_over_equal_layers, "equal_layers_with_final_norm"
    ),
    Criterion("ffn_hidden_size", (NEURONS,), UnitMoments, scores_in_each_layer, "after_activation"),
    Criterion("ffn_hidden_size", (BEFORE_ACTIVATION,), UnitMoments, scores_in_each_layer, "before_activation"),
    Criterion("num_attention_heads", (HEADS,), UnitMoments, scores_in_each_layer, "token_norm"),
    Criterion(
        "num_attention_heads",
        (HEAD_CHANNELS,),
        UnitMoments,
        scores_in_each_layer,
        "channel_norm",
        heard=_query_size,
        fold=_HEADS_BY_CHANNELS,
    ),
    Criterion("num_query_groups", (QUERY_GROUPS,), UnitMoments, scores_in_each_layer, "token_norm"),
    Criterion(
        "num_query_groups",
        (HEAD_CHANNELS,),
        UnitMoments,
        scores_in_each_layer,
        "channel_norm",
        heard=_query_size,
        fold=_GROUPS_BY_CHANNELS,
    ),
    *(Criterion(axis, sites, UnitMoments, finish, "taylor", heard) for axis, sites, finish, heard in _GRADIENTS),
    *(Criterion(axis, sites, SignedUnitMoments, finish, "loss_change", heard)
      for axis, sites, finish, heard in _GRADIENTS),
)  # fmt: skip


def names_of(axis: str) -> list[str]:
    """The names of an axis' criteria, its default first."""
    return [criterion.name for criterion in KNOWN if criterion.axis == axis]


def chosen(names: Mapping[str, str] | None = None, *, only: Iterable[str] | None = None) -> dict[str, Criterion]:
    """The criterion of every axis of the registry that has one, or of the axes `only`: those named, else the default.

    Raises UserError for an axis that has no criterion and for a name that is none of its axis.
    """
    names = names or {}
    axes = [axis for axis in AXES if names_of(axis)] if only is None else list(only)
    criteria = {}
    for axis in {**dict.fromkeys(axes), **names}:
        known = {criterion.name: criterion for criterion in KNOWN if criterion.axis == axis and axis in AXES}
        if not known:
            raise UserError(f"{axis}: no axis that is scored; there are {', '.join(a for a in AXES if names_of(a))}")
        name = names.get(axis, next(iter(known)))
        if name not in known:
            raise UserError(f"{axis} by the criterion {name!r}: allowed are {', '.join(known)}")
        criteria[axis] = known[name]
    return criteria


CRITERIA: dict[str, Criterion] = chosen()
