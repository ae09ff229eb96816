"""The registry of prunable axes: what a unit of each is, and the rule by which units are kept.

An axis is a field of `ModelArch`. Scores, plans, targets and cuts walk this table; nothing else names an axis.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from minitron_nemo.errors import UserError
from minitron_nemo.shape.arch import ModelArch


@dataclass(frozen=True)
class Axis:
    """One prunable dimension of a shape.

    `per_layer`: every layer keeps units of its own (as many in each); else one choice serves the whole model.
    `within`: another field of the shape whose units each hold an equal block of this axis and keep equally many of
    it, as the query heads of a query group do; None: the units compete freely.
    `is_layers`: the units are the layers themselves: cutting drops tensors, not parts of them.
    """

    name: str
    per_layer: bool = False
    within: str | None = None
    is_layers: bool = False

    def size(self, arch: ModelArch) -> int:
        """How many units a model of this shape has (in each layer, if `per_layer`)."""
        return int(getattr(arch, self.name))

    def blocks(self, arch: ModelArch) -> int:
        """Blocks inside which units compete."""
        return 1 if self.within is None else int(getattr(arch, self.within))

    def check_size(self, size: int, source: ModelArch, *, blocks: int | None = None) -> None:
        """Refuse a size to prune to that is larger than the source's or breaks its blocks.

        `blocks` is how many of the source's blocks stay, by default all.
        """
        blocks = self.blocks(source) if blocks is None else blocks
        largest = self.size(source) // self.blocks(source) * blocks
        if not 1 <= size <= largest:
            whose = "the size" if blocks == self.blocks(source) else f"what {blocks} {self.within} hold"
            raise UserError(f"{self.name}={size}: pruning needs 1..{largest}, {whose} of the source")
        if size % blocks:
            raise UserError(
                f"{self.name}={size}: units are pruned evenly inside {self.within}, "
                f"so it must be a multiple of {self.within}={blocks}"
            )

    def check_units(
        self, units: Sequence[int], *, source: ModelArch, target: ModelArch, within: Sequence[int] | None = None
    ) -> None:
        """Refuse kept units that are not ascending units of the source, as many in each block as the target has.

        `within` are the blocks that stay, by default all; the units of the others go with them.
        """
        size, wanted = self.size(source), self.size(target)
        if len(units) != wanted:
            raise UserError(f"plan: {self.name} keeps {len(units)} units, the target has {wanted}")
        ascending = all(a < b for a, b in zip(units, units[1:], strict=False))
        if not ascending or units[0] < 0 or units[-1] >= size:
            raise UserError(f"plan: {self.name} must list units of 0..{size - 1} in ascending order, each once")
        held = size // self.blocks(source)
        within = range(self.blocks(source)) if within is None else within
        if Counter(unit // held for unit in units) != {block: wanted // len(within) for block in within}:
            raise UserError(
                f"plan: {self.name} keeps {list(units)}, but each of the {len(within)} {self.within}, which hold "
                f"{held}, must keep {wanted // len(within)}"
            )


AXES: dict[str, Axis] = {
    axis.name: axis
    for axis in (
        Axis("num_layers", is_layers=True),
        Axis("hidden_size"),
        Axis("ffn_hidden_size", per_layer=True),
        Axis("num_attention_heads", per_layer=True, within="num_query_groups"),
        Axis("num_query_groups", per_layer=True),
        Axis("vocab_size"),
    )
}

# The axes that every file of schema version 1 lists, scores and plans alike. One registered later is listed where it
# is scored or pruned, so that files and fingerprints from before it stay what they are.
FIRST_AXES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")


def blocks_first() -> list[Axis]:
    """Every axis, those whose units hold blocks of another before that one."""
    return sorted(AXES.values(), key=lambda axis: axis.within in AXES)


def shrink(source: ModelArch, **sizes: int | None) -> ModelArch:
    """The same model with these axes smaller (None: as it is); UserError for a size that cannot be pruned to."""
    smaller = {name: size for name, size in sizes.items() if size is not None}
    if unknown := [name for name in smaller if name not in AXES]:
        raise UserError(f"{unknown[0]}: not a prunable axis; there are {', '.join(AXES)}")
    for axis in blocks_first():
        blocks = None if axis.within is None else smaller.get(axis.within)
        axis.check_size(smaller.get(axis.name, axis.size(source)), source, blocks=blocks)
    return source.resized(smaller)
