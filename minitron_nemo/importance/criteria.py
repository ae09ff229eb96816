"""How each axis is scored: a record of where it is heard, what is kept of what is heard, and what that makes.

A criterion more is a record more. Sources: Minitron (2407.14679) and, for layers, ShortGPT (2403.03853).

Shapes: L layers of the model, M = 4 moments, U units of the axis.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minitron_nemo.importance import estimators
from minitron_nemo.importance.accumulators import CosineSums, Hearing, Statistic, UnitMoments
from minitron_nemo.importance.sites import HEADS, INPUT_NORM, LAYER, NEURONS, PRE_MLP_NORM, Site


@dataclass(frozen=True)
class Criterion:
    """The scores of one axis.

    `statistic(site, hearing)` makes what is kept of what is heard at a site. `finish(tables, batch_aggregation)` turns
    the merged tables of the sites, [L, ...] each and in their order, into scores: [L, U] where every layer ranks its
    own units, [U] where one choice serves the whole model, [L] for the layers themselves.
    """

    axis: str
    sites: tuple[Site, ...]
    statistic: Callable[[Site, Hearing], Statistic]
    finish: Callable[[Sequence[Tensor], str], Tensor]


def scores_in_each_layer(tables: Sequence[Tensor], batch_aggregation: str) -> Tensor:
    """[L, U] from moments [L, M, U]: each site is scored on its own, then the sites are plainly added (paper 1)."""
    return torch.stack([estimators.aggregate(t_LMU.movedim(1, 0), batch_aggregation) for t_LMU in tables]).sum(dim=0)


def scores_over_layers(tables: Sequence[Tensor], batch_aggregation: str) -> Tensor:
    """[U] from moments [L, M, U]: sites and layers plainly added, as they share the units (paper 1)."""
    return scores_in_each_layer(tables, batch_aggregation).sum(dim=0)


def block_importance(tables: Sequence[Tensor], batch_aggregation: str) -> Tensor:
    """[L] from sums of cosines [L, 2]; a mean over tokens, whatever the batch aggregation."""
    (cosines_L2,) = tables
    return estimators.block_importance(cosines_L2)


CRITERIA: dict[str, Criterion] = {
    criterion.axis: criterion
    for criterion in (
        Criterion("num_layers", (LAYER,), CosineSums, block_importance),
        Criterion("hidden_size", (INPUT_NORM, PRE_MLP_NORM), UnitMoments, scores_over_layers),
        Criterion("ffn_hidden_size", (NEURONS,), UnitMoments, scores_in_each_layer),
        Criterion("num_attention_heads", (HEADS,), UnitMoments, scores_in_each_layer),
    )
}
