"""From a budget to a shape: the largest model that costs no more, its axes shrunk by one common factor.

The rule is proportional because that keeps the ratio of MLP to residual stream that the source was designed with, and
it is monotone and needs no forward pass. It is a first answer, not the best: the published students shrink the MLP
harder than the stream. A search over shapes gives another `ModelArch`, and nothing after that knows the difference.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from minitron_nemo.errors import UserError
from minitron_nemo.shape.arch import WHOLE_HEADS, ModelArch
from minitron_nemo.shape.axes import shrink
from minitron_nemo.shape.figures import FIGURES, Workload

# Axes that a budget may shrink. The vocabulary is chosen by its text, and layers by what they do.
SHRINKABLE = ("hidden_size", "ffn_hidden_size", "num_layers", "num_attention_heads", "num_query_groups")
# Channels and neurons that come together for the matrix units, in models large enough to have eight such lots.
LOTS = {"hidden_size": 256, "ffn_hidden_size": 512}


@dataclass(frozen=True)
class Budget:
    """`limits`, name of a figure -> the most it may be, and the workload that the figures are taken at."""

    limits: Mapping[str, float]
    work: Workload

    def exceeded(self, arch: ModelArch) -> list[str]:
        """The figures of this shape that are above their limit."""
        return [name for name, most in self.limits.items() if FIGURES[name].of(arch, self.work) > most]


@dataclass(frozen=True)
class Rounding:
    """One axis of a fit: `source` x factor = `exact`, of which `size` is left, the next lower of the `multiple`s."""

    axis: str
    source: int
    exact: float
    size: int
    multiple: int

    def describe(self, factor: float) -> str:
        return (
            f"{self.axis} {self.source} x {factor:.3f} = {self.exact:.0f} -> {self.size} (multiples of {self.multiple})"
        )


@dataclass(frozen=True)
class Fit:
    """A target shape and, where a budget made it, how."""

    arch: ModelArch
    lines: list[str] = field(default_factory=list)


def granularity(source: ModelArch, given: Mapping[str, int | None], *, tp: int) -> dict[str, int]:
    """What each size must be a multiple of: what is `given`, or `LOTS`, and what tensor parallelism divides.

    A lot is at most the largest power of two in an eighth of the source's size, so that small models have some choice.
    """
    lots = dict.fromkeys(SHRINKABLE, 1)
    for axis, lot in LOTS.items():
        lots[axis] = given.get(axis) or min(lot, 2 ** max(int(math.log2(max(getattr(source, axis) / 8, 1))), 0))
    return lots | {axis: math.lcm(lots[axis], tp) for axis in ("ffn_hidden_size", "num_query_groups")}


def fit(
    source: ModelArch,
    budget: Budget,
    *,
    axes: Collection[str],
    fixed: Mapping[str, int],
    multiples: Mapping[str, int],
) -> Fit:
    """The shape that the largest common factor on `axes` leaves within the budget.

    Every size is rounded down to its multiple, but not below one of it, query heads to whole query groups, and the
    hidden size to a multiple of the heads where Hugging Face's model of the family needs it. `fixed` sizes are what
    they are. Raises UserError naming the smallest figure in reach when none is within the budget.
    """
    free = [axis for axis in SHRINKABLE if axis in axes and axis not in fixed]
    factors = sorted({*_steps(source, free, multiples), Fraction(1)}, reverse=True)
    tried = [
        (factor, shape)
        for factor in factors
        if (shape := _at(source, factor, free=free, fixed=fixed, multiples=multiples)) is not None
    ]
    for factor, (arch, roundings) in tried:
        if not budget.exceeded(arch):
            return Fit(arch, _lines(budget, arch, factor=float(factor), roundings=roundings))
    raise UserError(_refusal(budget, [arch for _, (arch, _) in tried], free=free, multiples=multiples))


def _steps(source: ModelArch, free: Collection[str], multiples: Mapping[str, int]) -> Iterator[Fraction]:
    """Every factor at which a rounded size changes."""
    for axis in free:
        size, lot = getattr(source, axis), multiples[axis]
        yield from (Fraction(lot * number, size) for number in range(1, size // lot + 1))


Shape = tuple[ModelArch, list[Rounding]]


def _at(
    source: ModelArch,
    factor: Fraction,
    *,
    free: Collection[str],
    fixed: Mapping[str, int],
    multiples: Mapping[str, int],
) -> Shape | None:
    """The shape at one factor, None where fixed sizes and rounded ones do not go together."""
    sizes, roundings = dict(fixed), []

    def shrunk(axis: str, *, lot: int, most: int) -> int:
        """The size of an axis that nobody fixed: rounded down, and at most what holds it."""
        whole = getattr(source, axis)
        if axis not in free or factor == 1:
            return most
        size = min(max(int(factor * whole) // lot, 1) * lot, most)
        roundings.append(Rounding(axis, whole, float(factor * whole), size, lot))
        return size

    def size_of(axis: str, lot: int, most: int) -> int:
        if axis not in sizes:
            sizes[axis] = shrunk(axis, lot=lot, most=most)
        return sizes[axis]

    size_of("num_layers", multiples["num_layers"], source.num_layers)
    groups = size_of("num_query_groups", multiples["num_query_groups"], source.num_query_groups)
    heads = size_of("num_attention_heads", groups, source.heads_per_group * groups)
    if factor < 1 and (heads % groups or heads > source.heads_per_group * groups):
        return None  # fixed heads that these groups cannot share
    whole_heads = source.family in WHOLE_HEADS
    hidden = size_of("hidden_size", math.lcm(multiples["hidden_size"], heads if whole_heads else 1), source.hidden_size)
    if factor < 1 and whole_heads and "hidden_size" not in fixed and hidden % heads:
        return None  # no channels that these heads divide
    size_of("ffn_hidden_size", multiples["ffn_hidden_size"], source.ffn_hidden_size)
    return shrink(source, **sizes), roundings


def _lines(budget: Budget, arch: ModelArch, *, factor: float, roundings: list[Rounding]) -> list[str]:
    """How a budget was met, for people: what it costs of what it may, and how each size was rounded."""
    costs = []
    for name, most in budget.limits.items():
        figure = FIGURES[name]
        cost = figure.of(arch, budget.work)
        costs.append(f"{figure.title} {figure.show(cost)} of at most {figure.show(most)} ({cost / most:.1%})")
    return ["budget    " + "; ".join(costs), *(f"rounded   {rounding.describe(factor)}" for rounding in roundings)]


def _refusal(budget: Budget, shapes: list[ModelArch], *, free: list[str], multiples: Mapping[str, int]) -> str:
    """One line for a budget that no shape meets."""
    least = {name: min(FIGURES[name].of(arch, budget.work) for arch in shapes) for name in budget.limits}
    name = next((name for name, value in least.items() if value > budget.limits[name]), next(iter(least)))
    lots = ", ".join(f"{axis} (multiples of {multiples[axis]})" for axis in free) or "no axis"
    return (
        f"budget.{name}={budget.limits[name]:g}: cannot be met: shrinking {lots} reaches {least[name]:g} "
        f"({FIGURES[name].show(least[name])}) at the least; raise it, or let prune.target.budget.axes have more of "
        f"{', '.join(SHRINKABLE)}"
    )
