"""Queries of removed heads folded into those of kept ones (2407.14679, section 2.3: leftover heads).

Paper 1 sorts L heads by importance and keeps K. For i from K - (L - K) to K, counted from 1, the kept head becomes

    head_i + ( head_i - head_{2K-i+1} )

The partners must be the removed heads K + 1 to L, so the range begins at 2K - L + 1: at the printed K - (L - K) the
partner would be L + 1. The weakest kept head is paired with the strongest removed one. With grouped queries this
happens inside each group, to the queries alone; keys, values and the output projection of the kept head stay.

Shapes: L heads of a group, K of them kept, D kv_channels, H hidden_size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minitron_nemo.checkpoint.geometry import Box
from minitron_nemo.checkpoint.source import ShapedSource, TensorSource
from minitron_nemo.errors import UserError
from minitron_nemo.importance.scores import ImportanceScores
from minitron_nemo.pruning.plan import PruningPlan

AXIS = "num_attention_heads"
SIGNS = {"plus": 1.0, "minus": -1.0}
QKV = ("self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias")


class HeadResidual(ShapedSource):
    """The source of a cut, the queries of its kept heads changed by those of the heads that go.

    `sign` is that of the bracket above. Raises UserError when fewer than half of the heads of a group stay.
    """

    def __init__(self, source: TensorSource, plan: PruningPlan, scores: ImportanceScores, *, sign: str) -> None:
        super().__init__(source.arch, made_of=source)
        self.source, self.plan, self.scores, self.sign = source, plan, scores, SIGNS[sign]
        held, kept = plan.source.heads_per_group, plan.target.heads_per_group
        if 2 * kept < held:
            raise UserError(
                f"prune.repairs.head_residual: {kept} of {held} heads of each group stay, but every removed head needs "
                f"a kept one: keep at least {-(-held // 2)}, or leave the repair out"
            )

    def dtype(self, name: str) -> torch.dtype:
        return self.source.dtype(name)

    def read(self, name: str, box: Box | None = None) -> Tensor:
        tensor, layer = self.tensors[name], self.tensors[name].layer
        if not name.endswith(QKV) or layer not in self.plan.layers:
            return self.source.read(name, box)
        whole = self.source.read(name)
        kept_heads = self.plan.units(AXIS, self.plan.layers.index(layer))
        changed = merged_queries(
            whole, self.arch.num_query_groups, pairs_of(self, layer, kept_heads), sign=self.sign,
            kv_channels=self.arch.kv_channels,
        )  # fmt: skip
        assert changed.shape == tensor.shape(self.arch)
        return changed if box is None else changed[box.slices()]


def pairs_of(repair: HeadResidual, layer: int, kept_heads: Sequence[int]) -> list[tuple[int, int]]:
    """(kept head, removed head) of a layer, heads counted over the layer; groups that go as a whole have none."""
    held = repair.arch.heads_per_group
    kept = set(kept_heads)
    pairs = []
    for group in range(repair.arch.num_query_groups):
        ranked = sorted(range(group * held, (group + 1) * held), key=lambda h: -float(repair.scores[AXIS][layer, h]))
        stay, go = [head for head in ranked if head in kept], [head for head in ranked if head not in kept]
        if stay:
            pairs += list(zip(reversed(stay), go, strict=False))
    return pairs


def merged_queries(
    weight: Tensor, groups: int, pairs: Sequence[tuple[int, int]], *, sign: float, kv_channels: int
) -> Tensor:
    """`linear_qkv`, weight [rows, H] or bias [rows], with head + sign x (head - partner) for paired queries."""
    blocks = weight.double().unflatten(0, (groups, -1, kv_channels))
    heads = blocks.shape[1] - 2
    changed = blocks.clone()
    for kept, removed in pairs:
        ours, theirs = (blocks[head // heads, head % heads] for head in (kept, removed))
        changed[kept // heads, kept % heads] = ours + sign * (ours - theirs)
    return changed.flatten(0, 2).to(weight.dtype)
