"""From scores to a plan: on every axis the most important units stay.

Shapes: R rows of a plan, B blocks that units compete in, U units of each.
"""

from collections.abc import Sequence
from itertools import cycle

from torch import Tensor

from minitron_nemo.errors import UserError
from minitron_nemo.importance.scores import ImportanceScores
from minitron_nemo.pruning.plan import PruningPlan, Rows, Units, everything, shrunk
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.shape.axes import AXES, Axis, blocks_first


def make_plan(scores: ImportanceScores, target: ModelArch, *, drop_layers: Sequence[int] | None = None) -> PruningPlan:
    """The plan that keeps the most important units of `scores.arch`; of equals, the lower index stays.

    `drop_layers` counts from 1 as in the paper; unset, the layers of lowest block importance go. Channels, neurons
    and heads are ranked by the scores of the whole source (single shot, as paper 1 found best).
    """
    source = scores.arch
    if target != shrunk(source, target):
        raise UserError(f"target: pruning changes only {', '.join(AXES)} of the model the importance was estimated on")
    layers = _kept_layers(scores, target.num_layers, drop_layers)
    keep: dict[str, Rows] = {}
    for axis in blocks_first():
        within = keep.get(axis.within) if axis.within is not None else None
        keep[axis.name] = (
            (layers,) if axis.is_layers else _best(axis, scores, target=target, layers=layers, within=within)
        )
    return PruningPlan(source, target, keep)


def top_units(scores: Tensor, count: int) -> Units:
    """The `count` highest of `scores` [units], lower index first among equals, ascending."""
    ranked = scores.sort(descending=True, stable=True).indices
    return tuple(sorted(ranked[:count].tolist()))


def _best(axis: Axis, scores: ImportanceScores, *, target: ModelArch, layers: Units, within: Rows | None) -> Rows:
    """The rows of an axis. Units compete inside their block, of those that stay: `within`, None for all."""
    source = scores.arch
    if axis.size(source) == axis.size(target):
        return everything(axis, source=source, target=target)
    table = scores[axis.name][list(layers)] if axis.per_layer else scores[axis.name][None]
    table_RBU = table.unflatten(1, (axis.blocks(source), -1))
    held = table_RBU.shape[2]
    rows = []
    # A row of blocks for each row of units, or one that serves them all.
    for units_BU, blocks in zip(table_RBU, cycle(within or [range(axis.blocks(source))]), strict=False):
        count = axis.size(target) // len(blocks)
        rows.append(tuple(block * held + unit for block in blocks for unit in top_units(units_BU[block], count)))
    return tuple(rows)


def _kept_layers(scores: ImportanceScores, count: int, drop_layers: Sequence[int] | None) -> Units:
    total = scores.arch.num_layers
    if drop_layers is None:
        return tuple(range(total)) if count == total else top_units(scores["num_layers"], count)
    kept = tuple(layer for layer in range(total) if layer + 1 not in drop_layers)
    if len(kept) != count or len(drop_layers) != total - count:
        raise UserError(
            f"drop_layers={list(drop_layers)}: layers are counted from 1 to {total}, each at most once, "
            f"and {total - count} must go to leave the target's {count}"
        )
    return kept
